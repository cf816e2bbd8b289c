# SPDX-License-Identifier: GPL-2.0-only
"""Profile strings: `k=v,k=v` with the SDK's keys (reference dpu.md 1.5).

The properties of an allocation are those of $UPMEM_PROFILE_BASE, then the program's own, then those of $UPMEM_PROFILE;
of two values for one key the later counts. An unknown key, or a value that the key does not take, is INVALID_PROFILE,
with a note that says which. (nrDpusPerCi went with SDK 2024.2, so it is unknown.)

Sizes are bytes, iramSize is instructions of 6 bytes; integers may be hexadecimal. fckFrequency is in MHz, and the DPUs
run at fckFrequency / clockDivision (2 by default: 700 MHz make DPUs of 350 MHz). `backend=simulator` gives ranks of
one DPU, up to 64 of them; `hw` the emulated DIMMs. disabledMask has a bit for each DPU of a rank, slice * 8 + member.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec

from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.profile import Chip, load_profile, rank_chip
from dpud.dpu.worker import NR_JOBS_PER_RANK

CLOCK_DIVISION = 2
IRAM_INSTRUCTION_BYTES = 6
CHIPS = {4: "upmem-v1a", 68: "upmem-v1b"}
"""dpu_chip_id_e (vD_asic8, vD_asic8_v1_4) and the profile that has its limits."""
REGION_MODES = {"perf": 1, "safe": 2, "hybrid": 3}

NO_EFFECT = {
    "cmdsBufferSize": "there is no buffer of control interface commands",
    "dispatchOnAllRanks": "every rank has a thread of its own",
    "rankPath": "ranks are no device files",
    "ignoreVersion": "there is no driver whose version could differ",
    "tryRepairIram": "no memory here needs repair",
    "tryRepairWram": "no memory here needs repair",
    "ignoreVpd": "there is no DIMM with a VPD",
    "nrThreadPerPool": "one thread copies the bytes of a transfer",
    "poolThreshold1Thread": "one thread copies the bytes of a transfer",
    "poolThreshold2Threads": "one thread copies the bytes of a transfer",
    "poolThreshold4Threads": "one thread copies the bytes of a transfer",
}
"""Keys that are taken, checked and without effect, each with the reason why."""


def _integer(text: str) -> int:
    value = int(text, 0) if text.isascii() and text[:1].isdigit() else -1
    if not 0 <= value < 1 << 64:
        raise ValueError("want an integer")
    return value


def _positive(text: str) -> int:
    value = _integer(text)
    if value == 0:
        raise ValueError("want an integer above 0")
    return value


def _boolean(text: str) -> Any:
    return _one_of({"true": True, "false": False})(text)


def _one_of(values: Mapping[str, Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        if text not in values:
            raise ValueError(f"want one of {', '.join(values)}")
        return values[text]

    return parse


def _words(text: str) -> int:
    value = _positive(text)
    if value % 8:
        raise ValueError("want a multiple of 8")
    return value


def _iram_size(text: str) -> int:
    _words(str(_positive(text) * IRAM_INSTRUCTION_BYTES))
    return _positive(text)


def _chip_id(text: str) -> int:
    value = _integer(text)
    if value not in CHIPS:
        raise ValueError(f"want one of {', '.join(map(str, CHIPS))}")
    return value


_NO_EFFECT_KINDS: dict[str, Callable[[str], Any]] = {
    "dispatchOnAllRanks": _boolean,
    "rankPath": str,
    "ignoreVersion": _boolean,
    "tryRepairIram": _boolean,
    "tryRepairWram": _boolean,
    "ignoreVpd": _boolean,
}


class Properties(msgspec.Struct, frozen=True, rename="camel"):
    """The properties that act; None where the profile of the machine decides."""

    backend: str = "hw"
    chip_id: int | None = None
    clock_division: int = CLOCK_DIVISION
    fck_frequency: int | None = None
    disabled_mask: int = 0
    disable_safe_checks: bool = False
    disable_mux_switch: bool = False
    disable_reset_on_alloc: bool = False
    mram_access_by_dpu_only: bool = False
    nr_threads_per_rank: int = 1
    nr_jobs_per_rank: int = NR_JOBS_PER_RANK
    sg_xfer_enable: bool = False
    sg_xfer_max_blocks_per_dpu: int | None = None
    iram_size: int | None = None
    mram_size: int | None = None
    wram_size: int | None = None
    region_mode: int = 0

    def chip(self, base: Chip) -> Chip:
        """The limits of `base`, with what these properties change."""
        if self.chip_id is not None:
            base = rank_chip(load_profile(CHIPS[self.chip_id]))
        changed: dict[str, float | None] = {
            "mram_bytes": self.mram_size,
            "wram_bytes": self.wram_size,
            "iram_bytes": self.iram_size and self.iram_size * IRAM_INSTRUCTION_BYTES,
            "fck_frequency_mhz": self._dpu_clock_mhz(base),
        }
        constants = {
            name: msgspec.structs.replace(getattr(base, name), value=value, source="profile string")
            for name, value in changed.items()
            if value is not None and value != getattr(base, name).value
        }
        return msgspec.structs.replace(base, **constants)

    def _dpu_clock_mhz(self, base: Chip) -> float:
        fck = self.fck_frequency or base.fck_frequency_mhz.value * CLOCK_DIVISION
        return fck / self.clock_division


_KINDS: dict[str, Callable[[str], Any]] = {
    "backend": _one_of({"hw": "hw", "simulator": "simulator"}),
    "chipId": _chip_id,
    "clockDivision": _positive,
    "fckFrequency": _positive,
    "disabledMask": _integer,
    "disableSafeChecks": _boolean,
    "disableMuxSwitch": _boolean,
    "disableResetOnAlloc": _boolean,
    "mramAccessByDpuOnly": _boolean,
    "nrThreadsPerRank": _integer,
    "nrJobsPerRank": _positive,
    "sgXferEnable": _boolean,
    "sgXferMaxBlocksPerDpu": _positive,
    "iramSize": _iram_size,
    "mramSize": _words,
    "wramSize": _words,
    "regionMode": _one_of(REGION_MODES),
} | {key: _NO_EFFECT_KINDS.get(key, _integer) for key in NO_EFFECT}


def chip_id_of(chip: Chip) -> int:
    """dpu_chip_id_e of a chip, told by its number of tasklets."""
    tasklets = {number: rank_chip(load_profile(name)).nr_tasklets.value for number, name in CHIPS.items()}
    return next(number for number, value in tasklets.items() if value == chip.nr_tasklets.value)


def load_properties(argument: str = "", environment: Mapping[str, str] = os.environ) -> Properties:
    """The effective properties of an allocation whose profile argument is `argument`; DpuError(INVALID_PROFILE)."""
    values: dict[str, Any] = {}
    for where, text in (
        ("$UPMEM_PROFILE_BASE", environment.get("UPMEM_PROFILE_BASE", "")),
        ("the profile argument", argument),
        ("$UPMEM_PROFILE", environment.get("UPMEM_PROFILE", "")),
    ):
        values.update(_parse(where, text))
    return msgspec.convert({key: value for key, value in values.items() if key not in NO_EFFECT}, Properties)


def _parse(where: str, text: str) -> Iterator[tuple[str, Any]]:
    for item in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (part.strip() for part in item.partition("="))
        try:
            if not equals or key not in _KINDS:
                raise ValueError("unknown property")
            yield key, _KINDS[key](value)
        except ValueError as problem:
            error = DpuError(DpuErr.INVALID_PROFILE)
            error.add_note(f"{where}: {item}: {problem}")
            raise error from None
