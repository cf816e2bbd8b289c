# SPDX-License-Identifier: GPL-2.0-only
"""Anything that several clients can do on several devices, against plain byte arrays."""

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from small import KIB, DictSwap, attempt, small_memory

from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.permissions import Permission
from dpud.gpu.address_space.regions import PageState, RegionType
from dpud.gpu.check import violations
from dpud.gpu.defrag.module import DefragModule
from dpud.gpu.errors import GpuError
from dpud.gpu.memory import HOST, GpuMemory
from dpud.gpu.migration import MigrationModule
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.qos import QosModule
from dpud.gpu.qos.policy import POLICIES
from dpud.gpu.qos.replay import replay
from dpud.gpu.store import HostPool

CLIENTS = ("ann", "bob")
LOCATIONS = st.sampled_from([0, 1, HOST])
FRACTIONS = st.floats(0, 1, exclude_max=True)
RIGHTS = st.sampled_from([Permission(bits) for bits in range(8)])


@dataclass
class Model:
    """One region as it should be."""

    va: int
    owner: str
    page: int
    data: bytearray
    rights: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)

    def allowed(self, client: str, start: int, end: int, wanted: Permission) -> bool:
        rights = self.rights.get(client)
        return rights is not None and all(
            int(rights[page]) & wanted == wanted for page in range(start // self.page, -(-end // self.page))
        )


class Path(RuleBasedStateMachine):
    """The data path beside the models."""

    may_fail: tuple[int, ...] = ()
    """Errors that can come to any operation, where memory breaks."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = self.new_memory()
        MigrationModule().attach(self.memory)
        self.running: Iterator[object] | None = None
        self.qos = QosModule(self.memory.clock)
        self.qos.attach(self.memory)
        self.defrag = DefragModule(interval_s=0)
        self.defrag.attach(self.memory)
        self.models: list[Model] = []
        self.rng = np.random.default_rng(7)

    def new_memory(self) -> GpuMemory:
        return small_memory(
            512 * KIB, 256 * KIB, host_bytes=512 * KIB, pool=HostPool(192 * KIB), swap=DictSwap(512 * KIB)
        )

    @rule(
        owner=st.sampled_from(CLIENTS),
        size=st.integers(1, 300 * KIB),
        page=st.sampled_from([2048, 4096, 65536]),
        kind=st.sampled_from(list(RegionType)),
        rights=RIGHTS,
        device=st.sampled_from([0, 1]),
    )
    def allocate(self, owner: str, size: int, page: int, kind: RegionType, rights: Permission, device: int) -> None:
        try:
            va = self.memory.allocate(owner, size, kind, rights, page_size=page, device=device)
        except GpuError as error:
            self.expect((error.errno, kind) == (errno.ENOMEM, RegionType.PINNED) or error.errno in self.may_fail)
            return
        model = Model(va, owner, page, bytearray(size))
        model.rights[owner] = np.full(-(-size // page), rights.effective())
        self.models.append(model)

    @staticmethod
    def expect(holds: bool) -> None:
        assert holds

    def pick(self, which: float) -> Model:
        return self.models[int(which * len(self.models))]

    def span(self, model: Model, where: float, length: float) -> tuple[int, int]:
        start = int(where * len(model.data))
        return start, start + 1 + int(length * (len(model.data) - start))

    @precondition(lambda self: self.models)
    @rule(
        client=st.sampled_from(CLIENTS),
        which=FRACTIONS,
        where=FRACTIONS,
        length=FRACTIONS,
        at=LOCATIONS,
        same=st.booleans(),
    )
    def write(self, client: str, which: float, where: float, length: float, at: int, same: bool) -> None:
        model = self.pick(which)
        start, end = self.span(model, where, length)
        end = min(end, len(model.data))
        data = bytes([end & 255]) * (end - start) if same else self.rng.bytes(end - start)
        number, nr_done = 0, end - start
        try:
            self.memory.write(client, model.va + start, data, at)
        except GpuError as error:
            number, nr_done = error.errno or 0, error.nr_done
        self.judge(model, client, start, end, Permission.WRITE, number)
        if number != errno.EACCES:
            self.wrote(model, start, data[:nr_done])

    def wrote(self, model: Model, start: int, data: bytes) -> None:
        """All of this, and nothing behind it."""
        model.data[start : start + len(data)] = data

    @precondition(lambda self: self.models)
    @rule(client=st.sampled_from(CLIENTS), which=FRACTIONS, where=FRACTIONS, length=FRACTIONS, at=LOCATIONS)
    def read(self, client: str, which: float, where: float, length: float, at: int) -> None:
        model = self.pick(which)
        start, end = self.span(model, where, length)
        end = min(end, len(model.data))
        number = 0
        try:
            self.saw(model, start, self.memory.read(client, model.va + start, end - start, at))
        except GpuError as error:
            number = error.errno or 0
        self.judge(model, client, start, end, Permission.READ, number)

    def saw(self, model: Model, start: int, data: bytes) -> None:
        """Somebody read this."""
        assert data == model.data[start : start + len(data)]

    def judge(self, model: Model, client: str, start: int, end: int, wanted: Permission, number: int) -> None:
        if model.allowed(client, start, end, wanted):
            region = self.memory.space.regions.find(model.va)
            assert region is not None
            assert number == errno.EBUSY if region.held else number in (0, errno.ENOMEM, *self.may_fail)
        else:
            assert number == errno.EACCES
            assert self.memory.space.faults.records[-1].client == client

    @precondition(lambda self: self.models)
    @rule(
        of=st.sampled_from(CLIENTS),
        which=FRACTIONS,
        where=FRACTIONS,
        length=FRACTIONS,
        rights=RIGHTS,
        by=st.sampled_from(CLIENTS),
    )
    def protect(self, of: str, which: float, where: float, length: float, rights: Permission, by: str) -> None:
        model = self.pick(which)
        start, end = self.span(model, where, length)
        start = start // model.page * model.page
        number = attempt(self.memory.protect, by, model.va + start, end - start, rights, of=of)
        assert number == (0 if by == model.owner else errno.EACCES)
        if number:
            return
        granted = model.rights.setdefault(of, np.zeros(-(-len(model.data) // model.page), dtype=int))
        granted[start // model.page : -(-end // model.page)] = rights.effective()

    @precondition(lambda self: self.models)
    @rule(which=FRACTIONS, where=FRACTIONS, length=FRACTIONS, advice=st.sampled_from(list(Advice)), location=LOCATIONS)
    def advise(self, which: float, where: float, length: float, advice: Advice, location: int) -> None:
        model = self.pick(which)
        start, end = self.span(model, where, length)
        start = start // model.page * model.page
        region = self.memory.space.regions.find(model.va)
        assert region is not None
        where_to = location if advice.takes_location else None
        number = attempt(self.memory.advise, model.owner, model.va + start, end - start, advice, where_to)
        assert number == (0 if region.type is RegionType.MANAGED else errno.EINVAL)

    @precondition(lambda self: self.models)
    @rule(which=FRACTIONS, where=FRACTIONS, length=FRACTIONS, to=LOCATIONS)
    def prefetch(self, which: float, where: float, length: float, to: int) -> None:
        model = self.pick(which)
        start, end = self.span(model, where, length)
        start = start // model.page * model.page
        region = self.memory.space.regions.find(model.va)
        assert region is not None
        number = attempt(self.memory.prefetch, model.owner, model.va + start, end - start, to)
        good = (0, errno.ENOMEM, *self.may_fail)
        assert number in (good if region.type is RegionType.MANAGED else (errno.EINVAL,))

    @precondition(lambda self: self.models)
    @rule(which=FRACTIONS)
    def sync(self, which: float) -> None:
        model = self.pick(which)
        readable = model.allowed(model.owner, 0, len(model.data), Permission.READ)
        number = attempt(self.memory.sync, model.owner, model.va, len(model.data))
        region = self.memory.space.regions.find(model.va)
        if region is not None and region.held and readable:
            assert number == errno.EBUSY
            return
        assert number in ((0, errno.ENOSPC, *self.may_fail) if readable else (errno.EACCES, *self.may_fail))

    @rule(nr_bytes=st.integers(1, 600 * KIB), location=LOCATIONS)
    def evict(self, nr_bytes: int, location: int) -> None:
        free = self.memory.locations[location].frames.nr_free_bytes
        freed = self.memory.evict(nr_bytes, location)
        assert self.memory.locations[location].frames.nr_free_bytes - free == freed

    @rule(budget=st.integers(0, 600 * KIB))
    def background(self, budget: int) -> None:
        self.memory.background(budget)

    @rule(
        client=st.sampled_from(CLIENTS),
        device=st.sampled_from([0, 1]),
        strategy=st.sampled_from(list(Strategy)),
        steps=st.integers(1, 60),
    )
    def begin_migration(self, client: str, device: int, strategy: Strategy, steps: int) -> None:
        """To another device; it goes on for some steps of the next rules too."""
        module = self.memory.migration
        module.settings.strategy = strategy
        number = attempt(module.start, f"client={client} device={device}")
        known = self.memory.clients.get(client)
        if number == 0:
            self.running = module.current.run()
            self.migrate_on(steps)
        else:
            busy, same = module.is_busy, known is not None and known.device == device
            pinned = any(pin.region.client == client for pin in self.memory.residency.pins)
            wanted = errno.EBUSY if pinned else errno.EINVAL if same else errno.ENODATA
            wanted = errno.EBUSY if busy else errno.ENOENT if known is None else wanted
            assert number == wanted or (number == errno.ENODATA and not known.regions)

    @rule(steps=st.integers(1, 60))
    def migrate_on(self, steps: int) -> None:
        for _ in range(steps if self.running is not None else 0):
            assert self.running is not None
            if next(self.running, StopIteration) is StopIteration:
                self.running = None
                return

    @rule()
    def cancel_migration(self) -> None:
        module = self.memory.migration
        busy = module.is_busy
        assert attempt(module.cancel) in ((0, errno.EBUSY) if busy else (errno.ESRCH,))

    @precondition(lambda self: self.models)
    @rule(which=FRACTIONS)
    def free(self, which: float) -> None:
        model = self.pick(which)
        self.memory.free(model.va, model.owner)
        self.models.remove(model)
        assert attempt(self.memory.read, model.owner, model.va, 1) == errno.EFAULT

    @precondition(lambda self: self.models)
    @rule(which=FRACTIONS, where=FRACTIONS, location=st.sampled_from([0, 1, 2]))
    def translate(self, which: float, where: float, location: int) -> None:
        """One by one and in bulk, the same; and the software's cache gets something to be stale with."""
        model = self.pick(which)
        va = model.va + int(where * len(model.data))
        (bulk,) = self.memory.translate_bulk(np.array([va]), location).tolist()
        if attempt(self.memory.translate, va, location):
            assert bulk == -1
        else:
            assert self.memory.translate(va, location) == bulk

    @rule(order=st.integers(2, 7), threshold=st.sampled_from([0.0, 0.3]), pause_us=st.sampled_from([2, 100]))
    def defragment(self, order: int, threshold: float, pause_us: int) -> None:
        """Pages move within their memories; nobody notices, and free memory is no more scattered than before."""
        before = [place.frames.nr_free for place in self.memory.locations]
        usable = self.usable(order)
        self.defrag.order, self.defrag.effort.pause_limit_ns = order, pause_us * 1000
        self.defrag.run(threshold)
        if not self.may_fail:
            assert [place.frames.nr_free for place in self.memory.locations] == before
            assert all(now >= then for now, then in zip(self.usable(order), usable, strict=True))

    def usable(self, order: int) -> list[int]:
        """Free blocks of an order in each memory, whole ones in larger ones, too."""
        free = (place.frames.free_blocks() for place in self.memory.locations)
        return [sum(nr << (at - order) for at, nr in enumerate(blocks) if at >= order) for blocks in free]

    @precondition(lambda self: self.models)
    @rule(which=FRACTIONS, where=FRACTIONS, length=FRACTIONS, owner=st.sampled_from(["nic", "gdr"]))
    def pin(self, which: float, where: float, length: float, owner: str) -> None:
        model = self.pick(which)
        start, end = self.span(model, where, length)
        nr_bytes = min(end, start + 64 * KIB, len(model.data)) - start
        number = attempt(self.memory.pin, model.va + start, nr_bytes, owner, "test")
        assert number in (0, errno.ENOMEM, *self.may_fail)

    @rule()
    def unpin(self) -> None:
        for pin in list(self.memory.residency.pins):
            region = pin.region
            assert self.may_fail or (region.state[pin.pages.start : pin.pages.stop] == PageState.RESIDENT).all()
            self.memory.unpin(pin)

    @rule(
        client=st.sampled_from(CLIENTS),
        limit=st.sampled_from([0, 100 * KIB, 4 << 20]),
        reservation=st.sampled_from([0, 50 * KIB]),
        total=st.sampled_from([0, 300 * KIB]),
        policy=st.sampled_from(list(POLICIES)),
    )
    def promise(self, client: str, limit: int, reservation: int, total: int, policy: str) -> None:
        """Bandwidth: whatever is promised, bytes are the same, later."""
        self.qos.set_total(total)
        self.qos.set_client(client, limit=limit, reservation=reservation)
        self.qos.set_policy(policy)

    @invariant()
    def nothing_is_violated(self) -> None:
        assert violations(self.memory) == []

    def teardown(self) -> None:
        """Everything is given back, and what was decided is decided again."""
        self.migrate_on(100_000)
        assert self.running is None
        assert replay(self.qos.decisions.text()).difference == ""
        for model in self.models:
            self.memory.free(model.va, model.owner)
        assert violations(self.memory) == []
        for location in self.memory.locations:
            assert location.frames.nr_free == location.frames.nr_usable
        assert self.memory.store.pool is not None
        assert self.memory.store.pool.stored_bytes == 0


TestPath = Path.TestCase
TestPath.settings = settings(max_examples=examples(25), stateful_step_count=30, deadline=None)
