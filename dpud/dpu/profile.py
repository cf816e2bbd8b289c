# SPDX-License-Identifier: GPL-2.0-only
"""Timing profiles: an engine's model and constants, and those of the CPU that serves it.

A profile is a TOML file in profiles/ whose every constant carries its unit, its source, whether it is calibrated, and
to which published figure it was fitted. It stands for an engine (kernelsim/dpu_hw.py): who copies, how long that takes
by one of these models (reference dpu.md section 6), and which CPU does the rest.

    memcpy       the CPU's own copying
    dma          nr_waves * T_ovh + nr_rounds * t_page, where t_page is what a DPU's DMA engine needs to read a
                 page into WRAM and write it out again; waves may not overlap, so each is a launch of its own
    channels     a serial and a shared part per page, the latter divided by the DMA channels (PTDMA)
    descriptors  a fixed price per batch of descriptors, then bandwidth (DSA)
    linear       a fixed price per page, whatever the device; the seed's sample log
    measured     what the copy really took on this machine
    zero         no time at all: what an engine could gain at most

The CPU's share (profiles/cpu/) is metadata per folio (unmap; remap, LRU, flags), TLB shootdowns and scanning. Published
metadata costs include one shootdown for each 512 pages, which is counted twice here: 0.3 % at most.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path
from typing import Any, Literal

import msgspec

from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.move import PAGE_SIZE
from kernelsim.dpu_hw import BatchTimes, HostWork

PROFILE_DIR = Path(__file__).parent / "profiles"
DEFAULT_PROFILE = "upmem-v1a"


class Constant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number and where it is from."""

    value: float
    unit: str
    source: str
    calibrated: bool = True
    """False for an estimate that no published measurement backs."""
    fitted_to: str = ""
    """The published rows that it was made to reproduce, which therefore validate nothing."""

    @property
    def standing(self) -> str:
        """What it is worth: `estimate`, `fitted` (to published rows) or `published`."""
        return "estimate" if not self.calibrated else "fitted" if self.fitted_to else "published"


class _Group(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A table of constants; a field's name ends in its unit, and the file must agree."""

    def __post_init__(self) -> None:
        for name, constant in self.constants().items():
            if not name.endswith(f"_{constant.unit.lower()}"):
                raise ValueError(f"{name} is not in {constant.unit}")
            if constant.value <= 0:
                raise ValueError(f"{name} must be above 0")

    def constants(self) -> dict[str, Constant]:
        """The constants of this table by name."""
        found = {name: getattr(self, name) for name in self.__struct_fields__}
        return {name: constant for name, constant in found.items() if constant is not None}


@dataclass(frozen=True)
class Work:
    """What a batch asked of the device."""

    nr_pages: int
    nr_waves: int
    nr_rounds: int
    """Sum over waves of ceil(pages / DPUs)."""
    wall_ns: int
    """What the copy took on this machine."""


class Chip(_Group, frozen=True, forbid_unknown_fields=True):
    """Limits of one DPU."""

    mram_bytes: Constant
    wram_bytes: Constant
    iram_bytes: Constant
    nr_tasklets: Constant
    fck_frequency_mhz: Constant


class Metadata(_Group, frozen=True, forbid_unknown_fields=True):
    """What migrating a folio costs besides copying it, and how that divides."""

    metadata_ns: Constant
    unmap_percent: Constant
    remap_percent: Constant
    lru_percent: Constant
    flags_percent: Constant

    def part_ns(self, percent: float) -> float:
        """That share of it, per folio."""
        return self.metadata_ns.value * percent / 100


class Copy(_Group, frozen=True, forbid_unknown_fields=True):
    """One core copying page after page."""

    bandwidth_bytes_per_ns: Constant
    start_ns: Constant | None = None
    """What a series of copies costs beyond its bytes: cold caches and TLBs of its first page."""

    def ns(self, nr_bytes: int) -> float:
        """Copying so much in one series."""
        start = self.start_ns.value if self.start_ns else 0.0
        return start + nr_bytes / self.bandwidth_bytes_per_ns.value


class Threads(_Group, frozen=True, forbid_unknown_fields=True):
    """Several cores copying a batch of 4 KiB pages: a part that does not divide, and one that does."""

    serial_ns: Constant
    shared_ns: Constant

    def page_ns(self, nr_threads: int) -> float:
        """Per 4 KiB page."""
        return self.serial_ns.value + self.shared_ns.value / nr_threads


class Call(_Group, frozen=True, forbid_unknown_fields=True):
    """The way into the kernel and out again; only the benchmarks behind the published tables pay it."""

    fixed_ns: Constant


class Tlb(_Group, frozen=True, forbid_unknown_fields=True):
    """A shootdown."""

    flush_ns: Constant
    receiver_ns: Constant

    def ns(self, nr_cpus: int) -> float:
        """One flush on so many CPUs, the flushing one included."""
        return self.flush_ns.value + self.receiver_ns.value * max(nr_cpus - 1, 0)


class Scan(_Group, frozen=True, forbid_unknown_fields=True):
    """Looking at page frames, per frame; and how many Linux's scanners look at for each page that they migrate."""

    migrate_scan_ns: Constant
    free_scan_ns: Constant
    migrate_scanned_pfns: Constant
    free_scanned_pfns: Constant


class Cpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The CPU that compacts, or that serves the engine that does; `load_cpu` makes it."""

    name: str
    doc: str
    metadata: Metadata
    copy: Copy
    call: Call
    tlb: Tlb
    scan: Scan
    threads: Threads | None = None

    def migrate_ns(self, nr_folios: int, folio_bytes: int = PAGE_SIZE) -> float:
        """Migrating so many folios in one batch, without what leads up to it (dpu.md 6(a) without T_fix and scan)."""
        return nr_folios * self.metadata.metadata_ns.value + self.copy.ns(nr_folios * folio_bytes)

    def scan_ns(self, nr_pages: int) -> float:
        """What Linux's two scanners take to find so many pages and places for them."""
        scan = self.scan
        migrate = scan.migrate_scanned_pfns.value * scan.migrate_scan_ns.value
        return nr_pages * (migrate + scan.free_scanned_pfns.value * scan.free_scan_ns.value)

    def constants(self) -> dict[str, Constant]:
        """Every constant as `table.name`."""
        return _constants(self)


class Dma(_Group, frozen=True, forbid_unknown_fields=True, tag_field="model", tag="dma"):
    """A DPU that copies through its WRAM."""

    dma_read_fixed_cycles: Constant
    dma_write_fixed_cycles: Constant
    dma_per_byte_cycles: Constant
    dma_max_bytes: Constant
    launch_overhead_us: Constant

    def copy_cycles(self, nr_bytes: int) -> float:
        """Cycles to read `nr_bytes` into WRAM and write them back, in transfers of at most dma_max_bytes."""
        nr_transfers = ceil(nr_bytes / self.dma_max_bytes.value)
        fixed = self.dma_read_fixed_cycles.value + self.dma_write_fixed_cycles.value
        return nr_transfers * fixed + 2 * nr_bytes * self.dma_per_byte_cycles.value

    def page_us(self, chip: Chip) -> float:
        """t_page: one page on one DPU."""
        return self.copy_cycles(PAGE_SIZE) / chip.fck_frequency_mhz.value

    def ns(self, work: Work, profile: "Profile") -> float:
        """T_ovh per wave (a batch without a move is still one launch), t_page per round."""
        launches_us = max(work.nr_waves, 1) * self.launch_overhead_us.value
        return 1000 * (launches_us + work.nr_rounds * self.page_us(rank_chip(profile)))


class Channels(_Group, frozen=True, forbid_unknown_fields=True, tag_field="model", tag="channels"):
    """A DMA engine with several channels."""

    serial_ns: Constant
    shared_ns: Constant
    nr_channels: Constant

    def page_ns(self, nr_channels: float) -> float:
        """Per 4 KiB page."""
        return self.serial_ns.value + self.shared_ns.value / nr_channels

    def ns(self, work: Work, profile: "Profile") -> float:
        return work.nr_pages * self.page_ns(self.nr_channels.value)


class Descriptors(_Group, frozen=True, forbid_unknown_fields=True, tag_field="model", tag="descriptors"):
    """A DMA engine that is given batches of descriptors, one for each page."""

    batch_fixed_ns: Constant
    batch_max_pages: Constant
    bandwidth_bytes_per_ns: Constant
    descriptor_ns: Constant

    def ns(self, work: Work, profile: "Profile") -> float:
        page_ns = max(PAGE_SIZE / self.bandwidth_bytes_per_ns.value, self.descriptor_ns.value)
        return ceil(work.nr_pages / self.batch_max_pages.value) * self.batch_fixed_ns.value + work.nr_pages * page_ns


class Memcpy(_Group, frozen=True, forbid_unknown_fields=True, tag_field="model", tag="memcpy"):
    """The profile's CPU copies."""

    def ns(self, work: Work, profile: "Profile") -> float:
        assert profile.cpu is not None
        return profile.cpu.copy.ns(work.nr_pages * PAGE_SIZE)


class Zero(_Group, frozen=True, forbid_unknown_fields=True, tag_field="model", tag="zero"):
    """Copies take no time."""

    def ns(self, work: Work, profile: "Profile") -> float:
        return 0.0


class Linear(_Group, frozen=True, forbid_unknown_fields=True, tag_field="model", tag="linear"):
    """So many ns for so many items, in proportion."""

    batch_ns: Constant
    batch_items: Constant

    def ns(self, work: Work, profile: "Profile") -> float:
        """Time of `work.nr_pages` items."""
        return work.nr_pages * self.batch_ns.value / self.batch_items.value


class Remap(_Group, frozen=True, forbid_unknown_fields=True, tag_field="model", tag="cpu"):
    """The remapping part of the CPU's metadata cost, for each PTE."""

    def ns(self, work: Work, profile: "Profile") -> float:
        assert profile.cpu is not None
        return work.nr_pages * profile.cpu.metadata.part_ns(profile.cpu.metadata.remap_percent.value)


class Measured(_Group, frozen=True, forbid_unknown_fields=True, tag_field="model", tag="measured"):
    """No model: this machine's own time."""

    def ns(self, work: Work, profile: "Profile") -> float:
        """The wall time, as measured."""
        return work.wall_ns


class Host(_Group, frozen=True, forbid_unknown_fields=True):
    """What the host notices of the device besides the batch itself."""

    result_timeout_us: Constant


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One engine, read and checked; `load_profile` makes it. It is a kernelsim.dpu_hw.Engine."""

    name: str
    doc: str
    device: Dma | Channels | Descriptors | Memcpy | Zero | Linear | Measured
    mapping: Remap | Linear | Measured
    copier: Literal["device", "cpu", "cpu-batched"] = "device"
    cpu: Cpu | None = None
    """None: the profile knows nothing of what the CPU does besides the mapping."""
    host: Host | None = None
    chip: Chip | None = None
    """None: no DPU. The emulator then moves the bytes on ranks of the default chip."""

    def device_ns(self, work: Work) -> int:
        """Modelled (or measured) time of a batch's copies in ns."""
        return round(self.device.ns(work, self))

    def copy_ns(self, nr_pages: int, wall_ns: int) -> int:
        """The same where the CPU copied, in `wall_ns`."""
        return self.device_ns(Work(nr_pages, 1, nr_pages, wall_ns))

    def mapping_update_ns(self, nr_ptes: int, wall_ns: int) -> int:
        """Modelled time in ns to update `nr_ptes` PTEs after a batch; `wall_ns` is what it took here."""
        return round(self.mapping.ns(Work(nr_ptes, 1, nr_ptes, wall_ns), self))

    @property
    def measured(self) -> bool:
        """Its times are this machine's own."""
        return isinstance(self.device, Measured)

    def times(self, work: HostWork, device_ns: int) -> BatchTimes:
        """A batch with the CPU's share of it; see kernelsim.dpu_hw."""
        if self.measured:
            return BatchTimes(work.prepare_wall_ns, 0, 0, device_ns, work.update_wall_ns)
        cpu = self.cpu
        if cpu is None:
            return BatchTimes(0, 0, 0, device_ns, self.mapping_update_ns(work.nr_ptes, work.update_wall_ns))
        metadata = cpu.metadata
        unmap = metadata.unmap_percent.value
        return BatchTimes(
            isolate_ns=round(work.nr_scanned * cpu.scan.migrate_scan_ns.value),
            unmap_ns=round(work.nr_folios * metadata.part_ns(unmap)),
            flush_ns=round(work.nr_flushes * cpu.tlb.ns(work.nr_cpus)),
            device_ns=device_ns,
            remap_ns=round(work.nr_folios * metadata.part_ns(100 - unmap)),
        )

    @property
    def result_timeout_ns(self) -> int:
        """How long the host waits for a device that does not answer."""
        return round(1000 * self.host.result_timeout_us.value) if self.host else 0

    def constants(self) -> dict[str, Constant]:
        """Every constant as `table.name`, for reports; the CPU's as `cpu.table.name`."""
        return _constants(self)

    def describe(self) -> str:
        """The text of debugfs dpu_compact/profile; see kernelsim.dpu_hw."""
        constants = self.constants().items()
        lines = [f"{name} {c.value:g} {c.unit} {c.standing}: {c.source}" for name, c in constants]
        return "\n".join([f"{self.name}: {self.doc}", *lines, ""])


def _constants(tables: msgspec.Struct) -> dict[str, Constant]:
    found: dict[str, Constant] = {}
    for name in tables.__struct_fields__:
        group = getattr(tables, name)
        if isinstance(group, _Group | Cpu):
            found |= {f"{name}.{key}": constant for key, constant in group.constants().items()}
    return found


def rank_chip(profile: Profile) -> Chip:
    """The chip of the ranks that move the bytes of this engine."""
    chip = profile.chip or load_profile(DEFAULT_PROFILE).chip
    assert chip is not None
    return chip


@cache
def load_cpu(name: str) -> Cpu:
    """The CPU profile of that name."""
    return msgspec.convert(_read(PROFILE_DIR / "cpu" / f"{name}.toml"), Cpu)


def _read(path: Path) -> dict[str, Any]:
    return tomllib.loads(path.read_text())


def profile_names() -> list[str]:
    """Names of the profiles there are."""
    return sorted(path.stem for path in PROFILE_DIR.glob("*.toml"))


@cache
def load_profile(name: str) -> Profile:
    """The profile of that name; DpuError(INVALID_PROFILE) if there is none."""
    if name not in profile_names():
        raise DpuError(DpuErr.INVALID_PROFILE)
    data = _read(PROFILE_DIR / f"{name}.toml")
    if "cpu" in data:
        data["cpu"] = _read(PROFILE_DIR / "cpu" / f"{data['cpu']}.toml")
    return msgspec.convert(data, Profile)
