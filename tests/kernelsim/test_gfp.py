# SPDX-License-Identifier: GPL-2.0-only
"""GFP flags against masks read in kernel logs, and texts that are not flags."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wiring import errno_of

from kernelsim.gfp import format_gfp, gfp_compaction_allowed, gfp_migratetype, gfp_names, gfp_zone, parse_gfp

# Seen in `page allocation failure` lines of 6.x kernels, or added up by hand from include/linux/gfp_types.h.
MASKS = {
    "GFP_KERNEL": 0xCC0,
    "GFP_KERNEL|__GFP_COMP": 0x40CC0,
    "GFP_KERNEL|__GFP_NORETRY": 0x10CC0,
    "GFP_KERNEL_ACCOUNT": 0x400CC0,
    "GFP_ATOMIC": 0x820,
    "GFP_NOWAIT": 0x2800,
    "GFP_NOIO": 0xC00,
    "GFP_NOFS": 0xC40,
    "GFP_USER": 0x100CC0,
    "GFP_HIGHUSER_MOVABLE": 0x100CCA,
    "GFP_TRANSHUGE_LIGHT": 0x1C20CA,
    "GFP_TRANSHUGE": 0x1C24CA,
    "GFP_KERNEL|GFP_DMA32": 0xCC4,
    "__GFP_RETRY_MAYFAIL": 0x4000,
    "none": 0,
}
UNMOVABLE, MOVABLE, RECLAIMABLE = 0, 1, 2
DMA, DMA32, NORMAL, ZONE_MOVABLE = 0, 1, 2, 3


@pytest.mark.parametrize(("text", "mask"), MASKS.items())
def test_names_and_masks(text: str, mask: int) -> None:
    assert parse_gfp(text) == mask
    assert format_gfp(mask) == text
    assert parse_gfp(hex(mask)) == mask


@pytest.mark.parametrize(
    "text",
    [
        *("", "GFP_KERNAL", "gfp_kernel", "GFP_KERNEL|", "GFP_KERNEL,__GFP_COMP", "3264", "0x", "0xzz", "0x100000000"),
        *("-1", "0x200", "0x4000000", "__GFP_DMA|__GFP_DMA32", "__GFP_DMA|__GFP_HIGHMEM"),
        "__GFP_MOVABLE|__GFP_RECLAIMABLE",
    ],
)
def test_what_is_no_gfp_mask(text: str) -> None:
    assert errno_of(parse_gfp, text) == errno.EINVAL


@given(st.sets(st.sampled_from(sorted(set(gfp_names) - {"__GFP_DMA", "__GFP_DMA32", "GFP_DMA", "GFP_DMA32"}))))
def test_whatever_is_printed_reads_back(names: set[str]) -> None:
    mask = 0
    for name in names - {"__GFP_RECLAIMABLE"}:
        mask |= gfp_names[name]
    assert parse_gfp(format_gfp(mask)) == mask


@pytest.mark.parametrize(
    ("text", "migratetype", "zone"),
    [
        ("GFP_KERNEL", UNMOVABLE, NORMAL),
        ("GFP_KERNEL|__GFP_RECLAIMABLE", RECLAIMABLE, NORMAL),
        ("GFP_HIGHUSER_MOVABLE", MOVABLE, ZONE_MOVABLE),
        ("GFP_USER|__GFP_MOVABLE", MOVABLE, NORMAL),
        ("GFP_HIGHUSER", UNMOVABLE, NORMAL),
        ("GFP_DMA", UNMOVABLE, DMA),
        ("GFP_KERNEL|GFP_DMA32", UNMOVABLE, DMA32),
    ],
)
def test_what_a_mask_asks_for(text: str, migratetype: int, zone: int) -> None:
    assert gfp_migratetype(parse_gfp(text)) == migratetype
    assert gfp_zone(parse_gfp(text)) == zone


def test_compaction_needs_io() -> None:
    assert [gfp_compaction_allowed(parse_gfp(text)) for text in ("GFP_KERNEL", "GFP_NOFS", "GFP_NOIO")] == [1, 1, 0]
