# SPDX-License-Identifier: GPL-2.0-only
"""When an engine gains: batch x DPUs x launch overhead -> speedup of migrating a batch, metadata included.

Nothing is measured: the models of reference dpu.md section 6, with the constants of the profiles. Both CPU baselines
do the same work on the same core: `batched` unmaps the whole batch, flushes once and copies; `serial` does page after
page, with a flush for each. The speedup over the batched one is what an engine is worth; the other one mostly says
what batching is worth.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial

import numpy as np

from dpud.bench.report import Line, Report
from dpud.dpu.move import PAGE_SIZE, count_waves
from dpud.dpu.profile import Channels, Cpu, Dma, Profile, Work, load_cpu, load_profile, rank_chip

BATCHES = (32, 128, 512, 2048, 16384)
NR_DPUS = (1, 8, 40, 64, 128, 512)
OVERHEADS_US = (5.0, 35.0, 100.0)
MEASURED_BATCH = 512
"""What AMD's figures for PTDMA and CPU threads were measured with."""
NR_CPUS = 16
"""That a TLB flush reaches."""
PACKED_PAGES = (512, 4096, 32768, 262144)
PACKED_DPUS = 64
_SEED = 7


def batched_ns(cpu: Cpu, nr_pages: int) -> float:
    """One batch by the CPU."""
    return cpu.migrate_ns(nr_pages) + cpu.tlb.ns(NR_CPUS)


def serial_ns(cpu: Cpu, nr_pages: int) -> float:
    """Page after page by the CPU, a flush for each, no call into the kernel."""
    return nr_pages * (cpu.migrate_ns(1) + cpu.tlb.ns(NR_CPUS))


def offloaded_ns(cpu: Cpu, nr_pages: int, copy_ns: float) -> float:
    """The same batch with the copies made by an engine."""
    return nr_pages * cpu.metadata.metadata_ns.value + cpu.tlb.ns(NR_CPUS) + copy_ns


def dpu_copy_ns(profile: Profile, nr_pages: int, nr_dpus: int, overhead_us: float) -> float:
    """One launch; pages shared out over the DPUs."""
    assert isinstance(profile.device, Dma)
    page_us = profile.device.page_us(rank_chip(profile))
    return 1000 * (overhead_us + math.ceil(nr_pages / nr_dpus) * page_us)


def cap(cpu: Cpu) -> float:
    """Amdahl: the most that an engine could gain, if it copied in no time."""
    page_ns = PAGE_SIZE / cpu.copy.bandwidth_bytes_per_ns.value
    return 1 + page_ns / cpu.metadata.metadata_ns.value


def breakeven_pages(cpu: Cpu, page_ns: float, overhead_ns: float) -> int | None:
    """The batch from which an engine of so much a page copies faster than one core; None: it never does."""
    gain_ns = PAGE_SIZE / cpu.copy.bandwidth_bytes_per_ns.value - page_ns
    return math.ceil(overhead_ns / gain_ns) if gain_ns > 0 else None


def speedup(cpu: Cpu, nr_pages: int, copy_ns: float) -> str:
    """`1.12 (7.5)`: over the batched CPU, and over the serial one."""
    took_ns = offloaded_ns(cpu, nr_pages, copy_ns)
    gain = batched_ns(cpu, nr_pages) / took_ns
    text = f"{gain:.2f}" if gain >= 1.005 else "no gain"
    return f"{text} ({serial_ns(cpu, nr_pages) / took_ns:.1f})"


def _row(cpu: Cpu, label: tuple[str, ...], copy_ns: Callable[[int], float], first: str, known_from: int = 1) -> Line:
    cells = (speedup(cpu, nr, copy_ns(nr)) if nr >= known_from else "?" for nr in BATCHES)
    return Line((*label, *cells, first))


def _shared(cpu: Cpu, label: tuple[str, ...], page_ns: float) -> Line:
    """An engine of which only the price of a page in a batch of 512 is published."""
    first = "never" if breakeven_pages(cpu, page_ns, 0) is None else "?"
    return _row(cpu, label, lambda nr: nr * page_ns, first, MEASURED_BATCH)


def dpu_rows(cpu: Cpu, profile: Profile) -> Iterator[Line]:
    """Overhead x DPUs."""
    assert isinstance(profile.device, Dma)
    page_us = profile.device.page_us(rank_chip(profile))
    for overhead_us in OVERHEADS_US:
        for nr_dpus in NR_DPUS:
            first = breakeven_pages(cpu, 1000 * page_us / nr_dpus, 1000 * overhead_us)
            label = f"{overhead_us:g} us", str(nr_dpus)
            copy_ns = partial(dpu_copy_ns, profile, nr_dpus=nr_dpus, overhead_us=overhead_us)
            yield _row(cpu, label, copy_ns, "never" if first is None else str(first))


def engine_rows(cpu: Cpu) -> Iterator[Line]:
    """The other engines, and CPU threads."""
    ptdma = load_profile("ptdma").device
    assert isinstance(ptdma, Channels)
    assert cpu.threads is not None
    for nr in (1, 4, 16):
        yield _shared(cpu, ("ptdma", f"{nr} ch."), ptdma.page_ns(nr))
    for name in ("dsa", "ideal"):
        copy_ns = partial(_copy_ns, load_profile(name))
        first = next(nr for nr in range(1, 1 << 20) if copy_ns(nr) < cpu.copy.ns(nr * PAGE_SIZE))
        yield _row(cpu, (name, ""), copy_ns, str(first))
    for nr in (1, 8):
        yield _shared(cpu, ("CPU threads", str(nr)), cpu.threads.page_ns(nr))


def _copy_ns(profile: Profile, nr_pages: int) -> float:
    return profile.device_ns(Work(nr_pages, 1, nr_pages, 0))


def packed(nr_pages: int, nr_dpus: int) -> Work:
    """What packing a region takes in which a random half of the pages is there."""
    occupied = np.flatnonzero(np.random.default_rng(_SEED).random(nr_pages) < 0.5)
    rank = np.arange(len(occupied))
    moves = occupied > rank
    src, dst = ((pfns[moves] << 12).astype(np.uint64) for pfns in (occupied, rank))
    nr_waves, nr_rounds = count_waves(src, dst, len(src), nr_dpus)
    return Work(len(src), nr_waves, nr_rounds, 0)


def packed_rows(cpu: Cpu, profile: Profile) -> Iterator[Line]:
    """Real packing: a wave may not land on pages that have yet to move, and each wave is a launch."""
    for region in PACKED_PAGES:
        work = packed(region, PACKED_DPUS)
        device_ns = profile.device_ns(work)
        gain = speedup(cpu, work.nr_pages, device_ns)
        cpu_us = cpu.copy.ns(work.nr_pages * PAGE_SIZE) / 1000
        texts = region, work.nr_pages, work.nr_waves, f"{device_ns / 1000:,.0f} us", f"{cpu_us:,.0f} us", gain
        yield Line(tuple(str(text) for text in texts))


def run() -> Report:
    cpu, profile = load_cpu("zen3-2025"), load_profile("upmem-v1a")
    batches = tuple(f"{nr} pages" for nr in BATCHES)
    report = Report(
        "breakeven",
        "speedup over the batched CPU (over the serial one), upmem-v1a beside a Zen 3 core",
        "Nothing is measured: the models of dpud/dpu/profiles. One launch for each batch, metadata included.",
        headings=("T_ovh", "DPUs", *batches, "Break-even"),
    )
    report.figures = list(dpu_rows(cpu, profile))
    haswell = load_cpu("haswell-2019")
    report.notes = [
        f"Amdahl: with copies in no time, {cap(cpu):.2f} on this core ({cap(haswell):.2f} on a Haswell of 2019)",
        "break-even: the batch from which the copies alone are faster than the core's",
        "the launch overhead of a UPMEM rank (T_ovh) is not published: 35 us is an estimate",
        *haswell_notes(haswell, profile),
    ]
    engines = Report(
        "breakeven",
        "the same for other engines",
        "Of PTDMA and CPU threads nothing is published for batches below 512 pages.",
        headings=("Engine", "", *batches, "Break-even"),
    )
    engines.figures = list(engine_rows(cpu))
    packing = Report(
        "breakeven",
        f"packing a half-empty region, {PACKED_DPUS} DPUs",
        "A random half of the region's pages is there. Packing moves it in waves, each a launch of 35 us.",
        headings=("Region", "Moves", "Waves", "Ours", "CPU copies", "Speedup over batched (serial)"),
    )
    packing.figures = list(packed_rows(cpu, profile))
    report.parts = [engines, packing]
    return report


def haswell_notes(cpu: Cpu, profile: Profile) -> list[str]:
    """The way to the seed's 2 to 5 times."""
    nr = 512
    took_ns = nr * cpu.metadata.metadata_ns.value + dpu_copy_ns(profile, nr, 64, 35.0)
    call_ns = nr * (cpu.call.fixed_ns.value + cpu.migrate_ns(1))
    return [
        f"Haswell 2019, 512 pages, 64 DPUs: {cpu.migrate_ns(nr) / took_ns:.2f} over one batch, {call_ns / took_ns:.1f} "
        f"over a call for each page; {call_ns / cpu.migrate_ns(nr):.1f} of that is batching, which needs no DPU"
    ]
