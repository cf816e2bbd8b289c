# SPDX-License-Identifier: GPL-2.0-only
"""What the data path asks of those that are passed in, and what it does with the answers."""

import errno
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest
from small import KIB, MIB, DictSwap, errno_of, small_memory

from dpud.gpu.address_space.regions import PageState
from dpud.gpu.check import violations
from dpud.gpu.errors import GpuError
from dpud.gpu.faults import PIN_NS, THROTTLE_NS
from dpud.gpu.memory import GpuMemory
from dpud.gpu.store import HostPool
from kernelsim.operation import Operation

RNG = np.random.default_rng(11)


@dataclass
class Promise:
    nr_bytes: int
    priority: int


@dataclass
class Gate:
    """An admission of so many bytes, which remembers what it was told."""

    left: int
    order: list[tuple[str, int]] = field(default_factory=list)
    used: list[tuple[str, int, int, int]] = field(default_factory=list)
    ratios: list[float] = field(default_factory=list)
    lets_write: bool = True
    forgotten: str = ""

    def connect(self, supply: object) -> None:
        self.supply = supply

    def pump(self) -> None:
        pass

    def forget(self, client: str) -> None:
        self.forgotten = client

    def has_room(self, client: str, nr_bytes: int, location: int = 0) -> bool:
        return self.lets_write

    def request(
        self, client: str, nr_bytes: int, priority: int, timeout_ns: int = 0, location: int = 0
    ) -> Operation[Promise]:
        yield None
        if nr_bytes > self.left:
            raise GpuError(errno.ETIMEDOUT if timeout_ns else errno.ENOMEM, "no")
        self.left -= nr_bytes
        return Promise(nr_bytes, priority)

    def release(self, grant: Promise) -> None:
        self.left += grant.nr_bytes

    def usage(
        self, client: str, nr_resident: int, nr_touched: int, now_ns: int, nr_stored: int = 0, active_ns: int = 0
    ) -> None:
        if nr_touched >= 0:
            self.used.append((client, nr_resident, nr_touched, nr_stored))

    def reclaim_order(
        self, need_bytes: int, for_priority: int, resident: Mapping[str, int]
    ) -> Sequence[tuple[str, int]]:
        return self.order

    def compressibility(self, ratio: float) -> None:
        self.ratios.append(ratio)

    def moved(self, client: str, source: int, target: int) -> None:
        pass


def resident(memory: GpuMemory, va: int) -> int:
    region = memory.space.regions.find(va)
    assert region is not None
    return region.count(PageState.RESIDENT)


def test_admission_is_asked_and_gets_its_grants_back() -> None:
    gate = Gate(100 * KIB)
    memory = small_memory(MIB, admission=gate)
    va = memory.allocate("a", 60 * KIB)
    assert gate.left == 40 * KIB
    assert errno_of(memory.allocate, "a", 60 * KIB) == errno.ENOMEM
    assert errno_of(memory.allocate, "a", 60 * KIB, timeout_ns=5) == errno.ETIMEDOUT
    assert errno_of(memory.allocate, "a", 4096, page_size=12345) == errno.EINVAL
    assert gate.left == 40 * KIB
    memory.free(va)
    memory.allocate("b", 10 * KIB)
    memory.remove_client("b")
    assert (gate.left, gate.forgotten) == (100 * KIB, "b")


def test_admission_may_refuse_the_first_write_of_a_page_and_no_other_access() -> None:
    gate = Gate(MIB)
    memory = small_memory(MIB, admission=gate)
    va = memory.allocate("a", 64 * KIB)
    memory.write("a", va, b"1" * 4096)
    gate.lets_write = False
    memory.write("a", va, b"2" * 4096)
    assert errno_of(memory.write, "a", va + 4096, b"3") == errno.ENOMEM
    assert memory.read("a", va, 8192) == b"2" * 4096 + bytes(4096)


def test_reclaim_takes_from_whom_admission_says() -> None:
    """Though ann's pages are the ones not used for longest."""
    gate = Gate(100 * MIB)
    memory = small_memory(MIB, admission=gate, pool=HostPool(16 * MIB))
    ann, bob = memory.allocate("ann", 512 * KIB), memory.allocate("bob", 512 * KIB)
    for va, client in ((ann, "ann"), (bob, "bob")):
        memory.write(client, va, RNG.bytes(512 * KIB))
    gate.order = [("bob", 256 * KIB), ("ann", MIB)]
    new = memory.allocate("ann", 512 * KIB)
    memory.write("ann", new, b"x" * 128 * KIB)
    assert (resident(memory, ann), resident(memory, bob)) == (128, 96)
    assert violations(memory) == []


def test_admission_hears_what_is_used_and_how_it_compresses() -> None:
    gate = Gate(100 * MIB)
    memory = small_memory(MIB, admission=gate, pool=HostPool(16 * MIB))
    va = memory.allocate("a", 64 * KIB)
    memory.write("a", va, b"12345678" * 4096)
    memory.sample()
    memory.read("a", va, 1)
    memory.sample()
    memory.evict(16 * KIB)
    memory.sample()
    used = [("a", 32 * KIB, 32 * KIB, 0), ("a", 32 * KIB, 4 * KIB, 0), ("a", 16 * KIB, 0, 16 * KIB)]
    assert gate.used == used
    assert gate.ratios == [4096 / 8]  # each page is one word


class Guard:
    """Says the same of every fault."""

    def __init__(self, verdict: str) -> None:
        self.verdict = verdict

    def fault(self, key: int, now_ns: int) -> str:
        return self.verdict


def test_who_thrashes_is_slowed_down() -> None:
    memory = small_memory(MIB, pool=HostPool(MIB), thrash_guard=Guard("throttle"))
    va = memory.allocate("a", 8 * KIB)
    memory.write("a", va, b"1" * 8 * KIB)
    memory.evict(8 * KIB)
    before = memory.clock.now_ns()
    memory.read("a", va, 8 * KIB)
    assert THROTTLE_NS <= memory.clock.now_ns() - before < 2 * THROTTLE_NS


def test_a_pinned_page_stays_for_a_while() -> None:
    memory = small_memory(MIB, pool=HostPool(4 * MIB), thrash_guard=Guard("pin"))
    va = memory.allocate("a", 2 * MIB)
    memory.write("a", va, b"1" * 8 * KIB)
    memory.evict(8 * KIB)
    memory.read("a", va, 8 * KIB)
    assert memory.evict(8 * KIB) == 0
    memory.clock.sleep_until(memory.clock.now_ns() + PIN_NS)
    assert memory.evict(8 * KIB) == 8 * KIB


@pytest.mark.slow
def test_pinned_pages_are_no_reason_to_fail() -> None:
    memory = small_memory(256 * KIB, pool=HostPool(4 * MIB), thrash_guard=Guard("pin"))
    va, data = memory.allocate("a", MIB), RNG.bytes(MIB)
    memory.write("a", va, data)
    for _ in range(3):
        assert memory.read("a", va, MIB) == data


class Stall:
    """Time between begin and end."""

    def __init__(self) -> None:
        self.total_ns = 0
        self.runs = False
        self._since: int | None = None

    def begin(self, now_ns: int) -> None:
        assert self._since is None
        self._since = now_ns

    def end(self, now_ns: int) -> None:
        assert self._since is not None
        self.total_ns += now_ns - self._since
        self._since = None

    def run(self, now_ns: int) -> None:
        assert not self.runs
        self.runs = True

    def rest(self, now_ns: int) -> None:
        assert self.runs
        self.runs = False


def test_waiting_for_memory_is_pressure_and_working_is_not() -> None:
    stalls = {"a": Stall(), "b": Stall()}
    memory = small_memory(MIB, pool=HostPool(4 * MIB), pressure=stalls.__getitem__)
    va = memory.allocate("a", 64 * KIB)
    memory.write("a", va, RNG.bytes(64 * KIB))
    memory.read("a", va, 64 * KIB)
    assert stalls["a"].total_ns == 0
    memory.evict(64 * KIB)
    before = memory.clock.now_ns()
    memory.read("a", va, 64 * KIB)
    assert 0 < stalls["a"].total_ns < memory.clock.now_ns() - before
    assert stalls["b"].total_ns == 0


def test_a_refused_fault_ends_its_stall() -> None:
    stall, swap = Stall(), DictSwap(MIB)
    memory = small_memory(MIB, swap=swap, pressure=lambda _client: stall)
    va = memory.allocate("a", 4096)
    memory.write("a", va, b"1")
    memory.evict(4096)
    swap.torn.update(swap.blobs)
    assert errno_of(memory.read, "a", va, 1) == errno.EIO
    stall.begin(0)


class Ahead:
    """Prefetches the next `nr` pages."""

    def __init__(self, nr: int) -> None:
        self.nr = nr

    def on_fault(self, first_key: int, nr_pages: int, page: int, resident: Callable[[int], bool]) -> Sequence[int]:
        assert resident(page)
        return range(page + 1, min(page + 1 + self.nr, nr_pages))


def test_prefetched_pages_come_along_without_evicting_anybody() -> None:
    memory = small_memory(MIB, pool=HostPool(4 * MIB), prefetcher=Ahead(7))
    va, data = memory.allocate("a", MIB), RNG.bytes(MIB)
    memory.write("a", va, data)
    memory.evict(MIB)
    memory.read("a", va, 1)
    assert (resident(memory, va), memory.space.faults.served["prefetched"]) == (8, 7)
    evicted = memory.residency.events["evicted"]
    assert memory.read("a", va, MIB) == data
    assert memory.residency.events["evicted"] == evicted
    assert memory.space.faults.served["prefetched"] > 7


class Broken(DictSwap):
    """A tier whose file is gone."""

    def read(self, key: int) -> object:  # type: ignore[override]
        raise GpuError(errno.EIO, "the file is gone")


def test_a_tier_that_is_gone_is_eio_and_the_page_is_not_given_up() -> None:
    swap = Broken(MIB)
    memory = small_memory(MIB, swap=swap)
    va = memory.allocate("a", 4096)
    memory.write("a", va, b"1" * 4096)
    memory.evict(4096)
    assert errno_of(memory.read, "a", va, 1) == errno.EIO
    assert memory.locations[0].frames.nr_free_bytes == MIB
    memory.store.swap = plain = DictSwap(MIB)
    plain.blobs = swap.blobs
    assert memory.read("a", va, 4096) == b"1" * 4096
    assert violations(memory) == []


@pytest.mark.slow
@pytest.mark.parametrize("nr_pages", [1, 40])
def test_a_full_pool_hands_its_coldest_on_to_swap(nr_pages: int) -> None:
    swap = DictSwap(16 * MIB)
    memory = small_memory(512 * KIB, pool=HostPool(nr_pages * 4096), swap=swap)
    va, data = memory.allocate("a", 2 * MIB), RNG.bytes(2 * MIB)
    memory.write("a", va, data)
    assert len(swap.blobs) * 4096 >= 2 * MIB - 512 * KIB - nr_pages * 4096
    assert memory.read("a", va, 2 * MIB) == data
    assert violations(memory) == []
