# SPDX-License-Identifier: MIT
"""What a bank's corrected errors look like: how many, how fast, and how they lie to each other.

Which of these tell something about uncorrectable errors to come is known from the field: how errors spread over rows
and cells of a bank does, their mere rate does not (Calchas, USENIX ATC 2024, on HBM; arXiv 2312.02855 on DRAM).
"""

from collections import deque
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

HOUR_NS = 3600 * 1_000_000_000
DAY_NS = 24 * HOUR_NS
WINDOW_NS = 5 * DAY_NS
MAX_ERRORS = 256
"""Of a bank, that are remembered: the last ones."""
NEAR_ROWS = 8

NAMES = ("one", "last_hour", "last_day", "rows", "cells", "cells_of_a_row", "near_rows", "words_with_two")


@dataclass(frozen=True)
class CorrectedError:
    time_ns: int
    row: int
    """Within its bank."""
    word: int
    bit: int


class BankHistory:
    """The corrected errors of one bank in the last days."""

    def __init__(self) -> None:
        self._errors: deque[CorrectedError] = deque(maxlen=MAX_ERRORS)

    def add(self, error: CorrectedError) -> None:
        self._errors.append(error)
        while self._errors[0].time_ns < error.time_ns - WINDOW_NS:
            self._errors.popleft()

    def rows(self) -> dict[int, int]:
        """Row -> how many of its cells had errors."""
        cells = {(each.row, each.word, each.bit) for each in self._errors}
        found: dict[int, int] = {}
        for row, _, _ in cells:
            found[row] = found.get(row, 0) + 1
        return found

    def features(self, now_ns: int) -> NDArray[np.float64]:
        """One value for each of NAMES; counts as log(1 + n)."""
        cells = {(each.row, each.word, each.bit) for each in self._errors}
        words: dict[tuple[int, int], set[int]] = {}
        for row, word, bit in cells:
            words.setdefault((row, word), set()).add(bit)
        by_row = self.rows()
        rows = np.array(sorted(by_row))
        times = np.array([each.time_ns for each in self._errors])
        counts: tuple[int, ...] = (
            int(np.count_nonzero(times > now_ns - HOUR_NS)),
            int(np.count_nonzero(times > now_ns - DAY_NS)),
            len(rows),
            len(cells),
            max(by_row.values(), default=0),
            int(np.count_nonzero(np.diff(rows) <= NEAR_ROWS)),
            sum(len(bits) > 1 for bits in words.values()),
        )
        return np.array([1.0, *np.log1p(counts)])
