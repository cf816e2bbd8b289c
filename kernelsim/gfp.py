# SPDX-License-Identifier: GPL-2.0-only
"""GFP flags: what a request for pages may do, and where it may look (include/linux/gfp_types.h, 6.12 numbering).

Bit values are the kernel's, so that a mask read in a real log means the same here. A name in text is a combination
(`GFP_KERNEL`), one bit (`__GFP_NORETRY`) or a number, joined by `|`; `format_gfp` writes them as trace output and
`%pGg` do (include/trace/events/mmflags.h): the largest combinations first, bits without a name as one hex number.

In Python a flag has one underscore less (two would be mangled inside classes).

Bits that nothing here looks at are taken and shown: __GFP_WRITE, __GFP_HARDWALL, __GFP_ACCOUNT, __GFP_ZEROTAGS,
__GFP_MEMALLOC, __GFP_NOMEMALLOC. There are no dirty limits, cpusets, memory cgroups, tags and PF_MEMALLOC tasks.
"""

import errno
from functools import lru_cache

from kernelsim.mmzone import (
    MIGRATE_MOVABLE,
    MIGRATE_RECLAIMABLE,
    MIGRATE_UNMOVABLE,
    ZONE_DMA,
    ZONE_DMA32,
    ZONE_MOVABLE,
    ZONE_NORMAL,
)

_GFP_DMA = 0x1
_GFP_HIGHMEM = 0x2
_GFP_DMA32 = 0x4
_GFP_MOVABLE = 0x8
_GFP_RECLAIMABLE = 0x10
_GFP_HIGH = 0x20
_GFP_IO = 0x40
_GFP_FS = 0x80
_GFP_ZERO = 0x100
_GFP_DIRECT_RECLAIM = 0x400
_GFP_KSWAPD_RECLAIM = 0x800
_GFP_WRITE = 0x1000
_GFP_NOWARN = 0x2000
_GFP_RETRY_MAYFAIL = 0x4000
_GFP_NOFAIL = 0x8000
_GFP_NORETRY = 0x10000
_GFP_MEMALLOC = 0x20000
_GFP_COMP = 0x40000
_GFP_NOMEMALLOC = 0x80000
_GFP_HARDWALL = 0x100000
_GFP_THISNODE = 0x200000
_GFP_ACCOUNT = 0x400000
_GFP_ZEROTAGS = 0x800000
_GFP_RECLAIM = _GFP_DIRECT_RECLAIM | _GFP_KSWAPD_RECLAIM
GFP_ZONEMASK = _GFP_DMA | _GFP_HIGHMEM | _GFP_DMA32 | _GFP_MOVABLE

GFP_ATOMIC = _GFP_HIGH | _GFP_KSWAPD_RECLAIM
GFP_KERNEL = _GFP_RECLAIM | _GFP_IO | _GFP_FS
GFP_KERNEL_ACCOUNT = GFP_KERNEL | _GFP_ACCOUNT
GFP_NOWAIT = _GFP_KSWAPD_RECLAIM | _GFP_NOWARN
GFP_NOIO = _GFP_RECLAIM
GFP_NOFS = _GFP_RECLAIM | _GFP_IO
GFP_USER = GFP_KERNEL | _GFP_HARDWALL
GFP_DMA = _GFP_DMA
GFP_DMA32 = _GFP_DMA32
GFP_HIGHUSER = GFP_USER | _GFP_HIGHMEM
GFP_HIGHUSER_MOVABLE = GFP_HIGHUSER | _GFP_MOVABLE
GFP_TRANSHUGE_LIGHT = (GFP_HIGHUSER_MOVABLE | _GFP_COMP | _GFP_NOMEMALLOC | _GFP_NOWARN) & ~_GFP_RECLAIM
GFP_TRANSHUGE = GFP_TRANSHUGE_LIGHT | _GFP_DIRECT_RECLAIM

# The order decides how a mask is printed: each name takes its bits away from those after it.
_SHOWN = """
    GFP_TRANSHUGE GFP_TRANSHUGE_LIGHT GFP_HIGHUSER_MOVABLE GFP_HIGHUSER GFP_USER GFP_KERNEL_ACCOUNT GFP_KERNEL
    GFP_NOFS GFP_ATOMIC GFP_NOIO GFP_NOWAIT GFP_DMA GFP_DMA32 __GFP_RECLAIM __GFP_DMA __GFP_HIGHMEM __GFP_DMA32
    __GFP_MOVABLE __GFP_RECLAIMABLE __GFP_HIGH __GFP_IO __GFP_FS __GFP_ZERO __GFP_DIRECT_RECLAIM __GFP_KSWAPD_RECLAIM
    __GFP_WRITE __GFP_NOWARN __GFP_RETRY_MAYFAIL __GFP_NOFAIL __GFP_NORETRY __GFP_MEMALLOC __GFP_COMP __GFP_NOMEMALLOC
    __GFP_HARDWALL __GFP_THISNODE __GFP_ACCOUNT __GFP_ZEROTAGS
"""

gfp_names: dict[str, int] = {name: globals()[name.removeprefix("_")] for name in _SHOWN.split()}
"""Every name that is understood, in printing order."""

_KNOWN_BITS = 0
for _value in gfp_names.values():
    _KNOWN_BITS |= _value


def format_gfp(gfp: int) -> str:
    """`GFP_KERNEL|__GFP_NORETRY`; `none` for 0 (show_gfp_flags)."""
    return _text_of(gfp)


@lru_cache(maxsize=1024)  # a trace has few of them, thousands of times
def _text_of(gfp: int) -> str:
    words = []
    left = gfp
    for name, value in gfp_names.items():
        if left and left & value == value:
            words.append(name)
            left &= ~value
    if left:
        words.append(f"{left:#x}")
    return "|".join(words) or "none"


def parse_gfp(text: str) -> int:
    """The mask that a text names. OSError(EINVAL): an unknown name or bit, or flags that exclude each other."""
    gfp = 0
    for word in text.strip().split("|"):
        gfp |= _parse_word(word.strip())
    if gfp & ~_KNOWN_BITS:
        raise OSError(errno.EINVAL, f"no GFP flag has bit {gfp & ~_KNOWN_BITS:#x}")
    zone_bits = gfp & (_GFP_DMA | _GFP_DMA32 | _GFP_HIGHMEM)
    if zone_bits & (zone_bits - 1) or (gfp & _GFP_DMA and gfp & _GFP_MOVABLE):
        raise OSError(errno.EINVAL, "one zone at most (GFP_ZONE_BAD)")
    if gfp & _GFP_MOVABLE and gfp & _GFP_RECLAIMABLE:
        raise OSError(errno.EINVAL, "a page is movable or reclaimable, not both")
    return gfp


def _parse_word(word: str) -> int:
    if word in gfp_names:
        return gfp_names[word]
    if word == "none":
        return 0
    digits = word[2:] if word[:2] in ("0x", "0X") else ""
    if not digits or len(digits) > 8 or any(digit not in "0123456789abcdefABCDEF" for digit in digits):
        raise OSError(errno.EINVAL, f"unknown GFP flag {word!r}")
    return int(digits, 16)


def gfp_migratetype(gfp: int) -> int:
    """The kind of pageblock that pages of this request belong in."""
    if gfp & _GFP_MOVABLE:
        return MIGRATE_MOVABLE
    return MIGRATE_RECLAIMABLE if gfp & _GFP_RECLAIMABLE else MIGRATE_UNMOVABLE


def gfp_zone(gfp: int) -> int:
    """The highest zone type allowed. ZONE_MOVABLE takes both flags, as on a kernel whose HighMem zone is empty."""
    if gfp & _GFP_DMA:
        return ZONE_DMA
    if gfp & _GFP_DMA32:
        return ZONE_DMA32
    return ZONE_MOVABLE if gfp & _GFP_HIGHMEM and gfp & _GFP_MOVABLE else ZONE_NORMAL


def gfp_compaction_allowed(gfp: int) -> bool:
    """Compaction may wait for I/O (include/linux/gfp.h)."""
    return gfp & _GFP_IO != 0
