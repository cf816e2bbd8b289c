# SPDX-License-Identifier: GPL-2.0-only
"""Timing profiles: what the modelled device is made of and how long it takes.

A profile is a TOML file in profiles/ whose every constant carries its unit, its source and whether it is
calibrated. The device's time follows one of three models (reference dpu.md section 6):

    dma       nr_waves * T_ovh + nr_rounds * t_page, where t_page is what a DPU's DMA engine needs to read a
              page into WRAM and write it out again; waves may not overlap, so each is a launch of its own
    linear    a fixed price per page, whatever the DPUs; the seed's sample log
    measured  what the copy really took on this machine

The host's share after the batch (mapping update per PTE) is linear or measured.
"""

import tomllib
from dataclasses import dataclass
from functools import cache
from math import ceil
from pathlib import Path

import msgspec

from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.move import PAGE_SIZE

PROFILE_DIR = Path(__file__).parent / "profiles"


class Constant(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A number and where it is from."""

    value: float
    unit: str
    source: str
    calibrated: bool = True
    """False for an estimate that no published measurement backs."""


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
        return {name: getattr(self, name) for name in self.__struct_fields__}


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

    def ns(self, work: Work, chip: Chip) -> int:
        """T_ovh per wave (a batch without a move is still one launch), t_page per round."""
        launches_us = max(work.nr_waves, 1) * self.launch_overhead_us.value
        page_us = self.copy_cycles(PAGE_SIZE) / chip.fck_frequency_mhz.value
        return round(1000 * (launches_us + work.nr_rounds * page_us))


class Linear(_Group, frozen=True, forbid_unknown_fields=True, tag_field="model", tag="linear"):
    """So many ns for so many items, in proportion."""

    batch_ns: Constant
    batch_items: Constant

    def ns(self, work: Work, chip: Chip) -> int:
        """Time of `work.nr_pages` items."""
        return round(work.nr_pages * self.batch_ns.value / self.batch_items.value)


class Measured(_Group, frozen=True, forbid_unknown_fields=True, tag_field="model", tag="measured"):
    """No model: this machine's own time."""

    def ns(self, work: Work, chip: Chip) -> int:
        """The wall time, as measured."""
        return work.wall_ns


class Host(_Group, frozen=True, forbid_unknown_fields=True):
    """What the host notices of the device besides the batch itself."""

    result_timeout_us: Constant


class Profile(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One profile, read and checked; `load_profile` makes it."""

    name: str
    doc: str
    chip: Chip
    host: Host
    device: Dma | Linear | Measured
    mapping: Linear | Measured

    def device_ns(self, work: Work) -> int:
        """Modelled (or measured) device time of a batch in ns."""
        return self.device.ns(work, self.chip)

    def mapping_update_ns(self, nr_ptes: int, wall_ns: int) -> int:
        """Modelled time in ns to update `nr_ptes` PTEs after a batch; `wall_ns` is what it took here."""
        return self.mapping.ns(Work(nr_ptes, 1, nr_ptes, wall_ns), self.chip)

    @property
    def result_timeout_ns(self) -> int:
        """How long the host waits for a device that does not answer."""
        return round(1000 * self.host.result_timeout_us.value)

    def constants(self) -> dict[str, Constant]:
        """Every constant as `table.name`, for reports."""
        tables = {"chip": self.chip, "host": self.host, "device": self.device, "mapping": self.mapping}
        return {f"{t}.{name}": c for t, group in tables.items() for name, c in group.constants().items()}


def profile_names() -> list[str]:
    """Names of the profiles there are."""
    return sorted(path.stem for path in PROFILE_DIR.glob("*.toml"))


@cache
def load_profile(name: str) -> Profile:
    """The profile of that name; DpuError(INVALID_PROFILE) if there is none."""
    if name not in profile_names():
        raise DpuError(DpuErr.INVALID_PROFILE)
    return msgspec.convert(tomllib.loads((PROFILE_DIR / f"{name}.toml").read_text()), Profile)
