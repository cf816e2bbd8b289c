# SPDX-License-Identifier: GPL-2.0-only
"""Two memories with a connection between them, and migrations over it, all in one thread."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from small import KIB, MIB, DictSwap, small_memory

from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock
from dpud.gpu.memory import GpuMemory
from dpud.gpu.migration import MigrationModule
from dpud.gpu.migration.channel import Channel, ConnectionLost, Pipe
from dpud.gpu.migration.client_pages import Brake
from dpud.gpu.migration.engine import Migration
from dpud.gpu.migration.state import Progress
from dpud.gpu.store import HostPool
from kernelsim.operation import Operation


def together(*operations: Operation[Any], at_most: int = 200_000) -> None:
    """Run operations in turn until the first one has ended; the others as far as they come."""
    first, *others = operations
    for _ in range(at_most):
        for other in list(others):
            if next(other, StopIteration) is StopIteration:
                others.remove(other)
        if next(first, StopIteration) is StopIteration:
            break
    else:
        raise AssertionError("it does not end")
    for _ in range(20):
        for other in list(others):
            if next(other, StopIteration) is StopIteration:
                others.remove(other)


class Side:
    """A daemon, as far as migration goes."""

    def __init__(self, name: str, clock: ManualClock, *device_bytes: int, **collaborators: Any) -> None:
        collaborators = {"pool": HostPool(MIB), "swap": DictSwap(4 * MIB)} | collaborators
        self.memory = small_memory(*(device_bytes or (MIB,)), clock=clock, **collaborators)
        ids = iter(range(1, 1000))
        self.migration = MigrationModule(new_id=lambda: f"{name}{next(ids)}")
        self.migration.attach(self.memory)

    def bytes_of(self, client: str) -> list[bytes]:
        """All regions of a client, as its owner reads them."""
        return [self.memory.read(client, region.va, region.nr_bytes) for region in self.memory.clients[client].regions]

    def has(self, client: str) -> bool:
        """Whether it has memory that can be used."""
        there = self.memory.clients.get(client)
        return there is not None and bool(there.regions) and not any(region.held for region in there.regions)

    def check(self) -> None:
        assert violations(self.memory) == []


class World:
    """Source and destination. `meddle(frames from the source so far)` may cut or change what goes over."""

    def __init__(self, *, seed: int = 1, source_bytes: int = MIB, target_bytes: int = MIB) -> None:
        self.clock = ManualClock()
        self.a = Side("a", self.clock, source_bytes)
        self.b = Side("b", self.clock, target_bytes)
        self.rng = np.random.default_rng(seed)
        self.serving: list[Operation[None]] = []
        self.new_pipes: Callable[[], tuple[Channel, Channel]] = Pipe.pair
        self.is_down = False

    def connect(self) -> Operation[Channel]:
        if self.is_down:
            raise ConnectionLost("nobody listens")
        ours, theirs = self.new_pipes()
        self.serving.append(self.b.migration.receiver.serve(theirs))
        yield None
        return ours

    def start(self, client: str = "c") -> Migration:
        """From a to b."""
        module = self.a.migration
        id = module._new_id()
        source, target = module.remote(id, client, "b", self.connect)
        progress = Progress(id, client, "b")
        module.current = Migration(source, target, self.clock, module.settings, progress, module.out_journal)
        module.history.append(progress)
        return module.current

    def serve(self) -> Operation[None]:
        """Everybody who has connected."""
        while True:
            for operation in list(self.serving):
                if next(operation, StopIteration) is StopIteration:
                    self.serving.remove(operation)
            yield None

    def run(self, migration: Migration, meanwhile: Callable[[], object] = lambda: None) -> Progress:
        together(migration.run(), self.serve(), _again(meanwhile))
        return migration.progress

    def fill(self, client: str = "c", *sizes: int, page: int = 4 * KIB) -> list[bytes]:
        """Regions of noise and zeros."""
        for size in sizes or (300 * KIB,):
            va = self.a.memory.allocate(client, size, page_size=page)
            self.a.memory.write(client, va, self.rng.bytes(size * 3 // 4))
        return self.a.bytes_of(client)


def _again(step: Callable[[], object]) -> Iterator[None]:
    while True:
        step()
        yield None


def uniform_writer(
    memory: GpuMemory, client: str, pages_per_s: float, rng: np.random.Generator, brake: Brake | None = None
) -> Callable[[], None]:
    """Writes to random pages of a client's first region, as many as time has passed for and the brake allows."""
    region = memory.clients[client].regions[0]
    state = {"ns": memory.clock.now_ns(), "due": 0.0}
    if brake is not None:
        brake.sleeps = False

    def write() -> None:
        now = memory.clock.now_ns()
        rate = min(pages_per_s, (brake.pages_per_s if brake is not None else 0) or pages_per_s)
        state["due"] += (now - state["ns"]) * rate / 1e9
        state["ns"] = now
        nr = int(state["due"])
        state["due"] -= nr
        if not region.held:
            for page in rng.integers(0, region.nr_pages, nr).tolist():
                memory.write(client, region.va + page * region.page_bytes + 64, rng.bytes(8))

    return write
