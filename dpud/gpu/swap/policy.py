# SPDX-License-Identifier: MIT
"""Replacement policies by name. A new one is one class that keeps to the protocol in dpud/gpu/policy.py.

S3-FIFO (Yang et al., "FIFO queues are all you need for cache eviction", SOSP'23) as libCacheSim 0.3.5 has it, so that
its misses are the same one by one:

    small   a FIFO of a tenth of the capacity, where pages begin
    main    a FIFO of the rest; who was used since gets another round, at most three times
    ghost   keys only, of the last pages that left `small` unused, up to nine tenths of the capacity

A page that leaves `small` goes to `main` if it was used twice there, else out. One that comes back while its key is in
`ghost` begins in `main`. Until the first eviction, pages that `small` has no room for begin in `main` too.

Each operation is O(1), for `victim` on average: a page is passed over once for each use.

A memory holds pages of several sizes, so how many it holds is not known beforehand. Without a `capacity`, it is taken
to be the most pages there have been, and at the first eviction, when that is known, pages are dealt out to `small` and
`main` as they would have been had it been known before.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence

from dpud.gpu.policy import Lru, ReplacementPolicy

SMALL_SHARE = 0.1
GHOST_SHARE = 0.9
TO_MAIN_USES = 2
_MAX_USES = 3

_KINDS: dict[str, Callable[[], ReplacementPolicy]] = {"lru": Lru}


def register(name: str) -> Callable[[type[ReplacementPolicy]], type[ReplacementPolicy]]:
    """A policy, by name."""

    def registered(kind: type[ReplacementPolicy]) -> type[ReplacementPolicy]:
        if name in _KINDS:
            raise ValueError(f"there is a policy {name} already")
        _KINDS[name] = kind
        return kind

    return registered


def names() -> tuple[str, ...]:
    return tuple(_KINDS)


def kind_of(name: str) -> Callable[[], ReplacementPolicy]:
    """Who makes it. Raises KeyError for a name that is none."""
    return _KINDS[name]


def new_policy(name: str) -> ReplacementPolicy:
    """Raises KeyError for a name that is none."""
    return _KINDS[name]()


@register("s3-fifo")
class S3Fifo:
    """`capacity` in pages; 0: as it turns out."""

    def __init__(self, capacity: int = 0) -> None:
        self._fixed = capacity
        self._most = capacity
        self._small: OrderedDict[int, int] = OrderedDict()  # key -> uses
        self._main: OrderedDict[int, int] = OrderedDict()
        self._ghost: OrderedDict[int, None] = OrderedDict()
        self._awaited: set[int] = set()
        self._has_evicted = False

    @property
    def small_capacity(self) -> int:
        return int(self._most * SMALL_SHARE)

    @property
    def main_capacity(self) -> int:
        return self._most - self.small_capacity

    def miss(self, key: int) -> None:
        """A page will be inserted; to be said before pages are evicted for it, as that may push it out of `ghost`."""
        if key in self._ghost:
            del self._ghost[key]
            self._awaited.add(key)

    def insert(self, key: int) -> None:
        self.miss(key)
        if key in self._awaited:
            self._awaited.discard(key)
            self._main[key] = 0
        elif not self._has_evicted and self._fixed and len(self._small) >= self.small_capacity:
            self._main[key] = 0
        else:
            self._small[key] = 0
        self._most = max(self._most, len(self))

    def access(self, key: int) -> None:
        if key in self._small:
            self._small[key] += 1
        elif key in self._main:
            self._main[key] += 1

    def remove(self, key: int) -> None:
        self._small.pop(key, None)
        self._main.pop(key, None)
        self._awaited.discard(key)

    def victim(self) -> int | None:
        if not self._has_evicted:
            self._begin()
        if len(self._main) > self.main_capacity or not self._small:
            return self._main_victim()
        found = self._small_victim()
        return self._main_victim() if found is None else found

    def _begin(self) -> None:
        """The first eviction: `small` keeps those that came first."""
        self._has_evicted = True
        if not self._fixed:
            for key in list(self._small)[self.small_capacity :]:
                self._main[key] = self._small.pop(key)

    def _small_victim(self) -> int | None:
        while self._small:
            key, uses = self._small.popitem(last=False)
            if uses < TO_MAIN_USES:
                self._remember(key)
                return key
            self._main[key] = 0
        return None

    def _main_victim(self) -> int | None:
        while self._main:
            key, uses = self._main.popitem(last=False)
            if not uses:
                return key
            self._main[key] = min(uses, _MAX_USES) - 1
        return None

    def _remember(self, key: int) -> None:
        limit = int(self._most * GHOST_SHARE)
        if key in self._ghost or not limit:
            return
        while len(self._ghost) >= limit:
            self._ghost.popitem(last=False)
        self._ghost[key] = None

    def victims(self, n: int) -> Sequence[int]:
        found: list[int] = []
        while len(found) < n and (key := self.victim()) is not None:
            found.append(key)
        return found

    def __len__(self) -> int:
        return len(self._small) + len(self._main)


def misses(policy: ReplacementPolicy, trace: Iterable[int], capacity: int) -> int:
    """Misses of a policy on a trace of keys, in a memory of `capacity` pages."""
    held: set[int] = set()
    nr = 0
    for key in trace:
        if key in held:
            policy.access(key)
            continue
        nr += 1
        policy.miss(key)
        if len(held) >= capacity and (victim := policy.victim()) is not None:
            held.discard(victim)
        policy.insert(key)
        held.add(key)
    return nr
