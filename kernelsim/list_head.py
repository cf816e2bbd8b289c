# SPDX-License-Identifier: GPL-2.0-only
"""Circular doubly linked lists of pages, as include/linux/list.h has them over pointers.

An entry is a pfn; a list's head is a slot behind the last pfn. An entry that is on no list points at itself, so
deleting it twice is harmless.
"""

from kernelsim.jit import njit
from kernelsim.page import Pages


@njit
def list_add(pages: Pages, entry: int, head: int) -> None:
    """Insert behind the head: the list's front."""
    first = pages[head].next
    pages[entry].next = first
    pages[entry].prev = head
    pages[first].prev = entry
    pages[head].next = entry


@njit
def list_add_tail(pages: Pages, entry: int, head: int) -> None:
    """Insert before the head: the list's end."""
    last = pages[head].prev
    pages[entry].prev = last
    pages[entry].next = head
    pages[last].next = entry
    pages[head].prev = entry


@njit
def list_del(pages: Pages, entry: int) -> None:
    """Unlink, and leave the entry pointing at itself."""
    before = pages[entry].prev
    after = pages[entry].next
    pages[before].next = after
    pages[after].prev = before
    pages[entry].next = entry
    pages[entry].prev = entry
