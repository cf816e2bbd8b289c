# SPDX-License-Identifier: GPL-2.0-only
"""What was read from a machine, before anything is inferred from it; and the files of a captured folder.

| file | content |
|---|---|
| zoneinfo, buddyinfo, pagetypeinfo | text, as /proc showed it before kpageflags was read |
| kpageflags, kpagecount | uint64 for each pfn, from 0 to at least the end of the last zone |
| buddyinfo.end | /proc/buddyinfo once kpageflags had been read (optional) |
| maps, pagemap | the processes (optional; both or none) |
| vmstat, meminfo, extfrag_index, unusable_index | for the reader's information; not used |

Each may be compressed with zstd and is then called NAME.zst. `maps` is text: for each process a line `Task
PID NR COMM`, then its /proc/PID/maps. `pagemap` holds uint64 pairs (virtual page number, /proc/PID/pagemap
entry) of present pages: NR of the first process in ascending order, then those of the next."""

import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dpud.proctext import CaptureError, parse_maps, parse_zones
from kernelsim.hostimage import HostImage, HostTask, HostZone, build_host_image
from kernelsim.mmzone import pageblock_nr_pages

TEXTS = ("zoneinfo", "pagetypeinfo", "buddyinfo")  # in the order of reading
OPTIONAL_TEXTS = ("buddyinfo.end", "maps")
WORDS = ("kpageflags", "kpagecount")

PM_PRESENT = 1 << 63  # fs/proc/task_mmu.c
PM_PFRAME_MASK = (1 << 55) - 1

MAX_MAPPINGS_PER_PAGE = 32
MAX_TEXT_BYTES = 256 << 20
"""How much of the processes is taken (page table entries per page frame, size of a text): bounds what a
broken capture can ask for.
"""

_TASK = re.compile(r"Task (\d{1,10}) (\d{1,15}) (.*)")


@dataclass
class RawCapture:
    """One machine as read."""

    texts: dict[str, str]
    zones: tuple[HostZone, ...]
    kpageflags: NDArray[np.uint64]
    """uint64[nr_pages]"""
    kpagecount: NDArray[np.uint64]
    """uint64[nr_pages]"""
    pagemap: NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), dtype=np.uint64))
    """uint64[n, 2]: (vpn, pagemap entry)"""

    def image(self, guess: int = 0) -> HostImage:
        """What the capture says about the machine; `guess` as for build_host_image(). Raises CaptureError if `maps`
        and `pagemap` do not fit."""
        return build_host_image(
            self.zones,
            self.kpageflags,
            self.kpagecount,
            mappings=tuple(_tasks(self.texts.get("maps", ""), self.pagemap)),
            buddyinfo=self.texts["buddyinfo"],
            buddyinfo_end=self.texts.get("buddyinfo.end", ""),
            guess=guess,
        )


def zones_of(texts: dict[str, str]) -> tuple[HostZone, ...]:
    return parse_zones(texts["zoneinfo"], texts["buddyinfo"], texts["pagetypeinfo"])


def end_pfn(zones: tuple[HostZone, ...]) -> int:
    return zones[-1].end_pfn


def alloc_words(nr: int, cause: str) -> NDArray[np.uint64]:
    """uint64[nr] of zeros, or a CaptureError that names the cause of so large a number."""
    try:
        return np.zeros(nr, dtype=np.uint64)
    except MemoryError:
        raise CaptureError(f"{cause}: {nr * 8 >> 20} MiB are more than this machine has memory for") from None


def alloc_pages(zones: tuple[HostZone, ...]) -> NDArray[np.uint64]:
    """A word for each page up to the last zone's last pageblock."""
    return alloc_words(-(-end_pfn(zones) // pageblock_nr_pages) * pageblock_nr_pages, "zoneinfo")


def nr_mappings(maps: str) -> int:
    """How many pagemap entries the processes in `maps` claim."""
    return sum(int(head[2]) for line in maps.split("\n") if (head := _TASK.fullmatch(line)))


def _tasks(maps: str, pagemap: NDArray[np.uint64]) -> Iterator[HostTask]:
    lines = maps.split("\n")[:-1]  # paths may hold other line separators
    heads = [i for i, line in enumerate(lines) if line.startswith("Task ")]
    if lines and heads[:1] != [0]:
        raise CaptureError("maps: does not begin with a `Task` line")
    first = 0
    for at, until in itertools.pairwise([*heads, len(lines)]):
        head = _TASK.fullmatch(lines[at])
        if not head:
            raise CaptureError(f"maps: not a `Task PID NR COMM` line: {lines[at][:60]!r}")
        last = first + int(head[2])
        yield _task(int(head[1]), head[3], lines[at + 1 : until], pagemap[first:last])
        first = last


def _task(pid: int, comm: str, lines: list[str], pagemap: NDArray[np.uint64]) -> HostTask:
    vmas = parse_maps(lines, f"maps of {pid}")
    present = pagemap[(pagemap[:, 1] & np.uint64(PM_PRESENT)) != 0]
    vpn = (present[:, 0] & np.uint64(PM_PFRAME_MASK)).astype(np.int64)
    bounds = np.array(vmas, dtype=np.int64).reshape(-1, 3)
    vma = np.searchsorted(bounds[:, 0], vpn, side="right") - 1
    if len(vpn) and (vma.min() < 0 or (vpn >= bounds[vma, 1]).any() or (np.diff(vpn) <= 0).any()):
        raise CaptureError(f"pagemap: the entries of process {pid} do not lie in its VMAs in ascending order")
    return HostTask(pid, comm, vmas, vpn, (present[:, 1] & np.uint64(PM_PFRAME_MASK)).astype(np.int64))
