# SPDX-License-Identifier: MIT
"""Which of several host nodes a page of host memory is put on.

Locations below `nr_devices` are devices, those from there on host nodes. Without NUMA there is one of these, and no
question. numa/placement.py has the answers where there are more.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.regions import Region

Pages = NDArray[np.int64]


class Placement(Protocol):
    """Who is asked."""

    def nearest(self, at: int, /) -> int:
        """The host node nearest to a location: what HOST means there."""
        ...

    def place(self, region: Region, pages: Pages, at: int, /) -> Pages:
        """Location for each page of HOST or PINNED memory that `at` is the first to use."""
        ...


class OneHost:
    """The only host node there is, or the first."""

    def __init__(self, host: int) -> None:
        self._host = host

    def nearest(self, _at: int) -> int:
        return self._host

    def place(self, _region: Region, pages: Pages, _at: int) -> Pages:
        return np.full(len(pages), self._host, dtype=np.int64)


class Balancer(Protocol):
    """numa.Balancer, as far as the data path goes."""

    def tick(self) -> None:
        """An access begins: whoever samples now and then may look at the time."""
        ...

    def reached(self, region: Region, pages: Pages, at: int, bring: Callable[[Pages, int], None], /) -> None:
        """`at` is about to map these resident pages, which it did not reach; `bring` moves some of them."""
        ...

    def holds(self, region: Region, pages: Pages, at: int, /) -> NDArray[np.bool_]:
        """Pages of managed memory whose place the balancer decides: using them from `at` does not move them."""
        ...
