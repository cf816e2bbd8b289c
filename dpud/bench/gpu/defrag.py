# SPDX-License-Identifier: GPL-2.0-only
"""Defragmentation: requests that fail beside allocators that move nothing; bytes moved against the exact least; pauses.

All of it is in simulated time and from seeds, the same on every machine, but for the CPU of a plan.
"""

import os
import time
from pathlib import Path
from statistics import median

import numpy as np

from dpud.bench.gpu import defrag_load
from dpud.bench.gpu.defrag_load import MIB, Event, peak_bytes, random_mix, read_log, serving, training, write_log
from dpud.bench.gpu.defrag_peers import BestFit, Buddy, FirstFit, Moving, replay
from dpud.bench.gpu.min_moves import can_bound, least_displaced, least_moved
from dpud.bench.report import Figure, Line, Report, percentile
from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock, PacedClock
from dpud.gpu.defrag.effort import DEFAULT_PAUSE_NS
from dpud.gpu.defrag.heap import ALIGNMENT, Block, Heap
from dpud.gpu.defrag.module import DefragModule
from dpud.gpu.defrag.plan import plan
from dpud.gpu.defrag.suballocator import Suballocator
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import GpuMemory
from dpud.gpu.store import HostPool

CAPACITY = 256 * MIB
LOG_VARIABLE = "DPUD_RMM_LOG"
NR_SMALL_CASES = 1200
NR_CROWDED_CASES = 200
_NR_MIXES = 3
_LIVE_EVENTS = 3000


def run() -> Report:
    report = Report(
        "gpu defrag",
        "requests that fail although live + request <= capacity",
        f"Random mixes: 20,000 events, {CAPACITY // MIB} MiB, sizes log-uniform from 256 bytes to 4 MiB, allocated up "
        "to 85 %. Logs in RMM's format, in as much memory as is live at once at the peak: it is full then. Best fit is "
        " RMM's (coalescing), buddy has pages of 4 KiB. Scattered is 1 - largest hole / free, on average; moved: "
        "of the bytes asked for.",
        headings=("Load", "1. requests", "2. dpud", "3. best fit", "4. first fit", "5. buddy", "6. moved", "Verdict"),
    )
    loads = {f"mix {seed}": (random_mix(seed), CAPACITY) for seed in range(_NR_MIXES)} | logs()
    report.figures = [_line(name, *load, report) for name, load in loads.items()]
    report.notes.append(f"met: none fails with dpud; {LOG_VARIABLE}=FILE adds a log")
    report.parts = [small_cases(), live_bytes()]
    return report


def logs() -> dict[str, tuple[list[Event], int]]:
    """Name -> events, capacity; each has been a log."""
    texts = {name: write_log(made(1)) for name, made in (("training", training), ("serving", serving))}
    if path := os.environ.get(LOG_VARIABLE):
        texts[Path(path).name] = Path(path).read_text()
    found = {f"RMM log, {name}": read_log(text.splitlines()) for name, text in texts.items()}
    return {name: (events, peak_bytes(events)) for name, events in found.items()}


def _line(name: str, events: list[Event], capacity: int, report: Report) -> Line:
    ours = Moving(capacity)
    peers = BestFit(capacity), FirstFit(capacity), Buddy(capacity)
    outcomes = [replay(events, each, capacity) for each in (ours, *peers)]
    scattered = " ".join(f"{each.scattered:.2f}" for each in outcomes)
    reserved = " ".join(f"{each.peak_reserved / capacity:.2f}" for each in outcomes)
    plan_us = ours.plan_ns / max(1, ours.nr_plans) / 1000
    report.notes.append(
        f"{name}, columns 2 to 5: scattered {scattered}; peak reserved / capacity {reserved}; "
        f"{ours.nr_plans} plans of {plan_us:,.0f} us CPU"
    )
    verdict = "met" if outcomes[0].owed == 0 else "missed"
    moved = f"{ours.moved_bytes / outcomes[0].asked_bytes:.4f}"
    return Line((name, f"{outcomes[0].nr_requests:,}", *(str(each.owed) for each in outcomes), moved, verdict), verdict)


# Against the exact least.


def small_cases() -> Report:
    """Random heaps of up to five blocks, a seventh of them pinned."""
    nr, missed, ratios = _against_least(windows_only=False)
    _, missed_by_windows, by_windows = _against_least(windows_only=True)
    report = Report(
        "gpu defrag",
        "bytes moved against the exact least",
        f"{nr} random heaps in which no hole is large enough, {missed + len(ratios)} of them with any solution, by "
        "Dijkstra over all layouts. Where blocks are as few as here, ours searches layouts, too; where there are more "
        "than eight, it looks at windows alone.",
    )
    report.figures = [
        Figure("solutions not found", missed, "cases", 0),
        Figure("bytes moved / least, at worst", max(ratios), "", 2.0),
        Figure("bytes moved / least, on average", float(np.mean(ratios)), "", 2.0),
        Figure("solutions not found, by windows alone", missed_by_windows, "cases"),
        Figure("bytes moved / least, at worst, by windows alone", max(by_windows), ""),
        Figure("bytes moved / least, on average, by windows alone", float(np.mean(by_windows)), ""),
    ]
    if can_bound():
        crowded = [each for seed in range(NR_CROWDED_CASES) if (each := crowded_case(seed)) is not None]
        ratios = [ours / bound for ours, bound in crowded]
        report.figures += [
            Figure(f"bytes moved / bound, at worst, {len(crowded)} cases of 9 to 12 blocks", max(ratios), "", 2.0),
            Figure("bytes moved / bound, on average, the same", float(np.mean(ratios)), "", 2.0),
        ]
        report.notes.append("bound: bytes that are elsewhere in the cheapest layout with the hole (integer program)")
    return report


def _against_least(*, windows_only: bool) -> tuple[int, int, list[float]]:
    """(cases, those with a solution that was not found, bytes moved / least of the others)."""
    cases = (small_case(seed, windows_only=windows_only) for seed in range(NR_SMALL_CASES))
    pairs = [pair for pair in cases if pair is not None]
    possible = [(ours, exact) for ours, exact in pairs if exact is not None]
    return len(pairs), sum(o is None for o, _ in possible), [o / e for o, e in possible if o is not None and e]


def small_case(seed: int, *, windows_only: bool = False) -> tuple[int | None, int | None] | None:
    """(units that we move, the least); None in place of a number where there is no way; None where none is needed."""
    rng = np.random.default_rng([11, seed])
    heap, blocks = Heap(int(rng.integers(6, 13)) * ALIGNMENT), list[Block]()
    for _ in range(60):
        if rng.random() < 0.55 and (block := heap.alloc(int(rng.integers(1, 6)) * ALIGNMENT)) is not None:
            blocks.append(block)
        elif blocks:
            heap.free(blocks.pop(int(rng.integers(len(blocks)))))
    while len(blocks) > 5:
        heap.free(blocks.pop(int(rng.integers(len(blocks)))))
    if heap.free_bytes <= heap.largest_hole:
        return None
    for block in blocks:
        block.pins += [("x", "pinned")] if rng.random() < 1 / 7 else []
    wanted = int(rng.integers(heap.largest_hole // ALIGNMENT + 1, heap.free_bytes // ALIGNMENT + 1))
    starts, sizes = tuple(block.start // ALIGNMENT for block in blocks), [block.size // ALIGNMENT for block in blocks]
    exact = least_moved(starts, sizes, [bool(each.pins) for each in blocks], heap.nr_bytes // ALIGNMENT, wanted)
    found = plan(heap, wanted * ALIGNMENT, windows_only=windows_only)
    return None if found is None else found.nr_bytes // ALIGNMENT, exact


def crowded_case(seed: int) -> tuple[int, int] | None:
    """(units that we move, a bound from below) of a heap of 9 to 12 blocks, some pinned; None where it is no case."""
    rng, nr_blocks = np.random.default_rng([13, seed]), 9 + seed % 4
    heap, blocks = Heap(int(rng.integers(40, 60)) * ALIGNMENT), list[Block]()
    while (block := heap.alloc(int(rng.integers(1, 5)) * ALIGNMENT)) is not None:
        blocks.append(block)
    while len(blocks) > nr_blocks:
        heap.free(blocks.pop(int(rng.integers(len(blocks)))))
    for block in blocks:
        block.pins += [("x", "pinned")] if seed % 3 == 0 and rng.random() < 0.1 else []
    if len(blocks) < nr_blocks or heap.free_bytes <= heap.largest_hole:
        return None
    wanted = int(rng.integers(heap.largest_hole // ALIGNMENT + 1, heap.free_bytes // ALIGNMENT + 1))
    starts, sizes = tuple(block.start // ALIGNMENT for block in blocks), [block.size // ALIGNMENT for block in blocks]
    bound = least_displaced(starts, sizes, [bool(each.pins) for each in blocks], heap.nr_bytes // ALIGNMENT, wanted)
    found = plan(heap, wanted * ALIGNMENT)
    return None if found is None or not bound else (found.nr_bytes // ALIGNMENT, bound)


# With real bytes.


def live_bytes() -> Report:
    """Blocks that are written, moved, and read again; and pages of a device that are put together."""
    clock = ManualClock()
    device = SimulatedDevice(DeviceProfile(memory_bytes=32 * MIB), clock)
    memory = GpuMemory([device], clock=clock, pool=HostPool(32 * MIB))
    defrag = DefragModule()
    defrag.attach(memory)
    heap = Suballocator(memory, "train", 16 * MIB, effort=defrag.effort)
    nr_wrong, nr_failed = _use(heap, random_mix(5, _LIVE_EVENTS, 16 * MIB, MIB))
    heap.close()
    made, cost, before = _scatter_and_run(memory, defrag)
    effort, mover = defrag.effort, heap.mover
    report = Report(
        "gpu defrag",
        "while bytes are in use",
        f"A heap of 16 MiB: {_LIVE_EVENTS:,} events at 85 %, every block written, and read when it is freed. Then "
        "an eighth of a device is in use, everywhere, in pages of 4 KiB. Simulated time of an A100.",
    )
    report.figures = [
        Figure("blocks whose bytes were not as written", nr_wrong, "blocks", 0),
        Figure("requests that failed", nr_failed, "requests", 0),
        Figure("longest pause", effort.longest_ns / 1000, "us", DEFAULT_PAUSE_NS / 1000, "limit"),
        *daemon_pauses(),
        Figure("of moved bytes, remapped without a copy", _share(mover.nr_remapped_bytes, mover.nr_copied_bytes), "%"),
        Figure("blocks of 2 MiB that could be free and are not", before - made, "blocks", 0),
        Figure("bytes moved for each byte of a block gained", cost, ""),
        Figure("violations of any invariant", len(violations(memory)), "", 0),
    ]
    return report


def daemon_pauses() -> list[Figure]:
    """What others wait for in the daemon, where the emulation's own time counts: 32 MiB, an eighth of it in use."""
    clock = PacedClock(time.thread_time_ns)  # what else runs on the machine is not ours
    memory = GpuMemory([SimulatedDevice(DeviceProfile(memory_bytes=32 * MIB), clock)], clock=clock)
    defrag = DefragModule()
    defrag.attach(memory)
    _scatter(memory, memory.locations[0].frames.nr_free_bytes >> 16)
    pauses, besides = list[float](), list[float]()
    effort, limit_us = defrag.effort, DEFAULT_PAUSE_NS / 1000
    running = defrag.running(rests=False)
    for waitable in running:
        if waitable is not None:
            waitable.wait(1)
            continue
        pauses.append(effort.turn_ns / 1000)
        besides.append((effort.turn_ns - effort.moving_ns) / 1000)
    return [
        Figure(f"median of {len(pauses):,} pauses in the daemon, CPU time included", median(pauses), "us"),
        Figure("99 % of them", percentile(pauses, 99), "us", limit_us, "limit"),
        Figure("median of what they are besides moving a page", median(besides), "us", limit_us, "limit"),
        Figure("99 % of what they are besides moving a page", percentile(besides, 99), "us", limit_us, "limit"),
        Figure("the longest of them", max(pauses), "us", limit_us, "limit"),
        Figure("pages moved in each", defrag.relocator.stats["pages_moved"] / len(pauses), ""),
    ]


def _share(part: int, rest: int) -> float:
    return 100 * part / max(1, part + rest)


def _use(heap: Suballocator, events: list[Event]) -> tuple[int, int]:
    """(blocks with wrong bytes, requests that failed)."""
    held: dict[int, Block] = {}
    nr_wrong = nr_failed = 0
    for event in events:
        data = np.random.default_rng(event.name).bytes(event.nr_bytes)
        if event.is_alloc:
            try:
                block = heap.alloc(event.nr_bytes)
            except OSError:
                nr_failed += 1
                continue
            heap.write(block, 0, data)
            held[event.name] = block
        elif event.name in held:
            block = held.pop(event.name)
            nr_wrong += heap.read(block, 0, event.nr_bytes) != data
            heap.free(block)
    return nr_wrong, nr_failed


def _scatter(memory: GpuMemory, nr_pages: int) -> None:
    """Pages of 64 KiB, all over a device; every eighth stays."""
    vas = [memory.allocate("scatter", 64 * defrag_load.KIB) for _ in range(nr_pages)]
    for va in vas:
        memory.write("scatter", va, bytes([va >> 21 & 255]) * (64 * defrag_load.KIB))
    for number, va in enumerate(vas):
        if number % 8:
            memory.free(va)


def _scatter_and_run(memory: GpuMemory, defrag: DefragModule) -> tuple[int, float, int]:
    """(2 MiB blocks free afterwards, bytes moved for each byte gained, blocks that could be free)."""
    frames = memory.locations[0].frames
    _scatter(memory, frames.nr_free_bytes >> 16)
    defrag.run()
    return frames.free_blocks()[-1], defrag.cost, frames.nr_free_bytes // (2 * MIB)
