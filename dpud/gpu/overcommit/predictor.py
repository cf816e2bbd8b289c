# SPDX-License-Identifier: MIT
"""How much a client will use at most, from what it has used.

Theory of operation
    A client is granted what it asks for, and uses less. `History` keeps the highest use of each of the last
    WINDOW_SAMPLES sample periods; a policy makes a peak of it. Policies look along the last axis, so many clients or
    many moments can be asked about at once.

    static      what was granted
    borg        90 % of that
    n-sigma     mean plus N standard deviations of the window
    percentile  the P-th percentile of the window
    max-of      the larger of the two: one is good at noise, the other at bursts
    history     max-of and the window's highest, times 1 + a margin that each client earns (Margin)

    Source of n-sigma, percentile and their maximum: Bashir et al., "Take it to the limit: peak prediction-driven
    resource overcommitment in datacenters", EuroSys 2021. Of the margin: the update of adaptive conformal inference
    (Gibbs and Candes, NeurIPS 2021): a rate of misses is aimed at, whatever the distribution.

A prediction is never more than what was granted. What a young grant may use is nobody's history: see account.py.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float64]
Policy = Callable[[Samples, Any], NDArray[np.float64]]
"""(use [..., sample], granted [...]) -> peak [...], in bytes."""

WINDOW_SAMPLES = 300
WARM_UP_SAMPLES = 30
"""As long as a grant is younger than this, all of it counts as used."""

SIGMAS = 3.0
PERCENTILE = 99.0
BORG_SHARE = 0.9
"""Borg's default before the paper: usable are 90 % of limits."""

TARGET_MISSES = 0.005
_MARGIN_UP = 0.1


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


def highest(samples: Samples, granted: Any) -> NDArray[np.float64]:
    """The most that was used in the window."""
    return _at_most(samples.max(axis=-1), granted)


STATIC, HISTORY = "static", "history"
POLICIES: Mapping[str, Policy] = {
    STATIC: static,
    "borg": borg,
    "n-sigma": n_sigma(),
    "percentile": percentile(),
    "max-of": max_of(n_sigma(), percentile()),
    HISTORY: max_of(n_sigma(), percentile(), highest),
}
"""A new one is a function and a line here."""


class Margin:
    """How much more than predicted is expected, as a share: grows by 10 % at a miss, and shrinks so slowly in between
    that in the long run TARGET_MISSES of the samples are misses."""

    def __init__(self) -> None:
        self.share: Any = 0.0

    def learn(self, missed: Any) -> None:
        """`missed`: whether use exceeded what was predicted for it; of one client, or of many as an array."""
        down = _MARGIN_UP * TARGET_MISSES / (1 - TARGET_MISSES)
        self.share = np.clip(self.share + np.where(missed, _MARGIN_UP, -down), 0.0, 1.0)

    def widen(self, peak: Any, granted: Any) -> NDArray[np.float64]:
        return _at_most(peak * (1 + self.share), granted)


class History:
    """Highest use of each of the last sample periods."""

    def __init__(self, nr_samples: int = WINDOW_SAMPLES) -> None:
        self._ring: Samples = np.zeros(nr_samples)
        self.nr_samples = 0
        """Ever."""

    def add(self, nr_bytes: int, times: int = 1) -> None:
        """The next `times` periods' highest use."""
        size = len(self._ring)
        for _ in range(min(times, size)):
            self._ring[self.nr_samples % size] = nr_bytes
            self.nr_samples += 1

    def window(self) -> Samples:
        """Samples there are, in no particular order."""
        return self._ring[: min(self.nr_samples, len(self._ring))]
