# SPDX-License-Identifier: GPL-2.0-only
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from dpud.dpu.dpu_set import DPU_ALLOCATE_ALL, CallbackFlags, DpuSet, LaunchPolicy
from dpud.dpu.dpu_xfer import SgXferFlags, XferDirection, XferFlags
from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.faults import FaultKind, FaultPlan
from dpud.dpu.move import I64
from dpud.dpu.profile import load_profile, rank_chip
from dpud.dpu.program import DPU_COMPACT, DPU_MRAM_HEAP_POINTER_NAME
from dpud.dpu.rank import Rank, RankOptions, RankPool, RankState, Space, Symbol

SYNC, ASYNC = LaunchPolicy.DPU_SYNCHRONOUS, LaunchPolicy.DPU_ASYNCHRONOUS
TO_DPU, FROM_DPU = XferDirection.DPU_XFER_TO_DPU, XferDirection.DPU_XFER_FROM_DPU
HEAP = DPU_MRAM_HEAP_POINTER_NAME


def program(main: Callable[[Rank, I64], FaultKind | None], **changed: object) -> SimpleNamespace:
    """A DPU program with one variable in each memory."""
    symbols = {"arg": Symbol(Space.WRAM, 0, 64), "heap": Symbol(Space.MRAM, 0, 4096)}
    fields = {"name": "toy", "symbols": symbols, "nr_tasklets": 1, "iram_bytes": 24, "main": main}
    return SimpleNamespace(**(fields | changed))


IDLE = program(lambda rank, dpus: None)


@pytest.fixture
def pool() -> Iterator[RankPool]:
    """Two ranks; DPU 1 of each is disabled."""
    chip = rank_chip(load_profile("upmem-v1a"))
    pool = RankPool([Rank(i, chip, FaultPlan(), nr_dpus=8, disabled_mask=0b10) for i in range(2)])
    yield pool
    pool.close()


def fails(code: DpuErr, function: Callable[..., object], *args: object) -> None:
    with pytest.raises(DpuError) as caught:
        function(*args)
    assert caught.value.code is code


def test_alloc_takes_whole_ranks(pool: RankPool) -> None:
    dpus = DpuSet.alloc(pool, 3)
    assert len(dpus) == 3
    assert [rank.is_owned for rank in pool.ranks] == [True, False]
    fails(DpuErr.ALLOCATION, DpuSet.alloc, pool, 8)
    assert not pool.ranks[1].is_owned
    dpus.free()
    everything = DpuSet.alloc(pool, DPU_ALLOCATE_ALL)
    assert len(everything) == 14
    fails(DpuErr.ALLOCATION, DpuSet.alloc_ranks, pool, 1)
    everything.free()
    assert [rank.usage_count for rank in pool.ranks] == [0, 0]


def test_views(pool: RankPool) -> None:
    dpus = DpuSet.alloc(pool, 9)
    assert [len(rank) for rank in dpus.ranks()] == [7, 2]
    assert sum(1 for _ in dpus.dpus()) == 9
    fails(DpuErr.INVALID_DPU_SET, next(dpus.dpus()).free)


def test_a_freed_set_is_invalid(pool: RankPool) -> None:
    dpus = DpuSet.alloc_ranks(pool, 1)
    view = next(dpus.dpus())
    dpus.free()
    for call in (
        dpus.free,
        dpus.sync,
        dpus.status,
        lambda: dpus.load(IDLE),
        lambda: view.copy_from("arg", 0, 8),
    ):
        fails(DpuErr.INVALID_DPU_SET, call)
    assert not pool.ranks[0].is_owned


def test_bytes_travel(pool: RankPool) -> None:
    dpus = DpuSet.alloc(pool, 9)
    dpus.load(IDLE)
    dpus.copy_to("heap", 8, b"for all!")
    assert {dpu.copy_from("heap", 8, 8) for dpu in dpus.dpus()} == {b"for all!"}
    rows = np.arange(18, dtype=np.uint64).reshape(9, 2)
    dpus.push_xfer(TO_DPU, "arg", 16, rows)
    back = np.zeros_like(rows)
    dpus.push_xfer(FROM_DPU, "arg", 16, back)
    assert (back == rows).all()
    assert [int.from_bytes(dpu.copy_from("arg", 16, 8), "little") for dpu in dpus.dpus()] == rows[:, 0].tolist()
    dpus.load(IDLE)
    assert next(dpus.dpus()).copy_from("arg", 16, 16) == bytes(16)


@pytest.mark.parametrize(
    ("code", "symbol", "offset", "nr_bytes"),
    [
        (DpuErr.UNKNOWN_SYMBOL, "nothing", 0, 8),
        (DpuErr.INVALID_SYMBOL_ACCESS, "arg", 60, 8),
        (DpuErr.INVALID_SYMBOL_ACCESS, "arg", -4, 8),
        (DpuErr.INVALID_SYMBOL_ACCESS, "heap", 4096, 8),
        (DpuErr.INVALID_WRAM_ACCESS, "arg", 2, 4),
        (DpuErr.INVALID_WRAM_ACCESS, "arg", 0, 6),
        (DpuErr.INVALID_MRAM_ACCESS, "heap", 4, 8),
        (DpuErr.INVALID_MRAM_ACCESS, "heap", 0, 12),
    ],
)
def test_illegal_access(pool: RankPool, code: DpuErr, symbol: str, offset: int, nr_bytes: int) -> None:
    dpus = DpuSet.alloc(pool, 1)
    dpus.load(IDLE)
    fails(code, dpus.copy_to, symbol, offset, bytes(nr_bytes))
    fails(code, dpus.copy_from, symbol, offset, nr_bytes)


def test_transfers_of_the_wrong_shape(pool: RankPool) -> None:
    dpus = DpuSet.alloc(pool, 2)
    dpus.load(IDLE)
    fails(DpuErr.INVALID_MEMORY_TRANSFER, dpus.push_xfer, TO_DPU, "arg", 0, np.zeros((3, 8), np.uint8))
    fails(DpuErr.INVALID_DPU_SET, dpus.copy_from, "arg", 0, 8)
    fails(DpuErr.INVALID_DPU_SET, dpus.log_read)


def test_programs(pool: RankPool) -> None:
    dpus = DpuSet.alloc_ranks(pool, 2)
    fails(DpuErr.NO_PROGRAM_LOADED, dpus.copy_to, "arg", 0, bytes(8))
    fails(DpuErr.NO_PROGRAM_LOADED, dpus.launch, SYNC)
    fails(DpuErr.TOO_MANY_TASKLETS, dpus.load, program(IDLE.main, nr_tasklets=25))
    fails(DpuErr.INVALID_IRAM_ACCESS, dpus.load, program(IDLE.main, iram_bytes=24577))
    too_big = {"x": Symbol(Space.WRAM, 65536, 8)}
    fails(DpuErr.INVALID_WRAM_ACCESS, dpus.load, program(IDLE.main, symbols=too_big))
    dpus.load(IDLE)
    next(dpus.ranks()).load(DPU_COMPACT)
    fails(DpuErr.DIFFERENT_DPU_PROGRAMS, dpus.copy_to, "arg", 0, bytes(8))


def test_the_heap_ends_with_the_mram(pool: RankPool) -> None:
    dpus = DpuSet.alloc(pool, 1)
    dpus.load(DPU_COMPACT)
    size = (64 << 20) - (1 << 20)
    dpus.copy_to(HEAP, size - 8, b"the last")
    assert dpus.copy_from(HEAP, size - 8, 8) == b"the last"
    fails(DpuErr.INVALID_SYMBOL_ACCESS, dpus.copy_to, HEAP, size, bytes(8))


def test_launch_policy(pool: RankPool) -> None:
    dpus = DpuSet.alloc(pool, 1)
    dpus.load(IDLE)
    fails(DpuErr.INVALID_LAUNCH_POLICY, dpus.launch, 7)


def test_a_synchronous_launch_runs_on_the_caller(pool: RankPool) -> None:
    seen: list[tuple[int, list[int], str]] = []

    def main(rank: Rank, dpus: I64) -> None:
        seen.append((rank.rank_id, dpus.tolist(), threading.current_thread().name))

    dpus = DpuSet.alloc(pool, 9)
    dpus.load(program(main))
    dpus.launch(SYNC)
    here = threading.current_thread().name
    assert seen == [(0, [0, 2, 3, 4, 5, 6, 7], here), (1, [0, 2], here)]
    assert dpus.status() == (True, False)


def test_while_running_the_host_has_no_mram(pool: RankPool) -> None:
    started, go_on = threading.Event(), threading.Event()

    def main(rank: Rank, dpus: I64) -> None:
        started.set()
        assert go_on.wait(10)

    dpus = DpuSet.alloc(pool, 1)
    dpus.load(program(main))
    dpus.launch(ASYNC)
    assert started.wait(10)
    assert dpus.status() == (False, False)
    fails(DpuErr.MRAM_BUSY, dpus.copy_to, "heap", 0, bytes(8))
    fails(DpuErr.MRAM_BUSY, dpus.copy_from, "heap", 0, 8)
    fails(DpuErr.DPU_ALREADY_RUNNING, dpus.launch, SYNC)
    dpus.copy_to("arg", 0, bytes(8))  # WRAM has a port of its own
    go_on.set()
    dpus.sync()
    assert dpus.status() == (True, False)
    dpus.copy_to("heap", 0, bytes(8))


@pytest.mark.parametrize(
    ("fault", "code", "text"),
    [
        (FaultKind.DPU_FAULT, DpuErr.DPU_FAULT, "dpu is in fault"),
        (FaultKind.TIMEOUT, DpuErr.TIMEOUT, "result timeout"),
        (FaultKind.RANK_LOST, DpuErr.DRIVER, "driver error"),
    ],
)
def test_a_fault_surfaces_at_launch_or_at_sync(pool: RankPool, fault: FaultKind, code: DpuErr, text: str) -> None:
    for rank in pool.ranks:
        dpus = DpuSet.alloc_ranks(pool, 1)
        dpus.load(program(lambda rank, dpus: fault))
        if rank.rank_id == 0:
            fails(code, dpus.launch, SYNC)
        else:
            dpus.launch(ASYNC)
            with pytest.raises(DpuError, match=rf"asynchronous operation error \(launch_rank\): {text}"):
                dpus.sync()
            dpus.sync()  # told once
        assert dpus.status() == (fault is not FaultKind.TIMEOUT, fault is FaultKind.DPU_FAULT)
        held = rank.state
        dpus.free()
        if fault is FaultKind.RANK_LOST:
            assert held is RankState.LOST  # so the second round gets the other rank
        else:
            DpuSet.alloc_ranks(pool, 1)  # resets it; kept, so the second round gets the other rank
            assert rank.state is RankState.IDLE


def test_a_lost_rank_comes_back_when_revived(pool: RankPool) -> None:
    dpus = DpuSet.alloc_ranks(pool, 1)
    dpus.load(program(lambda rank, dpus: FaultKind.RANK_LOST))
    fails(DpuErr.DRIVER, dpus.launch, SYNC)
    fails(DpuErr.DRIVER, dpus.copy_to, "arg", 0, bytes(8))
    fails(DpuErr.DRIVER, dpus.launch, SYNC)
    dpus.free()
    fails(DpuErr.ALLOCATION, DpuSet.alloc_ranks, pool, 2)
    pool.ranks[0].revive()
    assert DpuSet.alloc_ranks(pool, 2).status() == (True, False)


def test_jobs_of_a_rank_run_in_order(pool: RankPool) -> None:
    order: list[object] = []

    def main(rank: Rank, dpus: I64) -> FaultKind:
        order.append("run")
        return FaultKind.DPU_FAULT

    dpus = DpuSet.alloc_ranks(pool, 1)
    dpus.load(program(main))
    dpus.launch(ASYNC)
    dpus.then(lambda _, error: order.append(error and error.code))
    dpus.then(lambda _, error: order.append(error))
    dpus.sync()  # the callback took the error
    assert order == ["run", DpuErr.DPU_FAULT, None]


def test_a_program_that_breaks_is_an_internal_error(pool: RankPool, caplog: pytest.LogCaptureFixture) -> None:
    dpus = DpuSet.alloc_ranks(pool, 1)
    dpus.load(program(lambda rank, dpus: 1 // 0))  # type: ignore[arg-type, return-value]
    dpus.launch(ASYNC)
    with pytest.raises(DpuError, match="internal error"):
        dpus.sync()
    assert "ZeroDivisionError" in caplog.text


def test_workers_end_with_the_pool(pool: RankPool) -> None:
    dpus = DpuSet.alloc_ranks(pool, 2)
    dpus.load(IDLE)
    others = set(threading.enumerate())
    for _ in range(2):  # a closed pool starts its workers again
        dpus.launch(ASYNC)
        dpus.sync()
        assert len(set(threading.enumerate()) - others) == 2
        pool.close()
        assert set(threading.enumerate()) <= others


def test_log_header_names_the_dpu(pool: RankPool) -> None:
    """target 3, rank 1, slice 4, member 4: the SDK documentation's own example."""
    rank = Rank(1, rank_chip(load_profile("upmem-v1a")), FaultPlan(), disabled_mask=(1 << 36) - 1)
    dpus = DpuSet.alloc(RankPool([rank]), 1)
    dpus.load(DPU_COMPACT)
    assert dpus.log_read() == "=== DPU#0x30010404 ===\n"


# dpu_prepare_xfer, dpu_push_xfer and their flags (dpu.md 1.2).


def test_prepared_transfers(pool: RankPool) -> None:
    dpus = DpuSet.alloc(pool, 9)
    dpus.load(IDLE)
    buffers = [bytearray([i] * 16) for i in range(9)]
    for dpu, buffer in list(zip(dpus.dpus(), buffers, strict=True))[:8]:
        dpu.prepare_xfer(buffer)
    fails(DpuErr.TRANSFER_ALREADY_SET, next(dpus.dpus()).prepare_xfer, buffers[0])
    fails(DpuErr.TRANSFER_ALREADY_SET, dpus.prepare_xfer, buffers[0])
    fails(DpuErr.INVALID_MEMORY_TRANSFER, dpus.push_xfer, TO_DPU, "heap", 0, 24)
    dpus.push_xfer(TO_DPU, "heap", 0, 16, XferFlags.DPU_XFER_NO_RESET)
    dpus.push_xfer(TO_DPU, "heap", 16, 8)
    assert [dpu.copy_from("heap", 8, 16)[::8] for dpu in dpus.dpus()] == [bytes([i, i]) for i in range(8)] + [bytes(2)]
    back = bytearray(16)
    first = next(dpus.dpus())
    first.prepare_xfer(back)  # the reset has forgotten the other one
    dpus.push_xfer(FROM_DPU, "heap", 0, 16)
    assert back == bytes(16)
    first.prepare_xfer(bytes(16))
    fails(DpuErr.INVALID_MEMORY_TRANSFER, dpus.push_xfer, FROM_DPU, "heap", 0, 16)


def test_one_buffer_prepared_for_all(pool: RankPool) -> None:
    dpus = DpuSet.alloc(pool, 3)
    dpus.load(IDLE)
    dpus.prepare_xfer(b"the same")
    dpus.push_xfer(TO_DPU, "heap", 0, 8)
    dpus.broadcast_to("heap", 8, b"and more")
    assert {dpu.copy_from("heap", 0, 16) for dpu in dpus.dpus()} == {b"the sameand more"}


def test_parallel_transfers_are_for_wram_while_it_runs(pool: RankPool) -> None:
    started, go_on = threading.Event(), threading.Event()

    def main(rank: Rank, dpus: I64) -> None:
        started.set()
        assert go_on.wait(10)

    dpus = DpuSet.alloc(pool, 1)
    dpus.load(program(main))
    dpus.launch(ASYNC)
    assert started.wait(10)
    dpus.copy_to("arg", 0, b"sent now", XferFlags.DPU_XFER_PARALLEL)
    assert dpus.copy_from("arg", 0, 8) == b"sent now"
    fails(DpuErr.INVALID_PARALLEL_MEMORY_TRANSFER, dpus.copy_to, "heap", 0, b"sent now", XferFlags.DPU_XFER_PARALLEL)
    go_on.set()
    dpus.sync()


def test_asynchronous_transfers_wait_for_the_run(pool: RankPool) -> None:
    seen: list[bytes] = []
    dpus = DpuSet.alloc(pool, 1)
    dpus.load(program(lambda rank, dpus: seen.append(rank.bytes_of(Space.MRAM)[0, :8].tobytes())))  # type: ignore[func-returns-value]
    later = XferFlags.DPU_XFER_ASYNC
    for text in (b"before 1", b"before 2"):
        dpus.copy_to("heap", 0, text, later)
        dpus.launch(ASYNC)
    back = bytearray(8)
    dpus.prepare_xfer(back)
    dpus.push_xfer(FROM_DPU, "heap", 0, 8, later)
    fails(DpuErr.INVALID_SYMBOL_ACCESS, dpus.copy_to, "heap", 4096, bytes(8), later)  # found at once
    dpus.sync()
    assert seen == [b"before 1", b"before 2"]
    assert back == b"before 2"
    assert dpus.status() == (True, False)


def test_the_rank_takes_so_many_jobs(pool: RankPool) -> None:
    """nrJobsPerRank: who asks for one more waits for a place."""
    rank = Rank(0, load_profile("upmem-v1a").chip, FaultPlan(), 8, options=RankOptions(nr_jobs=2))
    dpus = DpuSet.alloc_ranks(RankPool([rank]), 1)
    running, go_on, put = threading.Event(), threading.Event(), threading.Event()

    def hold(*_: object) -> None:
        running.set()
        assert go_on.wait(10)

    dpus.callback(hold, flags=CallbackFlags.DPU_CALLBACK_ASYNC)
    assert running.wait(10)
    for _ in range(2):
        dpus.callback(hold, flags=CallbackFlags.DPU_CALLBACK_ASYNC)

    def one_more() -> None:
        dpus.callback(hold, flags=CallbackFlags.DPU_CALLBACK_ASYNC)
        put.set()

    thread = threading.Thread(target=one_more)
    thread.start()
    assert not put.wait(0.05)
    go_on.set()
    assert put.wait(10)
    thread.join()
    dpus.sync()
    rank.close()


def test_scatter_and_gather() -> None:
    chip = load_profile("upmem-v1a").chip
    plain = DpuSet.alloc(RankPool([Rank(0, chip, FaultPlan(), 8)]), 2)
    plain.load(IDLE)
    blocks = [[b"aaaaaaaa", b"bbbbbbbb"], [b"cccccccccccccccc"]]

    def get(dpu: int, block: int) -> bytes | None:
        return blocks[dpu][block] if block < len(blocks[dpu]) else None

    fails(DpuErr.SG_NOT_ACTIVATED, plain.push_sg_xfer, TO_DPU, "heap", 0, 16, get)
    dpus = DpuSet.alloc(RankPool([Rank(0, chip, FaultPlan(), 8, options=RankOptions(sg_max_blocks=2))]), 2)
    dpus.load(IDLE)
    dpus.push_sg_xfer(TO_DPU, "heap", 8, 16, get)
    assert [dpu.copy_from("heap", 8, 16) for dpu in dpus.dpus()] == [b"aaaaaaaabbbbbbbb", b"c" * 16]
    back = [[bytearray(4), bytearray(12)], [bytearray(16)]]
    dpus.push_sg_xfer(FROM_DPU, "heap", 8, 16, lambda d, b: back[d][b] if b < len(back[d]) else None)
    assert back == [[b"aaaa", b"aaaabbbbbbbb"], [b"c" * 16]]
    fails(DpuErr.SG_NOT_MRAM_SYMBOL, dpus.push_sg_xfer, TO_DPU, "arg", 0, 16, get)
    fails(DpuErr.SG_LENGTH_MISMATCH, dpus.push_sg_xfer, TO_DPU, "heap", 0, 24, get)
    unchecked = SgXferFlags.DPU_SG_XFER_DISABLE_LENGTH_CHECK
    dpus.push_sg_xfer(TO_DPU, "heap", 0, 24, get, unchecked)
    fails(DpuErr.SG_LENGTH_MISMATCH, dpus.push_sg_xfer, TO_DPU, "heap", 0, 8, get, unchecked)
    blocks[0].append(b"one more")
    fails(DpuErr.SG_TOO_MANY_BLOCKS, dpus.push_sg_xfer, TO_DPU, "heap", 0, 24, get)


def test_a_dpu_by_its_place(pool: RankPool) -> None:
    """DPU 1 of each rank is disabled; the ranks have one control interface of 8."""
    dpus = DpuSet.alloc_ranks(pool, 2)
    rank = next(dpus.ranks())
    assert rank.get(0, 7).single()[1] == 7
    fails(DpuErr.DPU_DISABLED, rank.get, 0, 1)
    for place in ((1, 0), (0, 8), (-1, 0)):
        fails(DpuErr.INVALID_DPU_SET, rank.get, *place)
    fails(DpuErr.INVALID_DPU_SET, dpus.get, 0, 0)
    dpus.free()
    few = DpuSet.alloc(pool, 2)
    fails(DpuErr.INVALID_DPU_SET, few.get, 0, 7)


def test_iram_is_accessed_by_8_bytes(pool: RankPool) -> None:
    dpus = DpuSet.alloc(pool, 1)
    dpus.load(program(IDLE.main, symbols={"code": Symbol(Space.IRAM, 0, 64)}))
    dpus.copy_to("code", 8, bytes(range(8)))
    assert dpus.copy_from("code", 8, 8) == bytes(range(8))
    fails(DpuErr.INVALID_IRAM_ACCESS, dpus.copy_to, "code", 4, bytes(8))
    fails(DpuErr.INVALID_IRAM_ACCESS, dpus.load, program(IDLE.main, symbols={"x": Symbol(Space.IRAM, 24576, 8)}))
    dpus.load(program(IDLE.main))
    fails(DpuErr.LOG_CONTEXT_MISSING, dpus.log_read)


def test_without_safe_checks_alignment_is_the_host_s_affair() -> None:
    options = RankOptions(safe_checks=False)
    rank = Rank(0, load_profile("upmem-v1a").chip, FaultPlan(), 8, options=options)
    dpus = DpuSet.alloc(RankPool([rank]), 1)
    dpus.load(IDLE)
    dpus.copy_to("heap", 4, b"abc")
    assert dpus.copy_from("heap", 3, 5) == b"\0abc\0"


def test_without_a_reset_the_program_stays_for_the_next() -> None:
    options = RankOptions(reset_on_alloc=False)
    pool = RankPool([Rank(0, load_profile("upmem-v1a").chip, FaultPlan(), 8, options=options)])
    dpus = DpuSet.alloc(pool, 1)
    dpus.load(IDLE)
    dpus.copy_to("arg", 0, b"left me!")
    dpus.free()
    assert DpuSet.alloc(pool, 1).copy_from("arg", 0, 8) == b"left me!"
