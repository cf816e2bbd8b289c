# SPDX-License-Identifier: GPL-2.0-only
"""Small captured machines for tests, made up page by page, with the truth about them.

Facts are typed anew (kpageflags bits, text formats), and free blocks are found by trying every aligned block
from the largest order down, so that nothing here leans on the code under test.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import zstandard

PAGES = 512
ORDERS = range(11)
UNMOVABLE, MOVABLE, RECLAIMABLE, HIGHATOMIC, CMA, ISOLATE = range(6)
TYPES = {UNMOVABLE: "Unmovable", MOVABLE: "Movable", RECLAIMABLE: "Reclaimable", HIGHATOMIC: "HighAtomic"}
TYPES[ISOLATE] = "Isolate"  # and no CMA: as a kernel without CONFIG_CMA writes it

UPTODATE, LRU, SLAB, BUDDY, MMAP, ANON, SWAPBACKED, NOPAGE = (1 << bit for bit in (3, 5, 7, 10, 11, 12, 14, 20))
PGTABLE, RESERVED = 1 << 26, 1 << 32
ANON_PAGE = UPTODATE | LRU | MMAP | ANON | SWAPBACKED


@dataclass
class Zone:
    node: int
    name: str
    start: int
    end: int
    nr_absent_blocks: int = 0  # of the span, without flags and not counted by pagetypeinfo


@dataclass
class Machine:
    """A machine with known free blocks and pageblock types. Change it, then `write` it."""

    zones: list[Zone]
    flags: np.ndarray
    counts: np.ndarray
    types: list[int]
    apart: set[int] = field(default_factory=set)
    """Pageblocks that do not merge with their buddy."""
    tasks: list[tuple[int, str, list[tuple[int, int]]]] = field(default_factory=list)
    """(pid, comm, [(vpn, pfn)])"""

    def free_blocks(self) -> list[tuple[int, int]]:
        """(pfn, order), ascending."""
        return sorted(block for zone in self.zones for block in self._free_in(zone))

    def _free_in(self, zone: Zone) -> Iterator[tuple[int, int]]:
        left = {pfn for pfn in range(zone.start, zone.end) if self.flags[pfn] & BUDDY}
        for order in reversed(ORDERS):
            for pfn in sorted(pfn for pfn in left if pfn % (1 << order) == 0):
                block = range(pfn, pfn + (1 << order))
                if left.issuperset(block) and not (order == 10 and self._split(pfn)):
                    left.difference_update(block)
                    yield pfn, order

    def _split(self, pfn: int) -> bool:
        return not self.apart.isdisjoint((pfn // PAGES, pfn // PAGES + 1))

    def buddyinfo(self) -> str:
        free = self.free_blocks()
        lines = []
        for zone in self.zones:
            orders = [order for pfn, order in free if zone.start <= pfn < zone.end]
            counts = "".join(f"{orders.count(order):6d} " for order in ORDERS)
            lines.append(f"Node {zone.node}, zone {zone.name:>8} {counts}\n")
        return "".join(lines)

    def block_counts(self, zone: Zone) -> list[int]:
        blocks = range(zone.start // PAGES, zone.end // PAGES)
        counted = [self.types[block] for block in blocks if self.flags[block * PAGES : (block + 1) * PAGES].any()]
        return [counted.count(kind) for kind in TYPES]

    def pagetypeinfo(self) -> str:
        free = self.free_blocks()
        text = "Page block order: 9\nPages per block:  512\n\n"
        text += f"{'Free pages count per migrate type at order ':<43} {''.join(f'{o:6d} ' for o in ORDERS)}\n"
        for zone in self.zones:
            for kind, name in TYPES.items():
                orders = [o for pfn, o in free if zone.start <= pfn < zone.end and self.types[pfn // PAGES] == kind]
                counts = "".join(f"{orders.count(order):6d} " for order in ORDERS)
                text += f"Node {zone.node:4d}, zone {zone.name:>8}, type {name:>12} {counts}\n"
        text += f"\n{'Number of blocks type ':<23}{''.join(f'{name:>12} ' for name in TYPES.values())}\n"
        for zone in self.zones:
            counts = "".join(f"{nr:12d} " for nr in self.block_counts(zone))
            text += f"Node {zone.node}, zone {zone.name:>8} {counts}\n"
        return text

    def zoneinfo(self) -> str:
        text = ""
        for zone in self.zones:
            span = zone.end - zone.start
            managed = span - zone.nr_absent_blocks * PAGES
            text += f"Node {zone.node}, zone {zone.name:>8}\n"
            text += "  per-node stats\n      nr_inactive_anon 5\n  pages free     77\n        boost    0\n"
            for label, value in (("min", 10), ("low", 12), ("high", 14), ("promo", 16), ("spanned", span)):
                text += f"        {label:<8} {value}\n"
            text += f"        present  {span}\n        managed  {managed}\n        cma      0\n"
            text += "        protection: (0, 0, 0, 0, 0)\n      nr_free_pages 77\n  pagesets\n"
            for cpu, count in enumerate((3, 4)):
                text += f"    cpu: {cpu}\n              count:    {count}\n              high:     60\n"
                text += "              batch:    7\n"
            text += f"  vm stats threshold: 4\n  node_unreclaimable:  0\n  start_pfn:           {zone.start}\n"
        return (
            text
            + "Node 0, zone  Movable\n  pages free     0\n        spanned  0\n"
            + "".join(f"        {label:<8} 0\n" for label in ("min", "low", "high", "promo", "present", "managed"))
        )

    def maps(self) -> str:
        text = ""
        for pid, comm, entries in self.tasks:
            text += f"Task {pid} {len(entries)} {comm}\n"
            start, end = min(vpn for vpn, _ in entries), max(vpn for vpn, _ in entries) + 1
            text += f"{start << 12:x}-{end << 12:x} rw-p 00000000 00:00 0                          [heap]\n"
        return text

    def pagemap(self) -> np.ndarray:
        rows = [(vpn, 1 << 63 | pfn) for _, _, entries in self.tasks for vpn, pfn in entries]
        return np.array(rows, dtype=np.uint64).reshape(-1, 2)

    def files(self) -> dict[str, bytes]:
        texts = {
            "zoneinfo": self.zoneinfo(),
            "buddyinfo": self.buddyinfo(),
            "pagetypeinfo": self.pagetypeinfo(),
        }
        texts["buddyinfo.end"] = texts["buddyinfo"]
        files = {name: text.encode() for name, text in texts.items()}
        files |= {"kpageflags": self.flags.tobytes(), "kpagecount": self.counts.tobytes()}
        if self.tasks:
            files |= {"maps": self.maps().encode(), "pagemap": self.pagemap().tobytes()}
        return files

    def write(self, folder: Path, compressed: bool = True) -> Path:
        """Write the capture; `dpud run --from` takes the folder."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            if compressed and name in ("kpageflags", "kpagecount", "maps", "pagemap"):
                (folder / f"{name}.zst").write_bytes(zstandard.compress(content, 3))
            else:
                (folder / name).write_bytes(content)
        return folder


def machine(seed: int = 0, nr_blocks: int = 12, nr_nodes: int = 1) -> Machine:
    """Zone DMA (8 MiB from pfn 1) and a zone Normal of `nr_blocks` pageblocks for each node. Of every four
    pageblocks of Normal two are Movable with anon pages of one process and holes, one is Unmovable or
    Reclaimable, one is free."""
    rng = random.Random(seed)
    zones = [Zone(0, "DMA", 1, 2048)]
    for node in range(nr_nodes):
        start = zones[-1].end
        zones.append(Zone(node, "Normal", start, start + nr_blocks * PAGES))
    nr_pages = zones[-1].end
    flags = np.full(nr_pages, BUDDY, dtype=np.uint64)
    flags[:256] = RESERVED
    flags[0] = NOPAGE
    built = Machine(zones, flags, np.zeros(nr_pages, dtype=np.uint64), [MOVABLE] * (nr_pages // PAGES))
    for block in range(4, nr_pages // PAGES):
        _fill(built, block, rng)
    mapped = np.flatnonzero(built.counts).tolist()
    if mapped:
        built.tasks = [(41, "web server", [(0x400 + i, pfn) for i, pfn in enumerate(mapped)])]
    return built


def _fill(built: Machine, block: int, rng: random.Random) -> None:
    first = block * PAGES
    role = (MOVABLE, rng.choice((UNMOVABLE, RECLAIMABLE)), MOVABLE, None)[block % 4]
    if role is None:
        return
    built.types[block] = role
    for pfn in range(first, first + PAGES):
        if rng.random() < 0.5:
            continue
        if role == MOVABLE:
            built.flags[pfn] = ANON_PAGE
            built.counts[pfn] = 1
        elif role == RECLAIMABLE or rng.random() < 0.3:
            built.flags[pfn] = SLAB
        else:
            built.flags[pfn] = PGTABLE
