# SPDX-License-Identifier: MIT
"""What went wrong, as NVIDIA's driver says it: numbered events, counters that only grow, and who has taken note.

An event has a sequence number. `ack` says up to which one somebody has looked; what came later is open. So a program
sees repeats, and that all is well again, where a gauge of "the last XID" shows neither.

Numbers and meanings: NVIDIA, "XID errors", docs.nvidia.com/deploy/xid-errors.
"""

import errno
import logging
from collections import Counter, deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum

from dpud.gpu.clock import Clock
from dpud.gpu.errors import GpuError

KEPT = 1000
"""Events that can still be read; the counters know about all."""

log = logging.getLogger("dpud.gpu.fault")


class Xid(IntEnum):
    DBE = 48
    """Double bit ECC error."""
    REMAP = 63
    """A page was retired, or a row remapped (or will be, at the next reset)."""
    REMAP_FAILURE = 64
    """It could not be: no spare rows are left."""
    OFF_THE_BUS = 79
    """The device has fallen off the bus."""
    HIGH_SBE_RATE = 92
    """High single-bit ECC error rate."""
    CONTAINED = 94
    """Bytes were lost, and one client is affected."""
    UNCONTAINED = 95
    """Bytes were lost that several clients may use."""


_HARMLESS = (Xid.DBE, Xid.REMAP, Xid.HIGH_SBE_RATE)
"""By themselves: nothing has come of it yet."""


@dataclass(frozen=True)
class FaultEvent:
    sequence: int
    time_ns: int
    xid: Xid
    location: str
    client: str
    """Empty where it is nobody's."""
    text: str

    def __str__(self) -> str:
        seconds, ns = divmod(self.time_ns, 1_000_000_000)
        whose = f" client={self.client}" if self.client else ""
        return f"{self.sequence} [{seconds}.{ns // 1000:06}] Xid {self.xid:d} {self.location}{whose}: {self.text}"


class EventLog:
    """The events of all locations."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self.records: deque[FaultEvent] = deque(maxlen=KEPT)
        self.counts: Counter[tuple[Xid, str]] = Counter()
        """By number and location."""
        self.nr_events = 0
        self.acknowledged = 0
        """Sequence number of the last event that somebody has taken note of."""

    def add(self, xid: Xid, location: str, text: str, client: str = "") -> None:
        self.nr_events += 1
        event = FaultEvent(self.nr_events, self._clock.now_ns(), xid, location, client, text)
        self.records.append(event)
        self.counts[xid, location] += 1
        again = xid is Xid.REMAP_FAILURE and self.counts[xid, location] > 1
        log.log(logging.INFO if again or xid in _HARMLESS else logging.ERROR, "%s", event)

    @property
    def nr_open(self) -> int:
        return self.nr_events - self.acknowledged

    def acknowledge(self, sequence: int | None = None) -> None:
        """Take note of events up to this one; None: of all. Raises GpuError(EINVAL)."""
        last = self.nr_events if sequence is None else sequence
        if not self.acknowledged <= last <= self.nr_events:
            raise GpuError(
                errno.EINVAL, f"event {last}: {self.acknowledged} is acknowledged, {self.nr_events} is the last"
            )
        self.acknowledged = last

    def open_by_kind(self) -> Counter[tuple[Xid, str]]:
        """Of those that can still be read."""
        return Counter((each.xid, each.location) for each in self.records if each.sequence > self.acknowledged)

    def table(self) -> Iterator[str]:
        """A line for each number and location: how many ever, how many of those that are kept are open."""
        still_open = self.open_by_kind()
        for (xid, location), nr in sorted(self.counts.items()):
            yield f"{xid:d} {location} {nr} {still_open[xid, location]} {xid.name.lower()}"
