# SPDX-License-Identifier: GPL-2.0-only
"""`dpud stress`: clients that use GPU memory at random and check every byte they read.

Each thread is a client with buffers of every kind of memory; together they have `size` bytes, four times what the
device has unless told otherwise. What a page holds follows from buffer, page and version, so a reader knows what to
expect without keeping a copy. Contents are mixed: zeros, text, weights, numbers, noise.

One lock goes round in the order of asking, as in the daemon. A stall is the time from asking to the end of an
operation.
"""

import errno
import itertools
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from dpud.errors import UserError
from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.check import violations
from dpud.gpu.clock import RealClock
from dpud.gpu.errors import GpuError
from dpud.gpu.memory import HOST, GpuMemory
from dpud.gpu.system import GpuConfig, build
from dpud.owner import FairLock

MIB = 1 << 20
OVERSUBSCRIPTION = 4
STALL_LIMIT_S = 1.0
INTERRUPTED = 130
"""Exit code, as a shell has it for SIGINT."""
_PAGE_BYTES = (2048, 4096, 4096, 65536)
_KINDS = (RegionType.DEVICE, RegionType.DEVICE, RegionType.MANAGED, RegionType.HOST)
_STAMP_BYTES = 16
_NR_TEMPLATES = 16
_MAX_PAGES = 32
_REPORT_S = 5.0


@dataclass(frozen=True)
class Options:
    """The command line. Sizes in bytes."""

    threads: int = 4
    duration_s: float = 60.0
    size: int = 256 * MIB
    device: int | None = None
    compression: bool = True
    swap: bool = True
    seed: int | None = None


@dataclass
class Tally:
    """What happened so far; threads hold the lock when they write it."""

    ops: Counter[str] = field(default_factory=Counter)
    nr_bytes: int = 0
    nr_wrong: int = 0
    nr_refused: int = 0
    """Accesses that got ENOMEM: everything was full."""
    longest_s: float = 0.0
    longest_cpu_s: float = 0.0
    """The most that all threads computed while one waited: what a stall is judged by where others use this host."""
    first_problem: str = ""

    def problem(self, text: str) -> None:
        self.nr_wrong += 1
        self.first_problem = self.first_problem or text


def run(options: Options, say: Callable[[str], None] = lambda line: print(line, file=sys.stderr)) -> int:
    """Stress for the time given -> exit code: 1 if a byte was wrong, an operation stalled, or an invariant broke."""
    seed = random.randrange(1 << 32) if options.seed is None else options.seed
    memory = _memory(options)
    say(f"seed {seed}, {options.threads} threads, {options.size // MIB} MiB on {_describe(memory)}")
    stress = Stress(memory, options, seed)
    stress.run(say)
    return stress.verdict(say) or (INTERRUPTED if stress.is_interrupted else 0)


def _memory(options: Options) -> GpuMemory:
    nothing_behind = not options.compression and not options.swap
    share = options.size if nothing_behind else options.size // OVERSUBSCRIPTION
    device = options.device or max(8 * MIB, -(-share // (2 * MIB)) * 2 * MIB)
    if options.size < 16 * MIB or options.threads < 1:
        raise UserError("stress needs at least one thread and 16 MiB")
    if nothing_behind and options.size > device:
        raise UserError(f"with --no-compression --no-swap nothing leaves the device: --size up to {device // MIB}")
    host = max(16 * MIB, options.size)
    pool, tiers = _behind(options)
    return build(GpuConfig(1, device, host, pool, options.compression, tiers=tiers), RealClock())


def _behind(options: Options) -> tuple[int, dict[str, int]]:
    """Sizes of the pool and of the tiers. With both, the pool is small, so that the tiers have something to do."""
    if not options.swap:
        return (2 * options.size if options.compression else 0), {}
    pool = options.size // 32 if options.compression else 0
    return pool, {"memory": options.size // 4, "nvme": 2 * options.size}


def _describe(memory: GpuMemory) -> str:
    stores = [type(store).__name__ for store in (memory.store.pool, memory.store.swap) if store is not None]
    behind = " and ".join(stores) or "nothing"
    return f"a device of {memory.locations[0].frames.nr_bytes // MIB} MiB with {behind} behind it"


class Content:
    """What pages hold: a stamp, and behind it one of some templates of its buffer's kind."""

    def __init__(self, page_bytes: int, kind: int, rng: np.random.Generator) -> None:
        self.page_bytes = page_bytes
        self._templates = [_template(kind, page_bytes - _STAMP_BYTES, rng) for _ in range(_NR_TEMPLATES)]

    def page(self, number: int, page: int, version: int) -> bytes:
        if version == 0:
            return bytes(self.page_bytes)
        stamp = number.to_bytes(4, "little") + page.to_bytes(4, "little") + version.to_bytes(8, "little")
        return stamp + self._templates[(page * 7 + version * 3) % _NR_TEMPLATES]


def _template(kind: int, nr_bytes: int, rng: np.random.Generator) -> bytes:
    """Zeros, text, bfloat16 weights, small integers or noise."""
    nr = nr_bytes // 4 + 1
    words: bytes
    if kind == 0:
        words = bytes(nr_bytes)
    elif kind == 1:
        words = b" ".join(rng.choice([b"page", b"frame", b"device", b"memory"], nr).tolist())
    elif kind == 2:
        words = (rng.normal(0, 0.02, 2 * nr).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16).tobytes()
    elif kind == 3:
        words = np.minimum(rng.zipf(1.5, nr), 50_000).astype(np.int64).tobytes()
    else:
        words = rng.bytes(nr_bytes)
    assert len(words) >= nr_bytes
    return words[:nr_bytes]


@dataclass
class StressBuffer:
    """One allocation and the version of each of its pages."""

    number: int
    va: int
    kind: RegionType
    content: Content
    versions: list[int]

    def expected(self, first: int, end: int) -> bytes:
        return b"".join(self.content.page(self.number, page, self.versions[page]) for page in range(first, end))


class Worker:
    """One client."""

    def __init__(self, name: str, memory: GpuMemory, nr_bytes: int, seed: int, numbers: "itertools.count[int]") -> None:
        self.name, self.memory = name, memory
        self._random = random.Random(seed)
        rng = np.random.default_rng(seed)
        self._contents = {size: [Content(size, kind, rng) for kind in range(5)] for size in set(_PAGE_BYTES)}
        self._numbers = numbers
        self.buffers = [self._allocate(nr_bytes // 8) for _ in range(8)]

    def step(self, tally: Tally) -> None:
        """One random operation."""
        choice = self._random.random()
        buffer = self._random.choice(self.buffers)
        if choice < 0.5:
            self._read(buffer, tally)
        elif choice < 0.97:
            self._write(buffer, tally)
        elif choice < 0.995:
            self._press(tally)
        else:
            self._renew(buffer, tally)

    def fill(self, tally: Tally) -> None:
        """Write everything, once."""
        for buffer in self.buffers:
            for first in range(0, len(buffer.versions), _MAX_PAGES):
                self._write_pages(buffer, first, min(first + _MAX_PAGES, len(buffer.versions)), tally)

    def verify(self, tally: Tally) -> None:
        """Everything, once."""
        for buffer in self.buffers:
            for first in range(0, len(buffer.versions), _MAX_PAGES):
                self._check(buffer, first, min(first + _MAX_PAGES, len(buffer.versions)), tally)

    def _allocate(self, nr_bytes: int) -> StressBuffer:
        page_bytes, kind = self._random.choice(_PAGE_BYTES), self._random.choice(_KINDS)
        va = self.memory.allocate(self.name, nr_bytes, kind, page_size=page_bytes)
        content = self._random.choice(self._contents[page_bytes])
        return StressBuffer(next(self._numbers), va, kind, content, [0] * (nr_bytes // page_bytes))

    def _range(self, buffer: StressBuffer) -> tuple[int, int]:
        first = self._random.randrange(len(buffer.versions))
        most = min(_MAX_PAGES, max(1, MIB // 4 // buffer.content.page_bytes))
        return first, min(len(buffer.versions), first + self._random.randint(1, most))

    def _at(self, buffer: StressBuffer) -> int:
        return self._random.choice((0, 0, HOST)) if buffer.kind is RegionType.MANAGED else 0

    def _read(self, buffer: StressBuffer, tally: Tally) -> None:
        tally.ops["read"] += 1
        self._check(buffer, *self._range(buffer), tally)

    def _check(self, buffer: StressBuffer, first: int, end: int, tally: Tally) -> None:
        size = buffer.content.page_bytes
        try:
            found = self.memory.read(self.name, buffer.va + first * size, (end - first) * size, self._at(buffer))
        except GpuError as error:
            self._refused(error, tally)
            return
        tally.nr_bytes += len(found)
        if found != buffer.expected(first, end):
            tally.problem(f"{self.name}: buffer {buffer.number}, pages {first}..{end - 1} are not what was written")

    def _write(self, buffer: StressBuffer, tally: Tally) -> None:
        tally.ops["write"] += 1
        self._write_pages(buffer, *self._range(buffer), tally)

    def _write_pages(self, buffer: StressBuffer, first: int, end: int, tally: Tally) -> None:
        size, old = buffer.content.page_bytes, buffer.versions[first:end]
        buffer.versions[first:end] = [version + 1 for version in old]
        nr_done = (end - first) * size
        try:
            data = buffer.expected(first, end)
            self.memory.write(self.name, buffer.va + first * size, data, self._at(buffer))
        except GpuError as error:
            self._refused(error, tally)
            nr_done = error.nr_done
            buffer.versions[first + nr_done // size : end] = old[nr_done // size :]
        tally.nr_bytes += nr_done

    def _refused(self, error: GpuError, tally: Tally) -> None:
        tally.nr_refused += error.errno == errno.ENOMEM
        if error.errno != errno.ENOMEM:
            tally.problem(f"{self.name}: {error}")

    def _press(self, tally: Tally) -> None:
        tally.ops["pressure"] += 1
        self.memory.evict(self._random.randint(1, 32 << 10))

    def _renew(self, buffer: StressBuffer, tally: Tally) -> None:
        tally.ops["free and allocate"] += 1
        self.memory.free(buffer.va, self.name)
        nr_bytes = len(buffer.versions) * buffer.content.page_bytes
        self.buffers[self.buffers.index(buffer)] = self._allocate(nr_bytes)


class Stress:
    """Threads, and what they found."""

    def __init__(self, memory: GpuMemory, options: Options, seed: int) -> None:
        self.memory, self.options, self.tally = memory, options, Tally()
        self._lock = FairLock()
        self._ends_at = 0.0
        self.is_interrupted = False
        numbers = itertools.count(1)
        share = options.size // options.threads
        self.workers = [
            Worker(f"client{index}", memory, share, seed * 1000 + index, numbers) for index in range(options.threads)
        ]

    def run(self, say: Callable[[str], None]) -> None:
        """Fill all buffers, then until the time is over; the background eviction has a thread of its own."""
        for worker in self.workers:
            worker.fill(self.tally)
        say("all buffers are filled")
        self.tally.nr_bytes = 0
        begin = time.monotonic()
        self._ends_at = begin + self.options.duration_s
        jobs = [*(worker.step for worker in self.workers), self._background]
        threads = [threading.Thread(target=self._loop, args=(job,), daemon=True) for job in jobs]
        for thread in threads:
            thread.start()
        try:
            while (left_s := self._ends_at - time.monotonic()) > 0:
                time.sleep(min(_REPORT_S, left_s))
                say(self._progress(time.monotonic() - begin))
        except KeyboardInterrupt:  # what was done until then is worth a verdict
            self._ends_at, self.is_interrupted = 0.0, True
            say(f"interrupted after {time.monotonic() - begin:.0f} s")
        for thread in threads:
            thread.join()

    def _loop(self, job: Callable[[Tally], None]) -> None:
        while time.monotonic() < self._ends_at:
            asked, cpu = time.monotonic(), time.process_time()
            self._lock.acquire()
            try:
                job(self.tally)
            except Exception as error:  # a thread that died silently would look like success
                self.tally.problem(f"{type(error).__name__}: {error}")
                self._ends_at = 0.0
                raise
            finally:
                took_s = time.monotonic() - asked
                self.tally.longest_s = max(self.tally.longest_s, took_s)
                self.tally.longest_cpu_s = max(self.tally.longest_cpu_s, min(took_s, time.process_time() - cpu))
                self._lock.release()

    def _background(self, tally: Tally) -> None:
        tally.ops["background"] += self.memory.background(256 << 10) > 0

    def _progress(self, seconds: float) -> str:
        tally = self.tally
        rate = tally.nr_bytes / MIB / max(seconds, 0.001)
        return (
            f"{seconds:4.0f} s: {sum(tally.ops.values()):,} operations, {rate:.0f} MiB/s, longest"
            f" {1e3 * tally.longest_s:.0f} ms, {tally.nr_wrong} wrong, {tally.nr_refused} without room"
        )

    def verdict(self, say: Callable[[str], None]) -> int:
        """Read everything once more, check every invariant, and say how it went -> exit code."""
        for worker in self.workers:
            worker.verify(self.tally)
        broken = violations(self.memory)
        tally = self.tally
        say(", ".join(f"{name}: {nr:,}" for name, nr in sorted(tally.ops.items())))
        served = {name: nr for name, nr in self.memory.space.faults.served.items() if nr}
        say(
            "pages: "
            + ", ".join(f"{name} {nr:,}" for name, nr in (served | self.memory.residency.events).items() if nr)
        )
        for problem in [tally.first_problem, *broken[:5]]:
            if problem:
                say(problem)
        if tally.longest_s > STALL_LIMIT_S:
            say(f"an operation took {tally.longest_s:.2f} s; in one, {tally.longest_cpu_s:.2f} s were computed")
        failed = tally.nr_wrong or broken or tally.longest_cpu_s > STALL_LIMIT_S
        say("failed" if failed else "every byte was right")
        return 1 if failed else 0
