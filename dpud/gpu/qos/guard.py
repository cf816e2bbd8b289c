# SPDX-License-Identifier: MIT
"""Keeps a priority level's latency target, by a cap on all levels below it.

Theory of operation
    Once a period the level's waits are looked at. Where more than one percent were longer than the target, there was
    too little bandwidth for it, so those below are capped:

        base    what is left of the total when the level, and those above it, have what they ask for and a fifth more,
                and those below what they have reserved, which passes the cap; lower, by a fifth a period, where that
                does not do. Never below a twentieth of the total.
        cap     base, less what it takes to work off the queue that has built up, in half a second

    The first formula goes near to the right cap at once, so there is little left to search for. The base goes down only
    while the target is missed, and up only after a calm time in which waits were below half of the target. If that
    turns out to have been too much, the next try comes after twice the time, up to a minute: it does not oscillate.
    Where the level asks for less than half of what it did, the base follows after a second.
"""

from dataclasses import dataclass, field

from dpud.gpu.qos.bucket import NS_PER_S, Bucket

PERIOD_NS = 100_000_000
ALLOWED_MISSES_PERCENT = 1
_HEADROOM_PERCENT = 120
_CUT_PERCENT = 80
_RAISE_PERCENT = 110
_FLOOR_PERCENT = 5
_FULL_PERCENT = 95
"""A cap above this is none."""
_BURST_NS = 1_000_000
"""Of the cap: those below must not come all at once."""
_DRAIN_NS = 500_000_000
_MIN_HOLD_NS = 5 * NS_PER_S
_GONE_HOLD_NS = NS_PER_S
_MAX_HOLD_NS = 60 * NS_PER_S


@dataclass
class Period:
    """What a level saw since its guard last looked."""

    nr: int = 0
    nr_missed: int = 0
    worst_ns: int = 0
    asked_bytes: int = 0
    entitled_bytes: int = 0
    """Granted by constraint."""

    def granted(self, waited_ns: int, target_ns: int) -> None:
        self.nr += 1
        self.nr_missed += waited_ns > target_ns
        self.worst_ns = max(self.worst_ns, waited_ns)


@dataclass(frozen=True)
class Load:
    """Of a level and those above it: bytes/s asked for, bytes queued. Of those below: bytes/s had by constraint."""

    total: int
    demand: int
    backlog: int
    entitled_below: int


@dataclass
class Guard:
    """One level's. `cap.rate` is 0 while nobody is capped."""

    cap: Bucket = field(default_factory=Bucket)
    base: int = 0
    demand: int = 0
    """Bytes/s asked for by this level and those above; smoothed."""
    entitled: int = 0
    """Bytes/s that those below had by constraint."""
    lowered_at: int = 0
    """What `demand` was when the base was lowered last."""
    held_since_ns: int = 0
    hold_ns: int = _MIN_HOLD_NS
    tried: bool = False
    """The last change was upwards."""

    def tick(self, seen: Period, target_ns: int, load: Load, now_ns: int) -> None:
        """A period is over."""
        total, demand, backlog = load.total, load.demand, load.backlog
        self.entitled = load.entitled_below
        self.demand += (demand - self.demand) // 2 if self.demand else demand
        missed = seen.nr_missed * 100 > seen.nr * ALLOWED_MISSES_PERCENT
        if missed:
            self._lower(backlog * NS_PER_S > demand * target_ns, total, now_ns)
        elif self.base and 2 * seen.worst_ns <= target_ns:
            self._raise(total, now_ns)
        elif self.base:
            self.held_since_ns = now_ns
        drain = backlog * NS_PER_S // _DRAIN_NS if missed else 0
        cap = max(self.base - drain, total * _FLOOR_PERCENT // 100) if self.base else 0
        if cap != self.cap.rate:
            self.cap.set(cap, max(1, cap * _BURST_NS // NS_PER_S), now_ns)

    def _fit(self, total: int) -> int:
        return total - self.demand * _HEADROOM_PERCENT // 100 - self.entitled

    def release(self) -> None:
        """There is no target any more."""
        vars(self).update(vars(Guard()))

    def _lower(self, is_draining: bool, total: int, now_ns: int) -> None:
        """`is_draining`: what waits is more than the target allows, whatever the cap is from now on."""
        if self.tried:
            self.hold_ns = min(2 * self.hold_ns, _MAX_HOLD_NS)
        self.tried, self.held_since_ns, self.lowered_at = False, now_ns, self.demand
        before = self.base or total
        fit = self._fit(total)
        wanted = min(before, fit) if fit < before or is_draining else before * _CUT_PERCENT // 100
        self.base = max(wanted, total * _FLOOR_PERCENT // 100)

    def _raise(self, total: int, now_ns: int) -> None:
        """Waits are short. Whether for long enough?"""
        calm_ns, gone = now_ns - self.held_since_ns, 2 * self.demand < self.lowered_at
        if calm_ns < (_GONE_HOLD_NS if gone else self.hold_ns):
            return
        self.held_since_ns, self.tried = now_ns, not gone
        fit = self._fit(total) if gone else 0
        self.base = max(fit, self.base * _RAISE_PERCENT // 100)
        if self.base >= total * _FULL_PERCENT // 100:
            self.base = 0
