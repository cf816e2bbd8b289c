# SPDX-License-Identifier: MIT
"""Rows, banks and spare rows of one memory.

Row n of a memory is its frame n (2 KiB, the page of an HBM2 channel in legacy mode, JEDEC JESD235), and rows go round
over the banks, as addresses are interleaved. Each bank has spare rows: a row that is remapped lies in one of them
from then on, at the same address. NVIDIA A100 GPU Memory Error Management (docs.nvidia.com/deploy/a100-gpu-mem-error-
mgmt): up to 8 rows of a bank, 512 in all; a remapping that is due takes effect at the next reset, and until then the
page is offline; what finds no spare is XID 64. The number of banks is uncalibrated.
"""

from collections import Counter
from dataclasses import dataclass
from enum import StrEnum

NR_BANKS = 128
SPARES_PER_BANK = 8
SPARES_IN_ALL = 512


class Cause(StrEnum):
    """Why a row is replaced."""

    CORRECTABLE = "correctable"
    UNCORRECTABLE = "uncorrectable"


@dataclass
class Limits:
    """What there is of spares. May be changed, as long as it is not less than what is used."""

    per_bank: int = SPARES_PER_BANK
    in_all: int = SPARES_IN_ALL


HISTOGRAM = ("max", "high", "partial", "low", "none")
"""nvmlRowRemapperHistogramValues_t: banks by what they have left."""


class Rows:
    """Which rows were remapped, and which will be."""

    def __init__(self, nr_rows: int, limits: Limits, nr_banks: int = NR_BANKS) -> None:
        self.nr_rows, self.nr_banks = nr_rows, min(nr_banks, nr_rows)
        self.limits = limits
        self.remapped: Counter[Cause] = Counter(dict.fromkeys(Cause, 0))
        """In effect."""
        self.pending: dict[int, Cause] = {}
        """Rows that the next reset remaps."""
        self.failed = False
        """A row found no spare, ever."""
        self._used = [0] * self.nr_banks

    def bank(self, row: int) -> int:
        return row % self.nr_banks

    def rows(self, bank: int) -> range:
        """Of a bank."""
        return range(bank, self.nr_rows, self.nr_banks)

    def reserve(self, row: int, cause: Cause) -> bool:
        """Keep a spare for a row until the next reset, or say that there is none."""
        if row in self.pending:
            return True
        bank = self.bank(row)
        if self._used[bank] >= self.limits.per_bank or sum(self._used) >= self.limits.in_all:
            self.failed = True
            return False
        self._used[bank] += 1
        self.pending[row] = cause
        return True

    def take_effect(self, row: int) -> None:
        """The row is where its spare is from now on."""
        self.remapped[self.pending.pop(row)] += 1

    def histogram(self) -> dict[str, int]:
        """Banks by spare rows left. NVIDIA does not say where `high` and `low` begin; here at 5/8, and below 2/8."""
        found = dict.fromkeys(HISTOGRAM, 0)
        for used in self._used:
            left, limit = self.limits.per_bank - used, self.limits.per_bank
            at = 0 if not used else 4 if left <= 0 else 1 if left * 8 >= limit * 5 else 3 if left * 8 < limit * 2 else 2
            found[HISTOGRAM[at]] += 1
        return found
