# SPDX-License-Identifier: GPL-2.0-only
"""Translation: in bulk, one by one beside a dictionary of pages, and the TLB beside lists in LRU order."""

from collections import OrderedDict
from collections.abc import Callable
from statistics import median
from time import perf_counter_ns, thread_time_ns

import numpy as np
from numpy.typing import NDArray

from dpud.bench.report import Figure, Report
from dpud.gpu.address_space.tlb import DEFAULT_SETS, DEFAULT_WAYS
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory

NR_BYTES = 64 << 20
NR_BULK = 1 << 20
NR_SCALAR = 1 << 16
NR_TLB = 1 << 16
NR_ROUNDS = 7
BULK_TARGET = 10.0  # million a second
_SIZES = ((2048, "2K"), (4096, "4K"), (65536, "64K"), (2 << 20, "2M"))


def dict_of_pages(pages: dict[int, int]) -> Callable[[int], int]:
    """The peer: the simplest page table that Python has, in the fastest form there is, a closure. One page size, and
    nothing is ever invalidated."""

    def translate(va: int) -> int:
        return pages[va >> 12] + (va & 4095)

    return translate


def run() -> Report:
    report = Report(
        "gpu address_space",
        "translation of addresses",
        f"{NR_BYTES >> 20} MiB resident on a device, random addresses; {NR_ROUNDS} rounds, peers in turns; the median"
        " of the bulk rounds.",
    )
    for page_bytes, name in _SIZES:
        memory, va = _resident(page_bytes)
        rate = _bulk(memory, va)
        report.figures = [*report.figures, Figure(f"bulk, pages of {name}", rate, "M/s", BULK_TARGET, more=True)]
    memory, va = _resident(4096)
    ours, theirs = _scalar(memory, va)
    hits, expected = _tlb(memory, va)
    report.figures = [
        *report.figures,
        Figure("one by one", ours, "ns", theirs, "dict of pages"),
        Figure("TLB hits of a zipf trace", hits, "hits", expected, "LRU lists"),
    ]
    report.notes.append(
        "one by one goes through software's cache of translations, which every change of an entry invalidates; calls in"
        " a plain loop, and so are the dictionary's: CPU time, the fastest round"
    )
    return report


def _resident(page_bytes: int) -> tuple[GpuMemory, int]:
    """A memory with all of a region on the device."""
    memory = GpuMemory([SimulatedDevice(DeviceProfile(memory_bytes=NR_BYTES))])
    va = memory.allocate("bench", NR_BYTES, page_size=page_bytes)
    for at in range(0, NR_BYTES, max(page_bytes, 1 << 20)):
        memory.write("bench", va + at, bytes(max(page_bytes, 1 << 20)))
    return memory, va


def _addresses(va: int, nr: int) -> NDArray[np.int64]:
    return va + np.random.default_rng(1).integers(0, NR_BYTES, nr)


def _bulk(memory: GpuMemory, va: int) -> float:
    """Million translations a second."""
    vas = _addresses(va, NR_BULK)
    assert int(memory.translate_bulk(vas).min()) >= 0
    times = [_timed(lambda: memory.translate_bulk(vas)) for _ in range(NR_ROUNDS)]
    return NR_BULK / median(times) * 1000


def _scalar(memory: GpuMemory, va: int) -> tuple[float, float]:
    """ns of one translation, ours and a dictionary's, over the same addresses."""
    vas = _addresses(va, NR_SCALAR).tolist()
    firsts = np.arange(va, va + NR_BYTES, 4096)
    frames = memory.translate_bulk(firsts).tolist()
    peer = dict_of_pages({first >> 12: frame for first, frame in zip(firsts.tolist(), frames, strict=True)})
    translate = memory.translator()
    assert [translate(each) for each in vas] == [peer(each) for each in vas]
    rounds = [(_calls(translate, vas), _calls(peer, vas)) for _ in range(NR_ROUNDS)]
    ours, theirs = (min(times) / NR_SCALAR for times in zip(*rounds, strict=True))
    return ours, theirs


def _calls(translate: Callable[[int], int], vas: list[int]) -> int:
    begin = thread_time_ns()
    for va in vas:
        translate(va)
    return thread_time_ns() - begin


def _tlb(memory: GpuMemory, va: int) -> tuple[int, int]:
    """Hits of a zipf trace in the device's TLB, and in a list in LRU order for each of its sets."""
    pages = np.minimum(np.random.default_rng(2).zipf(1.2, NR_TLB) - 1, NR_BYTES // 4096 - 1).tolist()
    region = memory.space.regions.find(va)
    assert region is not None
    tlb = memory.space.tlbs[0]
    tlb.flush()
    before = tlb.nr_hits
    lists = [OrderedDict[int, None]() for _ in range(DEFAULT_SETS)]
    expected = 0
    for page in pages:
        memory.space.entries(region, page, 1, 0)
        lru = lists[(va // 4096 + page) % DEFAULT_SETS]
        expected += page in lru
        lru[page] = None
        lru.move_to_end(page)
        if len(lru) > DEFAULT_WAYS:
            lru.popitem(last=False)
    return tlb.nr_hits - before, expected


def _timed(work: Callable[[], object]) -> int:
    begin = perf_counter_ns()
    work()
    return perf_counter_ns() - begin
