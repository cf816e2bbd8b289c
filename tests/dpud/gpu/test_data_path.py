# SPDX-License-Identifier: GPL-2.0-only
"""What a client sees of the data path, case by case."""

import errno

import numpy as np
import pytest
from small import KIB, MIB, DictSwap, errno_of, small_memory

from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.pagetable import PHYS_BITS
from dpud.gpu.address_space.permissions import EXECUTE, READ, WRITE, Permission, parse_permissions
from dpud.gpu.address_space.regions import PageState, RegionType
from dpud.gpu.check import violations
from dpud.gpu.memory import HOST, GpuMemory
from dpud.gpu.store import HostPool

RNG = np.random.default_rng(3)
MANAGED, PINNED = RegionType.MANAGED, RegionType.PINNED


def states(memory: GpuMemory, va: int) -> list[str]:
    region = memory.space.regions.find(va)
    assert region is not None
    return [PageState(state).name for state in region.state]


def homes(memory: GpuMemory, va: int) -> list[str]:
    region = memory.space.regions.find(va)
    assert region is not None
    return [memory.locations[home].name for home in region.home]


# Bytes.


@pytest.mark.slow
@pytest.mark.parametrize("page", [2 * KIB, 4 * KIB, 64 * KIB, 2 * MIB])
def test_a_working_set_of_four_devices_comes_back(page: int) -> None:
    memory = small_memory(4 * MIB, host_bytes=2 * MIB, pool=HostPool(64 * MIB))
    data = RNG.bytes(4 * 4 * MIB)
    va = memory.allocate("a", len(data), page_size=page)
    memory.write("a", va, data)
    assert memory.read("a", va, len(data)) == data
    assert memory.residency.events["evicted"] >= 12 * MIB // page
    assert violations(memory) == []


def test_memory_never_written_is_zero_and_takes_none() -> None:
    memory = small_memory(MIB)
    va = memory.allocate("a", 100 * MIB)
    assert not any(memory.read("a", va + 50 * MIB, MIB))
    assert memory.locations[0].frames.nr_free_bytes == MIB
    memory.write("a", va + 4095, b"xy")
    assert memory.read("a", va + 4090, 10) == bytes(5) + b"xy" + bytes(3)
    assert memory.locations[0].frames.nr_free_bytes == MIB - 8 * KIB


@pytest.mark.slow
def test_a_new_page_does_not_show_an_old_client_s_bytes() -> None:
    memory = small_memory(256 * KIB)
    va = memory.allocate("a", 128 * KIB)
    memory.write("a", va, b"\xff" * 128 * KIB)
    memory.free(va)
    for page in (2048, 4096, 65536):
        va = memory.allocate("b", 192 * KIB, page_size=page)
        for at in range(0, 192 * KIB, page):
            memory.write("b", va + at + 7, b"1")
        assert memory.read("b", va, 192 * KIB).count(b"\xff") == 0
        memory.free(va)


@pytest.mark.slow
def test_a_large_page_gets_a_block_emptied_for_it() -> None:
    """4 KiB pages are all over the device; a 2 MiB page needs 2 MiB in one piece."""
    memory = small_memory(8 * MIB, pool=HostPool(64 * MIB))
    stays, goes = (memory.allocate("a", 4 * MIB) for _ in range(2))
    for at in range(0, 4 * MIB, 4 * KIB):  # page by page in turns
        memory.write("a", stays + at, at.to_bytes(8, "little"))
        memory.write("a", goes + at, b"x")
    memory.free(goes)
    large = memory.allocate("a", 2 * MIB, page_size=2 * MIB)
    memory.write("a", large, b"large")
    assert memory.residency.events["blocks_emptied"] == 1
    assert all(memory.read("a", stays + at, 8) == at.to_bytes(8, "little") for at in range(0, 4 * MIB, 4 * KIB))
    assert memory.read("a", large, 5) == b"large"
    assert violations(memory) == []


def test_a_full_device_without_anything_behind_it_says_enomem() -> None:
    memory = small_memory(MIB)
    va = memory.allocate("a", 2 * MIB)
    memory.write("a", va, b"\1" * MIB)
    assert errno_of(memory.write, "a", va + MIB, b"\2") == errno.ENOMEM
    assert memory.read("a", va, MIB) == b"\1" * MIB
    memory.free(va)
    va = memory.allocate("a", MIB)
    memory.write("a", va, b"\3" * MIB)


@pytest.mark.slow
def test_when_everything_is_full_nothing_is_lost() -> None:
    memory = small_memory(512 * KIB, pool=HostPool(256 * KIB), swap=DictSwap(256 * KIB))
    va, data = memory.allocate("a", 4 * MIB), RNG.bytes(MIB)
    errors = 0
    for at in range(0, 4 * MIB, 4 * KIB):
        errors += attempt_write(memory, va + at, data[:4096])
    written = 4 * MIB // 4096 - errors
    assert written * 4 >= 900  # of 1024 KiB there are
    assert violations(memory) == []


def attempt_write(memory: GpuMemory, va: int, data: bytes) -> bool:
    try:
        memory.write("a", va, data)
    except OSError as error:
        return error.errno == errno.ENOMEM
    return False


@pytest.mark.slow
def test_a_page_that_was_only_read_is_not_written_to_swap_again() -> None:
    swap = DictSwap(16 * MIB)
    memory = small_memory(MIB, swap=swap)
    va = memory.allocate("a", 2 * MIB)
    memory.write("a", va, RNG.bytes(2 * MIB))
    memory.evict(MIB)
    nr_writes = swap.nr_writes
    for _ in range(4):
        memory.read("a", va, 2 * MIB)
    assert swap.nr_writes == nr_writes
    memory.write("a", va, b"1")
    assert violations(memory) == []
    memory.read("a", va + MIB, MIB)
    memory.evict(MIB)
    assert swap.nr_writes == nr_writes + 1


def test_watermarks_bound_background_eviction() -> None:
    memory = small_memory(MIB, pool=HostPool(16 * MIB))
    va = memory.allocate("a", MIB)
    memory.write("a", va, RNG.bytes(MIB))
    assert memory.background(64 * KIB) == 64 * KIB
    assert memory.background(MIB) == 15 * MIB // 100 // 2048 * 2048 - 64 * KIB
    assert memory.background(MIB) == 0


def test_sync_makes_pages_clean_and_leaves_them() -> None:
    pool = HostPool(16 * MIB)
    memory = small_memory(MIB, pool=pool)
    va = memory.allocate("a", 64 * KIB)
    memory.write("a", va, b"\1" * 6000)
    assert memory.sync("a", va, 64 * KIB) == 2
    assert memory.sync("a", va, 64 * KIB) == 0
    assert states(memory, va)[:2] == ["RESIDENT", "RESIDENT"]
    memory.write("a", va, b"\2")
    assert memory.sync("a", va, 64 * KIB) == 1


# Refused accesses.


def test_the_fault_log_says_who_where_what_and_why() -> None:
    memory = small_memory(MIB)
    memory.client("bob")
    va = memory.allocate("ann", 64 * KIB, permissions=READ)
    memory.clock.sleep_until(123)
    assert errno_of(memory.write, "ann", va + 10, b"1") == errno.EACCES
    assert errno_of(memory.read, "bob", va + 5000, 1, HOST) == errno.EACCES
    assert errno_of(memory.read, "ann", va + 64 * KIB - 1, 2) == errno.EFAULT
    assert errno_of(memory.access, "ann", va, EXECUTE) == errno.EACCES
    memory.free(va, "ann")
    assert errno_of(memory.read, "ann", va, 1) == errno.EFAULT
    lines = list(map(str, memory.space.faults.records))
    assert [line.split(" why=")[0] for line in lines] == [
        f"time_ns=123 client=ann at=device0 va={va + 10:#x} access=w error=EACCES page=UNTOUCHED",
        f"time_ns=123 client=bob at=host va={va + 5000:#x} access=r error=EACCES page=UNTOUCHED",
        f"time_ns=123 client=ann at=device0 va={va + 64 * KIB:#x} access=r error=EFAULT page=none",
        f"time_ns=123 client=ann at=device0 va={va:#x} access=x error=EACCES page=UNTOUCHED",
        f"time_ns=123 client=ann at=device0 va={va:#x} access=r error=EFAULT page=none",
    ]
    assert "permissions are r--" in lines[0]
    assert memory.space.faults.refused == {"EACCES": 3, "EFAULT": 2}


def test_permissions_are_per_page_and_per_client() -> None:
    memory = small_memory(MIB)
    va = memory.allocate("ann", 16 * KIB)
    memory.protect("ann", va + 4 * KIB, 4 * KIB, READ)
    memory.protect("ann", va, 16 * KIB, READ | EXECUTE, of="bob")
    memory.write("ann", va, b"1" * 4096)
    assert errno_of(memory.write, "ann", va + 4095, b"12") == errno.EACCES
    assert memory.read("bob", va, 2) == b"11"
    assert errno_of(memory.write, "bob", va, b"2") == errno.EACCES
    assert errno_of(memory.protect, "bob", va, 4096, READ | WRITE) == errno.EACCES
    assert errno_of(memory.protect, "ann", va + 1, 4096, READ) == errno.EINVAL
    assert errno_of(memory.free, va, "bob") == errno.EACCES


def test_a_client_that_ends_leaves_nothing() -> None:
    memory = small_memory(MIB, pool=HostPool(MIB))
    va = memory.allocate("ann", 256 * KIB)
    other = memory.allocate("bob", 4096)
    memory.protect("bob", other, 4096, READ, of="ann")
    memory.write("ann", va, RNG.bytes(256 * KIB))
    memory.evict(128 * KIB)
    memory.remove_client("ann")
    assert memory.locations[0].frames.nr_free_bytes == MIB
    assert memory.store.pool is not None
    assert memory.store.pool.used_bytes == 0
    assert errno_of(memory.read, "ann", other, 1) == errno.EACCES


@pytest.mark.parametrize("text", ["rw", "r--", "rwx", "-w-", "---", "x"])
def test_permissions_are_letters(text: str) -> None:
    expected = Permission.NONE
    for letter, bit in (("r", READ), ("w", WRITE | READ), ("x", EXECUTE)):  # who may write may read
        expected |= bit if letter in text else 0
    assert parse_permissions(text) == expected


# Lost bytes.


def test_a_torn_slot_is_eio_until_the_page_is_written_anew() -> None:
    swap = DictSwap(MIB)
    memory = small_memory(MIB, swap=swap)
    va = memory.allocate("a", 12 * KIB)
    memory.write("a", va, b"\1" * 12 * KIB)
    memory.evict(12 * KIB)
    swap.torn.add(sorted(swap.blobs)[1])
    assert errno_of(memory.read, "a", va, 12 * KIB) == errno.EIO
    assert states(memory, va) == ["RESIDENT", "CORRUPT", "RESIDENT"]
    assert memory.read("a", va, 4096) == b"\1" * 4096
    assert memory.space.faults.records[-1].va == va + 4096
    assert errno_of(memory.write, "a", va + 5000, b"part") == errno.EIO
    memory.write("a", va + 4096, b"\2" * 4096)
    assert memory.read("a", va, 12 * KIB) == b"\1" * 4096 + b"\2" * 4096 + b"\1" * 4096
    assert memory.residency.events["corrupt"] == 1
    assert violations(memory) == []


def test_a_flipped_bit_in_the_pool_is_eio() -> None:
    pool = HostPool(MIB)
    memory = small_memory(MIB, pool=pool)
    va = memory.allocate("a", 4096)
    memory.write("a", va, RNG.bytes(4096))
    memory.evict(4096)
    ((key, blob),) = pool._blobs.items()
    wrong = bytearray(blob.data)
    wrong[100] ^= 4
    pool._blobs[key] = blob._replace(data=bytes(wrong))
    assert errno_of(memory.read, "a", va, 1) == errno.EIO


# Kinds of memory, and advice.


def test_pinned_memory_is_there_at_once_and_stays() -> None:
    memory = small_memory(MIB, host_bytes=MIB, pool=HostPool(16 * MIB))
    va = memory.allocate("a", 600 * KIB, PINNED)
    assert set(homes(memory, va)) == {"host"}
    assert errno_of(memory.allocate, "a", 600 * KIB, PINNED) == errno.ENOMEM
    assert memory.evict(MIB, HOST) == 0
    assert not any(memory.read("a", va, 600 * KIB))
    assert violations(memory) == []


def test_managed_memory_goes_where_it_is_used() -> None:
    memory = small_memory(MIB, MIB)
    va = memory.allocate("a", 8 * KIB, MANAGED)
    memory.write("a", va, b"12345", HOST)
    assert homes(memory, va)[0] == "host"
    assert memory.read("a", va, 5, 1) == b"12345"
    assert homes(memory, va)[0] == "device1"
    assert memory.locations[2].frames.nr_free_bytes == MIB
    assert memory.space.faults.served["migrated"] == 1


def test_a_preferred_location_is_reached_over_the_link() -> None:
    memory = small_memory(MIB, MIB)
    va = memory.allocate("a", 4096, MANAGED)
    memory.advise("a", va, 4096, Advice.SET_PREFERRED_LOCATION, 1)
    memory.write("a", va, b"1", 0)
    assert homes(memory, va) == ["device1"]
    assert memory.read("a", va, 1, HOST) == b"1"
    assert homes(memory, va) == ["device1"]
    assert memory.space.faults.served["mapped_remote"] == 1
    assert memory.translate(va, 0) >> PHYS_BITS == memory.translate(va, 2) >> PHYS_BITS == 1


def test_read_mostly_makes_copies_and_a_write_drops_them() -> None:
    memory = small_memory(MIB, MIB)
    va = memory.allocate("a", 4096, MANAGED)
    memory.write("a", va, b"1", HOST)
    memory.advise("a", va, 4096, Advice.SET_READ_MOSTLY)
    assert [memory.read("a", va, 1, at) for at in (0, 1, HOST)] == [b"1"] * 3
    assert homes(memory, va) == ["host"]
    assert len({memory.translate(va, at) >> PHYS_BITS for at in (0, 1, 2)}) == 3
    assert violations(memory) == []
    memory.write("a", va, b"2", 1)
    assert [memory.read("a", va, 1, at) for at in (1, 0, HOST)] == [b"2"] * 3
    assert memory.space.faults.served["collapsed"] == 2
    memory.advise("a", va, 4096, Advice.UNSET_READ_MOSTLY)
    assert sum(place.frames.nr_free_bytes for place in memory.locations) == 3 * MIB - 4096


def test_accessed_by_never_faults_and_never_moves_the_page() -> None:
    memory = small_memory(MIB, MIB)
    va = memory.allocate("a", 4096, MANAGED)
    memory.advise("a", va, 4096, Advice.SET_ACCESSED_BY, 1)
    memory.write("a", va, b"1", HOST)
    served = dict(memory.space.faults.served)
    assert memory.read("a", va, 1, 1) == b"1"
    assert (homes(memory, va), dict(memory.space.faults.served)) == (["host"], served)
    memory.read("a", va, 1, 0)  # migrates, and device1's mapping follows
    served = dict(memory.space.faults.served)
    assert memory.read("a", va, 1, 1) == b"1"
    assert (homes(memory, va), dict(memory.space.faults.served)) == (["device0"], served)


def test_prefetch_brings_pages_before_they_are_used() -> None:
    memory = small_memory(MIB, MIB, pool=HostPool(MIB))
    va = memory.allocate("a", 64 * KIB, MANAGED)
    memory.write("a", va, RNG.bytes(64 * KIB), HOST)
    memory.residency.evict(memory.locations[2], 4)
    assert memory.prefetch("a", va, 64 * KIB, 1) == 16
    assert set(homes(memory, va)) == {"device1"}
    assert errno_of(memory.advise, "a", memory.allocate("a", 4096), 4096, Advice.SET_READ_MOSTLY) == errno.EINVAL


# Other.


def test_a_window_is_like_a_bytearray() -> None:
    memory = small_memory(MIB)
    va = memory.allocate("a", 10_000)
    window = memory.access("a", va + 1000, READ | WRITE)
    assert len(window) == 9000
    window[:3] = b"abc"
    window[-1] = 7
    assert (window[1], window[0:4], window[8999]) == (ord("b"), b"abc\0", 7)
    assert window.tobytes() == memory.read("a", va + 1000, 9000)
    with pytest.raises(IndexError):
        window[9000]


@pytest.mark.parametrize(
    "arguments",
    [{"size": 0}, {"size": 1, "page_size": 8192}, {"size": 1, "device": 1}, {"size": 1, "page_size": 2 * MIB}],
)
def test_what_makes_no_sense_is_einval(arguments: dict[str, int]) -> None:
    assert errno_of(small_memory(MIB).allocate, "a", **arguments) == errno.EINVAL


@pytest.mark.slow
def test_the_same_calls_give_the_same_state_and_time() -> None:
    def run() -> tuple[int, object]:
        memory, rng = small_memory(MIB, pool=HostPool(16 * MIB)), np.random.default_rng(5)
        va = memory.allocate("a", 3 * MIB)
        for _ in range(300):
            at, size = int(rng.integers(3 * MIB - 9000)), int(rng.integers(1, 9000))
            memory.write("a", va + at, rng.bytes(size))
        return memory.clock.now_ns(), memory.translate_bulk(np.arange(va, va + 3 * MIB, 2048)).tolist()

    assert run() == run()
