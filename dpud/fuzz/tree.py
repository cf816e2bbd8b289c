# SPDX-License-Identifier: GPL-2.0-only
"""The files of a machine: every one that its registry has at the time, and names that it has not.

An input is one request, a line: verb, path, offset and bytes, apart by tabs, with what is no plain letter as in URLs. A
star behind the verb: not root asks, but nobody.
Requests go through the file system's own rules (fs/kernfs.py), as from FUSE, but for the mount. They follow one another
on a machine that goes on, with all that it has: a DPU, a GPU, processes, tracing. Whoever waits longer than others take
is interrupted, as by a signal.
"""

import errno
import os
import re
import time
import tomllib
from collections.abc import Callable, Generator, Iterator, Mapping
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from dpud.config import Config
from dpud.config_file import ConfigFile
from dpud.dpu.debugfs import add_fault_files
from dpud.dpu.sysfs import add_rank_files
from dpud.fuzz.mutate import Mutator, below
from dpud.fuzz.target import name_of
from dpud.gpu.check import violations
from dpud.gpu.memory import GpuMemory
from dpud.gpu.migration import MigrationModule
from dpud.gpu.swap.module import SwapModule
from dpud.gpu.system import GpuConfig, add_files, build
from dpud.lab import Lab
from fs.kernfs import Cred, Tree
from kernelsim.attr import Attr, Changes, ConfigGroup, Dir, File, Registry
from kernelsim.kinds import Bytes
from kernelsim.operation import Operation

_MIB = 1 << 20
_MAX_WAITS = 60
_TICK_NS = 50_000_000
_PATIENCE_NS = 300_000_000
"""What others can use the machine meanwhile may take long, and be interrupted."""
_MAX_READ = 1 << 17
_QUOTED = re.compile(r"`([^`]+)`")
_NAMES = (
    "a",
    "b",
    "c",
    "d",
    "a.b",
    "..",
    ".",
    "",
    "x" * 64,
    "x" * 300,
    "a b",
    "a\tb",
    "a\nb",
    "é",
    "-",
    "%41",
    "CON",
    "\udcff",
)
_WORDS = """
    a b c 0 1 2 4K 64K 300K 1M 3M 8M 50 100 max auto none gpu0 host node0 on off y n N -1 +1 own drop 0-3 1,2 ./j
    GFP_KERNEL GFP_ATOMIC|__GFP_NOWARN __GFP_MOVABLE kmem: kmem:mm_page_alloc compaction:* !dpu_* *compact* function
    function_graph nop global local mono lz4 zstd adaptive client=a device=0 unix:./s to=unix:./t tcp:127.0.0.1:1
    bit double stuck row bank device page gpu=0 bit=3 nr=2 seed=7 location=host va=0x0 address=0 rw- r-- --- rwx
    upmem-v1a upmem-v1b ptdma dsa seed cpu cpu-batched preferred local madvise always never
"""
_LINES = (
    "50 seed=7 runs",
    'order >= 4 && (nid == 1 || comm ~ "k*")',
    "file dpu_compact.c line 1-900 +p",
    "client=a to=unix:./t",
    "client=a device=1",
    "bit client=a bit=3",
    "<6>hello",
    "0x7fffffff\n",
)
WORDS = tuple(word.encode() for word in (*_WORDS.split(), *_LINES))
ROOT_USER, NOBODY = Cred(0, 0, pid=7, comm=lambda: "fuzz"), Cred(65534, 65534, pid=8)


def line_of(verb: str, path: bytes, offset: int, data: bytes) -> bytes:
    """An input."""
    return b"%s\t%s\t%d\t%s" % (
        verb.encode(),
        quote_from_bytes(path).encode(),
        offset,
        quote_from_bytes(data, safe="/ ").encode(),
    )


class Files:
    """Those that a machine has at the time, to be read and written: inputs are drawn for them, and carried out."""

    def __init__(self, registry: Registry, tree: Tree, gpu: GpuMemory) -> None:
        self._registry, self.tree, self.gpu = registry, tree, gpu
        self._mutator = Mutator([b"1\n"], WORDS, 1 << 13)
        self._texts: dict[Attr[Any], list[bytes]] = {}
        self._names_at = -1
        self._look_for_files()

    def tick(self, ns: int) -> None:
        """Time passes."""
        raise NotImplementedError

    # Inputs.

    def _look_for_files(self) -> None:
        """What there is now."""
        at = self._registry.changes.counts[Changes.NAMES]
        if at == self._names_at:
            return
        self._names_at = at
        nodes = list(self._registry.nodes.values())
        files = [node for node in nodes if isinstance(node, File)]
        self._written = [file for file in files if file.attr.writable]
        self._read = [file for file in files if file.attr.readable]
        groups = [
            node for node in nodes if isinstance(node, Dir) and any(isinstance(k, ConfigGroup) for k in node.kobjs)
        ]
        self._groups = [node.path for node in groups]
        self._items = [
            f"{node.path}/{name}" for node in groups for name, each in node.entries.items() if isinstance(each, Dir)
        ]

    def draw(self, chance: Random) -> bytes:
        self._look_for_files()
        roll = chance.random()
        if roll < 0.68:
            return self._draw_write(chance)
        if roll < 0.80:
            file = chance.choice(self._read)
            return line_of(
                "read", os.fsencode(file.path), below(chance, 3) * below(chance, 9000), b"%d" % below(chance, _MAX_READ)
            )
        if roll < 0.84:
            return line_of("truncate", os.fsencode(chance.choice(self._written).path), 0, b"")
        if roll < 0.90:
            return line_of(
                "mkdir",
                f"{chance.choice(self._groups)}/{chance.choice(_NAMES)}".encode("utf-8", "surrogateescape"),
                0,
                b"",
            )
        if roll < 0.92 and self._items:
            return line_of("rmdir", os.fsencode(chance.choice(self._items)), 0, b"")
        if roll < 0.96:
            return line_of("tick", b"", 10 ** below(chance, 11), b"")
        verb = chance.choice(
            ("write", "read", "mkdir", "rmdir", "chmod", "unlink", "readdir", "create", "make", "readlink")
        )
        path = self._mutator.mutated(
            chance.choice((*self._groups, chance.choice(self._read).path)).encode("utf-8", "surrogateescape"), chance
        )
        return line_of(verb, path, below(chance, 1 << 12), b"1")

    def _draw_write(self, chance: Random) -> bytes:
        file = chance.choice(self._written)
        roll = chance.random()
        known = self._texts.get(file.attr)
        if known is None:
            known = self._texts[file.attr] = [*_known_texts(file.attr), *_facts().get(file.attr.name, [])]
        data = chance.choice(known) if known and roll < 0.6 else self._mutator.word(chance)
        if roll < 0.04 and self.gpu.space.regions:
            region = chance.choice(list(self.gpu.space.regions))
            data = b"%#x %d %s why" % (
                region.va + below(chance, 3) * 4096,
                below(chance, 1 << 17),
                region.client.encode(),
            )
        if roll > 0.45:
            data = self._mutator.mutated(data, chance)
        furthest = 1 << 16 if isinstance(file.attr.kind, Bytes) else 5000 if roll > 0.97 else 1
        verb = "write*" if chance.random() < 0.02 else "write"
        return line_of(verb, os.fsencode(file.path), below(chance, furthest), data)

    # Carrying them out.

    def run(self, data: bytes) -> str:
        verb, path, number, rest = (*data.split(b"\t"), b"", b"", b"")[:4]
        offset = int(number) if number.isdigit() and len(number) < 19 else 0
        try:
            self._do(verb.decode("latin-1"), os.fsdecode(unquote_to_bytes(path)), offset, unquote_to_bytes(rest))
        except OSError as refusal:
            return name_of(refusal)
        return "ok"

    def _do(self, verb: str, path: str, offset: int, data: bytes) -> None:
        tree, cred = self.tree, ROOT_USER
        if verb.endswith("*"):
            verb, cred = verb[:-1], NOBODY
        if verb == "tick":
            self.tick(min(offset, 10**11))
        elif verb in ("read", "write", "truncate"):
            self._do_open(verb, path, offset, data, cred)
        elif verb == "chmod":
            tree.chmod(path, offset & 0o7777)
        elif verb in ("mkdir", "rmdir"):
            getattr(tree, verb)(path, cred)
        elif verb in ("unlink", "create", "make", "readdir", "readlink"):
            getattr(tree, verb)(path)

    def _do_open(self, verb: str, path: str, offset: int, data: bytes, cred: Cred = ROOT_USER) -> None:
        file = self.tree.open(path, os.O_RDONLY if verb == "read" else os.O_WRONLY, cred)
        try:
            if verb == "read":
                size = int(data) if data.isdigit() and len(data) < 9 else 4096
                file.read(min(size, _MAX_READ), offset, cred, nonblock=True)
            elif verb == "write":
                taken = file.write(data, offset, cred)
                assert 0 <= taken <= len(data), taken
            else:
                file.truncate(cred)
        finally:
            file.release()


class Machine(Files):
    """The World of a machine's files."""

    def __init__(self, seed: int) -> None:
        chance = Random(seed)
        pick = chance.choice
        nodes, words = pick(((32,), (32, 34))), pick(("stamp", "stamp", "full"))
        self.lab = Lab(nodes, words, nr_ranks=pick((1, 2)), patience=pick((0, 3)), cma=pick((0, 8)))
        self._running: list[Operation[Any]] = []
        machine, driver = self.lab.machine, self.lab.hw
        assert driver is not None
        machine.kthreads.spawn = lambda operation, _name: self._running.append(operation)
        add_rank_files(machine.registry, driver.pool)
        add_fault_files(machine.registry, driver, machine.printk)
        machine.registry.add("/proc", ConfigFile(Config()))
        self._add_gpu(chance)
        super().__init__(machine.registry, Tree(machine.registry, self._call, request=self._ask), self.gpu)

    def _add_gpu(self, chance: Random) -> None:
        Path("swap").mkdir(exist_ok=True)
        tiers = {"memory": 4 * _MIB, "nvme": 4 * _MIB} if chance.random() < 0.7 else {}
        config = GpuConfig(chance.choice((1, 2)), 8 * _MIB, 8 * _MIB, 2 * _MIB, tiers=tiers, swap_folder=Path("swap"))
        self.gpu = build(config)
        add_files(self.lab.registry, self.gpu)
        assert isinstance(self.gpu.migration, MigrationModule)
        self._running.append(self.gpu.migration.worker())

    # Requests.

    def _ask(self, perform: Callable[..., Any], *args: Any, interrupted: Callable[[], bool] = bool) -> Any:
        return self._call(perform, *args)

    def _call(self, fn: Callable[..., Any], /, *args: Any, interrupted: Callable[[], bool] = bool) -> Any:
        """Hold the machine; what takes long takes turns with what runs in the background."""
        result = fn(*args)
        return self._driven(result) if isinstance(result, Generator) else result

    def _driven(self, operation: Operation[Any]) -> Any:
        nr_waits = 0
        deadline_ns = time.process_time_ns() + _PATIENCE_NS
        while True:
            try:
                waitable = next(operation)
            except StopIteration as stop:
                return stop.value
            if waitable is not None:
                nr_waits += 1
                waitable.wait(0)
                self.others(4)
            if nr_waits > _MAX_WAITS or time.process_time_ns() > deadline_ns:
                operation.close()
                raise OSError(errno.EINTR, "a signal")

    def others(self, nr_slices: int) -> None:
        """Turns of what runs in the background."""
        for operation in list(self._running):
            for _ in range(nr_slices):
                try:
                    waitable = next(operation)
                except StopIteration:
                    self._running.remove(operation)
                    break
                if waitable is not None:
                    waitable.wait(0)
                    break

    def tick(self, ns: int) -> None:
        """Time passes."""
        machine = self.lab.machine
        for clock in (machine.clock, self.gpu.clock):
            assert hasattr(clock, "advance")
            clock.advance(ns)
        machine.step(machine.clock.now_ns())
        self.gpu.background(_MIB)
        self.others(16)

    # Looking.

    def check(self) -> Iterator[None]:
        """Every invariant; and every file can be read."""
        violated = [*self.lab.machine.check(), *violations(self.gpu)]
        assert not violated, violated[:3]
        self._look_for_files()
        for file in self._read:
            yield
            try:
                self._do_open("read", file.path, 0, b"100000")
            except OSError:
                continue

    def close(self) -> None:
        for operation in self._running:
            operation.close()
        if self.lab.hw is not None:
            self.lab.hw.close()
        swap = self.gpu.watcher
        if isinstance(swap, SwapModule):
            for tier in swap.space.tiers:
                tier.close()


@cache
def _facts() -> Mapping[str, list[bytes]]:
    """In a checkout, what tests/abi knows of files, by name: defaults, and the ends of ranges."""
    known: dict[str, list[bytes]] = {}
    for table in (Path(__file__).parents[2] / "tests" / "abi").glob("*.toml"):
        for path, facts in tomllib.loads(table.read_text()).items():
            low, high = facts.get("range", (0, 0))
            texts = [facts["default"]] if isinstance(facts.get("default"), str) else []
            texts += [str(value) for value in (low - 1, low, high, high + 1)] if "range" in facts else []
            known.setdefault(path.rpartition("/")[2], []).extend(text.encode() for text in texts)
    return known


def _known_texts(attr: Attr[Any]) -> list[bytes]:
    """What its declaration says of what it takes."""
    kind = attr.kind
    found = [*kind.legal(), *kind.legal(), *kind.illegal(), *_QUOTED.findall(attr.doc)]
    if attr.default is not None and isinstance(shown := kind.format(attr.default), str):
        found.append(shown)
    return [text.encode("utf-8", "surrogateescape") for text in found]
