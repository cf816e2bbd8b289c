# SPDX-License-Identifier: GPL-2.0-only
"""KSM's files: /sys/kernel/mm/ksm and in /proc/PID (mm/ksm.c, fs/proc/base.c, admin-guide/mm/ksm.rst)."""

from __future__ import annotations

import errno
from typing import TYPE_CHECKING

from kernelsim.attr import Attr, Bool, Flavour, Int, Kobject, Text
from kernelsim.kinds import INT_MAX, c_string, einval
from kernelsim.ksm_merge import NONE, STABLE, UNSTABLE
from kernelsim.mm_types import LongOp

if TYPE_CHECKING:
    from kernelsim.ksm import Ksm
    from kernelsim.mmap import Mm

UINT_MAX = 2**32 - 1
_STOP, _UNMERGE = 0, 2


class _KstrtoBool(Bool):
    """0 or 1, or words that mean it: by the first letter, of `on` and `off` by the second (kstrtobool(), 6.18)."""

    def parse(self, data: bytes, flavour: Flavour) -> tuple[int, int]:
        word = c_string(data).lower()
        if word.startswith((b"1", b"y", b"t", b"e", b"on")):
            return 1, len(data)
        if word.startswith((b"0", b"n", b"f", b"d", b"of")):
            return 0, len(data)
        raise einval("neither yes nor no")

    def illegal(self) -> tuple[str, ...]:
        return "2\n", "\n", "o\n", "-1\n", " 1\n", "abc\n"


class _Kstrtoint(Int):
    """A number whose store passes on what kstrtoint() says: ERANGE for one that is no int."""

    def check(self, value: int) -> None:
        if value > INT_MAX:
            raise OSError(errno.ERANGE, "not an int")
        super().check(value)

    def illegal(self) -> tuple[str, ...]:
        return f"{self.lo - 1}\n", "\n", "abc\n", "-\n", "1.5\n", "1,2", "0x", "--1"


class KsmFiles(Kobject):
    """Files of every kernel with KSM, and the values that it goes by."""

    run = Attr(Int(0, 2), 0, doc="1: ksmd merges; 0: it rests, what is merged stays; 2: it rests, all is unmerged.")
    pages_to_scan = Attr(Int(0, UINT_MAX), 100, doc="Pages that ksmd looks at before it sleeps.")
    sleep_millisecs = Attr(Int(0, UINT_MAX), 20, doc="How long ksmd sleeps.")
    max_page_sharing = Attr(
        _Kstrtoint(2, INT_MAX), 256, doc="Merged pages that one KSM page stands for; further ones get another."
    )
    smart_scan = Attr(_KstrtoBool(), 1, doc="1: look less often at pages that were not merged in several passes.")
    pages_shared = Attr(Text(), doc="KSM pages.")
    pages_sharing = Attr(Text(), doc="Further pages that these stand for: what is saved.")
    pages_unshared = Attr(Text(), doc="Pages that none is the same as, looked at again and again.")
    pages_volatile = Attr(Text(), doc="Pages that change too fast, or were just met.")
    pages_scanned = Attr(Text(), doc="Pages that ksmd looked at.")
    pages_skipped = Attr(Text(), doc="Looks that smart_scan saved.")
    full_scans = Attr(Text(), doc="How often all mergeable memory was gone over.")
    stable_node_chains = Attr(Text(), doc="Contents that have more than one KSM page.")
    stable_node_dups = Attr(Text(), doc="Their KSM pages.")
    general_profit = Attr(Text(), doc="Bytes saved, less those that KSM needs for it.")

    ksm: Ksm
    """Set by the machine."""

    @run.store
    def _run(self, value: int) -> LongOp:
        yield from self.ksm.mutex.acquire()
        try:
            if value != self.run:
                self.run = value
                if value == _UNMERGE:
                    yield from self.ksm.unmerge_and_remove_all_rmap_items()
        except BaseException:  # no room, or a signal
            self.run = _STOP
            raise
        finally:
            self.ksm.mutex.release()

    @max_page_sharing.stored
    def _check_unused(self, old: int, new: int) -> None:
        if old != new:
            self.ksm.remove_all_stable_nodes()

    @pages_shared.show
    def _pages_shared(self) -> str:
        return str(self.ksm.stable.pages_shared)

    @pages_sharing.show
    def _pages_sharing(self) -> str:
        return str(self.ksm.stable.nr_items - self.ksm.stable.pages_shared)

    @pages_unshared.show
    def _pages_unshared(self) -> str:
        return str(self.ksm.count(UNSTABLE))

    @pages_volatile.show
    def _pages_volatile(self) -> str:
        return str(self.ksm.count(NONE) - self.ksm.stable.nr_items - self.ksm.count(UNSTABLE))

    @pages_scanned.show
    def _pages_scanned(self) -> str:
        return str(self.ksm.pages_scanned)

    @pages_skipped.show
    def _pages_skipped(self) -> str:
        return str(self.ksm.pages_skipped)

    @full_scans.show
    def _full_scans(self) -> str:
        return str(self.ksm.full_scans)

    @stable_node_chains.show
    def _chains(self) -> str:
        return str(len(self.ksm.stable.chains))

    @stable_node_dups.show
    def _dups(self) -> str:
        return str(sum(self.ksm.stable.chains))

    @general_profit.show
    def _general_profit(self) -> str:
        return str(self.ksm.general_profit())


class KsmNumaFiles(Kobject):
    """One more where there are NUMA nodes."""

    merge_across_nodes = Attr(Int(0, 1), 1, doc="0: only pages of the same node are merged. Set while nothing is.")

    def __init__(self, ksm: Ksm) -> None:
        self.ksm = ksm

    @merge_across_nodes.stored
    def _across(self, old: int, new: int) -> None:
        if old != new:
            self.ksm.remove_all_stable_nodes()
            self.ksm.stable.merge_across_nodes = bool(new)


class ProcPidKsm(Kobject):
    """/proc/PID's files about it (fs/proc/base.c)."""

    ksm_merging_pages = Attr(Text(), mode=0o400, doc="Pages of it that are merged.")
    ksm_stat = Attr(Text(), mode=0o400, doc="What KSM does with its memory, and what that saves.")

    def __init__(self, ksm: Ksm, mm: Mm) -> None:
        self.ksm = ksm
        self.mm = mm

    @ksm_merging_pages.show
    def _merging_pages(self) -> str:
        return str(self.ksm.count(STABLE, self.mm))

    @ksm_stat.show
    def _stat(self) -> str:
        """No prctl() here makes all of a process mergeable, and no zero page stands for others."""
        ksm, mm = self.ksm, self.mm
        mergeable = any(vma.mm is mm for vma in ksm.mergeable())
        return (
            f"ksm_rmap_items {ksm.count(NONE, mm)}\n"
            "ksm_zero_pages 0\n"
            f"ksm_merging_pages {ksm.count(STABLE, mm)}\n"
            f"ksm_process_profit {ksm.process_profit(mm)}\n"
            "ksm_merge_any: no\n"
            f"ksm_mergeable: {'yes' if mergeable else 'no'}\n"
        )
