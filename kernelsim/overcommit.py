# SPDX-License-Identifier: GPL-2.0-only
"""How much memory may be promised: overcommit accounting and its sysctls (mm/util.c, mm/mmap.c).

Private writable mappings are promises: their pages may all be wanted one day. `vm_committed_as` counts them, as
Committed_AS in /proc/meminfo shows it. What is refused goes by overcommit_memory:

    0  one request larger than all of memory
    1  nothing
    2  what would bring the sum to the commit limit: overcommit_kbytes, or overcommit_ratio percent of what is not in
       hugetlb pools; a process leaves the smaller of user_reserve_kbytes and 1/32 of its own size of that

There is no swap to add. Every emulated process is root's, so Linux's admin_reserve_kbytes, which root need not leave,
would change nothing, and does not exist here. Imported processes' mappings are not counted: a pagemap does not tell
which of them were.
"""

import errno

from kernelsim.attr import Attr, Int, Kobject
from kernelsim.mmzone import Mem
from kernelsim.page import PAGE_SIZE

OVERCOMMIT_GUESS, OVERCOMMIT_ALWAYS, OVERCOMMIT_NEVER = range(3)
DEFAULT_MAX_MAP_COUNT = 65530
_INT = Int(-(2**31), 2**31 - 1)
_ULONG = Int(0, 2**64 - 1)
_KB = PAGE_SIZE // 1024
_USER_RESERVE_KBYTES = 1 << 17  # init_user_reserve(): 3 percent of what is free at boot, at most 128 MiB


class Overcommit(Kobject):
    """Limits on address space, and what counts against them."""

    overcommit_memory = Attr(Int(0, 2), 0, doc="0: refuse the absurd only; 1: nothing; 2: keep the commit limit.")
    overcommit_ratio = Attr(_INT, 50, doc="Percent of memory that overcommit_memory=2 lets be promised.", late=True)
    overcommit_kbytes = Attr(
        _ULONG, 0, doc="The same in kB, instead of the ratio; setting one sets the other to 0.", late=True
    )
    user_reserve_kbytes = Attr(_ULONG, doc="kB below the commit limit that a large process has to leave.")
    max_map_count = Attr(Int(), DEFAULT_MAX_MAP_COUNT, doc="Mappings that one process may have.")

    def __init__(self, mem: Mem) -> None:
        self.mem = mem
        self.vm_committed_as = 0
        """Pages promised."""
        free_kbytes = int(mem.zones["free_pages"].sum()) * _KB
        self._user_reserve_kbytes = min(free_kbytes // 32, _USER_RESERVE_KBYTES)

    @overcommit_ratio.stored
    def _by_ratio(self, _old: int, _new: int) -> None:
        self.overcommit_kbytes = 0

    @overcommit_kbytes.stored
    def _by_kbytes(self, _old: int, _new: int) -> None:
        self.overcommit_ratio = 0

    @user_reserve_kbytes.show
    def _show_user_reserve(self) -> int:
        return self._user_reserve_kbytes

    @user_reserve_kbytes.store
    def _set_user_reserve(self, kbytes: int) -> None:
        self._user_reserve_kbytes = kbytes

    @property
    def totalram_pages(self) -> int:
        return int(self.mem.zones["managed"].sum())

    def vm_commit_limit(self) -> int:
        """Pages that may be promised under overcommit_memory=2."""
        if self.overcommit_kbytes:
            return self.overcommit_kbytes // _KB
        not_huge = self.totalram_pages - int(self.mem.nodes["nr_hugetlb"].sum())
        return not_huge * self.overcommit_ratio % 2**64 // 100  # unsigned long arithmetic: the ratio may be negative

    def vm_enough_memory(self, nr_pages: int, total_vm: int) -> None:
        """Promise so many pages to a process of `total_vm` pages. OSError(ENOMEM), and no promise, beyond the limit."""
        refused = False
        if self.overcommit_memory == OVERCOMMIT_GUESS:
            refused = nr_pages > self.totalram_pages
        elif self.overcommit_memory == OVERCOMMIT_NEVER:
            allowed = self.vm_commit_limit() - min(total_vm // 32, self._user_reserve_kbytes // _KB)
            refused = self.vm_committed_as + nr_pages >= allowed
        if refused:
            raise OSError(errno.ENOMEM, "more than may be promised")
        self.vm_committed_as += nr_pages

    def vm_unacct_memory(self, nr_pages: int) -> None:
        """Take a promise back."""
        self.vm_committed_as -= nr_pages

    def check_map_count(self, nr: int) -> None:
        """OSError(ENOMEM) where one mapping more than `nr` is too many for a process."""
        if nr >= self.max_map_count:
            raise OSError(errno.ENOMEM, "too many mappings")
