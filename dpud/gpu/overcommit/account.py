# SPDX-License-Identifier: MIT
"""What admission knows of one client.

Theory of operation
    `nr_granted` is promised, `nr_used` is what holds bytes now, wherever they are. In between lies growth: what may
    still be asked for. `peak_bytes` says how much of the promise is expected to be used: at least what is used now and
    what is reserved, at most what was granted. A grant that is younger than the warm-up counts in full.

    Use is told whenever somebody looks; of each sample period the highest counts.
"""

from dataclasses import dataclass

from dpud.gpu.overcommit.predictor import POLICIES, WARM_UP_SAMPLES, History
from dpud.gpu.overcommit.pressure import PressureStall


@dataclass(eq=False)
class Grant:
    """A promise of memory."""

    client: str
    nr_bytes: int
    priority: int
    location: int
    born: int
    """Samples that the client's history had then."""


class Account:
    """One client at admission. Sizes in bytes."""

    def __init__(self, client: str, now_ns: int, location: int = 0) -> None:
        self.client = client
        self.location = location
        self.own_priority = 0
        self.reservation_bytes = 0
        self.limit_bytes = 0
        """0 for none."""
        self.timeout_ns = 0
        """How long its requests wait, for whoever makes them."""
        self.grants: dict[Grant, None] = {}
        self.nr_granted = 0
        self.nr_used = 0
        self.nr_resident = 0
        self.nr_touched = 0
        """Accessed between the last two samples."""
        self.active_ns = now_ns
        """When it was last seen to have accessed anything."""
        self.history = History(now_ns)
        self.pressure = PressureStall(now_ns)

    @property
    def priority(self) -> int:
        """Its own, or the highest of its grants."""
        return max([self.own_priority, *(grant.priority for grant in self.grants)])

    def add(self, grant: Grant) -> None:
        self.grants[grant] = None
        self.nr_granted += grant.nr_bytes

    def remove(self, grant: Grant) -> None:
        del self.grants[grant]
        self.nr_granted -= grant.nr_bytes

    def sample(self, nr_used: int, now_ns: int) -> None:
        """What it uses now."""
        self.nr_used = nr_used
        self.history.tell(nr_used, now_ns)

    @property
    def young_bytes(self) -> int:
        """Of its grants, those that history says nothing about."""
        return sum(g.nr_bytes for g in self.grants if self.history.nr_samples - g.born < WARM_UP_SAMPLES)

    def peak_bytes(self, policy: str) -> int:
        """How much of what it was granted is expected to be used."""
        window = self.history.window()
        predicted = float(POLICIES[policy](window, self.nr_granted)) if len(window) else 0.0
        expected = min(self.nr_granted, int(predicted) + self.young_bytes)
        return max(expected, self.nr_used, min(self.reservation_bytes, self.nr_granted))

    def growth_bytes(self, policy: str) -> int:
        """How much more it is expected to use than it does; a reservation is kept even without a grant."""
        return max(self.peak_bytes(policy), self.reservation_bytes) - self.nr_used

    @property
    def reserved_growth_bytes(self) -> int:
        """What is left of its reservation."""
        return max(0, self.reservation_bytes - self.nr_used)
