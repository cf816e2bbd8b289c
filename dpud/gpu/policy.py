# SPDX-License-Identifier: MIT
"""Which page leaves a location's memory first: the protocol, and plain LRU. swap/ has more.

`victim` takes the page out of the policy. Whoever then keeps it in memory inserts it again.

Where clients have shares of their own (admission says who gives way), each has a list of its own, as each of Linux's
memory cgroups has an lruvec on each node: whose page goes is admission's business, which of them the policy's.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol


class ReplacementPolicy(Protocol):
    """Pages in memory, in some order of worth. Keys are unique."""

    def miss(self, key: int, /) -> None:
        """It will be inserted; said before pages are evicted for it, as that may be all that is still known of it."""
        ...

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

    def miss(self, key: int) -> None:
        """Nothing is remembered of pages that left."""

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


class ClientPolicies:
    """The policy of a location: one list for all clients, or one for each. Keys are unique over all of them."""

    def __init__(self, new_policy: NewPolicy, client_of: Callable[[int], str] | None = None) -> None:
        """`client_of`: whose a page is; without, nobody asks."""
        self.new_policy = new_policy
        self._client_of = client_of
        self._lists: dict[str, ReplacementPolicy] = {}

    def __len__(self) -> int:
        return sum(map(len, self._lists.values()))

    def __iter__(self) -> Iterator[ReplacementPolicy]:
        return iter(self._lists.values())

    def of(self, client: str) -> ReplacementPolicy:
        """A client's list."""
        name = "" if self._client_of is None else client
        found = self._lists.get(name)
        if found is None:
            found = self._lists[name] = self.new_policy()
        return found

    def has(self, key: int) -> ReplacementPolicy:
        """The list that a page belongs to."""
        return self.of("" if self._client_of is None else self._client_of(key))

    def insert(self, key: int) -> None:
        self.has(key).insert(key)

    def remove(self, key: int) -> None:
        self.has(key).remove(key)

    def victim(self, client: str | None = None) -> int | None:
        """A client's, or that of the client who has most pages there."""
        if client is not None:
            return self.of(client).victim()
        return max(self._lists.values(), key=len).victim() if self._lists else None

    def convert(self, new_policy: NewPolicy) -> None:
        """Another policy; pages keep their order."""
        self.new_policy = new_policy
        for client, old in self._lists.items():
            new = self._lists[client] = new_policy()
            for key in old.victims(len(old)):
                new.insert(key)

    def forget(self, client: str) -> None:
        """It has no pages any more."""
        found = self._lists.pop(client, None)
        assert not found, "a client that left pages behind"
