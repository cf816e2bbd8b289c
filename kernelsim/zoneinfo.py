# SPDX-License-Identifier: GPL-2.0-only
"""/proc/zoneinfo: each zone's size, watermarks, counters and per-CPU page lists (mm/vmstat.c zoneinfo_show_print).

Every node shows every zone that the kernel was built with, also those it has no pages of; the counters of the node
itself come with its first populated zone.

Where it differs from Linux: counters are exact, so the threshold up to which a CPU would keep changes to itself is 0.
A machine without per-CPU page lists (pcp.py) shows for each CPU what a kernel has before it sets them up, lists that
hold nothing: high 0, batch 1.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.kconfig import Kconfig
from kernelsim.mmzone import MAX_NR_ZONES, ZONE_MOVABLE, Mem, node_dtype, pageset_dtype, zone_dtype, zone_names
from kernelsim.seq_printf import Template
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

_NR_ZONE_WORDS, _NR_NODE_WORDS, _NR_PAGESET_WORDS = (
    dtype.itemsize // 8 for dtype in (zone_dtype, node_dtype, pageset_dtype)
)
_SPANNED, _FREE_BLOCKS = _NR_ZONE_WORDS, _NR_ZONE_WORDS + 1
"""Where a zone's words go on with what has to be computed."""
_BLOCK_WORDS, _BLOCK_SIZES = np.array(BLOCKS, dtype=np.int64).T.copy()
_START, _END, _FREE = (word(zone_dtype, field) for field in ("start_pfn", "end_pfn", "free_pages"))
_SIZES = (
    *((name, word(zone_dtype, "watermark", mark)) for mark, name in enumerate(("min", "low", "high", "promo"))),
    ("spanned", _SPANNED),
    ("present", word(zone_dtype, "present")),
    ("managed", word(zone_dtype, "managed")),
    ("cma", word(zone_dtype, "cma_pages")),
)
_SIZE_LINES = "".join(
    ["  pages free     %d\n", "        boost    0\n"]  # nothing boosts watermarks here
    + [f"        {name:<8s} %d\n" for name, _ in _SIZES]
    + [f"        protection: ({', '.join(['%d'] * MAX_NR_ZONES)})\n"]
)
_SIZE_WORDS = (_FREE, *(at for _, at in _SIZES), *(word(zone_dtype, "reserve", above) for above in range(MAX_NR_ZONES)))

Piece = tuple[str, Sequence[int]]
"""Part of the text, and which of the values go into it."""


class _Values:
    """All numbers of the machine that the text may have, one after the other: records word by word."""

    def __init__(self, mem: Mem) -> None:
        self._mem = mem
        self._nr_cpus = mem.pagesets.shape[1]
        shapes = (
            (len(mem.zones), _NR_ZONE_WORDS + 2),
            (len(mem.nodes), _NR_NODE_WORDS),
            (len(mem.zones) * self._nr_cpus, _NR_PAGESET_WORDS),
            (len(mem.nodes), 1),
        )
        starts = np.cumsum([0, *(rows * columns for rows, columns in shapes)]).tolist()
        self.now = np.zeros(starts[-1], dtype=np.int64)
        self._zones, self._nodes, self._pagesets, self._hopeless = (
            self.now[start:end].reshape(shape)
            for start, end, shape in zip(starts[:-1], starts[1:], shapes, strict=True)
        )
        self._starts = starts

    def of_zone(self, zone: int, words: Sequence[int]) -> list[int]:
        return [zone * (_NR_ZONE_WORDS + 2) + at for at in words]

    def of_node(self, nid: int, words: Sequence[int]) -> list[int]:
        return [self._starts[1] + nid * _NR_NODE_WORDS + at for at in words]

    def of_pageset(self, zone: int, cpu: int) -> list[int]:
        start = self._starts[2] + (zone * self._nr_cpus + cpu) * _NR_PAGESET_WORDS
        return [start + word(pageset_dtype, name) for name in _PAGESET]

    def hopeless(self, nid: int) -> int:
        return int(self._starts[3]) + nid

    def look(self, hopeless: Sequence[bool]) -> None:
        mem, zones = self._mem, self._zones
        zones[:, :_NR_ZONE_WORDS] = _words(mem.zones)
        zones[:, _SPANNED] = zones[:, _END] - zones[:, _START]
        zones[:, _FREE_BLOCKS] = zones[:, _BLOCK_WORDS] @ _BLOCK_SIZES
        self._nodes[:] = _words(mem.nodes)
        self._hopeless[:, 0] = hopeless
        if self._nr_cpus:
            self._pagesets[:] = _words(mem.pagesets.reshape(-1))


@dataclass(frozen=True)
class _Form:
    """The text for the zones that have pages."""

    populated: bytes
    template: Template
    at: NDArray[np.int64]
    """Where the words are that go into it."""
    shifts: NDArray[np.int64]


class Zoneinfo(Kobject):
    """The file. `hopeless(nid)`: kswapd has given up on the node.

    The text is one template, made when it is first seen which zones have pages, and filled from the words of all
    records at once: monitors read this file often.
    """

    zoneinfo = Attr(Text(), doc="Size, watermarks, counters and per-CPU lists of each zone.", kept="memory")

    def __init__(self, mem: Mem, nr_cpus: int, kconfig: Kconfig, hopeless: Callable[[int], bool]) -> None:
        self.mem = mem
        self.nr_cpus = nr_cpus
        self.hopeless = hopeless
        absent = unlisted(kconfig)
        zone_items = [("nr_free_pages", _FREE, 0), ("nr_free_pages_blocks", _FREE_BLOCKS, 0)]
        zone_items += [(name, at, 0) for name, at in ZONE_ITEMS]
        self._zone_items = [item for item in zone_items if not item[0].startswith(absent)]
        self._node_items = [item for item in NODE_ITEMS if not item[0].startswith(absent)]
        self._shown_values = _Values(mem)
        self._shown_form: _Form | None = None

    @zoneinfo.show
    def _zoneinfo(self) -> bytes:
        populated = (self.mem.zones["present"] > 0).tobytes()
        form, values = self._shown_form, self._shown_values
        if form is None or form.populated != populated:
            form = self._shown_form = self._make_form(populated)
        values.look([self.hopeless(nid) for nid in range(self.mem.nr_nodes)])
        return form.template.fill(values.now[form.at] >> form.shifts)

    def _make_form(self, populated: bytes) -> _Form:
        pieces = list(self._pieces())
        at = [at for _, ats in pieces for at in ats]
        of_node, nids = self._shown_values.of_node, range(self.mem.nr_nodes)
        shift_of = {of_node(nid, [at])[0]: shift for nid in nids for _, at, shift in NODE_ITEMS}
        template = Template("".join(text for text, _ in pieces))
        shifts = [shift_of.get(word, 0) for word in at]
        return _Form(populated, template, np.array(at, np.int64), np.array(shifts, np.int64))

    def _pieces(self) -> Iterator[Piece]:
        zones = self.mem.zones
        columns = zip(zones["node"].tolist(), zones["type"].tolist(), zones["present"].tolist(), strict=True)
        populated = {(node, of_type): zone for zone, (node, of_type, present) in enumerate(columns) if present}
        for nid in range(self.mem.nr_nodes):
            node_shown = False
            for zone_type, name in enumerate(zone_names):
                yield f"Node {nid}, zone {name:>8s}\n", ()
                zone = populated.get((nid, zone_type))
                if zone is None:
                    yield _EMPTY[zone_type], ()
                    continue
                if not node_shown:
                    yield (
                        "  per-node stats\n" + _lines(self._node_items),
                        self._shown_values.of_node(nid, [at for _, at, _ in self._node_items]),
                    )
                    node_shown = True
                yield from self._zone(nid, zone)

    def _zone(self, nid: int, zone: int) -> Iterator[Piece]:
        values, counters = self._shown_values, [at for _, at, _ in self._zone_items]
        yield _SIZE_LINES + _lines(self._zone_items), values.of_zone(zone, [*_SIZE_WORDS, *counters])
        yield "  pagesets\n", ()
        for cpu in range(self.nr_cpus):
            lines = _PAGESET_LINES.replace("%d", str(cpu), 1)
            if cpu < self.mem.pagesets.shape[1]:
                yield lines, values.of_pageset(zone, cpu)
            else:
                yield lines % _BOOT_PAGESET, ()
        yield "  node_unreclaimable:  %d\n", [values.hopeless(nid)]
        yield "  start_pfn:           %d\n", values.of_zone(zone, [_START])


def _lines(items: Sequence[tuple[str, int, int]]) -> str:
    return "".join([f"      {name:<12s} %d\n" for name, _, _ in items])


def _words(records: Any) -> NDArray[np.int64]:
    """The 64-bit words of each record."""
    words: NDArray[np.int64] = records.view("i8").reshape(len(records), -1)
    return words


def _empty_zone(zone_type: int) -> str:
    mark = _MIN_MOVABLE_WMARK if zone_type == ZONE_MOVABLE else 0
    return _SIZE_LINES % (0, *[mark] * 4, 0, 0, 0, 0, *[0] * MAX_NR_ZONES)


_EMPTY = [_empty_zone(zone_type) for zone_type in range(MAX_NR_ZONES)]
