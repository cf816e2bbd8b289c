# SPDX-License-Identifier: MIT
"""Who keeps memory in order, as far as the data path asks: recovery of what is broken, and who puts frames together."""

from collections.abc import Collection
from typing import Protocol

from dpud.gpu.address_space.regions import Region
from dpud.gpu.address_space.space import Pages
from dpud.gpu.location import Frames, Location

Busy = Collection[int]
"""Keys of pages that an access needs."""


class Examiner(Protocol):
    """fault.Recovery, as far as the data path goes."""

    def examine(self, region: Region, pages: Pages, /) -> int: ...
    def unreadable(self, region: Region, pages: Pages, /) -> Pages: ...
    def are_fit(self, location: Location, firsts: Frames, order: int, /) -> bool: ...
    def screen(self, location: Location, firsts: Frames, order: int, /) -> None: ...


class Defragmenter(Protocol):
    """defrag.DefragModule, as far as the data path goes."""

    def make_block(self, location: Location, order: int, busy: Busy, /) -> bool: ...
    def explain(self, location: Location, order: int, nr_blocks: int, busy: Busy, /) -> str: ...
