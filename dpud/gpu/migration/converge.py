# SPDX-License-Identifier: MIT
"""Whether pre-copy ends: how much each round has to send, from the rates of dirtying and of sending.

Theory of operation
    A writer that hits all M pages alike, D writes to pages a second, leaves after t seconds  M (1 - exp(-D t / M))
    different pages dirty. A round of n pages takes n / B seconds at B pages a second, so the next has

        n(0) = M,    n(i+1) = M (1 - exp(-(D / B) (n(i) / M)))

    to send, and stopping after round k costs a downtime of n(k+1) / B. For D < B this falls towards 0; for D >= B
    towards a fixed point above it, and no number of rounds helps. (Clark et al., NSDI 2005, for the rounds; the
    exponential is the expected number of pages not hit, (1 - 1/M)^(D t).)

    The other way round, u different dirty pages after t seconds mean  D = -(M / t) ln(1 - u / M).  A real writer hits
    fewer pages more often: for it this is what matters, since only different pages have to be sent again.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

_ALL_BUT_NONE = 1e-9


class Strategy(StrEnum):
    AUTO = "auto"
    """By the prediction after the first round."""
    PRECOPY = "precopy"
    POSTCOPY = "postcopy"
    HYBRID = "hybrid"
    """One round of pre-copy, then post-copy."""
    STOP_AND_COPY = "stop-and-copy"


@dataclass(frozen=True)
class Prediction:
    """What pre-copy would take. Pages and seconds."""

    rounds: int
    """Before the last, for which the writer is held."""
    total_s: float
    downtime_s: float
    nr_pages: float
    """Sent in all."""
    converges: bool
    """The downtime is below the limit."""


def next_round(nr_all: int, dirtying: float, sending: float, nr_pages: float) -> float:
    """Pages that are dirty after a round of `nr_pages`."""
    return nr_all * -math.expm1(-(dirtying / sending) * (nr_pages / nr_all))


def rounds(nr_all: int, dirtying: float, sending: float, first: float | None = None) -> Iterator[float]:
    """Pages of each round, without end."""
    nr_pages = float(nr_all if first is None else first)
    while True:
        yield nr_pages
        nr_pages = next_round(nr_all, dirtying, sending, nr_pages)


def predict(
    nr_all: int, dirtying: float, sending: float, downtime_s: float, max_rounds: int, first: float | None = None
) -> Prediction:
    """From rates in pages a second; `first`: pages of the next round, all unless said."""
    total = 0.0
    for done, nr_pages in enumerate(rounds(nr_all, dirtying, sending, first)):
        total += nr_pages
        if done and (nr_pages <= downtime_s * sending or done >= max_rounds):
            break
    last = nr_pages / sending
    return Prediction(done, total / sending, last, total, last <= downtime_s)


def dirty_rate(nr_all: int, nr_dirty: int, seconds: float) -> float:
    """Writes a second that leave so many different pages dirty in that time."""
    if seconds <= 0 or not nr_dirty:
        return 0.0
    return -math.log(max(1 - nr_dirty / nr_all, _ALL_BUT_NONE)) * nr_all / seconds
