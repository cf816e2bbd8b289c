# SPDX-License-Identifier: MIT
"""Pages that must stay in their frames, who says so, and why: a transfer by physical address, a mapping elsewhere.

A pinned page is in memory, and is neither relocated nor evicted nor moved to another location on demand. What breaks
(fault/) leaves its frame all the same: the other choice is to lose it. Pins of a region end with it.

Invariant: a page has a record in `of_page` exactly as long as somebody's pin covers it.
"""

import errno
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from dpud.gpu.address_space.regions import PageState, Region
from dpud.gpu.address_space.space import Pages
from dpud.gpu.errors import GpuError

if TYPE_CHECKING:
    from dpud.gpu.memory import GpuMemory

_BATCH_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Pin:
    """One range that somebody pinned."""

    region: Region
    pages: range
    owner: str
    reason: str

    @property
    def keys(self) -> range:
        return range(self.region.first_key + self.pages.start, self.region.first_key + self.pages.stop)

    def __str__(self) -> str:
        va = self.region.va + (self.pages.start << self.region.page_shift)
        return f"{va:#x} {len(self.pages)} {self.region.client} {self.owner} {self.reason}"


class Pins:
    """All of them, by page. Ask `key in pins`."""

    def __init__(self) -> None:
        self.of_page: dict[int, list[Pin]] = {}
        self._pins: dict[Pin, None] = {}

    def __contains__(self, key: object) -> bool:
        return key in self.of_page

    def __iter__(self) -> Iterator[Pin]:
        return iter(self._pins)

    def __len__(self) -> int:
        return len(self._pins)

    def add(self, region: Region, pages: range, owner: str, reason: str) -> Pin:
        pin = Pin(region, pages, owner, reason)
        self._pins[pin] = None
        for key in pin.keys:
            self.of_page.setdefault(key, []).append(pin)
        return pin

    def remove(self, pin: Pin) -> None:
        """Raises GpuError(EINVAL) for one that is gone."""
        if pin not in self._pins:
            raise GpuError(errno.EINVAL, "no such pin")
        del self._pins[pin]
        for key in pin.keys:
            self.of_page[key].remove(pin)
            if not self.of_page[key]:
                del self.of_page[key]

    def forget(self, region: Region) -> None:
        """A region is freed."""
        for pin in [each for each in self._pins if each.region is region]:
            self.remove(pin)

    def mask(self, region: Region, pages: Pages) -> "np.ndarray[tuple[int], np.dtype[np.bool_]]":
        """Which of a region's pages are pinned."""
        if not self.of_page:
            return np.zeros(len(pages), dtype=np.bool_)
        return np.array([key in self.of_page for key in (region.first_key + pages).tolist()], dtype=np.bool_)


def pin_range(memory: "GpuMemory", va: int, nr_bytes: int, owner: str, reason: str) -> Pin:
    """Bring the pages of a range into memory, as for a write by their owner, and keep them there.

    Raises GpuError: EFAULT; ENOMEM or EIO, and nothing is pinned.
    """
    region = memory.space.regions.find(va)
    if region is None or nr_bytes < 1 or va + nr_bytes > region.va + region.nr_bytes:
        raise GpuError(errno.EFAULT, f"not all of {nr_bytes} bytes at {va:#x} are allocated")
    pages = range(*memory.space.page_range(region, va, nr_bytes))
    pin = memory.residency.pins.add(region, pages, owner, reason)  # first, so that what came in stays
    try:
        _bring_in(memory, region, np.array(pages))
    except GpuError:
        memory.residency.pins.remove(pin)
        raise
    return pin


def _bring_in(memory: "GpuMemory", region: Region, pages: Pages) -> None:
    home = memory.clients[region.client].device
    memory.residency.examine(region, pages)
    per_batch = max(1, _BATCH_BYTES >> region.page_shift)
    for start in range(0, len(pages), per_batch):
        batch = pages[start : start + per_batch]
        at = np.where(region.state[batch] == PageState.RESIDENT, region.home[batch], home)
        for number in np.unique(at).tolist():
            group = batch[at == number]
            keys = set((region.first_key + group).tolist())
            memory.faults.serve(region, group, number, True, np.zeros(len(group), dtype=np.bool_), keys)
