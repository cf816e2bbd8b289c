# SPDX-License-Identifier: GPL-2.0-only
"""/sys/kernel/debug/fail_page_alloc: page allocations that fail on purpose (mm/fail_page_alloc.c).

    echo 1 > min-order              requests of fewer pages are spared; 1 is the default
    echo N > ignore-gfp-wait        also those that could reclaim, which is most of them
    echo 100 > probability          and as many of them as `times` says (once) fail

A failure comes before anything is tried and is not reported as one: no reclaim, no compaction, no warning. Differences
from Linux: page faults take single pages in compiled code, past this point.
"""

from kernelsim.attr import Attr, Bool, Flavour, Int
from kernelsim.fault_inject import FaultAttr
from kernelsim.gfp import _GFP_DIRECT_RECLAIM, _GFP_HIGHMEM, _GFP_NOFAIL, _GFP_NOWARN
from kernelsim.kinds import c_string, einval

_TRUE, _FALSE = (b"y", b"Y", b"t", b"T", b"1", b"on", b"On", b"oN", b"ON"), (b"n", b"N", b"f", b"F", b"0")


class DebugfsBool(Bool):
    """Shown as Y or N. Source: debugfs_create_bool(), kstrtobool(), which goes by the first letter or two."""

    def parse(self, data: bytes, flavour: Flavour) -> tuple[int, int]:
        text = c_string(data)
        for value, words in ((1, _TRUE), (0, (*_FALSE, b"of", b"oF", b"Of", b"OF"))):
            if text.startswith(words):
                return value, len(data)
        raise einval("neither yes nor no")

    def format(self, value: int) -> str:
        return "Y\n" if value else "N\n"

    def describe(self) -> str:
        return "Y | N"

    def legal(self) -> tuple[str, ...]:
        return "Y\n", "n", "1\n", "0\n", "on\n", "off\n"

    def illegal(self) -> tuple[str, ...]:
        return "\n", "x\n", "2\n", "o\n", "-1\n"


class FailPageAlloc(FaultAttr):
    """The fault point; `space` counts pages."""

    min_order = Attr(Int(0, 2**32 - 1), 1, name="min-order", doc="Smaller requests never fail.", mode=0o600)
    ignore_gfp_highmem = Attr(
        DebugfsBool(),
        1,
        name="ignore-gfp-highmem",
        doc="Y: requests that may use high memory (those of user pages) never fail.",
        mode=0o600,
    )
    verbose = Attr(Int(0, 2), 2, doc="0: failures are not logged when they are injected.", mode=0o600)
    ignore_gfp_reclaim = Attr(
        DebugfsBool(),
        1,
        name="ignore-gfp-wait",
        doc="Y: requests that may wait for reclaim never fail.",
        mode=0o600,
    )

    def should_fail_alloc_page(self, gfp: int, order: int) -> bool:
        """Is a request for 2^order pages to fail?"""
        if not self.armed or order < self.min_order or gfp & _GFP_NOFAIL:
            return False
        if (self.ignore_gfp_highmem and gfp & _GFP_HIGHMEM) or (self.ignore_gfp_reclaim and gfp & _GFP_DIRECT_RECLAIM):
            return False
        return self.should_fail(1 << order, nowarn=bool(gfp & _GFP_NOWARN))
