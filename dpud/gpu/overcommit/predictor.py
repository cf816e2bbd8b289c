# SPDX-License-Identifier: MIT
"""How much clients will use at most, from what they have used.

Theory of operation
    Clients are granted what they ask for, and use less; and not all of them at once. `History` keeps the highest use of
    each of the last WINDOW_SAMPLES periods of SAMPLE_NS, periods being those of the clock, so that histories can be
    added up. A policy makes a peak of it. Policies look along the last axis, so many clients or many moments can be
    asked about at once.

    static      what was granted
    borg        90 % of that
    n-sigma     mean plus N standard deviations of the window; of all clients' use together
    percentile  the P-th percentile of the window
    max-of      the larger of the two: one is good at noise, the other at bursts; together
    history     the window's highest, or the last sample and the largest rise within HORIZON_SAMPLES that the window has
                seen, if that is more; together, times 1 + a margin that is learnt (Margin)

    Source of n-sigma, percentile and their maximum: Bashir et al., "Take it to the limit: peak prediction-driven
    resource overcommitment in datacenters", EuroSys 2021. Of the margin: the update of adaptive conformal inference
    (Gibbs and Candes, NeurIPS 2021): a rate of misses is aimed at, whatever the distribution.

A prediction is never more than what was granted. What a young grant may use is nobody's history: see account.py.
"""

from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]
Policy = Callable[[Samples, Any], NDArray[np.float64]]
"""(use [..., sample], oldest first, granted [...]) -> peak [...], in bytes."""

SAMPLE_NS = 1_000_000_000
WINDOW_SAMPLES = 900
WARM_UP_SAMPLES = 30
"""As long as a grant is younger than this, all of it counts as used."""

SIGMAS = 3.0
PERCENTILE = 99.0
BORG_SHARE = 0.9
"""Borg's default before the paper: usable are 90 % of limits."""

HORIZON_SAMPLES = 30
"""How far ahead a prediction has to hold."""

TARGET_MISSES = 0.005
_MARGIN_UP = 0.02


def _at_most(peak: Any, granted: Any) -> NDArray[np.float64]:
    limited: NDArray[np.float64] = np.minimum(peak, granted)
    return limited


def static(_samples: Samples, granted: Any) -> NDArray[np.float64]:
    return np.asarray(granted, dtype=np.float64)


def borg(_samples: Samples, granted: Any) -> NDArray[np.float64]:
    return np.asarray(granted, dtype=np.float64) * BORG_SHARE


def n_sigma(sigmas: float = SIGMAS) -> Policy:
    def peak(samples: Samples, granted: Any) -> NDArray[np.float64]:
        return _at_most(samples.mean(axis=-1) + sigmas * samples.std(axis=-1), granted)

    return peak


def percentile(rank: float = PERCENTILE) -> Policy:
    def peak(samples: Samples, granted: Any) -> NDArray[np.float64]:
        return _at_most(np.percentile(samples, rank, axis=-1), granted)

    return peak


def max_of(*policies: Policy) -> Policy:
    def peak(samples: Samples, granted: Any) -> NDArray[np.float64]:
        found: NDArray[np.float64] = np.max([policy(samples, granted) for policy in policies], axis=0)
        return found

    return peak


def highest_or_rising(samples: Samples, granted: Any) -> NDArray[np.float64]:
    """What was used at most, or what would be if the largest rise came once more, now."""
    nr_ahead = min(HORIZON_SAMPLES, samples.shape[-1] - 1)
    reached = samples
    width = 1
    while width <= nr_ahead:  # the maximum of `width` samples from each on, doubled up to nr_ahead + 1
        step = min(width, nr_ahead + 1 - width)
        reached = np.maximum(reached[..., :-step], reached[..., step:])
        width += step
    rise = (reached - samples[..., : reached.shape[-1]]).max(axis=-1)
    return _at_most(np.maximum(samples.max(axis=-1), samples[..., -1] + rise), granted)


STATIC, HISTORY = "static", "history"
POLICIES: Mapping[str, Policy] = {
    STATIC: static,
    "borg": borg,
    "n-sigma": n_sigma(),
    "percentile": percentile(),
    "max-of": max_of(n_sigma(), percentile()),
    HISTORY: highest_or_rising,
}
"""A new one is a function and a line here."""

TOGETHER = ("n-sigma", "max-of", HISTORY)
"""Policies that look at the sum of clients' use: their peaks do not come at the same time."""


class Margin:
    """How much more than predicted is expected, as a share: grows at a miss, and shrinks so slowly in between that in
    the long run TARGET_MISSES of the predictions are missed."""

    def __init__(self) -> None:
        self.share = 0.0
        self._made: deque[tuple[float, bool]] = deque(maxlen=HORIZON_SAMPLES)  # predictions, and whether they count
        self._used: deque[float] = deque(maxlen=HORIZON_SAMPLES)

    def learn(self, nr_used: float, predicted: float, *, counts: bool = True) -> None:
        """One more period: what was used in it, and what is predicted for the next HORIZON_SAMPLES."""
        self._used.append(nr_used)
        if len(self._made) == HORIZON_SAMPLES:
            expected, counted = self._made[0]
            if counted:
                self._move(max(self._used) > expected)
        self._made.append((predicted, counts))

    def _move(self, missed: bool) -> None:
        step = _MARGIN_UP if missed else -_MARGIN_UP * TARGET_MISSES / (1 - TARGET_MISSES)
        self.share = min(1.0, max(0.0, self.share + step))


class History:
    """Highest use of each of the last periods, and the last. What is not told has not changed.

    Clients' last uses were at one moment, and can be added up; their highest were not.
    """

    def __init__(self, now_ns: int = 0, nr_samples: int = WINDOW_SAMPLES) -> None:
        self._ring: Samples = np.zeros(nr_samples)
        self._ends: Samples = np.zeros(nr_samples)
        self._period = now_ns // SAMPLE_NS
        self._highest = self._last = 0
        self.nr_samples = 0
        """Periods that are over, ever."""

    def tell(self, nr_bytes: int, now_ns: int) -> bool:
        """What is used now -> whether a period came to its end."""
        closed = self.advance(now_ns)
        self._highest, self._last = max(self._highest, nr_bytes), nr_bytes
        return closed

    def advance(self, now_ns: int) -> bool:
        """Close the periods that are over."""
        size, nr = len(self._ring), now_ns // SAMPLE_NS - self._period
        if nr <= 0:
            return False
        self._ring[self._period % size], self._ends[self._period % size] = self._highest, self._last
        for period in range(self._period + max(1, nr - size), self._period + nr):
            self._ring[period % size] = self._ends[period % size] = self._last
        self._period += nr
        self.nr_samples += nr
        self._highest = self._last
        return True

    def window(self) -> Samples:
        """The highest of the last periods there are. Oldest first."""
        return self._last_of(self._ring, self.nr_samples)

    def ends(self, nr_samples: int) -> Samples:
        """The last use of so many periods; before the beginning they are zeros. Oldest first."""
        return self._last_of(self._ends, nr_samples)

    def _last_of(self, ring: Samples, nr_samples: int) -> Samples:
        nr = min(nr_samples, len(ring))
        taken: Samples = ring[(self._period - nr + np.arange(nr)) % len(ring)]
        return taken
