# SPDX-License-Identifier: MIT
"""Whose pages are that move from one store to another, and from where.

A page in the pool lies in host memory: at the node nearest to the location that it left. What moves on from there, from
the pool to swap and from tier to tier, is charged to the owner of the page as DEMOTION, encoded as it is. Nobody waits
for that, for it makes room for others; where the owner is limited, it is owed (qos/module.py).
"""

from collections import Counter
from collections.abc import Mapping

from dpud.gpu.faults import FaultService
from dpud.gpu.holdings import Holdings
from dpud.gpu.traffic import Cause


class OwnersMoves:
    """A store.Mover."""

    def __init__(self, holdings: Holdings, faults: FaultService) -> None:
        self._holdings, self._faults = holdings, faults

    def node(self, key: int) -> int:
        region, page = self._holdings.space.regions.page_of(key)
        return self._faults.placement.nearest(int(region.home[page]))

    def charge(self, sizes: Mapping[int, int]) -> None:
        counts: Counter[tuple[str, int]] = Counter()
        for key, nr_bytes in sizes.items():
            counts[self._holdings.space.regions.page_of(key)[0].client, self.node(key)] += nr_bytes
        for (client, location), nr_bytes in counts.items():
            self._holdings.traffic.charge(client, Cause.DEMOTION, nr_bytes, location)
