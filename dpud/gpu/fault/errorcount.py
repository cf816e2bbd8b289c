# SPDX-License-Identifier: MIT
"""Corrected errors of each page in the last day: who has too many goes out of use before it is too late.

The rule is rasdaemon's (ras-page-isolation.c): so many corrected errors of a page within a cycle of time, 50 in 24 h,
and what to do then: nothing (`off`), only say so (`account`), move its bytes and retire it (`soft`), or retire it
without (`hard`: the bytes come from a copy elsewhere, or are lost); `soft-then-hard` does the second where the first
finds no room. The names of the knobs are those of its environment variables.
"""

from collections import deque
from dataclasses import dataclass
from enum import StrEnum

DAY_NS = 86_400 * 1_000_000_000
THRESHOLD = 50


class Action(StrEnum):
    OFF = "off"
    ACCOUNT = "account"
    SOFT = "soft"
    HARD = "hard"
    SOFT_THEN_HARD = "soft-then-hard"


@dataclass
class Rule:
    threshold: int = THRESHOLD
    cycle_ns: int = DAY_NS
    action: Action = Action.SOFT


class ErrorCount:
    """Times of corrected errors, by frame. Forgets what is older than a cycle."""

    def __init__(self, rule: Rule) -> None:
        self.rule = rule
        self._times: dict[int, deque[int]] = {}

    def add(self, frame: int, nr: int, now_ns: int) -> bool:
        """Errors were corrected -> whether the frame has come to the threshold with them; then it is counted anew."""
        if self.rule.action is Action.OFF:
            return False
        times = self._times.setdefault(frame, deque())
        times.extend([now_ns] * nr)
        while times[0] < now_ns - self.rule.cycle_ns:
            times.popleft()
        if len(times) < self.rule.threshold:
            return False
        del self._times[frame]
        return True

    def nr_recent(self, frame: int) -> int:
        return len(self._times.get(frame, ()))

    def forget(self, frame: int) -> None:
        self._times.pop(frame, None)
