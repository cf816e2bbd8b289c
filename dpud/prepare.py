# SPDX-License-Identifier: GPL-2.0-only
"""Taking out of this host what no /proc file shows and what decides how a compaction goes.

- Dirty page cache. A dirty large folio can be neither split nor, without a free block of its size, moved: the first one
  met so ends a compaction. sync(2) writes them back.
- Per-CPU page lists. Hundreds of megabytes of free pages can rest there, in an order that no file shows.
  `percpu_pagelist_high_fraction` at its maximum makes the lists as short as they get (four batches, mm/page_alloc.c
  zone_highsize), and a page freed on a CPU then sends the surplus to the buddy lists. It stays so until the compaction
  is done, since what that frees would rest on these lists too and keep pageblocks from being whole; then the old value
  comes back. Nothing is moved and nothing is reclaimed.
"""

import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dpud.proctext import parse_pagesets

HIGH_FRACTION = Path("/proc/sys/vm/percpu_pagelist_high_fraction")
ZONEINFO = Path("/proc/zoneinfo")
PREPARED = "synced, per-CPU lists drained and kept short"

_SHORTEST = (1 << 31) - 1
_CHURN_BYTES = 4 << 20
_CHURN_PAGES = _CHURN_BYTES // mmap.PAGESIZE  # each page freed sends 63 others or more away, while the list is too long
_MAX_ROUNDS = 64


def prepare(cpus: Iterable[int]) -> None:
    """Within short_lists(): write back dirty pages, and empty the per-CPU page lists of these CPUs, which this process
    may run on. It stays bound as it was. Raises OSError."""
    os.sync()
    here = os.sched_getaffinity(0)
    try:
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            _empty_list()
    finally:
        os.sched_setaffinity(0, here)


def nr_listed() -> int:
    """Pages on per-CPU lists now, of all zones and CPUs."""
    zones = parse_pagesets(ZONEINFO.read_text()).values()
    return sum(pageset.count for pagesets in zones for pageset in pagesets)


@contextmanager
def short_lists() -> Iterator[None]:
    """Keep the limit of all per-CPU page lists at its minimum. Raises OSError."""
    before = HIGH_FRACTION.read_text()
    HIGH_FRACTION.write_text(str(_SHORTEST))
    try:
        yield
    finally:
        HIGH_FRACTION.write_text(before)


def _empty_list() -> None:
    """Free pages on this CPU until that makes its lists no shorter."""
    nr = nr_listed()
    for _ in range(_MAX_ROUNDS):
        _churn()
        left = nr_listed()
        if nr - left < _CHURN_PAGES:
            return
        nr = left


def _churn() -> None:
    """Take some single pages and free them."""
    with mmap.mmap(-1, _CHURN_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        for at in range(0, _CHURN_BYTES, mmap.PAGESIZE):
            memory[at] = 1
