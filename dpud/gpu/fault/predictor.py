# SPDX-License-Identifier: MIT
"""Which banks will have an uncorrectable error within a week, said at each corrected one, and how well that works.

Theory of operation
    A logistic regression on what a bank's corrected errors look like (features.py). Above THRESHOLD it is an alarm,
    which holds for HORIZON_NS. What became of alarms is counted as it shows: an uncorrectable error in an alarmed bank
    is a hit, in another a miss; an alarm that ran out was false. Precision and recall so far stand beside each
    decision. The rule that everybody has, 50 corrected errors of a page in 24 hours, is judged in the same way.

    The weights are learnt from generated histories (streams.py) by `python -m dpud.gpu.fault.learning`, which prints
    them. What they are worth on real memory nobody knows before it has been counted there: that is what the counts are
    for.
"""

from collections import defaultdict, deque
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.fault.errorcount import ErrorCount, Rule
from dpud.gpu.fault.features import DAY_NS, BankHistory, CorrectedError

HORIZON_NS = 7 * DAY_NS
THRESHOLD = 0.5
WEIGHTS = (1.945, 0.429, -0.568, -5.615, 0.732, -0.683, 5.945, -0.038)
"""Of features.NAMES; made by learning.py."""
_KEPT = 200


def probability(features: NDArray[np.float64], weights: NDArray[np.float64]) -> float:
    return float(1 / (1 + np.exp(-np.clip(features @ weights, -30, 30))))


@dataclass
class Scoreboard:
    """What became of one predictor's alarms. Banks are any hashable things."""

    nr_alarms: int = 0
    nr_hits: int = 0
    nr_false: int = 0
    nr_misses: int = 0
    lead_ns: list[int] = field(default_factory=list)
    """From alarm to error, of each hit."""
    _open: dict[int, int] = field(default_factory=dict)

    @property
    def precision(self) -> float:
        """Of the alarms of which it is known, those that were right; 1 while none is."""
        known = self.nr_hits + self.nr_false
        return self.nr_hits / known if known else 1.0

    @property
    def recall(self) -> float:
        """Of the uncorrectable errors, those that had been foreseen; 1 while there was none."""
        errors = self.nr_hits + self.nr_misses
        return self.nr_hits / errors if errors else 1.0

    @property
    def median_lead_ns(self) -> int:
        return int(np.median(self.lead_ns)) if self.lead_ns else 0

    def is_alarmed(self, bank: int) -> bool:
        return bank in self._open

    def alarmed(self) -> list[int]:
        """Banks."""
        return sorted(self._open)

    def alarm(self, bank: int, now_ns: int) -> bool:
        """Say that a bank will fail -> whether that is news."""
        self.expire(now_ns)
        if bank in self._open:
            return False
        self._open[bank] = now_ns
        self.nr_alarms += 1
        return True

    def failed(self, bank: int, now_ns: int) -> None:
        """An uncorrectable error."""
        self.expire(now_ns)
        since_ns = self._open.pop(bank, None)
        if since_ns is None:
            self.nr_misses += 1
        else:
            self.nr_hits += 1
            self.lead_ns.append(now_ns - since_ns)

    def expire(self, now_ns: int) -> None:
        """Alarms that have run out were false."""
        for bank in [bank for bank, since_ns in self._open.items() if since_ns + HORIZON_NS < now_ns]:
            del self._open[bank]
            self.nr_false += 1


@dataclass(frozen=True)
class Decision:
    """An alarm, and what alarms were worth up to then."""

    time_ns: int
    bank: int
    probability: float
    precision: float
    recall: float
    median_lead_ns: int

    def __str__(self) -> str:
        return (
            f"{self.time_ns} bank={self.bank} probability={self.probability:.2f} "
            f"precision={self.precision:.2f} recall={self.recall:.2f} lead_s={self.median_lead_ns // 1_000_000_000}"
        )


class Predictor:
    """Of one memory."""

    def __init__(self, weights: tuple[float, ...] = WEIGHTS, rule: Rule | None = None) -> None:
        self.weights = np.array(weights)
        self.learnt, self.by_rule = Scoreboard(), Scoreboard()
        self.decisions: deque[Decision] = deque(maxlen=_KEPT)
        self._counts = ErrorCount(rule or Rule())
        self._histories: dict[int, BankHistory] = defaultdict(BankHistory)

    def corrected(self, bank: int, error: CorrectedError) -> Decision | None:
        """An error was corrected -> an alarm, if this makes one."""
        now_ns = error.time_ns
        if self._counts.add(bank << 32 | error.row, 1, now_ns):
            self.by_rule.alarm(bank, now_ns)
        history = self._histories[bank]
        history.add(error)
        if self.learnt.is_alarmed(bank):
            self.learnt.expire(now_ns)
        p = probability(history.features(now_ns), self.weights)
        if p < THRESHOLD or not self.learnt.alarm(bank, now_ns):
            return None
        found = self.learnt
        self.decisions.append(Decision(now_ns, bank, p, found.precision, found.recall, found.median_lead_ns))
        return self.decisions[-1]

    def uncorrectable(self, bank: int, now_ns: int) -> None:
        for board in (self.learnt, self.by_rule):
            board.failed(bank, now_ns)

    def rows(self, bank: int) -> dict[int, int]:
        """Rows of a bank that had errors of late, within the bank -> how many of their cells."""
        return self._histories[bank].rows()
