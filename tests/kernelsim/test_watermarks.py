# SPDX-License-Identifier: GPL-2.0-only
"""Watermarks and reserves, against those of a real kernel (shared/data, zoneinfo)."""

import re
from pathlib import Path

import numpy as np
import pytest

from kernelsim.mmzone import Mem, default_min_free_kbytes, zone_names

CAPTURES = Path(__file__).parents[3] / "shared/data/host-fragmentation"
FIELDS = ("min", "low", "high", "promo", "spanned", "present", "managed", "start_pfn")


def read_zones(zoneinfo: str) -> list[dict[str, int | str | list[int]]]:
    """The populated zones, by a reading of their own of this test's."""
    zones = []
    for text in re.split(r"^Node ", zoneinfo, flags=re.M)[1:]:
        values: dict[str, int | str | list[int]] = {"name": text.split()[2]}
        for field in FIELDS:
            found = re.search(rf"^\s+{field}:?\s+(\d+)$", text, re.M)
            values[field] = int(found[1]) if found else 0
        protection = re.search(r"protection: \(([^)]*)\)", text)
        assert protection is not None
        values["protection"] = [int(pages) for pages in protection[1].split(",")]
        if values["present"]:
            zones.append(values)
    return zones


@pytest.mark.parametrize("case", ["random50", "runs40"])
def test_watermarks_and_lowmem_reserve_are_the_real_kernels(case: str) -> None:
    path = CAPTURES / case / "before/zoneinfo"
    if not path.exists():
        pytest.skip("needs ../shared/data")
    real = read_zones(path.read_text())
    mem = Mem(
        [(0, zone_names.index(z["name"]), z["start_pfn"], z["start_pfn"] + z["spanned"]) for z in real],  # type: ignore
        np.array([[10]]),
    )
    mem.zones["managed"] = [zone["managed"] for zone in real]
    # khugepaged raised min_free_kbytes above the default there; the zones' shares add up to it
    mem.setup_watermarks(4 * sum(int(zone["min"]) for zone in real))  # type: ignore[arg-type]
    for zone, record in zip(real, mem.zones, strict=True):
        # each share was rounded down, so was their sum
        expected = [zone[mark] for mark in ("min", "low", "high", "promo")]
        assert record["watermark"].tolist() == pytest.approx(expected, abs=3), zone["name"]
        assert record["reserve"].tolist() == zone["protection"][:4], zone["name"]  # type: ignore[index]


@pytest.mark.parametrize(
    ("lowmem_kbytes", "expected"),
    [(512, 128), (16 << 10, 512), (1 << 20, 4096), (16 << 20, 16384), (1 << 40, 262144)],
)
def test_min_free_kbytes_follows_the_table_in_the_kernels_comment(lowmem_kbytes: int, expected: int) -> None:
    """mm/page_alloc.c lists: 16MB: 512k, 1024MB: 4096k, 16384MB: 16384k; never below 128k or above 256M."""
    assert default_min_free_kbytes(lowmem_kbytes) == expected
