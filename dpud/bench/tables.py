# SPDX-License-Identifier: GPL-2.0-only
"""Published measurements of page migration beside what our models give for them, and the seed's table explained.

Nothing is measured here. Every constant comes from a profile; those that were made to reproduce a published row say to
which (`fitted_to`). A row that a constant was fitted to validates nothing; where nothing was fitted, the error is the
model's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from dpud.bench.report import Line, Report
from dpud.dpu.move import PAGE_SIZE
from dpud.dpu.profile import Channels, Constant, Cpu, Profile, Work, load_cpu, load_profile

TOLERANCE = 0.10
BATCH_PAGES = 512  # what migrate_pages takes at a time (HPAGE_PMD_NR)
GIB = 1 << 30

# Published, in GB/s (reference dpu.md 2.2: Zi Yan's RFC, 2019; 2.3: AMD's RFC V3, 2025).
ZI_YAN_4K = {"1 x 4K": (1, 0.312, 1.385), "512 x 4K": (512, 0.854, 1.983)}
ZI_YAN_THP = (2.387, 2.481)
AMD_VANILLA = {"4K": 3.73, "16K": 5.53, "64K": 5.90, "128K": 6.34, "256K": 6.50, "512K": 6.86, "1M": 6.92, "2M": 10.67}
AMD_THREADS_4K = {1: 3.84, 2: 4.04, 4: 4.72, 8: 4.91, 12: 4.84, 16: 4.77}
AMD_PTDMA_4K = {1: 2.75, 2: 3.35, 4: 4.01, 8: 4.46, 12: 4.60, 16: 4.61}
AMD_COPY_PERCENT = {"512 x 4K": 35.0, "512 x 2M": 97.0, "1 x 2M": 66.0}

FITTED, FREE, OUTSIDE = "fitted", "not fitted", "not covered"


@dataclass(frozen=True)
class Published:
    """One published figure and ours. `how` is one of FITTED, FREE, OUTSIDE."""

    what: str
    published: float
    ours: float
    how: str
    unit: str = "GB/s"

    @property
    def error(self) -> float:
        return self.ours / self.published - 1

    @property
    def verdict(self) -> str:
        """Rows that the model is meant for have to be within TOLERANCE."""
        if self.how is OUTSIDE:
            return ""
        return "met" if abs(self.error) <= TOLERANCE else "missed"

    def cells(self) -> tuple[str, ...]:
        published, ours = (f"{value:.3f} {self.unit}" for value in (self.published, self.ours))
        return self.what, published, ours, f"{100 * self.error:+.1f} %", self.how


def zi_yan(cpu: Cpu) -> Iterator[Published]:
    """migrate_pages on a Haswell, and its copying alone."""
    for what, (nr_pages, migrate, copy) in ZI_YAN_4K.items():
        nr_bytes = nr_pages * PAGE_SIZE
        total_ns = cpu.call.fixed_ns.value + cpu.migrate_ns(nr_pages)
        yield Published(f"Zi Yan 2019, {what}", migrate, nr_bytes / total_ns, FITTED)
        yield Published(f"Zi Yan 2019, {what}, copy only", copy, nr_bytes / cpu.copy.ns(nr_bytes), FITTED)
    thp = 512 * PAGE_SIZE
    total_ns = cpu.call.fixed_ns.value + cpu.migrate_ns(1, thp)
    yield Published("Zi Yan 2019, THP", ZI_YAN_THP[0], thp / total_ns, OUTSIDE)
    yield Published("Zi Yan 2019, THP, copy only", ZI_YAN_THP[1], thp / cpu.copy.ns(thp), OUTSIDE)


def amd(cpu: Cpu, ptdma: Profile) -> Iterator[Published]:
    """move_pages of 1 GiB on a Zen 3."""
    for size, published in AMD_VANILLA.items():
        how = {"4K": FITTED, "2M": FITTED}.get(size, OUTSIDE)
        rate = gib_rate(cpu, folio_bytes(size), cpu.migrate_ns(1, folio_bytes(size)))
        yield Published(f"AMD V3, {size}, vanilla", published, rate, how)
    assert cpu.threads is not None
    assert isinstance(ptdma.device, Channels)
    metadata_ns = cpu.metadata.metadata_ns.value
    for nr, published in AMD_THREADS_4K.items():
        rate = gib_rate(cpu, PAGE_SIZE, metadata_ns + cpu.threads.page_ns(nr))
        yield Published(f"AMD V3, 4K, CPU threads: {nr}", published, rate, FITTED)
    for nr, published in AMD_PTDMA_4K.items():
        rate = gib_rate(cpu, PAGE_SIZE, metadata_ns + ptdma.device.page_ns(nr))
        yield Published(f"AMD V3, 4K, PTDMA channels: {nr}", published, rate, FITTED)


def gib_rate(cpu: Cpu, nr_bytes: int, folio_ns: float) -> float:
    """GB/s of one call for 1 GiB in folios of `nr_bytes`."""
    return GIB / (cpu.call.fixed_ns.value + GIB / nr_bytes * folio_ns)


def folio_bytes(size: str) -> int:
    return int(size[:-1]) << {"K": 10, "M": 20}[size[-1]]


def shares(cpu: Cpu) -> Iterator[Published]:
    """folio_copy's share of move_pages, to which nothing was fitted."""
    for what, published in AMD_COPY_PERCENT.items():
        nr, size = what.split(" x ")
        copy_ns = cpu.copy.ns(int(nr) * folio_bytes(size))
        total_ns = cpu.call.fixed_ns.value + cpu.migrate_ns(int(nr), folio_bytes(size))
        how = OUTSIDE if what == "1 x 2M" else FREE
        yield Published(f"AMD, copying in move_pages, {what}", published, 100 * copy_ns / total_ns, how, "%")


def rows() -> list[Published]:
    """Every published row there is."""
    zen3, ptdma = load_cpu("zen3-2025"), load_profile("ptdma")
    return [*zi_yan(load_cpu("haswell-2019")), *amd(zen3, ptdma), *shares(zen3)]


def fitted_constants() -> list[str]:
    """One note for each constant that was fitted."""
    sources: dict[str, dict[str, Constant]] = {
        "zen3-2025": load_cpu("zen3-2025").constants(),
        "haswell-2019": load_cpu("haswell-2019").constants(),
        "ptdma": {key: value for key, value in load_profile("ptdma").constants().items() if key.startswith("device.")},
    }
    return [
        f"{where} {name} = {constant.value:g} {constant.unit}: fitted to {constant.fitted_to}"
        for where, constants in sources.items()
        for name, constant in constants.items()
        if constant.fitted_to
    ]


# The seed's table.

NR_SEED_PAGES = 128


def seed_lines() -> Iterator[Line]:
    """The seed's `traditional 2-10 ms, DPU 0.25-1.7 ms`, taken apart."""
    zen3, haswell = load_cpu("zen3-2025"), load_cpu("haswell-2019")
    upmem, seed = load_profile("upmem-v1a"), load_profile("seed")
    nr = NR_SEED_PAGES
    yield _line(
        "traditional", "2 - 10 ms", "1.07 - 14.1 ms", "published: mean THP fault under fragmentation, 1 to 30 threads"
    )
    yield _line("", "", "", "of thpscale, Linux 6.5: scanning, isolating, migrating, retrying")
    one_ns = nr * (haswell.call.fixed_ns.value + haswell.migrate_ns(1))
    yield _line("", "", _ms(one_ns), "migrating 128 pages, a call for each, Haswell")
    yield _line("", "", _ms(haswell.migrate_ns(nr)), "the same in one batch, Haswell: the batched CPU baseline")
    yield _line("", "", _ms(zen3.migrate_ns(nr)), "the same in one batch, Zen 3: the batched CPU baseline")
    for nr_dpus in (1, 8, 64):
        device_ns = upmem.device_ns(Work(nr, 1, -(-nr // nr_dpus), 0))
        what, published = ("DPU", "0.25 - 1.7 ms") if nr_dpus == 1 else ("", "")
        yield _line(what, published, _ms(device_ns), f"copying 128 pages, upmem-v1a, DPUs: {nr_dpus}, one launch")
    seed_ns = seed.device_ns(Work(nr, 1, 2, 0)) + seed.mapping_update_ns(64, 0)
    yield _line("sample log", "0.358 ms", _ms(seed_ns), "234567 + 123456 ns: ascending digits, no measurement")
    whole_ns = nr * zen3.metadata.metadata_ns.value + upmem.device_ns(Work(nr, 1, -(-nr // 64), 0))
    gain = zen3.migrate_ns(nr) / whole_ns
    yield _line("like with like", "2 - 5 x", f"{gain:.2f} x", f"128 pages with metadata, 64 DPUs ({_ms(whole_ns)})")
    yield _line("", "", "", f"against the batched Zen 3: {'a gain' if gain > 1 else 'no gain'}")


def _line(*texts: str) -> Line:
    return Line(texts)


def _ms(ns: float) -> str:
    return f"{ns / 1e6:.3g} ms"


def run() -> Report:
    report = Report(
        "tables",
        "published measurements of page migration and our models",
        "Nothing is measured: the models of dpud/dpu/profiles, held against what was published.",
        headings=("Row", "Published", "Ours", "Error", "Constants"),
    )
    found = rows()
    report.figures = list(found)
    worst = max(abs(row.error) for row in found if row.how is not OUTSIDE)
    report.notes = [
        f"rows that the models are for: within {100 * worst:.1f} %",
        "a fit is not a validation: of those rows, only copying's shares of move_pages had nothing fitted to them",
        "not covered: folios between 4K and 2M, which are copied more slowly than either; a THP on a Haswell, which is "
        "copied faster than 512 scattered pages; one 2M folio by itself: the way into the kernel is not calibrated. "
        "CPU threads and PTDMA channels are modelled for 4K only",
        *fitted_constants(),
    ]
    seed = Report(
        "tables",
        "what the seed's `traditional 2-10 ms, DPU 0.25-1.7 ms` compares",
        "A fault under fragmentation on one side, the copying of 128 pages on the other.",
        headings=("Row", "Seed", "Figure", "What it is"),
    )
    seed.figures = list(seed_lines())
    report.parts = [seed]
    return report
