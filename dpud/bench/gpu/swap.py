# SPDX-License-Identifier: GPL-2.0-only
"""Swap: misses beside libCacheSim's and Belady's, prefetching beside NVIDIA's rule and Linux's readahead, faults beside
mmap(2) with MADV_PAGEOUT.

With DPUD_CLOUDPHYSICS=FILE (cloudPhysicsIO.oracleGeneral.bin of the libCacheSim repository, which is not ours to pass
on) that trace is replayed too.
"""

import mmap
import os
import tempfile
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from dpud.bench.gpu.readahead import Guess, LinuxReadahead, PublishedDensityRule
from dpud.bench.gpu.traces import TRACES
from dpud.bench.report import Line, Report, percentile
from dpud.errors import UserError
from dpud.gpu.clock import RealClock
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from dpud.gpu.policy import Lru
from dpud.gpu.swap.accuracy import PrefetchAccuracy
from dpud.gpu.swap.belady import optimal_misses
from dpud.gpu.swap.module import SwapModule
from dpud.gpu.swap.policy import S3Fifo, misses
from dpud.gpu.swap.prefetch import DensityTree, Majority, Stride

CLOUDPHYSICS = "DPUD_CLOUDPHYSICS"
NR_ACCESSES, NR_PAGES = 40_000, 8192
_SHARES = (10, 40)
_CLOUDPHYSICS_RECORD = np.dtype([("time", "<u4"), ("key", "<u8"), ("size", "<u4"), ("next", "<i8")])  # oracleGeneral
_MADV_PAGEOUT = 21  # Linux 5.4; Python's mmap does not name it
_NR_FAULTS = {"memory": 2000, "nvme": 2000, "ssd": 1000, "hdd": 60}
_PAGE = 4096
_FILE_PAGES = 4096

Trace = Sequence[int]


def run() -> Report:
    report = Report(
        "gpu swap",
        "misses of replacement policies",
        f"Traces of {NR_ACCESSES} accesses to {NR_PAGES} pages at most (bench/gpu/traces.py), with room for so many "
        "percent of the pages that they touch. Ours and libCacheSim's have to be equal.",
        headings=("Trace", "Room", "LRU", "libCacheSim", "S3-FIFO", "libCacheSim ", "Fewest", "Gap closed"),
        figures=list(_policies()),
    )
    report.notes.append("gap closed: of the misses that LRU has beyond the fewest possible, those that S3-FIFO spares")
    report.parts += [_prefetching(), _latency()]
    return report


# Policies.


def _traces() -> Iterator[tuple[str, Trace]]:
    for name, make in TRACES.items():
        yield name, make(NR_ACCESSES, NR_PAGES)
    path = os.environ.get(CLOUDPHYSICS)
    if path:
        yield "CloudPhysics", np.fromfile(path, dtype=_CLOUDPHYSICS_RECORD)["key"].tolist()


def _policies() -> Iterator[Line]:
    for name, trace in _traces():
        for share in _SHARES:
            yield policy_line(name, trace, max(20, len(set(trace)) * share // 100), f"{share} %")


def policy_line(name: str, trace: Trace, capacity: int, room: str) -> Line:
    """One row; `met` where all misses are libCacheSim's, where that is installed."""
    lru, s3fifo = misses(Lru(), trace, capacity), misses(S3Fifo(capacity), trace, capacity)
    peers = libcachesim_misses("LRU", trace, capacity), libcachesim_misses("S3FIFO", trace, capacity)
    fewest = optimal_misses(trace, capacity)
    gap = f"{100 * (lru - s3fifo) / (lru - fewest):.0f} %" if lru > fewest else "-"
    cells = lru, peers[0], s3fifo, peers[1], fewest
    verdict = "" if None in peers else "met" if peers == (lru, s3fifo) else "missed"
    return Line((name, room, *("-" if cell is None else f"{cell:,}" for cell in cells), gap), verdict)


def libcachesim_misses(name: str, trace: Trace, capacity: int) -> int | None:
    """None where it is not installed."""
    try:
        import libcachesim
    except ImportError:
        return None
    cache, request, nr = getattr(libcachesim, name)(capacity, hashpower=18), libcachesim.Request(), 0
    request.obj_size = 1
    for key in trace:
        request.obj_id = key + 1
        nr += not cache.get(request)
    return nr


# Prefetching.


def _prefetching() -> Report:
    prefetchers: dict[str, Callable[[], Guess]] = {
        "density": DensityTree,
        "51 % rule": PublishedDensityRule,
        "stride": Stride,
        "majority": Majority,
        "readahead": LinuxReadahead,
    }
    figures = []
    for name, trace in _traces():
        if max(trace) < NR_PAGES:
            found = [replay(make(), trace, NR_PAGES // 2) for make in prefetchers.values()]
            cells = (f"{100 * each.accuracy:.0f} / {100 * each.coverage:.0f}" for each in found)
            figures.append(Line((name, *cells)))
    return Report(
        "gpu swap",
        "prefetching: accuracy / coverage in percent",
        f"The same traces with room for {NR_PAGES // 2} pages in LRU order, all of them on a tier at first. 51 % rule: "
        "NVIDIA's, written anew from its description; readahead: Linux's of files.",
        headings=("Trace", *prefetchers),
        figures=figures,
    )


def replay(prefetcher: Guess, trace: Trace, capacity: int) -> PrefetchAccuracy:
    """Accesses in a memory of so many pages."""
    held: OrderedDict[int, None] = OrderedDict()
    accuracy = PrefetchAccuracy()
    on_access = prefetcher.on_access if isinstance(prefetcher, LinuxReadahead) else None

    def bring_in(pages: Sequence[int]) -> None:
        accuracy.prefetched(pages)
        for page in pages:
            held[page] = None
            if len(held) > capacity:
                held.popitem(last=False)

    for page in trace:
        accuracy.accessed([page])
        if page in held:
            held.move_to_end(page)
            if on_access is not None:
                bring_in(on_access(NR_PAGES, page, held.__contains__))
            continue
        accuracy.missed([page])
        bring_in(prefetcher.on_fault(0, NR_PAGES, page, held.__contains__))
        held[page] = None
        if len(held) > capacity:
            held.popitem(last=False)
    return accuracy


# Latency.


def _latency() -> Report:
    figures = []
    with tempfile.TemporaryDirectory(prefix="dpud-bench-") as folder:
        peer = mmap_faults(Path(folder), 1000)
        figures.append(_latency_line("mmap, MADV_PAGEOUT", "-", peer))
        for name, nr in _NR_FAULTS.items():
            samples, modelled_ns = tier_faults(name, Path(folder), nr)
            figures.append(_latency_line(name, f"{modelled_ns / 1000:.0f}", samples))
    return Report(
        "gpu swap",
        "latency of a fault on one page of 4 KiB, in us",
        "Random pages that are not in memory, one at a time, read through the whole data path of a GpuMemory; the "
        "tier's file and the file that is mapped are on the same file system.",
        headings=("Where", "Modelled", "50 %", "99 %", "100 %"),
        figures=figures,
        notes=["modelled: what the tier's profile makes a read take at least; the rest is the real file and Python"],
    )


def _latency_line(name: str, modelled: str, samples: Sequence[int]) -> Line:
    return Line((name, modelled, *(f"{percentile(samples, share) / 1000:,.0f}" for share in (50, 99, 100))))


def mmap_faults(folder: Path, nr: int) -> list[int]:
    """ns of first touches of pages of a mapped file that were paged out."""
    path = folder / "mapped"
    path.write_bytes(np.random.default_rng(1).bytes(_FILE_PAGES * _PAGE))
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 0) as mapped:
        os.fsync(file.fileno())
        mapped.madvise(mmap.MADV_RANDOM)
        samples = []
        for page in np.random.default_rng(2).integers(0, _FILE_PAGES, nr).tolist():
            mapped.madvise(_MADV_PAGEOUT)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            begin = perf_counter_ns()
            mapped[page * _PAGE]
            samples.append(perf_counter_ns() - begin)
    return samples


def tier_faults(name: str, folder: Path, nr: int) -> tuple[list[int], int]:
    """(ns of reads of pages that lie on a tier, ns that the tier's profile gives a read of two blocks)."""
    clock, nr_bytes = RealClock(), _FILE_PAGES * _PAGE
    swap = SwapModule.with_tiers({name: 2 * nr_bytes}, clock, folder)
    memory = GpuMemory([SimulatedDevice(DeviceProfile(memory_bytes=2 * nr_bytes), clock)], clock=clock, swap=swap.space)
    swap.attach(memory)
    swap.set_prefetch("none")
    swap.guard.enabled = False
    va = memory.allocate("bench", nr_bytes)
    memory.write("bench", va, np.random.default_rng(1).bytes(nr_bytes))
    memory.evict(2 * nr_bytes)
    if swap.space.used_bytes < nr_bytes:
        raise UserError(f"the pages did not go to the tier {name}")
    samples = [
        _one_fault(memory, va + page * _PAGE)
        for page in np.random.default_rng(2).permutation(_FILE_PAGES)[:nr].tolist()
    ]
    swap.space.close()
    tier = swap.space.tiers[0]
    reads = tier.timing.reads
    return samples, tier.timing.seek_ns + reads.latency_ns + 2 * _PAGE * 1_000_000_000 // reads.bandwidth_bytes_per_s


def _one_fault(memory: GpuMemory, va: int) -> int:
    begin = perf_counter_ns()
    memory.read("bench", va, 1)
    return perf_counter_ns() - begin
