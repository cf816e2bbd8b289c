# SPDX-License-Identifier: GPL-2.0-only
"""/proc/zoneinfo: each zone's size, watermarks, counters and per-CPU page lists (mm/vmstat.c zoneinfo_show_print).

Every node shows every zone that the kernel was built with, also those it has no pages of; the counters of the node
itself come with its first populated zone.

Where it differs from Linux: counters are exact, so the threshold up to which a CPU would keep changes to itself is 0.
A machine without per-CPU page lists (pcp.py) shows for each CPU what a kernel has before it sets them up, lists that
hold nothing: high 0, batch 1.
"""

from collections.abc import Callable, Sequence
from operator import itemgetter
from typing import Any

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.kconfig import Kconfig
from kernelsim.mmzone import MAX_NR_ZONES, ZONE_MOVABLE, Mem, zone_dtype, zone_names
from kernelsim.vmstat import BLOCKS, NODE_ITEMS, ZONE_ITEMS, unlisted, word

_STAT_THRESHOLD = 0
_MIN_MOVABLE_WMARK = 32  # SWAP_CLUSTER_MAX, also of a zone without pages
_PAGESET = ("count", "high", "batch", "high_min", "high_max")
_PAGESET_LINES = "".join(
    ["    cpu: %d\n"]
    + [f"              {name + ':':<9s} %d\n" for name in _PAGESET]
    + [f"  vm stats threshold: {_STAT_THRESHOLD}\n"]
)
_BOOT_PAGESET = (0, 0, 1, 0, 0)

_NR_WORDS = zone_dtype.itemsize // 8
_SPANNED, _FREE_BLOCKS, _ZERO = _NR_WORDS, _NR_WORDS + 1, _NR_WORDS + 2
"""Where a zone's words go on with what has to be computed."""
_FREE = word(zone_dtype, "free_pages")
_SIZES = (
    ("boost", _ZERO),  # nothing boosts watermarks here
    *((name, word(zone_dtype, "watermark", mark)) for mark, name in enumerate(("min", "low", "high", "promo"))),
    ("spanned", _SPANNED),
    ("present", word(zone_dtype, "present")),
    ("managed", word(zone_dtype, "managed")),
    ("cma", word(zone_dtype, "cma_pages")),
)
_SIZE_LINES = "".join(
    ["  pages free     %d\n"]
    + [f"        {name:<8s} %d\n" for name, _ in _SIZES]
    + [f"        protection: ({', '.join(['%d'] * MAX_NR_ZONES)})\n"]
)
_SIZE_WORDS = (_FREE, *(at for _, at in _SIZES), *(word(zone_dtype, "reserve", above) for above in range(MAX_NR_ZONES)))


class Zoneinfo(Kobject):
    """The file. `hopeless(nid)`: kswapd has given up on the node.

    Each part of the text is one template filled from the words of a zone's or node's record at once: line by line it
    took several times as long, and monitors read this file often.
    """

    zoneinfo = Attr(Text(), doc="Size, watermarks, counters and per-CPU lists of each zone.", kept=True)

    def __init__(self, mem: Mem, nr_cpus: int, kconfig: Kconfig, hopeless: Callable[[int], bool]) -> None:
        self.mem = mem
        self.nr_cpus = nr_cpus
        self.hopeless = hopeless
        absent = unlisted(kconfig)
        zone_items = [("nr_free_pages", _FREE), ("nr_free_pages_blocks", _FREE_BLOCKS), *ZONE_ITEMS]
        lines, words = _template(zone_items, absent)
        self._zone_lines, self._zone_words = _SIZE_LINES + lines, itemgetter(*_SIZE_WORDS, *words)
        lines, words = _template([(name, number) for number, (name, _, _) in enumerate(NODE_ITEMS)], absent)
        self._node_lines, self._node_words = "  per-node stats\n" + lines, itemgetter(*words)
        self._heads = [[f"Node {nid}, zone {name:>8s}\n" for name in zone_names] for nid in range(mem.nr_nodes)]
        self._no_pagesets = "".join([_PAGESET_LINES % (cpu, *_BOOT_PAGESET) for cpu in range(nr_cpus)])

    @zoneinfo.show
    def _zoneinfo(self) -> str:
        zones = self.mem.zones
        columns = zip(zones["node"].tolist(), zones["type"].tolist(), zones["present"].tolist(), strict=True)
        populated = {(node, of_type): zone for zone, (node, of_type, present) in enumerate(columns) if present}
        zone_words, node_words = _words(zones), _words(self.mem.nodes)
        text = ""
        for nid, heads in enumerate(self._heads):
            node_shown = False
            for zone_type, head in enumerate(heads):
                zone = populated.get((nid, zone_type))
                text += head
                if zone is not None and not node_shown:
                    text += self._node(node_words[nid])
                    node_shown = True
                text += _EMPTY[zone_type] if zone is None else self._zone(nid, zone, zone_words[zone])
        return text

    def _node(self, words: Sequence[int]) -> str:
        text: str = self._node_lines % self._node_words([words[at] >> shift for _, at, shift in NODE_ITEMS])
        return text

    def _zone(self, nid: int, zone: int, words: list[int]) -> str:
        start, end = words[word(zone_dtype, "start_pfn")], words[word(zone_dtype, "end_pfn")]
        words += (end - start, sum([words[at] * size for at, size in BLOCKS]), 0)
        text: str = self._zone_lines % self._zone_words(words)
        text += f"  pagesets\n{self._pagesets(zone)}"
        return text + f"  node_unreclaimable:  {int(self.hopeless(nid))}\n  start_pfn:           {start}\n"

    def _pagesets(self, zone: int) -> str:
        if not self.mem.pagesets.size:
            return self._no_pagesets
        pagesets = [tuple(pageset[name] for name in _PAGESET) for pageset in self.mem.pagesets[zone]]
        pagesets += [_BOOT_PAGESET] * (self.nr_cpus - len(pagesets))
        return "".join([_PAGESET_LINES % (cpu, *pageset) for cpu, pageset in enumerate(pagesets)])


def _template(items: Sequence[tuple[str, int]], absent: tuple[str, ...]) -> tuple[str, list[int]]:
    """Lines to be filled in, and the words to do it with."""
    listed = [(name, at) for name, at in items if not name.startswith(absent)]
    return "".join([f"      {name:<12s} %d\n" for name, _ in listed]), [at for _, at in listed]


def _words(records: Any) -> list[list[int]]:
    """The 64-bit words of each record."""
    words: list[list[int]] = records.view("i8").reshape(len(records), -1).tolist()
    return words


def _empty_zone(zone_type: int) -> str:
    mark = _MIN_MOVABLE_WMARK if zone_type == ZONE_MOVABLE else 0
    return _SIZE_LINES % (0, 0, *[mark] * 4, 0, 0, 0, 0, *[0] * MAX_NR_ZONES)


_EMPTY = [_empty_zone(zone_type) for zone_type in range(MAX_NR_ZONES)]
