# SPDX-License-Identifier: MIT
"""How much of the time defragmentation takes, and for how long at once.

A slice is what is moved before anybody else has a turn. It is cut so short that by the device's profile it cannot take
longer than the limit, even where each page is a transfer of its own. What takes longer as a single page is not moved
in the background. `longest_ns` is what a slice really took. After a slice that took longer than the limit all the same
the next ones are half as long, down to one page, and become longer again when they take less than half of it.

Where real time passes, the program's own time comes on top of the device's, and is most of it. So the time is looked at
while pages move (relocate.py): a slice goes on only if more pages, each as slow as the slowest of late, would end in
half the limit. The other half is for what cannot be foreseen: once in a thousand times nothing that is needed is in a
cache, and the same work takes three times as long. One page moves in any slice, or nothing ever would: a limit below
what that takes cannot be kept, and `nr_over_limit` says how often it was not. To find and move one page takes this
program 0.15 ms, and at the worst 0.4 ms: hence the default of 0.5 ms.

After a slice of t ns there is a rest of t * (100 - percent) / percent ns. (Redis bounds active defragmentation so, with
active-defrag-cycle-max.)
"""

from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.location import Location

DEFAULT_PERCENT = 25
DEFAULT_PAUSE_NS = 500_000
_NS = 1_000_000_000
_ALL = 100
_MAX_HALVINGS = 12
_FORGET = 16
"""Each page makes the slowest of late one part in so many faster."""


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
        self.longest_cpu_ns = 0
        """The most that a turn took of a CPU. What `longest_ns` is more than that, the machine gave to others."""
        self.nr_over_limit = 0
        """Slices that took longer than the limit."""
        self._turn_began_ns: int | None = None
        self._turn_began_cpu_ns = 0
        self._slowest_ns: dict[int, int] = {}
        """The slowest page of late, by its size."""

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
        self.nr_over_limit += self._turn_began_ns is None and took_ns > self.pause_limit_ns
        if took_ns > self.pause_limit_ns:
            self._nr_halvings = min(_MAX_HALVINGS, self._nr_halvings + 1)
        elif took_ns * 2 < self.pause_limit_ns:
            self._nr_halvings = max(0, self._nr_halvings - 1)

    def begin_turn(self, now_ns: int, cpu_ns: int) -> None:
        """From now on nobody else has a turn, where real time passes."""
        self._turn_began_ns, self._turn_began_cpu_ns, self.moving_ns = now_ns, cpu_ns, 0

    def nr_more(self, page_bytes: int, took_ns: int, nr: int, now_ns: int) -> int:
        """Pages for which a slice that moved `nr` in `took_ns` has time left."""
        page_ns = max(1, took_ns // nr)
        if self._turn_began_ns is None:
            return (self.pause_limit_ns - took_ns) // page_ns
        slowest_ns = self._slowest_ns.get(page_bytes, 0)
        self._slowest_ns[page_bytes] = max(min(page_ns, self.pause_limit_ns), slowest_ns - slowest_ns // _FORGET)
        left_ns = self.pause_limit_ns // 2 - (now_ns - self._turn_began_ns)
        return left_ns // self._slowest_ns[page_bytes]

    def end_turn(self, now_ns: int, cpu_ns: int) -> None:
        """Others have theirs."""
        assert self._turn_began_ns is not None
        self.turn_ns = now_ns - self._turn_began_ns
        self._turn_began_ns = None
        self.longest_ns = max(self.longest_ns, self.turn_ns)
        self.longest_cpu_ns = max(self.longest_cpu_ns, cpu_ns - self._turn_began_cpu_ns)
        self.nr_over_limit += self.turn_ns > self.pause_limit_ns

    def rest_ns(self, took_ns: int) -> int:
        """How long to wait after so much work."""
        return took_ns * (_ALL - self.cpu_percent) // self.cpu_percent


def _page_ns(location: Location, page_bytes: int) -> int:
    engine = _device(location).local
    return engine.latency_ns + -(-page_bytes * _NS // engine.bandwidth_bytes_per_s)


def _device(location: Location) -> SimulatedDevice:
    assert isinstance(location.hardware, SimulatedDevice), "a device with a profile"
    return location.hardware
