# SPDX-License-Identifier: MIT
"""Sampling who uses which page of host memory, and moving pages to where they are used.

Theory of operation
    Each scan period some pages are unmapped everywhere. Who uses such a page next misses it: a hint fault, which is
    served like any other, and is told here first (`reached`). What a page's faults tell is its Heat; a rule (rules.py)
    makes a wish of it.

    A wish is granted where the target has room. Where it has none, the least worth of a few pages there has to leave
    first, for the nearest node with room; what that loses is taken off the wish's benefit.

    It is refused, and said so: beyond the rate limit (so many MB in each second, as the kernel's
    numa_balancing_promote_rate_limit_MBps); while a page is in backoff. A page that comes back to the node it left
    last, within the horizon, plays ping-pong. Once may be a mistake that was made good, or a change of use; the second
    time it stays for an eighth of a horizon, and twice as long each further time.

    The scan period adapts as the kernel's does: shorter where faults lead to moves, longer where they do not.

Invariants
    - PINNED pages never move, nor those that somebody pinned, or with copies or a preferred location.
    - Only resident pages of host nodes are unmapped, and each move is charged to the page's owner (Cause.MIGRATION).

Differs from Linux: pages are anybody's, there are no groups of tasks; a fault is a location's, not a task's.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.errors import GpuError
from dpud.gpu.location import Location
from dpud.gpu.numa.heat import Heat
from dpud.gpu.numa.paths import Paths
from dpud.gpu.numa.placement import NodePlacement
from dpud.gpu.numa.rules import OFF, RULES, Fault, Setting, Wish, benefits_ns
from dpud.gpu.placement import Pages

if TYPE_CHECKING:
    from dpud.gpu.memory import GpuMemory

_NS_PER_S = 1_000_000_000
_NS_PER_MS = 1_000_000
HORIZON_MS = 32_000
"""How far ahead what a move saves is reckoned: some scans at the period that the kernel begins with. Uncalibrated."""
ACCESS_BYTES = 64
"""A line of a cache."""
_NR_LOOKED_AT = 32
"""Pages among which the one that is worth least is chosen to make room."""
_MOVED_SHARE = 0.05
"""Of hint faults: from so many moves, and changes of use, on the next scan comes sooner."""
_KEPT = 1024
STAT = ("scans", "pages_unmapped", "hint_faults", "hint_faults_local", "promoted", "demoted", "exchanged")
REFUSALS = ("rate_limited", "backoff", "no_room", "not_worth_it")


@dataclass(frozen=True)
class Decision:
    """A line of the file `decisions`."""

    at_ns: int
    va: int
    source: str
    target: str
    verdict: str
    benefit_ns: float
    cost_ns: float

    def __str__(self) -> str:
        net_ns = self.benefit_ns - self.cost_ns
        return (
            f"{self.at_ns} {self.va:x} {self.source} {self.target} {self.verdict}"
            f" benefit={self.benefit_ns:.0f} cost={self.cost_ns:.0f} net={net_ns:.0f}"
        )


class Balancer:
    """A placement.Balancer."""

    def __init__(self, memory: "GpuMemory", placement: NodePlacement, paths: Paths) -> None:
        self.memory, self._placement, self._paths = memory, placement, paths
        self._first = memory.nr_devices
        self.rule = "cost" if len(placement.hosts) > 1 else OFF
        self.period_ns, self.min_period_ns, self.max_period_ns = (ms * _NS_PER_MS for ms in (1000, 100, 60_000))
        self.horizon_ns = HORIZON_MS * _NS_PER_MS
        self.scan_bytes = 256 << 20  # the kernel's numa_balancing scan_size_mb
        self.limit_MBps = 65536  # the kernel's numa_balancing_promote_rate_limit_MBps
        self.access_bytes = ACCESS_BYTES
        self.stat: Counter[str] = Counter(dict.fromkeys((*STAT, *REFUSALS, "pingpongs"), 0))
        self.decisions: deque[Decision] = deque(maxlen=_KEPT)
        self.heats: dict[int, Heat] = {}
        self._settings: dict[tuple[int, int], Setting] = {}
        self._next_ns = memory.clock.now_ns() + self.period_ns
        self._access_ns = self._next_ns
        self._cursor = 0
        self._seen = (0, 0)  # hint faults and moves, at the last scan
        self._nr_changed = 0
        self._window_ns = self._window_bytes = 0
        self._rng = np.random.default_rng(0)

    # Sampling.

    def tick(self) -> None:
        self._access_ns = now_ns = self.memory.clock.now_ns()
        if self.rule == OFF or now_ns < self._next_ns:
            return
        self._adapt()
        self._scan(now_ns)
        self._next_ns = now_ns + self.period_ns

    def _adapt(self) -> None:
        faults, moves = self.stat["hint_faults"], self.stat["promoted"]
        nr_faults, nr_moves = faults - self._seen[0], moves - self._seen[1] + self._nr_changed
        self._seen, self._nr_changed = (faults, moves), 0
        if nr_faults:
            longer = nr_moves < _MOVED_SHARE * nr_faults
            period_ns = self.period_ns * 3 // 2 if longer else self.period_ns // 2
            self.period_ns = min(self.max_period_ns, max(self.min_period_ns, period_ns))

    def _scan(self, now_ns: int) -> None:
        """Unmap the next pages, where the last scan stopped; at the end begin again."""
        self.stat["scans"] += 1
        left = self.scan_bytes
        for region, pages in self._from_cursor():
            taken = pages[: max(1, left >> region.page_shift)]
            self._sample(region, taken, now_ns)
            left -= len(taken) << region.page_shift
            self._cursor = region.first_key + int(taken[-1]) + 1
            if left <= 0:
                return
        self._cursor = 0
        self._forget_the_dead()

    def _from_cursor(self) -> Iterator[tuple[Region, Pages]]:
        for region in sorted(self.memory.space.regions, key=lambda each: each.first_key):
            pages = self._candidates(region)
            pages = pages[region.first_key + pages >= self._cursor]
            if len(pages):
                yield region, pages

    def _candidates(self, region: Region) -> Pages:
        """Pages that might move: not those of a region that is just leaving for another machine, or coming."""
        if region.type not in (RegionType.HOST, RegionType.MANAGED) or region.held or region.arrival is not None:
            return np.zeros(0, dtype=np.int64)
        here = (region.state == PageState.RESIDENT) & (region.home >= self._first)
        pages: Pages = np.flatnonzero(here & (region.advice.preferred < 0))
        pages = pages[~np.isin(pages, list(region.replicas))] if region.replicas else pages
        return pages[~self.memory.residency.pins.mask(region, pages)]

    def _sample(self, region: Region, pages: Pages, now_ns: int) -> None:
        for key in (region.first_key + pages).tolist():
            heat = self.heats.get(key)
            if heat is None:
                heat = self.heats[key] = Heat(len(self.memory.locations))
            if heat.sampled_ns is None:
                heat.sampled_ns = now_ns
                self.stat["pages_unmapped"] += 1
        self.memory.space.unmap_pages(region, pages)

    def _forget_the_dead(self) -> None:
        alive = [range(each.first_key, each.first_key + each.nr_pages) for each in self.memory.space.regions]
        self.heats = {key: heat for key, heat in self.heats.items() if any(key in keys for keys in alive)}

    # Hint faults.

    def holds(self, region: Region, pages: Pages, at: int) -> NDArray[np.bool_]:
        held: NDArray[np.bool_] = region.home[pages] >= self._first
        return held & (self.rule != OFF and at >= self._first)

    def reached(self, region: Region, pages: Pages, at: int, bring: Callable[[Pages, int], None]) -> None:
        now_ns, busy = self.memory.clock.now_ns(), set((region.first_key + pages).tolist())
        for page in pages.tolist():
            heat = self.heats.get(region.first_key + page)
            if heat is None or heat.sampled_ns is None:
                continue
            if heat.sampled_ns == self._access_ns:
                heat.sampled_ns = None  # unmapped as this very access began: that tells nothing
                continue
            last_at = heat.last_at
            waited_ns = heat.fault(at, now_ns)
            self._nr_changed += heat.has_changed
            home = int(region.home[page])
            self.stat["hint_faults"] += 1
            self.stat["hint_faults_local"] += home == self._placement.nearest(at)
            if self.rule != OFF and home >= self._first and self._may_move(region, page):
                self._judge(region, page, heat, Fault(at, last_at, waited_ns), busy, bring)

    def _may_move(self, region: Region, page: int) -> bool:
        is_fixed = region.held or region.arrival is not None or page in region.replicas
        is_fixed = is_fixed or region.first_key + page in self.memory.residency.pins
        return not is_fixed and bool(region.advice.preferred[page] < 0)

    def _judge(
        self,
        region: Region,
        page: int,
        heat: Heat,
        fault: Fault,
        busy: set[int],
        bring: Callable[[Pages, int], None],
    ) -> None:
        now_ns, home = self.memory.clock.now_ns(), int(region.home[page])
        wishes = RULES[self.rule](self.setting(region), heat, home, fault, now_ns)
        if not wishes:
            return
        if heat.backoff_until_ns > now_ns:
            self._note(region, page, wishes[0], home, "backoff")
        elif not self._within_limit(region.page_bytes, now_ns):
            self._note(region, page, wishes[0], home, "rate_limited")
        else:
            self._grant(region, page, heat, wishes, busy, bring)

    def _grant(
        self,
        region: Region,
        page: int,
        heat: Heat,
        wishes: list[Wish],
        busy: set[int],
        bring: Callable[[Pages, int], None],
    ) -> None:
        """The best wish that can be granted."""
        home, verdict = int(region.home[page]), "no_room"
        for wish in wishes:
            refusal = None if self._has_room(wish.to, region.order) else self._exchange(region, wish, busy)
            if refusal is None and self._has_room(wish.to, region.order):
                bring(np.array([page]), wish.to)
            if int(region.home[page]) == wish.to:
                self._moved(region, page, heat, wish, home)
                return
            verdict = refusal or verdict
        self._note(region, page, wishes[0], home, verdict)

    def _moved(self, region: Region, page: int, heat: Heat, wish: Wish, home: int) -> None:
        now_ns = self.memory.clock.now_ns()
        self._window_bytes += region.page_bytes
        self._note(region, page, wish, home, "promoted", wish.why)
        if wish.to == heat.left and now_ns - heat.left_ns < self.horizon_ns:
            self.stat["pingpongs"] += 1
            heat.nr_pingpongs += 1
            if heat.nr_pingpongs > 1:
                heat.backoff_until_ns = now_ns + ((self.horizon_ns >> 3) << min(heat.nr_pingpongs - 2, 16))
        heat.left, heat.left_ns = home, now_ns

    def _note(self, region: Region, page: int, wish: Wish, home: int, event: str, why: str = "") -> None:
        names = self.memory.space.names
        self.stat[event] += 1
        va, verdict = region.va + (page << region.page_shift), f"{event}:{why}" if why else event
        now_ns = self.memory.clock.now_ns()
        self.decisions.append(Decision(now_ns, va, names[home], names[wish.to], verdict, wish.benefit_ns, wish.cost_ns))

    def _within_limit(self, nr_bytes: int, now_ns: int) -> bool:
        if now_ns - self._window_ns >= _NS_PER_S:
            self._window_ns, self._window_bytes = now_ns, 0
        return self._window_bytes + nr_bytes <= self.limit_MBps << 20

    # Room.

    def _has_room(self, location: int, order: int) -> bool:
        return self.memory.locations[location].frames.nr_free_for(order) >= 1 << order

    def _exchange(self, region: Region, wish: Wish, busy: set[int]) -> str | None:
        """Have a page of the same size leave, where both moves together pay -> why not."""
        if self.rule == "two-fault":
            return "no_room"  # as the kernel's migrate_misplaced_folio refuses a node that is full
        least: tuple[float, Region, int, Wish] | None = None
        for other, page in islice(self._some_of(wish.to, region.order, busy), _NR_LOOKED_AT):
            leaving = self._leaving(other, page)
            if leaving is not None and (least is None or -leaving.net_ns < least[0]):
                least = -leaving.net_ns, other, page, leaving
        if least is None:
            return "no_room"
        loss_ns, other, page, leaving = least
        if self.rule == "cost" and wish.net_ns <= loss_ns:
            return "not_worth_it"
        self.stat["exchanged"] += self._push(other, page, leaving)
        return None

    def _some_of(self, location: int, order: int, busy: set[int]) -> Iterator[tuple[Region, int]]:
        """Pages of a node that might leave, in no order."""
        regions = [each for each in self.memory.space.regions if each.order == order]
        found = [(each, self._candidates(each)) for each in regions]
        here = [(each, pages[each.home[pages] == location]) for each, pages in found]
        ends = np.cumsum([len(pages) for _, pages in here])
        nr = int(ends[-1]) if len(ends) else 0
        for number in self._rng.permutation(nr)[: 2 * _NR_LOOKED_AT].tolist():
            at = int(np.searchsorted(ends, number, side="right"))
            region, pages = here[at]
            page = int(pages[number - int(ends[at])])
            if region.first_key + page not in busy:
                yield region, page

    def _leaving(self, region: Region, page: int) -> Wish | None:
        """To the node with room where it is missed least."""
        home = int(region.home[page])
        heat = self.heats.get(region.first_key + page) or Heat(len(self.memory.locations))
        setting = self.setting(region)
        benefits = benefits_ns(setting, heat, home, self.memory.clock.now_ns())
        nodes = [to for to in self._nearest_first(home) if to != home and self._has_room(to, region.order)]
        wishes = [
            Wish(to, float(benefits[to - self._first]), float(setting.copy_ns[home, to]), "makes-room") for to in nodes
        ]
        return max(wishes, key=lambda each: each.net_ns, default=None)

    def _nearest_first(self, location: int) -> list[int]:
        near = self._placement.topology.fallback(location - self._first)
        return [self._first + node for node in near]

    def _push(self, region: Region, page: int, leaving: Wish) -> bool:
        """Move a page that nobody asks for now -> whether it is there."""
        pages, home = np.array([page]), int(region.home[page])
        if len(self.memory.residency.unreadable(region, pages)):
            return False  # in the middle of somebody's access is no time to make it good
        try:
            self.memory.faults.migrate(region, pages, leaving.to, {region.first_key + page})
        except GpuError:
            return False  # no room after all; the page stays where it is
        self._note(region, page, leaving, home, "demoted", leaving.why)
        return True

    def demote(self, location: Location, nr_frames: int) -> int:
        """For background reclaim: the coldest of some pages go to other nodes rather than into the stores -> frames."""
        if self.rule == OFF or not location.is_host:
            return 0
        before, now_ns = location.frames.nr_free, self.memory.clock.now_ns()
        some: list[tuple[float, Region, int]] = []
        for order in {region.order for region in self.memory.space.regions}:
            for region, page in self._some_of(location.number, order, set()):
                heat = self.heats.get(region.first_key + page)
                some.append((heat.rate(now_ns) if heat else 0.0, region, page))
        for _, region, page in sorted(some, key=lambda each: each[0])[:_NR_LOOKED_AT]:
            if location.frames.nr_free - before >= nr_frames:
                break
            leaving = self._leaving(region, page)
            if leaving is not None and self._is_relaxed(leaving.to):
                self._push(region, page, leaving)
        return location.frames.nr_free - before

    def _is_relaxed(self, location: int) -> bool:
        """Whether a node is far enough from reclaim itself to take pages."""
        frames = self.memory.locations[location].frames
        return frames.nr_free * 100 > frames.nr_usable * self.memory.residency.watermarks.high

    def setting(self, region: Region) -> Setting:
        """For pages of a region's size."""
        key = region.page_bytes, self.access_bytes
        if key not in self._settings:
            locations, page_ns = self.memory.locations, self._paths.costs_ns(region.page_bytes)
            copy_ns = page_ns.T + np.diagonal(page_ns)[None, :]
            nodes = self._placement.topology.nodes
            users = [each.number for each in locations if not each.is_host or nodes[each.number - self._first].cpus]
            access_ns = self._paths.costs_ns(self.access_bytes)
            self._settings[key] = Setting(
                self._first, access_ns, copy_ns, np.array(users), self._placement.nearest, self.horizon_ns
            )
        found = self._settings[key]
        if found.horizon_ns != self.horizon_ns:
            found = self._settings[key] = Setting(
                found.first_host, found.access_ns, found.copy_ns, found.users, found.node_of, self.horizon_ns
            )
        return found

    def set_period(self, ns: int) -> None:
        """From now on, until it adapts."""
        self.period_ns = min(self.max_period_ns, max(self.min_period_ns, ns))
        self._next_ns = min(self._next_ns, self.memory.clock.now_ns() + self.period_ns)

    def playing(self) -> Iterator[tuple[int, Heat]]:
        """(address, heat) of pages that have played ping-pong."""
        for region in self.memory.space.regions:
            for page in range(region.nr_pages):
                heat = self.heats.get(region.first_key + page)
                if heat is not None and heat.nr_pingpongs:
                    yield region.va + (page << region.page_shift), heat
