# SPDX-License-Identifier: GPL-2.0-only
"""The knobs and triggers of compaction: /proc/sys/vm and node*/compact."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from kernelsim.attr import Attr, Bool, Flavour, Int, Kobject, Trigger
from kernelsim.kinds import INT_MAX, INT_MIN, einval, parse_sysctl
from kernelsim.mm_types import LongOp

if TYPE_CHECKING:
    from kernelsim.compaction import Compaction


class _Latch(Int):
    """An int that is stored first and looked at afterwards, so that later writes find it (sysctl_compact_memory)."""

    def parse(self, data: bytes, flavour: Flavour) -> tuple[int, int]:
        assert flavour is Flavour.SYSCTL
        value, nr_taken = parse_sysctl(data, signed=True)
        if not INT_MIN <= value <= INT_MAX:
            raise einval("not an int")
        return value, nr_taken


class CompactionSysctl(Kobject):
    """The sysctls, and the values that compaction.py goes by."""

    compact_memory = Attr(
        _Latch(1, 1), doc="Write 1: compact all zones of all nodes; the write returns when that is done."
    )
    compaction_proactiveness = Attr(
        Int(0, 100), 20, doc="How early kcompactd compacts in the background; 0: never unasked."
    )
    extfrag_threshold = Attr(
        Int(0, 1000), 500, doc="A zone whose extfrag_index is not above this is not compacted for an allocation."
    )
    compact_unevictable_allowed = Attr(Bool(), 1, doc="1: compaction moves mlocked and other unevictable pages too.")
    defrag_mode = Attr(Bool(), 0, doc="1: kcompactd keeps the high watermark free in whole pageblocks.")

    compaction: Compaction
    """Set by the machine."""
    proactiveness_written: Callable[[], None] | None = None
    """Called after a write of a value above 0: kcompactd is to look at once."""

    _latched = 0
    """What was written last."""

    @compact_memory.store
    def _compact_memory(self, value: int) -> LongOp:
        self._latched = value
        return self._compact_latched()

    @compact_memory.skipped
    def _compact_latched(self) -> LongOp:
        """sysctl_compaction_handler() goes by the stored value, whatever this write gave."""
        CompactionSysctl.compact_memory.kind.check(self._latched)
        yield from self.compaction.compact_nodes()

    @compaction_proactiveness.stored
    def _wake(self, _old: int, new: int) -> None:
        if new and self.proactiveness_written is not None:
            self.proactiveness_written()


class NodeCompact(Kobject):
    """node*/compact."""

    compact = Attr(Trigger(), doc="Write anything: compact the node; the write returns when that is done.")

    def __init__(self, compaction: Compaction, nid: int) -> None:
        self.compaction = compaction
        self.nid = nid

    @compact.store
    def _compact(self, _text: str) -> LongOp:
        yield from self.compaction.compact_node(self.nid)
