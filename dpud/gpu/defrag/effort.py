# SPDX-License-Identifier: MIT
"""How much of the time defragmentation takes, and for how long at once.

A slice is what is moved before anybody else has a turn. It is cut so short that by the device's profile it cannot take
longer than the limit, even where each page is a transfer of its own. What takes longer as a single page is not moved
in the background. `longest_ns` is what a slice really took.

After a slice of t ns there is a rest of t * (100 - percent) / percent ns. (Redis bounds active defragmentation so, with
active-defrag-cycle-max.)
"""

from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.location import Location

DEFAULT_PERCENT = 25
DEFAULT_PAUSE_NS = 100_000
_NS = 1_000_000_000
_ALL = 100


class Effort:
    """Limits, and what was spent."""

    def __init__(self) -> None:
        self.cpu_percent = DEFAULT_PERCENT
        self.pause_limit_ns = DEFAULT_PAUSE_NS
        self.longest_ns = self.last_ns = self.total_ns = self.nr_slices = 0

    def pages_per_slice(self, location: Location, page_bytes: int) -> int:
        """How many may be moved at once; 0 where one is too much."""
        return self.pause_limit_ns // max(1, _page_ns(location, page_bytes))

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

    @property
    def rest_ns(self) -> int:
        """How long to wait after the last slice."""
        return self.last_ns * (_ALL - self.cpu_percent) // self.cpu_percent


def _page_ns(location: Location, page_bytes: int) -> int:
    engine = _device(location).local
    return engine.latency_ns + -(-page_bytes * _NS // engine.bandwidth_bytes_per_s)


def _device(location: Location) -> SimulatedDevice:
    assert isinstance(location.hardware, SimulatedDevice), "a device with a profile"
    return location.hardware
