# SPDX-License-Identifier: GPL-2.0-only
"""The peer: the same pattern in this machine's own memory, compacted by its own kernel.

Run as root: `python -m dpud.bench.real_memory BYTES PERCENT SEED`. Prints `pages_migrated ns huge_pages_gained` of one
write to /proc/sys/vm/compact_memory, and gives the memory back by ending.
"""

import mmap
import sys
from pathlib import Path
from time import perf_counter_ns

import numpy as np

from kernelsim.mm_configfs import choose
from kernelsim.page import PAGE_SIZE

COMPACT_MEMORY = Path("/proc/sys/vm/compact_memory")
BUDDYINFO = Path("/proc/buddyinfo")


def fragment(size: int, percent: int, seed: int) -> mmap.mmap:
    """Small pages of anonymous memory, all written, then `percent` of them given back, as `holes` does it."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    np.frombuffer(memory, dtype=np.uint8)[::PAGE_SIZE] = 1
    for index in np.flatnonzero(choose(size // PAGE_SIZE, percent, seed, False)).tolist():
        memory.madvise(mmap.MADV_DONTNEED, index * PAGE_SIZE, PAGE_SIZE)
    return memory


def vmstat(name: str) -> int:
    return counter(Path("/proc/vmstat").read_text(), name)


def counter(text: str, name: str) -> int:
    """A value of `name value` lines. KeyError if it is not there."""
    return int(dict(line.split() for line in text.splitlines())[name])


def huge_pages(buddyinfo: str) -> int:
    """Free blocks of order 9 that /proc/buddyinfo shows; one of order 10 is two."""
    rows = [line.split()[-2:] for line in buddyinfo.splitlines()]
    return sum(int(order_9) + 2 * int(order_10) for order_9, order_10 in rows)


def compact() -> tuple[int, int, int]:
    """(pages that the kernel migrated, ns that the write took, free huge pages gained)."""
    huge_before = huge_pages(BUDDYINFO.read_text())
    nr_before, begin = vmstat("pgmigrate_success"), perf_counter_ns()
    COMPACT_MEMORY.write_text("1")
    spent_ns = perf_counter_ns() - begin
    return vmstat("pgmigrate_success") - nr_before, spent_ns, huge_pages(BUDDYINFO.read_text()) - huge_before


def main() -> None:
    size, percent, seed = map(int, sys.argv[1:])
    memory = fragment(size, percent, seed)
    print(*compact())
    del memory


if __name__ == "__main__":
    main()
