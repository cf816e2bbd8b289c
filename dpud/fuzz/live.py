# SPDX-License-Identifier: GPL-2.0-only
"""Gives inputs to a target, notes how they end, and makes what it finds short."""

import gc
import logging
import os
import signal
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from random import Random
from types import FrameType
from typing import TypeVar

from dpud.fuzz.target import Target, World, kind_of

LIMIT_NS = 1_000_000_000
"""CPU time that one input may take."""
GROWTH_BYTES = 96 << 20
"""How much larger a process may be after a batch than after its first inputs."""
CHECK_EVERY = 250
HANG = "more than a second"
_FIRST = 500  # inputs after which caches are full
_SHRINK_S = 30.0
_MAX_LINES = 40


T = TypeVar("T")


class Hang(BaseException):
    """One input takes too long. No Exception: whoever takes those for mistakes of a request must not take this."""


@dataclass
class Crash:
    """Something that must not be."""

    target: str
    seed: int
    """Of the batch."""
    number: int
    """Of the input in it."""
    kind: str
    text: str
    """A traceback, or what was seen."""
    inputs: list[bytes] = field(default_factory=list)
    """That lead there, on a new world with the seed `world`."""
    world: int = 0
    is_again: bool = True
    """Whether they did so when they were given once more."""


@dataclass
class Batch:
    """What became of a number of inputs."""

    target: str
    seed: int
    nr_inputs: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    longest_ns: int = 0
    cpu_ns: int = 0
    grown_bytes: int = 0
    peak_bytes: int = 0
    crash: Crash | None = None


class Logged(logging.Handler):
    """Remembers exceptions that were caught and logged: whoever asked was told something, but they are mistakes."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.problem: BaseException | None = None

    def emit(self, record: logging.LogRecord) -> None:
        if record.exc_info and record.exc_info[1] is not None and not isinstance(record.exc_info[1], OSError):
            self.problem = record.exc_info[1]

    def look(self) -> None:
        """Raises what was logged since."""
        problem, self.problem = self.problem, None
        if problem is not None:
            raise problem


class Life:
    """A target under way: worlds that follow one another, and what was given to the one there is."""

    def __init__(self, target: Target, seed: int) -> None:
        self.target = target
        self.batch = Batch(target.name, seed)
        self.logged = Logged()
        self.nr_steps = 0
        """Grows with whatever is done."""
        self._trail: list[bytes] = []
        self._nr_worlds = 0
        self._first_bytes = 0
        self.world = self._open()

    def _open(self) -> World:
        self.world_seed = self.batch.seed + self._nr_worlds
        self._nr_worlds += 1
        self.nr_steps += 1
        self._trail = []
        return self.target.open(self.world_seed)

    def _close(self) -> None:
        self.world.close()
        del self.world
        gc.collect()  # a machine hangs in cycles, and the collector does not see how large it is

    def _check(self) -> None:
        for _ in self.world.check():
            self.nr_steps += 1

    def give(self, data: bytes) -> Crash | None:
        """One input."""
        batch, target = self.batch, self.target
        if target.life:
            if len(self._trail) >= target.life:
                self._close()
                self.world = self._open()
            self._trail.append(data)
        self.nr_steps += 1
        begin_ns = time.process_time_ns()
        try:
            batch.outcomes[self.world.run(data)] += 1
            self.logged.look()
            taken_ns = time.process_time_ns() - begin_ns
            if taken_ns > LIMIT_NS:
                raise Hang(f"{taken_ns / 1e9:.1f} s of CPU time")
            if target.life and len(self._trail) % CHECK_EVERY == 0:
                self._check()
        except (Exception, Hang) as problem:
            return self._crashed(problem, data)
        batch.nr_inputs += 1
        batch.longest_ns = max(batch.longest_ns, taken_ns)
        if batch.nr_inputs == _FIRST:
            self._first_bytes = resident_bytes()
        return None

    def _crashed(self, problem: BaseException, data: bytes) -> Crash:
        text = "".join(traceback.format_exception(problem)).splitlines()
        inputs = self._trail or [data]
        batch = self.batch
        kind = HANG if isinstance(problem, Hang) else kind_of(problem)
        batch.crash = Crash(
            self.target.name, batch.seed, batch.nr_inputs, kind, "\n".join(text[-_MAX_LINES:]), inputs, self.world_seed
        )
        return batch.crash

    def end(self) -> Batch:
        """The last world is looked at, and closed."""
        batch = self.batch
        if batch.crash is not None:
            return batch  # what is left of it is no world
        try:
            self._check()
        except (Exception, Hang) as problem:
            self._crashed(problem, b"")
            return batch
        self._close()
        if self._first_bytes:
            batch.grown_bytes = max(0, resident_bytes() - self._first_bytes)
            if batch.grown_bytes > GROWTH_BYTES:
                grown = f"{batch.nr_inputs} inputs left {batch.grown_bytes >> 20} MiB behind"
                batch.crash = Crash(self.target.name, batch.seed, batch.nr_inputs, "memory grows", grown)
        return batch


def live(target: Target, seed: int, nr: int, told: Callable[[int, bytes], object]) -> Batch:
    """Give `nr` inputs that the target draws itself; `told` of each before."""
    chance = Random(seed)
    begin_ns = time.process_time_ns()
    life = Life(target, seed)
    logging.getLogger().addHandler(life.logged)
    with watched(lambda: life.nr_steps):
        for number in range(nr):
            data = life.world.draw(chance)
            told(number, data)
            if life.give(data) is not None:
                break
        batch = life.end()
    logging.getLogger().removeHandler(life.logged)
    batch.cpu_ns = time.process_time_ns() - begin_ns
    return batch


@contextmanager
def watched(number: Callable[[], int]) -> Iterator[None]:
    """Raises Hang in the block where `number` is the same after more than LIMIT_NS of CPU time."""
    seen = [-1]

    def look(_signum: int, _frame: FrameType | None) -> None:
        now = number()
        if now == seen[0]:
            raise Hang("more than a second of CPU time")
        seen[0] = now

    before = signal.signal(signal.SIGPROF, look)
    signal.setitimer(signal.ITIMER_PROF, LIMIT_NS / 1e9, LIMIT_NS / 1e9)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def resident_bytes() -> int:
    """Of this process (proc_pid_statm(5))."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# Again, and shorter.


def again(target: Target, world_seed: int, inputs: Sequence[bytes]) -> str | None:
    """The kind of crash that these inputs lead to on a new world; None if they do not."""
    nr, logged = 0, Logged()
    logging.getLogger().addHandler(logged)
    world = None
    try:
        with watched(lambda: nr):
            world = target.open(world_seed)
            for data in inputs:
                begin_ns = time.process_time_ns()
                world.run(data)
                logged.look()
                if time.process_time_ns() - begin_ns > LIMIT_NS:
                    return HANG
                nr += 1
            if target.life:
                for _ in world.check():
                    nr += 1
    except Hang:
        return HANG
    except Exception as problem:
        return kind_of(problem)
    finally:
        logging.getLogger().removeHandler(logged)
        if world is not None:
            world.close()
    return None


def shrink(target: Target, crash: Crash, seconds: float = _SHRINK_S) -> None:
    """Leave away inputs, then bytes, as long as the same happens."""
    deadline = time.monotonic() + seconds

    def same(inputs: Sequence[bytes]) -> bool:
        return time.monotonic() < deadline and again(target, crash.world, inputs) == crash.kind

    if not crash.inputs or not same(crash.inputs):
        crash.is_again = not crash.inputs
        return
    if crash.kind == HANG:
        return  # each try would take as long
    crash.inputs = reduced(crash.inputs, same)
    for at, data in enumerate(crash.inputs):
        crash.inputs[at] = bytes(reduced(list(data), partial(_same_with, crash.inputs, at, same)))


def _same_with(inputs: list[bytes], at: int, same: Callable[[list[bytes]], bool], data: list[int]) -> bool:
    """Another input in one place."""
    return same([*inputs[:at], bytes(data), *inputs[at + 1 :]])


def reduced(items: list[T], holds: Callable[[list[T]], bool]) -> list[T]:
    """Fewer of them for which it still holds. Source: Zeller, Hildebrandt, "Simplifying and isolating failure-inducing
    input", 2002: pieces are left out, smaller and smaller ones."""
    size = max(1, len(items) // 2)
    while items:
        at, shorter = 0, False
        while at < len(items):
            rest = items[:at] + items[at + size :]
            if holds(rest):
                items, shorter = rest, True
            else:
                at += size
        if size == 1 and not shorter:
            break
        size = max(1, size // 2)
    return items
