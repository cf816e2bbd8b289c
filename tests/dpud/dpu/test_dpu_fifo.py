# SPDX-License-Identifier: GPL-2.0-only
"""WRAM FIFOs: what is pushed arrives in order on DPUs that run, what is full says so, what is read comes back."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest

from dpud.dpu.dpu_fifo import FifoLink
from dpud.dpu.dpu_set import DpuSet, LaunchPolicy
from dpud.dpu.dpu_xfer import XferFlags
from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.faults import FaultPlan
from dpud.dpu.profile import load_profile, rank_chip
from dpud.dpu.rank import Rank, RankPool
from dpud.dpu.tasklet import Binary, InputFifo, OutputFifo, Program, Tasklet, Wram

NR_SLOTS = 4
STOP = (1 << 64) - 1
NO_RESET = XferFlags.DPU_XFER_NO_RESET


class Squares(Program):
    """Squares each number it is sent until it is told to stop."""

    nr_tasklets = 2
    requests = InputFifo(NR_SLOTS, 8)
    before = Wram(8)
    results = OutputFifo(2 * NR_SLOTS, 16)
    after = Wram(8)

    def main(self, t: Tasklet) -> Iterator[None]:  # type: ignore[override]
        while t.me() == 0:
            yield
            request = t.input_fifo_pop(self.requests)
            if request is None:
                continue
            number = int(request.view("<u8")[0])
            if number == STOP:
                return
            answer = np.array([number, number**2], "<u8").view(np.uint8)
            while not t.output_fifo_push(self.results, answer):
                yield


class Plain(Program):
    number = Wram(8)

    def main(self, t: Tasklet) -> None:
        pass


@pytest.fixture
def dpus() -> Iterator[DpuSet]:
    """Three DPUs of two ranks."""
    chip = rank_chip(load_profile("upmem-v1a"))
    pool = RankPool([Rank(number, chip, FaultPlan(), nr_dpus=2) for number in range(2)])
    found = DpuSet.alloc(pool, 3)
    found.load(Binary(Squares))
    yield found
    found.free()
    pool.close()


def fails(code: DpuErr, function: Callable[..., object], *args: object) -> None:
    with pytest.raises(DpuError) as caught:
        function(*args)
    assert caught.value.code is code


def word(number: int) -> bytes:
    return number.to_bytes(8, "little")


def push(dpus: DpuSet, link: FifoLink, number: int) -> None:
    dpus.fifo_prepare_xfer(link, word(number))
    dpus.fifo_push_xfer(link)


def take(dpus: DpuSet, link: FifoLink) -> list[list[tuple[int, int]]]:
    """What each DPU's output FIFO has, and empties it."""
    buffers = [bytearray(link.shape.nr_bytes) for _ in range(len(dpus))]
    for dpu, buffer in zip(dpus.dpus(), buffers, strict=True):
        dpu.fifo_prepare_xfer(link, buffer)
    dpus.fifo_push_xfer(link)
    found = []
    for dpu, buffer in zip(dpus.dpus(), buffers, strict=True):
        elements = (link.element(dpu, buffer, index).cast("Q") for index in range(link.size(dpu)))
        found.append([(each[0], each[1]) for each in elements])
    return found


def test_what_is_pushed_while_the_dpus_run_comes_back_in_order(dpus: DpuSet) -> None:
    """Many times round both rings, with one element for all DPUs and others for one only."""
    requests, results = dpus.link_input_fifo("requests"), dpus.link_output_fifo("results")
    requests.max_retries = 10_000
    dpus.launch(LaunchPolicy.DPU_ASYNCHRONOUS)
    first = next(dpus.dpus())
    expected: list[list[tuple[int, int]]] = [[], [], []]
    found: list[list[tuple[int, int]]] = [[], [], []]
    for number in range(30):
        push(dpus, requests, number)
        push(first, requests, 100 + number)
        for index, answers in enumerate(expected):
            answers += [(number, number**2), *([(100 + number, (100 + number) ** 2)] if index == 0 else [])]
        for answers, more in zip(found, take(dpus, results), strict=True):
            answers += more
    push(dpus, requests, STOP)
    dpus.sync()
    for answers, more in zip(found, take(dpus, results), strict=True):
        answers += more
    assert found == expected
    assert take(dpus, results) == [[], [], []]


def test_a_full_fifo_says_so_and_the_others_have_their_element(dpus: DpuSet) -> None:
    link = dpus.link_input_fifo("requests")
    link.max_retries, link.time_for_retry_us = 3, 1
    first, second, _ = dpus.dpus()
    for number in range(NR_SLOTS):
        push(first, link, number)
    fails(DpuErr.WRAM_FIFO_FULL, push, dpus, link, 9)
    assert DpuErr.WRAM_FIFO_FULL.value == 15
    assert str(DpuError(DpuErr.WRAM_FIFO_FULL)) == "wram fifo is full"
    results = dpus.link_output_fifo("results")
    push(second, link, STOP)
    third = list(dpus.dpus())[2]
    push(third, link, STOP)
    dpus.launch(LaunchPolicy.DPU_ASYNCHRONOUS)
    link.max_retries, link.time_for_retry_us = 10_000, 100
    push(first, link, STOP)
    dpus.sync()
    assert take(dpus, results) == [[(n, n * n) for n in range(NR_SLOTS)], [(9, 81)], [(9, 81)]]


def test_elements_do_not_touch_their_neighbours(dpus: DpuSet) -> None:
    dpus.copy_to("before", 0, word(1))
    dpus.copy_to("after", 0, word(2))
    requests = dpus.link_input_fifo("requests")
    for _ in range(NR_SLOTS):
        push(dpus, requests, STOP)
    take(dpus, dpus.link_output_fifo("results"))
    for dpu in dpus.dpus():
        assert (dpu.copy_from("before", 0, 8), dpu.copy_from("after", 0, 8)) == (word(1), word(2))


def test_a_load_empties_the_fifos(dpus: DpuSet) -> None:
    link = dpus.link_input_fifo("requests")
    link.max_retries = 0
    for _ in range(NR_SLOTS):
        push(dpus, link, 1)
    dpus.load(Binary(Squares))
    push(dpus, link, 1)


def test_prepared_buffers_are_kept_where_that_is_asked_for(dpus: DpuSet) -> None:
    link = dpus.link_input_fifo("requests")
    link.max_retries = 0
    dpus.fifo_prepare_xfer(link, word(7))
    fails(DpuErr.TRANSFER_ALREADY_SET, dpus.fifo_prepare_xfer, link, word(8))
    for _ in range(NR_SLOTS):
        dpus.fifo_push_xfer(link, NO_RESET)
    fails(DpuErr.WRAM_FIFO_FULL, dpus.fifo_push_xfer, link)
    dpus.fifo_push_xfer(link)  # nothing is prepared any more


def test_what_is_wrong_has_the_sdks_error(dpus: DpuSet) -> None:
    fails(DpuErr.UNKNOWN_SYMBOL, dpus.link_input_fifo, "nothing")
    fails(DpuErr.INVALID_SYMBOL_ACCESS, dpus.link_input_fifo, "results")
    fails(DpuErr.INVALID_SYMBOL_ACCESS, dpus.link_output_fifo, "requests")
    fails(DpuErr.INVALID_SYMBOL_ACCESS, dpus.link_input_fifo, "before")
    requests, results = dpus.link_input_fifo("requests"), dpus.link_output_fifo("results")
    fails(DpuErr.INVALID_MEMORY_TRANSFER, dpus.fifo_prepare_xfer, requests, bytes(7))
    fails(DpuErr.INVALID_MEMORY_TRANSFER, dpus.fifo_prepare_xfer, results, bytearray(results.shape.nr_bytes - 1))
    fails(DpuErr.INVALID_MEMORY_TRANSFER, dpus.fifo_prepare_xfer, results, bytes(results.shape.nr_bytes))
    dpus.load(Binary(Plain))
    fails(DpuErr.UNKNOWN_SYMBOL, dpus.link_input_fifo, "requests")
    for shape in ((3, 8), (4, 7), (0, 8)):
        with pytest.raises(ValueError, match="a FIFO of"):
            InputFifo(*shape)
