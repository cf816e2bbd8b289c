# SPDX-License-Identifier: GPL-2.0-only
"""A machine of one tebibyte on this host: boot, its cost in memory, a large process with holes, one node compacted.

Through a mounted daemon, with content stamps, so that the process can read everything back. A second process reads
buddyinfo without pause during the compaction. A machine that keeps no contents at all is booted for comparison.
"""

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter

from dpud.bench import host
from dpud.bench.node import MM, NODE0, REGION_ORDER, STATS, overlapping, prober
from dpud.bench.real_memory import counter
from dpud.bench.report import Figure, Report, percentile
from dpud.physmem import alloc_tables
from kernelsim.page import PAGE_SIZE, page_dtype

MACHINE_BYTES = 1 << 40
PROCESS_BYTES = 128 << 30
HOLES = "50 seed=7"
LIMIT_BYTES = 20 << 30
READ_TARGET_MS = 20


@dataclass(frozen=True)
class Boot:
    """One daemon's start: seconds to its first answer, and what it then takes of the host's memory."""

    seconds: float
    rss_bytes: int


def config(kind: str) -> str:
    """Two nodes of half a tebibyte, keeping `kind` of each page's contents."""
    node = f'[[machine.nodes]]\nmemory = "{MACHINE_BYTES // 2 >> 30}G"\n'
    return f'{node}{node}[memory]\nbytes = "{kind}"\n'


def rss_bytes(mountpoint: Path) -> int:
    """Resident memory of the daemon that was started for this mount point. ProcessLookupError if there is none."""
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and str(mountpoint).encode() in (process / "cmdline").read_bytes().split(b"\0"):
            found = re.search(r"^VmRSS:\s+(\d+) kB$", (process / "status").read_text(), re.MULTILINE)
            assert found is not None
            return int(found[1]) << 10
    raise ProcessLookupError(f"no daemon at {mountpoint}")


@contextmanager
def booted(kind: str) -> Iterator[tuple[Path, Boot]]:
    with tempfile.NamedTemporaryFile("w", suffix=".toml") as file:
        file.write(config(kind))
        file.flush()
        begin = perf_counter()
        with host.daemon("--config", file.name) as mount:
            yield mount, Boot(perf_counter() - begin, rss_bytes(mount))


def touch_s(nr_bytes: int) -> float:
    """Seconds that this host takes to hand out so much memory: no machine can boot faster."""
    begin = perf_counter()
    alloc_tables(nr_bytes >> 21, (1 << 21) // 8)[:, 0] = 1
    return perf_counter() - begin


def large_blocks(mount: Path) -> int:
    """Free blocks of 2 MiB and more on node 0, in blocks of 2 MiB."""
    rows = [line.split() for line in (mount / "proc/buddyinfo").read_text().splitlines() if line.startswith("Node 0")]
    return sum(int(row[-2]) + 2 * int(row[-1]) for row in rows)


def compaction(mount: Path) -> tuple[list[Figure], list[str]]:
    """A process with holes, and node 0 compacted around it."""
    process = mount / MM / "bench"
    process.mkdir()
    begin = perf_counter()
    (process / "anon").write_text(str(PROCESS_BYTES))
    filled_s = perf_counter() - begin
    (process / "holes").write_text(HOLES)
    rss = rss_bytes(mount)
    (mount / "proc/sys/vm/dpu_compact_region_order").write_text(str(REGION_ORDER))
    nr_before, moved_before = large_blocks(mount), counter((mount / STATS).read_text(), "pages_moved")
    with prober(mount / "proc/buddyinfo", True) as samples:
        begin = perf_counter()
        (mount / NODE0 / "compact_dpu").write_text("1")
        seconds = perf_counter() - begin
    reads = [ns / 1e6 for ns in overlapping(samples, 0, 1 << 62)]
    nr_moved = counter((mount / STATS).read_text(), "pages_moved") - moved_before
    verdict = (process / "verify").read_text().strip()
    figures = [
        Figure(f"process of {PROCESS_BYTES >> 30} GiB mapped and written", filled_s, "s"),
        Figure("host memory with that process", rss / (1 << 30), "GiB", LIMIT_BYTES / (1 << 30), "limit"),
        Figure("node 0 of 512 GiB compacted", seconds, "s"),
        Figure("pages moved", nr_moved, "pages"),
        Figure("wall time per moved page", seconds * 1e9 / max(nr_moved, 1), "ns"),
        Figure("free 2 MiB blocks gained", large_blocks(mount) - nr_before, "blocks"),
        Figure("buddyinfo during it, 99th percentile", percentile(reads, 99), "ms", READ_TARGET_MS),
        Figure(f"buddyinfo during it, longest of {len(reads)}", max(reads), "ms"),
    ]
    return figures, [f"verify after it: {verdict}"]


def run() -> Report:
    report = Report(
        "terabyte",
        "a machine of 1 TiB on this host",
        f"Two nodes of 512 GiB with content stamps, through a mounted daemon. A process of {PROCESS_BYTES >> 30} GiB "
        f"gave a random half back, then one write to compact_dpu of node 0, region order {REGION_ORDER}.",
    )
    nr_pages = MACHINE_BYTES // PAGE_SIZE
    map_bytes = nr_pages * page_dtype.itemsize
    needed = LIMIT_BYTES // 2
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if available < needed:
        report.notes.append(f"not run: {available >> 20} MiB of memory are free, {needed >> 20} are needed")
        return report
    handed_out_s = touch_s(map_bytes)
    with booted("none") as (_, none):
        pass
    with booted("stamp") as (mount, stamp):
        figures, notes = compaction(mount)
    report.figures = [
        Figure(f"this host hands out {map_bytes >> 30} GiB of memory, at first", handed_out_s, "s"),
        Figure("the same again", touch_s(map_bytes), "s"),
        *(Figure(f'boot, bytes = "{kind}"', boot.seconds, "s") for kind, boot in (("none", none), ("stamp", stamp))),
        Figure("host memory per page after boot, none", none.rss_bytes / nr_pages, "bytes"),
        Figure("host memory per page after boot, stamp", stamp.rss_bytes / nr_pages, "bytes"),
        *figures,
    ]
    report.notes += notes
    return report
