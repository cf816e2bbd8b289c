# SPDX-License-Identifier: MIT
"""How often a page is used, and by whom, as far as hint faults tell.

A page is unmapped, and how long it takes until somebody misses it is a sample of the time between two accesses. Of k
samples that took D together the best guess of the rate of a Poisson process is k / D; who came first tells how it is
divided. Older samples weigh less: each new one takes a share of FORGET from all before. And where one location came
first STREAK times in a row that had seldom done so, the page's use has changed: all from before is forgotten.
"""

import numpy as np
from numpy.typing import NDArray

FORGET = 0.15
"""So what is known goes back about seven samples."""
STREAK, SELDOM = 3, 0.34
"""By chance that happens to one in 27 at most, of the pages whose use is divided the least favourably."""
DOUBT = 1.0
"""One sample is thought to have come from all locations alike, before anything is known."""


class Heat:
    """Of one page."""

    __slots__ = (
        "_streak",
        "_streak_waited_ns",
        "backoff_until_ns",
        "counts",
        "last_at",
        "left",
        "left_ns",
        "nr_pingpongs",
        "sampled_ns",
        "waited_ns",
    )

    def __init__(self, nr_locations: int) -> None:
        self.counts: NDArray[np.float64] = np.zeros(nr_locations)
        self.waited_ns = 0.0
        self.sampled_ns: int | None = None
        """Since when it is unmapped."""
        self.last_at = -1
        """Location of the last fault."""
        self.left, self.left_ns = -1, 0
        """Where it came from the last time it moved, and when."""
        self._streak, self._streak_waited_ns = 0, 0
        self.nr_pingpongs = 0
        self.backoff_until_ns = 0

    @property
    def has_changed(self) -> bool:
        """Whether the last fault said that its use is another one now."""
        return self._streak == STREAK and float(self.counts.sum()) == STREAK

    def fault(self, at: int, now_ns: int) -> int:
        """It was missed -> after how many ns."""
        assert self.sampled_ns is not None, "it was not unmapped"
        waited_ns = max(1, now_ns - self.sampled_ns)
        self.sampled_ns = None
        self.counts *= 1 - FORGET
        self.counts[at] += 1
        self.waited_ns = self.waited_ns * (1 - FORGET) + waited_ns
        self._watch(at, waited_ns)
        return waited_ns

    def _watch(self, at: int, waited_ns: int) -> None:
        """For a change of use."""
        if at != self.last_at:
            self._streak = self._streak_waited_ns = 0
        self._streak += 1
        self._streak_waited_ns += waited_ns
        others = self.counts.sum() - self.counts[at]
        before = self.counts[at] - sum((1 - FORGET) ** age for age in range(self._streak))
        if self._streak == STREAK and others and before < SELDOM * (others + before):
            self.counts[:] = 0
            self.counts[at], self.waited_ns = STREAK, float(self._streak_waited_ns)
        self.last_at = at

    def rate(self, now_ns: int) -> float:
        """Accesses per ns. A page that is still waited for is as rare as that says."""
        waiting_ns = 0 if self.sampled_ns is None else now_ns - self.sampled_ns
        total_ns = self.waited_ns + waiting_ns
        return float(self.counts.sum()) / total_ns if total_ns else 0.0

    def shares(self, users: NDArray[np.int64]) -> NDArray[np.float64]:
        """Of accesses, by location; `users` are those that may access at all."""
        smoothed = self.counts.copy()
        smoothed[users] += DOUBT / len(users)
        shares: NDArray[np.float64] = smoothed / smoothed.sum()
        return shares
