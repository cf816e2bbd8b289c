# SPDX-License-Identifier: MIT
"""Where a page's bytes are besides its frame: a copy at another location, the stores, a checkpoint.

Only copies that are as the page is now count: copies of read-mostly pages always are, the stores' as long as the page
is `backed`, a checkpoint's until the page is written to.
"""

from typing import Protocol

import numpy as np

from dpud.gpu.address_space.regions import Region
from dpud.gpu.errors import UncorrectableError
from dpud.gpu.hal.interface import Bytes
from dpud.gpu.memory import GpuMemory


class Snapshots(Protocol):
    """Checkpoints, as far as this goes."""

    def page(self, region: Region, page: int, /) -> Bytes | None: ...


class Copies:
    def __init__(self, memory: GpuMemory, snapshots: Snapshots) -> None:
        self._memory, self._snapshots = memory, snapshots

    def find(self, region: Region, page: int) -> tuple[str, Bytes] | None:
        """(where, bytes) of the first good copy, cheapest first."""
        for number, frame in list(region.replicas.get(page, {}).items()):
            location = self._memory.locations[number]
            try:
                return location.name, location.load_pages(np.array([frame]), region.page_bytes)[0]
            except UncorrectableError:
                continue  # that one is bad as well; whoever looks at it next drops it
        if region.backed[page]:
            row = np.empty(region.page_bytes, dtype=np.uint8)
            place = self._memory.store.place(region.first_key + page)
            if not self._memory.store.peek([region.first_key + page], [row.data]):
                return place.value if place else "", row
        row_then = self._snapshots.page(region, page)
        return None if row_then is None else ("checkpoint", row_then)
