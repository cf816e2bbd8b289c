# SPDX-License-Identifier: MIT
"""How much of the time defragmentation takes, and for how long at once.

A slice is what is moved before anybody else has a turn. It is cut so short that by the device's profile it cannot take
longer than the limit, even where each page is a transfer of its own. What takes longer as a single page is not moved
in the background. `longest_ns` is what a slice really took. Where real time passes, the program's own time comes on
top of the device's, so the time is looked at while pages move (relocate.py), and the slice ends before one more would
be too much. After a slice that took longer than the limit all the same the next ones are half as long, down to one
page, and become longer again when they take less than half of it.

After a slice of t ns there is a rest of t * (100 - percent) / percent ns. (Redis bounds active defragmentation so, with
active-defrag-cycle-max.)
"""

from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.location import Location

DEFAULT_PERCENT = 25
DEFAULT_PAUSE_NS = 100_000
_NS = 1_000_000_000
_ALL = 100
_MAX_HALVINGS = 12


class Effort:
    """Limits, and what was spent."""

    def __init__(self) -> None:
        self.cpu_percent = DEFAULT_PERCENT
        self.pause_limit_ns = DEFAULT_PAUSE_NS
        self._nr_halvings = 0
        self.longest_ns = self.last_ns = self.total_ns = self.nr_slices = 0
        self.turn_ns = 0
        """How long nobody else had a turn, the last time, where real time passes."""
        self.moving_ns = 0
        """What of that it took to move pages, to find frames for them included."""
        self._turn_began_ns: int | None = None

    def pages_per_slice(self, location: Location, page_bytes: int) -> int:
        """How many may be moved at once; 0 where one is too much."""
        return self.halved(self.pages_by_profile(location, page_bytes))

    def pages_by_profile(self, location: Location, page_bytes: int) -> int:
        """The same, if nothing but the device took time."""
        return self.pause_limit_ns // max(1, _page_ns(location, page_bytes))

    def halved(self, nr: int) -> int:
        """Of so many of anything, after slices that took too long; one at least, if it was."""
        return max(1, nr >> self._nr_halvings) if nr > 0 else 0

    def bytes_per_slice(self, location: Location) -> int:
        """The same for one run of bytes."""
        engine = _device(location).local
        left_ns = max(0, self.pause_limit_ns - engine.latency_ns)
        return left_ns * engine.bandwidth_bytes_per_s // _NS

    def spent(self, took_ns: int) -> None:
        """A slice is over."""
        self.nr_slices += 1
        self.total_ns += took_ns
        self.last_ns = took_ns
        self.longest_ns = max(self.longest_ns, took_ns)
        if took_ns > self.pause_limit_ns:
            self._nr_halvings = min(_MAX_HALVINGS, self._nr_halvings + 1)
        elif took_ns * 2 < self.pause_limit_ns:
            self._nr_halvings = max(0, self._nr_halvings - 1)

    def begin_turn(self, now_ns: int) -> None:
        """From now on nobody else has a turn, where real time passes."""
        self._turn_began_ns, self.moving_ns = now_ns, 0

    def left_ns(self, took_ns: int, now_ns: int) -> int:
        """What a slice that took so long has left; what its turn took besides, to find what to move, counts too."""
        real_ns = 0 if self._turn_began_ns is None else now_ns - self._turn_began_ns
        return self.pause_limit_ns - max(took_ns, real_ns)

    def end_turn(self, now_ns: int) -> None:
        """Others have theirs."""
        assert self._turn_began_ns is not None
        self.turn_ns = now_ns - self._turn_began_ns
        self._turn_began_ns = None
        self.longest_ns = max(self.longest_ns, self.turn_ns)

    def rest_ns(self, took_ns: int) -> int:
        """How long to wait after so much work."""
        return took_ns * (_ALL - self.cpu_percent) // self.cpu_percent


def _page_ns(location: Location, page_bytes: int) -> int:
    engine = _device(location).local
    return engine.latency_ns + -(-page_bytes * _NS // engine.bandwidth_bytes_per_s)


def _device(location: Location) -> SimulatedDevice:
    assert isinstance(location.hardware, SimulatedDevice), "a device with a profile"
    return location.hardware
