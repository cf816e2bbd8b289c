# SPDX-License-Identifier: MIT
"""Made-up histories of memory errors, to learn from and to judge predictors by.

Four kinds of trouble come upon banks:

    transient  one corrected error somewhere, and never again
    cell       one weak cell: corrected errors at a rate of its own, up to hundreds a day; it seldom gets worse
    cluster    a row and those near it fail cell by cell, at a growing rate; most end in an uncorrectable error
    sudden     an uncorrectable error without any sign before

That corrected errors are many where one cell is weak, and few where it gets dangerous, is what makes a plain count a
poor predictor of HBM (gpu.md, on Calchas). How often each kind is and how fast it goes is uncalibrated: field data with
places of errors are not to be had freely. How many days there are to a fault is the user's choice, too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from dpud.gpu.fault.cells import FRAME_WORDS
from dpud.gpu.fault.features import DAY_NS, HOUR_NS
from dpud.gpu.fault.secded import CODE_BITS

SHARES = {"transient": 0.45, "cell": 0.30, "cluster": 0.18, "sudden": 0.07}
ROWS_OF_A_BANK = 1024
_CELL_PER_DAY = 3, 300
_CLUSTER_DAYS = 0.5, 6
_CLUSTER_PER_DAY = 2, 20
_CELL_GETS_WORSE, _CLUSTER_GETS_WORSE = 0.03, 0.75


@dataclass(frozen=True, order=True)
class StreamError:
    time_ns: int
    bank: int
    row: int
    word: int
    bit: int
    is_corrected: bool


def generate(seed: int, nr_banks: int, nr_days: float, faults_per_bank: float = 1.0) -> list[StreamError]:
    """Errors in order of time."""
    rng = np.random.default_rng(seed)
    kinds, weights = list(SHARES), list(SHARES.values())
    found: list[StreamError] = []
    for bank in range(nr_banks):
        for _ in range(rng.poisson(faults_per_bank)):
            start_ns = rng.uniform(0, nr_days * DAY_NS)
            found += _KINDS[rng.choice(kinds, p=weights)](rng, bank, start_ns)
    return sorted(error for error in found if error.time_ns < nr_days * DAY_NS)


def _cell(rng: np.random.Generator) -> tuple[int, int]:
    return int(rng.integers(FRAME_WORDS)), int(rng.integers(CODE_BITS))


def _transient(rng: np.random.Generator, bank: int, start_ns: float) -> Iterator[StreamError]:
    yield StreamError(int(start_ns), bank, int(rng.integers(ROWS_OF_A_BANK)), *_cell(rng), True)


def _sudden(rng: np.random.Generator, bank: int, start_ns: float) -> Iterator[StreamError]:
    yield StreamError(int(start_ns), bank, int(rng.integers(ROWS_OF_A_BANK)), *_cell(rng), False)


def _weak_cell(rng: np.random.Generator, bank: int, start_ns: float) -> Iterator[StreamError]:
    row, (word, bit) = int(rng.integers(ROWS_OF_A_BANK)), _cell(rng)
    per_day = np.exp(rng.uniform(*np.log(_CELL_PER_DAY)))
    length_ns = rng.uniform(1, 5) * DAY_NS
    for at in rng.uniform(0, length_ns, rng.poisson(per_day * length_ns / DAY_NS)):
        yield StreamError(int(start_ns + at), bank, row, word, bit, True)
    if rng.random() < _CELL_GETS_WORSE:
        yield StreamError(int(start_ns + length_ns), bank, row, word, bit, False)


def _cluster(rng: np.random.Generator, bank: int, start_ns: float) -> Iterator[StreamError]:
    row = int(rng.integers(ROWS_OF_A_BANK))
    length_ns = rng.uniform(*_CLUSTER_DAYS) * DAY_NS
    nr = 3 + rng.poisson(rng.uniform(*_CLUSTER_PER_DAY) * length_ns / DAY_NS)
    cells = [_cell(rng) for _ in range(int(rng.integers(3, 12)))]
    for at in length_ns * rng.uniform(0, 1, nr) ** 0.5:  # more and more of them
        word, bit = cells[int(rng.integers(1 + int((len(cells) - 1) * at / length_ns)))]
        near = min(max(row + int(rng.integers(-2, 3)), 0), ROWS_OF_A_BANK - 1)
        yield StreamError(int(start_ns + at), bank, near, word, bit, True)
    if rng.random() < _CLUSTER_GETS_WORSE:
        yield StreamError(int(start_ns + length_ns + rng.exponential(6 * HOUR_NS)), bank, row, *cells[0], False)


_KINDS = {"transient": _transient, "cell": _weak_cell, "cluster": _cluster, "sudden": _sudden}
