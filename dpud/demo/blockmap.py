# SPDX-License-Identifier: GPL-2.0-only
"""A picture of physical memory: one character for 32 MiB, one row for 2 GiB.

The character says how much of it is in use, so the picture needs no colour. The colour says how much of it is
broken: pageblocks that are partly used and partly free, in which no 2 MiB page can be allocated.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from kernelsim.mmzone import Mem, pageblock_nr_pages, pageblock_order
from kernelsim.page import PG_buddy, PG_nopage

BLOCKS_PER_CELL = 16
CELLS_PER_ROW = 64
SHADES = " ░▒▓█"
NO_MEMORY = "·"
HEAT = ("blue", "green", "yellow", "dark_orange", "red")
_GIB_PER_ROW = BLOCKS_PER_CELL * CELLS_PER_ROW * pageblock_nr_pages // (1 << 18)

LEGEND = (
    f"A character is {BLOCKS_PER_CELL * 2} MiB: '{SHADES[0]}' free to '{SHADES[-1]}' in use, '{NO_MEMORY}' no memory.\n"
    "Blue to red: share of its 2 MiB blocks that are partly free, partly in use."
)


@dataclass(frozen=True)
class BlockMap:
    """Memory by pageblock: `nr_free` int64[pageblock], `hole` bool[pageblock] where there is no memory at all."""

    nr_free: NDArray[np.int64]
    hole: NDArray[np.bool_]

    @classmethod
    def of(cls, mem: Mem) -> "BlockMap":
        """Look at the memory map."""
        pages = mem.pages[: mem.nr_pages]
        heads = np.flatnonzero(pages["flags"] & np.uint32(PG_buddy))
        order = pages["order"][heads]
        block = heads >> pageblock_order
        in_first = 1 << np.minimum(order, pageblock_order).astype(np.int64)
        nr_free = np.bincount(block, weights=in_first, minlength=len(mem.blocks)).astype(np.int64)
        nr_free[block[order > pageblock_order] + 1] = pageblock_nr_pages  # the largest blocks are two pageblocks
        hole = (pages["flags"].reshape(-1, pageblock_nr_pages) == PG_nopage).all(axis=1)
        return cls(nr_free, hole)

    @property
    def broken(self) -> NDArray[np.bool_]:
        """bool[pageblock]: some of it free, but not all."""
        return ~self.hole & (self.nr_free > 0) & (self.nr_free < pageblock_nr_pages)

    def rows(self) -> list[Text]:
        """The picture, without the rows that have no memory."""
        broken = self.broken
        used = 1 - self.nr_free / pageblock_nr_pages
        rows = []
        per_row = BLOCKS_PER_CELL * CELLS_PER_ROW
        for start in range(0, len(used), per_row):
            cells = [slice(at, at + BLOCKS_PER_CELL) for at in range(start, start + per_row, BLOCKS_PER_CELL)]
            cells = [cell for cell in cells if cell.start < len(used)]
            if self.hole[start : start + per_row].all():
                continue
            row = Text(f"{start // per_row * _GIB_PER_ROW:3d} GiB ", no_wrap=True)
            for cell in cells:
                memory = ~self.hole[cell]
                row.append_text(_cell(used[cell][memory], broken[cell][memory]))
            rows.append(row)
        return rows


def _cell(used: NDArray[np.float64], broken: NDArray[np.bool_]) -> Text:
    """One character, of the blocks that have memory."""
    if not len(used):
        return Text(NO_MEMORY, style="bright_black")
    return Text(SHADES[_step(used.mean(), len(SHADES))], style=HEAT[_step(broken.mean(), len(HEAT))])


def _step(share: float, nr_steps: int) -> int:
    """The nearest of `nr_steps` steps from 0 to 1."""
    return int(share * (nr_steps - 1) + 0.5)
