# SPDX-License-Identifier: MIT
"""Which page leaves a location's memory first: the protocol, and plain LRU. swap/ has more.

`victim` takes the page out of the policy. Whoever then keeps it in memory inserts it again.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Protocol


class ReplacementPolicy(Protocol):
    """Pages in memory, in some order of worth. Keys are unique."""

    def insert(self, key: int, /) -> None: ...

    def access(self, key: int, /) -> None:
        """It was used. A key that is not there is none of the policy's business."""
        ...

    def remove(self, key: int, /) -> None:
        """It left for another reason."""
        ...

    def victim(self) -> int | None:
        """The page to go next, taken out; None where there is none."""
        ...

    def victims(self, n: int, /) -> Sequence[int]:
        """Up to n of them."""
        ...

    def __len__(self) -> int: ...


NewPolicy = Callable[[], ReplacementPolicy]


class Lru:
    """Least recently used."""

    def __init__(self) -> None:
        self._order: OrderedDict[int, None] = OrderedDict()

    def insert(self, key: int) -> None:
        self._order[key] = None

    def access(self, key: int) -> None:
        if key in self._order:
            self._order.move_to_end(key)

    def remove(self, key: int) -> None:
        self._order.pop(key, None)

    def victim(self) -> int | None:
        return self._order.popitem(last=False)[0] if self._order else None

    def victims(self, n: int) -> list[int]:
        return [self._order.popitem(last=False)[0] for _ in range(min(n, len(self._order)))]

    def __len__(self) -> int:
        return len(self._order)
