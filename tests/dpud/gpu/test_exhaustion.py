# SPDX-License-Identifier: GPL-2.0-only
"""docs/exhaustion.md, sentence by sentence. The number in a test's name is the sentence's."""

import errno
import re
from collections.abc import Generator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from small import KIB, MIB, DictSwap, attempt, errno_of, small_memory

from dpud.gpu.address_space.frames import FREE
from dpud.gpu.address_space.pagetable import FRAME_BYTES
from dpud.gpu.address_space.permissions import READ
from dpud.gpu.address_space.regions import PageState, RegionType
from dpud.gpu.clock import ManualClock
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.fault.rows import Cause
from dpud.gpu.memory import GpuMemory
from dpud.gpu.overcommit import Admission
from dpud.gpu.overcommit.predictor import WARM_UP_SAMPLES
from dpud.gpu.store import HostPool
from kernelsim.operation import complete

NS = 1_000_000_000
RNG = np.random.default_rng(2630)
PAGE = "exhaustion.md"
Request = Generator[Any, None, Any]


class Gpu:
    """A device of 2 MiB with stores behind it, and its admission."""

    def __init__(self, pool: int = 4 * MIB, swap: int = 0, policy: str = "history", ratio: int = 1000) -> None:
        self.clock = ManualClock()
        self.admission = Admission(2 * MIB, self.clock, policy=policy, ratio_percent=ratio)
        self.memory: GpuMemory = small_memory(
            2 * MIB,
            host_bytes=2 * MIB,
            clock=self.clock,
            admission=self.admission,
            pressure=self.admission.pressure,
            pool=HostPool(pool) if pool else None,
            swap=DictSwap(swap) if swap else None,
        )

    def give(self, client: str, nr_bytes: int, priority: int = 0, timeout_ns: int = 0) -> int:
        return self.memory.allocate(client, nr_bytes, priority=priority, timeout_ns=timeout_ns)

    def fill(self, client: str, va: int, nr_bytes: int) -> bytes:
        data = RNG.bytes(nr_bytes)
        self.memory.write(client, va, data)
        return data

    def have(self, client: str, nr_bytes: int, priority: int = 0) -> int:
        """A region that is full of bytes."""
        va = self.give(client, nr_bytes, priority)
        self.fill(client, va, nr_bytes)
        return va

    def as_many_as_there_are(self, client: str, nr_bytes: int, priority: int = 0) -> list[int]:
        """Regions, until a request fails."""
        regions = []
        while not attempt(lambda: regions.append(self.give(client, nr_bytes, priority))):
            pass
        return regions

    def largest(self, client: str, priority: int = 0) -> int:
        """The largest request that is granted, found by asking."""
        low, high = 0, 64 * MIB
        while high - low > 4096:
            middle = (low + high) // 2
            if attempt(self.ask_and_return, client, middle, priority):
                high = middle
            else:
                low = middle
        return low

    def ask_and_return(self, client: str, nr_bytes: int, priority: int) -> None:
        self.memory.free(self.give(client, nr_bytes, priority))

    def pass_samples(self, nr: int = WARM_UP_SAMPLES + 5) -> None:
        for _ in range(nr):
            self.clock.advance(NS)
            self.memory.accounting.tell()

    def holdable(self) -> int:
        """What free memory and the stores can take, by their own account."""
        store = self.memory.store
        pool = store.pool.limit_bytes - store.pool.used_bytes if store.pool is not None else 0
        swap = store.swap.nr_free_bytes if store.swap is not None else 0
        return self.memory.locations[0].frames.nr_free_bytes + pool + swap

    def resident(self, va: int) -> int:
        region = self.memory.space.regions.find(va)
        assert region is not None
        return region.count(PageState.RESIDENT) << region.page_shift

    def request(self, client: str, nr_bytes: int, priority: int, timeout_s: int) -> Request:
        """A request that waits."""
        operation = self.admission.request(client, nr_bytes, priority, timeout_s * NS)
        next(operation)
        return operation


def is_over(operation: Request) -> bool:
    """Whether a request that waited has been granted."""
    try:
        next(operation)
    except StopIteration:
        return True
    return False


def test_01_who_asks_too_much_fails_alone() -> None:
    gpu = Gpu()
    va = gpu.give("ann", MIB)
    data = gpu.fill("ann", va, MIB)
    before = gpu.admission.account("ann").nr_granted, gpu.resident(va)
    assert errno_of(gpu.give, "bob", 16 * MIB) == errno.ENOMEM
    assert (gpu.admission.account("ann").nr_granted, gpu.resident(va)) == before
    assert gpu.memory.read("ann", va, MIB) == data
    gpu.fill("ann", va, MIB)


@pytest.mark.slow
def test_02_enomem_at_once_or_etimedout_in_time() -> None:
    gpu = Gpu()
    gpu.have("ann", 5 * MIB)
    before = gpu.clock.now_ns()
    assert errno_of(gpu.give, "bob", 2 * MIB) == errno.ENOMEM
    assert gpu.clock.now_ns() == before
    assert errno_of(gpu.give, "bob", 2 * MIB, timeout_ns=7 * NS) == errno.ETIMEDOUT
    assert gpu.clock.now_ns() == before + 7 * NS


def test_03_what_can_never_be_does_not_wait() -> None:
    gpu = Gpu(ratio=150)
    gpu.admission.account("ann").limit_bytes = MIB
    before = gpu.clock.now_ns()
    assert errno_of(gpu.give, "ann", MIB + 1, timeout_ns=NS) == errno.ENOMEM
    assert errno_of(gpu.give, "bob", 3 * MIB + 1, timeout_ns=NS) == errno.ENOMEM
    assert gpu.clock.now_ns() == before
    gpu.give("ann", MIB)
    assert errno_of(gpu.give, "ann", 1, timeout_ns=NS) == errno.ENOMEM


@pytest.mark.slow
@pytest.mark.parametrize(("pool", "swap"), [(0, 0), (MIB, 0), (0, 3 * MIB), (2 * MIB, 3 * MIB)])
@pytest.mark.parametrize("policy", ["static", "n-sigma", "history"])
def test_04_no_grant_is_beyond_what_can_be_held(pool: int, swap: int, policy: str) -> None:
    gpu = Gpu(pool, swap, policy)
    assert 0 < gpu.largest("probe", 100) <= gpu.holdable()
    gpu.have("ann", MIB)
    gpu.give("bob", 512 * KIB)
    gpu.pass_samples()
    assert gpu.largest("probe", 100) <= gpu.holdable()
    gpu.have("cid", 512 * KIB, 100)
    assert gpu.largest("probe", 100) <= gpu.holdable()


def test_05_a_failure_leaves_nothing_behind() -> None:
    gpu = Gpu()
    gpu.give("ann", MIB)
    before = gpu.admission.nr_granted, len(gpu.memory.space.regions), gpu.largest("ann")
    errno_of(gpu.give, "bob", 16 * MIB)
    errno_of(gpu.give, "bob", 5 * MIB, timeout_ns=NS)
    assert (gpu.admission.nr_granted, len(gpu.memory.space.regions), gpu.largest("ann")) == before
    assert len(gpu.admission.line) == 0


def test_06_without_stores_the_device_is_all_there_is() -> None:
    gpu = Gpu(pool=0)
    assert errno_of(gpu.give, "ann", 2 * MIB + 1) == errno.ENOMEM
    va = gpu.have("ann", 2 * MIB)
    assert gpu.resident(va) == 2 * MIB
    assert errno_of(gpu.give, "bob", 1, 100) == errno.ENOMEM
    assert gpu.memory.locations[1].frames.nr_free_bytes == 2 * MIB


@pytest.mark.slow
def test_07_bytes_come_back_as_they_were() -> None:
    gpu = Gpu(2 * MIB, 2 * MIB)
    written = []
    for number in range(12):
        va = gpu.give("ann", 256 * KIB)
        written.append((va, gpu.fill("ann", va, 256 * KIB)))
        if number % 3 == 0:
            gpu.have("bob", 128 * KIB, 100)
    assert gpu.memory.residency.events["evicted"] > 0
    assert [gpu.memory.read("ann", va, 256 * KIB) for va, _ in written] == [data for _, data in written]


@pytest.mark.slow
def test_08_full_of_bytes_everything_can_still_be_used() -> None:
    """As much as is granted, all of it written: then every page is read and written again."""
    gpu = Gpu(2 * MIB)
    regions = gpu.as_many_as_there_are("ann", 256 * KIB)
    for va in regions:
        gpu.fill("ann", va, 256 * KIB)
    assert len(regions) * 256 * KIB > 2.5 * MIB
    while not attempt(gpu.have, "bob", 4 * KIB, 100):
        pass
    for va in regions:
        data = gpu.fill("ann", va, 256 * KIB)
        assert gpu.memory.read("ann", va, 256 * KIB) == data


@pytest.mark.slow
def test_09_a_reservation_is_kept() -> None:
    gpu = Gpu(2 * MIB)
    gpu.admission.reserve("ann", MIB)
    greedy = gpu.give("bob", gpu.largest("bob", 100), 100)
    region = gpu.memory.space.regions.find(greedy)
    assert region is not None
    gpu.fill("bob", greedy, region.nr_bytes)
    assert errno_of(gpu.give, "bob", 64 * KIB, 100) == errno.ENOMEM
    gpu.have("ann", MIB)

    late = Gpu(2 * MIB)
    va = late.give("bob", 3 * MIB, 0)
    late.pass_samples()
    late.admission.reserve("ann", MIB)  # bob was granted it, but is not expected to use it
    refused = [attempt(late.fill, "bob", va + start, 64 * KIB) for start in range(0, 3 * MIB, 64 * KIB)]
    assert set(refused) == {0, errno.ENOMEM}
    late.have("ann", MIB)


@pytest.mark.slow
def test_10_static_promises_are_kept_in_full() -> None:
    gpu = Gpu(2 * MIB, policy="static")
    mine = {(client, priority): gpu.give(client, 512 * KIB, priority) for client, priority in (("ann", 0), ("bob", 3))}
    others = [("cid", va) for va in gpu.as_many_as_there_are("cid", 192 * KIB, 100)]
    gpu.pass_samples()
    assert len(others) > 5
    for client, va in others:
        gpu.fill(client, va, 192 * KIB)
    for (client, _), va in mine.items():
        gpu.fill(client, va, 512 * KIB)


def test_11_isolation_holds() -> None:
    gpu = Gpu()
    secret = gpu.have("ann", 2 * MIB)
    assert errno_of(gpu.memory.read, "bob", secret, 1) == errno.EACCES
    gpu.memory.free(secret)
    va = gpu.give("bob", 2 * MIB)
    gpu.memory.write("bob", va, b"x")
    assert gpu.memory.read("bob", va, 2 * MIB) == b"x" + bytes(2 * MIB - 1)
    assert errno_of(gpu.memory.read, "ann", va, 1) == errno.EACCES
    gpu.memory.protect("bob", va, 2 * MIB, READ)
    assert errno_of(gpu.memory.write, "bob", va, b"y") == errno.EACCES


def test_12_lower_priorities_leave_first() -> None:
    gpu = Gpu()
    high = gpu.have("ann", MIB, 5)
    low = gpu.have("bob", MIB, 1)
    gpu.memory.accounting.tell()
    gpu.have("cid", 512 * KIB, 3)
    assert gpu.resident(high) == MIB
    assert gpu.resident(low) <= 512 * KIB
    gpu.have("dot", 256 * KIB, 1)  # the lowest priority makes room among its own
    assert gpu.resident(high) == MIB


def test_13_the_longest_idle_leave_first() -> None:
    gpu = Gpu()
    vas = {}
    for client in ("ann", "bob", "cid"):
        vas[client] = gpu.have(client, 512 * KIB)
        gpu.clock.advance(10 * NS)
    gpu.memory.read("ann", vas["ann"], 1)
    gpu.memory.accounting.tell()
    gpu.have("dot", 768 * KIB)
    left = {client: gpu.resident(va) // KIB for client, va in vas.items()}
    assert left["bob"] < left["cid"] == 512 == left["ann"]


def test_14_the_active_give_in_proportion() -> None:
    admission = Admission(2 * MIB, ManualClock())
    resident = {"ann": 300, "bob": 600, "cid": 100}
    for client, nr_bytes in resident.items():
        admission.usage(client, nr_bytes, 1, admission.clock.now_ns())
    assert sorted(admission.reclaim_order(100, 0, resident)) == [("ann", 30), ("bob", 60), ("cid", 10)]


def test_15_within_a_reservation_pages_stay() -> None:
    gpu = Gpu()
    gpu.admission.reserve("ann", 768 * KIB)
    kept = gpu.have("ann", 768 * KIB)
    other = gpu.have("bob", MIB)
    gpu.memory.accounting.tell()
    gpu.have("cid", 768 * KIB, 9)
    assert gpu.resident(kept) == 768 * KIB
    assert gpu.resident(other) < MIB


@pytest.mark.slow
def test_16_a_higher_priority_gets_what_is_promised_but_not_what_is_written() -> None:
    gpu = Gpu(2 * MIB)
    everything = gpu.largest("ann")
    va = gpu.give("ann", everything)
    data = gpu.fill("ann", va, MIB)
    assert errno_of(gpu.give, "bob", 64 * KIB, 0) == errno.ENOMEM
    granted = gpu.largest("bob", 1)
    assert everything - MIB - 64 * KIB <= granted <= everything - MIB
    gpu.have("bob", granted, 1)
    assert gpu.memory.read("ann", va, MIB) == data


@pytest.mark.slow
def test_17_a_wrong_prediction_hurts_the_lowest_priority_first() -> None:
    gpu = Gpu(2 * MIB)
    low = gpu.give("low", MIB, 0)
    gpu.pass_samples()
    gpu.have("mid", gpu.largest("mid") - 512 * KIB)  # low uses nothing, and is not expected to
    high = gpu.give("high", 256 * KIB, 5)
    refused = [attempt(gpu.fill, "low", low + at, 64 * KIB) for at in range(0, MIB, 64 * KIB)]
    assert refused[0] == 0
    assert refused[-1] == errno.ENOMEM
    gpu.fill("high", high, 256 * KIB)
    assert errno_of(gpu.fill, "low", low + MIB - 64 * KIB, 64 * KIB) == errno.ENOMEM


@pytest.mark.slow
def test_18_by_rank_then_by_turn() -> None:
    gpu = Gpu()
    va = gpu.have("ann", gpu.largest("ann"))
    first, second = gpu.request("bob", 3 * MIB, 0, 60), gpu.request("cid", 3 * MIB, 0, 60)
    higher = gpu.request("dot", 3 * MIB, 1, 60)
    gpu.memory.free(va)
    assert [is_over(each) for each in (first, second, higher)] == [False, False, True]
    gpu.admission.release(next(iter(gpu.admission.account("dot").grants)))
    assert [is_over(each) for each in (first, second)] == [True, False]


def test_19_nobody_passes() -> None:
    gpu = Gpu()
    gpu.have("ann", 3 * MIB)
    large = gpu.request("bob", 4 * MIB, 0, 60)
    assert errno_of(gpu.give, "cid", 64 * KIB) == errno.ENOMEM
    small = gpu.request("cid", 64 * KIB, 0, 60)
    assert not is_over(small)
    large.close()
    assert is_over(small)


@pytest.mark.slow
def test_20_nobody_starves() -> None:
    """Each second somebody with a priority of 100 asks for all there is, and gives it back after two."""
    gpu = Gpu()
    nr_bytes = gpu.largest("ann", 100)
    held = complete(gpu.admission.request("ann", nr_bytes, 100))
    patient = gpu.request("bob", nr_bytes, 0, 1000)
    crowd: list[Request] = []
    for second in range(300):
        gpu.clock.advance(NS)
        crowd.append(gpu.request(f"c{second}", nr_bytes, 100, 1000))
        gpu.admission.release(held)
        if is_over(patient):
            break
        held = next(iter(next(a for a in gpu.admission.accounts.values() if a.grants).grants))
        crowd = [each for each in crowd if not is_over(each)]
    assert second == 99  # after 100 s of waiting its rank is 100, and it came before those of that priority


@pytest.mark.slow
def test_21_freed_memory_is_for_who_waits() -> None:
    gpu = Gpu()
    va = gpu.have("ann", gpu.largest("ann"))
    waiting = gpu.request("bob", 4 * MIB, 0, 60)
    gpu.memory.free(va)
    assert errno_of(gpu.give, "cid", 4 * MIB) == errno.ENOMEM
    assert is_over(waiting)


@pytest.mark.slow
@pytest.mark.parametrize("how", ["interrupted", "removed", "interrupted after its turn came"])
def test_22_who_gives_up_is_gone(how: str) -> None:
    gpu = Gpu()
    gpu.memory.client("bob")
    va = gpu.have("ann", gpu.largest("ann"))
    gone, after = gpu.request("bob", 4 * MIB, 5, 60), gpu.request("cid", 4 * MIB, 0, 60)
    if how == "interrupted":
        gone.close()
    elif how == "removed":
        gpu.memory.remove_client("bob")
        assert errno_of(next, gone) == errno.ETIMEDOUT
    gpu.memory.free(va)
    gone.close()
    assert is_over(after)
    assert gpu.admission.nr_granted == 4 * MIB


@pytest.mark.slow
def test_23_waiting_is_pressure_of_who_waits() -> None:
    gpu = Gpu()
    va = gpu.have("ann", 3 * MIB)
    gpu.clock.advance(NS)

    def total_us(client: str) -> int:
        text = gpu.admission.pressure(client).text(gpu.clock.now_ns())
        return int(re.findall(r"some .* total=(\d+)", text)[0])

    before = total_us("ann")
    assert errno_of(gpu.give, "bob", 4 * MIB, timeout_ns=3 * NS) == errno.ETIMEDOUT
    assert total_us("bob") == 3_000_000
    assert total_us("ann") == before
    assert gpu.resident(va) < 3 * MIB
    gpu.memory.read("ann", va, 3 * MIB)
    assert total_us("ann") > before
    assert total_us("bob") == 3_000_000


class Breakable(Gpu):
    """With what can break it."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.fault = FaultModule(self.memory)

    def retire(self, nr_bytes: int) -> None:
        """So much of the device's free memory goes out of use, from the end of it."""
        device = self.memory.locations[0]
        for frame in np.flatnonzero(device.frames.owner == FREE)[-nr_bytes // FRAME_BYTES :].tolist():
            self.fault.placing.retire(device, frame, Cause.UNCORRECTABLE)


def test_24_what_is_broken_is_promised_to_nobody() -> None:
    gpu = Breakable(pool=0, ratio=100)
    va = gpu.give("ann", MIB)
    gpu.retire(256 * KIB)
    assert errno_of(gpu.give, "bob", MIB, timeout_ns=NS) == errno.ETIMEDOUT
    assert errno_of(gpu.give, "bob", 2 * MIB, timeout_ns=NS) == errno.ENOMEM  # as in 3
    gpu.have("bob", 768 * KIB)
    gpu.fill("ann", va, MIB)
    assert gpu.admission.physical_bytes == 2 * MIB - 256 * KIB


def test_25_first_writes_beyond_what_is_left_are_refused() -> None:
    gpu = Breakable(pool=0, policy="static")
    low, high = gpu.give("bob", MIB), gpu.give("ann", MIB, 1)
    data = gpu.fill("bob", low, 256 * KIB)
    gpu.retire(768 * KIB)
    assert errno_of(gpu.memory.write, "bob", low + 256 * KIB, data) == errno.ENOMEM
    gpu.fill("ann", high, MIB)
    assert gpu.memory.read("bob", low, 256 * KIB) == data
    gpu.fill("bob", low, 256 * KIB)


def two_devices() -> tuple[GpuMemory, Admission, FaultModule]:
    admission = Admission(4 * MIB, ManualClock(), ratio_percent=100)
    memory = small_memory(2 * MIB, 2 * MIB, clock=admission.clock, admission=admission)
    return memory, admission, FaultModule(memory)


def test_26_promises_go_where_their_clients_go() -> None:
    memory, admission, fault = two_devices()
    va = memory.allocate("ann", MIB)
    memory.client("bob", 1)
    rest = memory.allocate("bob", MIB)
    waiting = memory.allocation(
        "cid", 1536 * KIB, RegionType.DEVICE, READ, page_size=4096, priority=0, device=None, timeout_ns=60 * NS
    )
    next(waiting)
    fault.lose(memory.locations[0])
    assert [account.location for account in map(admission.account, ("ann", "bob", "cid"))] == [1, 1, 1]
    memory.write("ann", va, bytes(MIB))
    memory.free(va)
    memory.free(rest)
    with pytest.raises(StopIteration) as done:
        next(waiting)
    region = memory.space.regions.find(done.value.value)
    assert region is not None
    assert region.device == 1


def test_27_what_is_mended_goes_to_who_waits() -> None:
    memory, admission, fault = two_devices()
    fault.lose(memory.locations[0])
    memory.allocate("ann", MIB, device=1)
    waiting = admission.request("bob", 1536 * KIB, 0, 60 * NS, 0)
    next(waiting)
    fault.reset(memory.locations[0])
    assert is_over(waiting)
    assert admission.physical_bytes == 4 * MIB


def test_every_sentence_has_its_test() -> None:
    text = (Path(__file__).parents[3] / "docs" / PAGE).read_text()
    contract, _, questions = text.partition("## The questions")
    sentences = [int(number) for number in re.findall(r"^(\d+)\. ", contract, re.MULTILINE)]
    tests = sorted({int(name[5:7]) for name in globals() if re.match(r"test_\d\d_", name)})
    assert sentences == list(range(1, len(sentences) + 1)) == tests
    rows = re.findall(r"^\| [A-Z].*\? \| (.*) \|$", questions, re.MULTILINE)
    assert len(rows) == 5
    assert all(1 <= int(number) <= len(sentences) for row in rows for number in re.findall(r"\d+", row))
