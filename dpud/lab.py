# SPDX-License-Identifier: GPL-2.0-only
"""Small emulated machines for experiments and tests, and shorthand for what a shell would do to them.

Everything is done in library mode, through the files. A `Lab` with `patience` has a device without threads, so that the
same calls always lead to the same state.
"""

import errno
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpud.dpu.driver import DpuConfig, DpuDriver
from dpud.dpu.faults import FaultKind, FaultPlan
from kernelsim import dpu_compact, fork
from kernelsim.alloc_configfs import AllocGroup
from kernelsim.attr import File, Operation, complete
from kernelsim.dpu_hw import U64, DpuResult
from kernelsim.kconfig import Kconfig
from kernelsim.machine import ALLOC_CONFIGFS as ALLOC_CONFIGFS
from kernelsim.machine import MM_CONFIGFS, NODES_SYSFS, Machine, MachineConfig, NodeConfig
from kernelsim.mm_configfs import MmGroup, Process

MIB = 1 << 20
VM = "/proc/sys/vm"
STATS = "/sys/kernel/debug/dpu_compact/stats"


class LateBatch:
    """A batch that is moved only when someone has asked for it `patience` times."""

    def __init__(self, execute: Callable[[], DpuResult], patience: int) -> None:
        self._execute = execute
        self._patience = patience
        self._result: DpuResult | OSError | None = None

    def done(self) -> bool:
        if self._result is None:
            self._patience -= 1
            if self._patience < 0:
                self._move()
        return self._result is not None

    def _move(self) -> None:
        try:
            self._result = self._execute()
        except OSError as no_device:
            self._result = no_device

    def wait(self, timeout_s: float) -> bool:
        return self.done()

    def result(self) -> DpuResult:
        assert self._result is not None
        if isinstance(self._result, OSError):
            raise self._result
        return self._result


class LateDevice(DpuDriver):
    """A device without threads: when it moves its batches depends on nothing but how often it is asked."""

    def __init__(self, config: DpuConfig, faults: FaultPlan, patience: int) -> None:
        super().__init__(config, faults)
        self._patience = patience

    def submit(self, base_addr: int, frag_addrs: U64, num_frags: int, skip_runs: U64 | None = None) -> Any:
        if not self.pool.nr_present:
            raise OSError(errno.ENODEV, "no DPU rank is present")
        profile = self.profile  # of when it was submitted

        def execute() -> DpuResult:
            now, self.profile = self.profile, profile
            try:
                return self.dpu_hw_compact_execute(base_addr, frag_addrs, num_frags, skip_runs)
            finally:
                self.profile = now

        return LateBatch(execute, self._patience)

    def submit_move(self, src_addrs: U64, dst_addrs: U64, num: int) -> Any:
        if not self.pool.nr_present:
            raise OSError(errno.ENODEV, "no DPU rank is present")
        return LateBatch(lambda: self.dpu_hw_move_execute(src_addrs, dst_addrs, num), self._patience)


class Lab:
    """A machine, driven through its files. `nodes` are sizes in MiB; `words` is "stamp" or "full"."""

    def __init__(
        self,
        nodes: Iterable[int] = (32,),
        words: str = "stamp",
        *,
        nr_ranks: int | None = 1,
        profile: str = "upmem-v1a",
        nr_cpus: int = 2,
        patience: int | None = None,
        kconfig: Mapping[str, str] | None = None,
        cma: int = 0,
    ) -> None:
        """`nr_ranks` None: no DPU at all. `patience`: a LateDevice, which has no threads. `cma`: MiB, per node."""
        self.faults = FaultPlan()
        sizes = tuple(NodeConfig(size * MIB, nr_cpus, cma * MIB) for size in nodes)
        config = MachineConfig(nodes=sizes, bytes=words, kconfig=Kconfig(kconfig or {}))
        self.hw: DpuDriver | None = None
        if nr_ranks is not None and patience is None:
            self.hw = DpuDriver(DpuConfig(nr_ranks=nr_ranks, profile=profile), self.faults)
        elif nr_ranks is not None and patience is not None:
            self.hw = LateDevice(DpuConfig(nr_ranks=nr_ranks, profile=profile), self.faults, patience)
        self.machine = Machine(config, self.hw)
        self.mem, self.vm, self.registry = self.machine.mem, self.machine.vm, self.machine.registry
        self._group = MmGroup(self.machine)

    # Files.

    def read(self, path: str) -> str:
        return self.registry.read(path).decode()

    def read_numbers(self, path: str, first: int = 0, nr: int = 1 << 20) -> NDArray[np.uint64]:
        """`nr` 64-bit numbers of a binary file from number `first` on, or as many as there are."""
        file = self.registry.nodes[path]
        assert isinstance(file, File)
        data = complete(file.attr.read_stream(file.kobj, 8 * first, 8 * nr, False))
        return np.frombuffer(data, dtype=np.uint64)

    def write(self, path: str, text: str) -> None:
        self.registry.write(path, text)

    def start(self, path: str, text: str) -> Operation[int]:
        """A write(2) as an operation, for the caller to drive."""
        file = self.registry.nodes[path]
        assert isinstance(file, File)
        return file.attr.write_text(file.kobj, text.encode(), file.flavour)

    def sysctl(self, **values: int) -> None:
        for name, value in values.items():
            self.write(f"{VM}/{name}", str(value))

    def stats(self) -> dict[str, int]:
        return {name: int(value) for name, value in (line.split() for line in self.read(STATS).splitlines())}

    def vmstat(self) -> dict[str, int]:
        lines = self.read("/proc/vmstat").splitlines()
        return {name: int(value) for name, value in (line.split() for line in lines)}

    # Processes.

    def spawn(self, name: str, **settings: str) -> Process:
        """mkdir, then one echo for each setting, in order."""
        process = complete(self.start_spawn(name))
        self.set(name, **settings)
        return process

    def start_spawn(self, name: str) -> Operation[Process]:
        """mkdir, as an operation."""
        process = yield from self._group.make_item(name)
        assert isinstance(process, Process)
        self.registry.add(f"{MM_CONFIGFS}/{name}", process)
        return process

    def set(self, name: str, **settings: str) -> None:
        for attr, text in settings.items():
            self.write(f"{MM_CONFIGFS}/{name}/{attr}", text)

    def start_set(self, name: str, attr: str, text: str) -> Operation[int]:
        return self.start(f"{MM_CONFIGFS}/{name}/{attr}", text)

    @property
    def names(self) -> list[str]:
        """The processes that have a directory."""
        return sorted(name for name in self.machine.processes if f"{MM_CONFIGFS}/{name}" in self.registry.nodes)

    def start_verify(self, name: str) -> Operation[bytes]:
        file = self.registry.nodes[f"{MM_CONFIGFS}/{name}/verify"]
        assert isinstance(file, File)
        return file.attr.read_text(file.kobj)

    def end(self, name: str) -> Operation[None]:
        """rmdir, as an operation; again, if it was interrupted."""
        process = self.machine.processes[name]
        if f"{MM_CONFIGFS}/{name}" in self.registry.nodes:
            self.registry.remove(f"{MM_CONFIGFS}/{name}", process)
        return self.machine.end_process(process)

    def verify(self, name: str) -> str:
        return self.read(f"{MM_CONFIGFS}/{name}/verify").strip()

    # Compaction.

    def start_compact(self, nid: int = 0) -> Operation[int]:
        return self.start(f"{NODES_SYSFS}/node{nid}/compact_dpu", "1")

    def compact(self, nid: int = 0) -> None:
        self.write(f"{NODES_SYSFS}/node{nid}/compact_dpu", "1")

    def arm(self, kind: FaultKind, move: int, times: int = 1, bit: int = 0) -> None:
        """The next `times` batches that come so far meet this fault at that move."""
        self.faults.arm(kind, move, times, bit)

    def revive(self) -> None:
        """Lost ranks come back."""
        for rank in self.hw.pool.ranks if self.hw else ():
            rank.revive()

    # Allocations.

    def allocator(self, name: str, **settings: str) -> str:
        """mkdir alloc/NAME, one echo for each setting -> the directory."""
        path = f"{ALLOC_CONFIGFS}/{name}"
        self.registry.add(path, AllocGroup(self.machine).make_item(name))
        for attr, text in settings.items():
            self.write(f"{path}/{attr}", text)
        return path

    def alloc(self, path: str, **settings: str) -> dict[str, int]:
        """echo 1 > alloc, whatever comes of it -> the result file."""
        for attr, text in settings.items():
            self.write(f"{path}/{attr}", text)
        try:
            self.write(f"{path}/alloc", "1")
        except OSError as none_to_be_had:
            if none_to_be_had.errno != errno.ENOMEM:
                raise
        return {name: int(value) for name, value in (line.split() for line in self.read(f"{path}/result").splitlines())}

    # What must always hold.

    def assert_sound(self) -> None:
        """No invariant is violated, and every process reads back what it wrote."""
        assert self.machine.check() == []
        assert {name: self.verify(name) for name in self.names} == dict.fromkeys(self.names, "ok")

    def assert_at_rest(self) -> None:
        """Nothing is left of any batch."""
        assert self.vm.in_flight == []
        assert int(self.mem.zones["held_pages"].sum()) == 0
        assert int(self.mem.nodes["nr_isolated_anon"].sum() + self.mem.nodes["nr_isolated_file"].sum()) == 0
        self.assert_sound()


def settle(operations: Iterable[Operation[object]], max_rounds: int = 50_000) -> list[object]:
    """Run operations to their ends in turns, as requests that take turns with the machine do -> their outcomes.

    An OSError is an outcome. One that never ends is a failure.
    """
    running = dict(enumerate(operations))
    outcomes: dict[int, object] = {}
    for _ in range(max_rounds):
        for key, operation in list(running.items()):
            over, outcome = advance(operation)
            if over:
                outcomes[key] = outcome
                del running[key]
        if not running:
            return [outcomes[key] for key in sorted(outcomes)]
    raise AssertionError(f"{len(running)} operations wait for ever")


def advance(operation: Operation[object]) -> tuple[bool, object]:
    """One slice: (True, value or OSError) if it ended."""
    try:
        waitable = next(operation)
    except StopIteration as stop:
        return True, stop.value
    except OSError as error:
        return True, error
    if waitable is not None:
        waitable.wait(0.01)
    return False, None


class SmallSlices:
    """Makes every long operation yield after few pages and every batch go by a rank's thread, until `undo()`."""

    def __init__(self, nr_pages: int) -> None:
        self._before: list[tuple[ModuleType, str, int]] = []
        for module in [module for name, module in sys.modules.items() if name.startswith("kernelsim.")]:
            for name, value in list(vars(module).items()):
                if _SLICE.fullmatch(name) and isinstance(value, int):
                    self.set(module, name, max(nr_pages // 8, 1) if module is fork else nr_pages)
        self.set(dpu_compact, "SYNCHRONOUS_FRAGMENTS", 0)

    def set(self, module: ModuleType, name: str, value: int) -> None:
        """Set one more constant until `undo()`."""
        self._before.append((module, name, getattr(module, name)))
        setattr(module, name, value)

    def undo(self) -> None:
        while self._before:
            module, name, value = self._before.pop()
            setattr(module, name, value)


_SLICE = re.compile(r"(\w+_)?SLICE_(PAGES|MOVES)")
"""Constants that say how long an operation works before it gives the machine away."""
