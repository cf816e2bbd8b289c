# SPDX-License-Identifier: MIT
"""Why there was no memory: the largest hole, who is in the way, and the fewest moves that would have helped."""

from collections import Counter
from collections.abc import Collection

import numpy as np

from dpud.gpu.address_space.frames import FREE
from dpud.gpu.address_space.pagetable import FRAME_BYTES
from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.defrag.blocks import BlockMaker
from dpud.gpu.defrag.metrics import runs
from dpud.gpu.defrag.relocate import Relocator
from dpud.gpu.location import Location


def explain(
    location: Location, order: int, nr_blocks: int, relocator: Relocator, maker: BlockMaker, busy: Collection[int]
) -> str:
    """One line."""
    frames = location.frames
    holes = runs(frames.owner == FREE)
    wanted, free = (nr_blocks << order) * FRAME_BYTES, frames.nr_free_bytes
    text = f"wanted {wanted}, free {free}, largest hole {max(holes, default=0) * FRAME_BYTES}"
    text += f", in the way: {_in_the_way(location, relocator, busy)}"
    if free < (1 << order) * FRAME_BYTES:
        return f"{text}; no move helps, too little is free"
    chosen, obstacles = maker.choose(location, order, busy)
    if chosen:
        return f"{text}; fewest moves: {chosen[0].nr_pages} pages, {chosen[0].nr_bytes} bytes"
    reasons = ", ".join(f"{nr} blocks: {why}" for why, nr in obstacles.most_common() if nr)
    return f"{text}; no move helps: {reasons or 'no block is partly free'}"


def _in_the_way(location: Location, relocator: Relocator, busy: Collection[int]) -> str:
    """Who has pages that cannot go, and bytes of them."""
    found: Counter[str] = Counter()
    keys = np.unique(location.frames.owner)
    for key in keys[keys >= 0].tolist():
        region, _ = relocator.find(key)
        if key in relocator.pins:
            pin = relocator.pins.of_page[key][0]
            found[f"{region.client} (pinned by {pin.owner}: {pin.reason})"] += region.page_bytes
        elif region.type is RegionType.PINNED:
            found[f"{region.client} (pinned memory)"] += region.page_bytes
        elif key in busy:
            found[f"{region.client} (this access)"] += region.page_bytes
        else:
            found[f"{region.client} (no room in the stores)"] += region.page_bytes
    return ", ".join(f"{who} {nr}" for who, nr in found.most_common(4)) or "nobody"
