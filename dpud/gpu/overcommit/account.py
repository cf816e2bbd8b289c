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
        self._prediction: tuple[tuple[str, int, int], int] = ("", 0, 0), 0

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
        expected = min(self.nr_granted, self._predicted(policy) + self.young_bytes)
        return max(expected, self.nr_used, min(self.reservation_bytes, self.nr_granted))

    def _predicted(self, policy: str) -> int:
        """What history says; it says the same until the next period, or the next grant."""
        key = policy, self.history.nr_samples, self.nr_granted
        if self._prediction[0] != key:
            window = self.history.window()
            peak = int(POLICIES[policy](window, self.nr_granted)) if len(window) else 0
            self._prediction = key, peak
        return self._prediction[1]

    def growth_bytes(self, policy: str) -> int:
        """How much more it is expected to use than it does; a reservation is kept even without a grant."""
        return max(self.peak_bytes(policy), self.reservation_bytes) - self.nr_used

    @property
    def reserved_growth_bytes(self) -> int:
        """What is left of its reservation."""
        return max(0, self.reservation_bytes - self.nr_used)
