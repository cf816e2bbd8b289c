# SPDX-License-Identifier: MIT
"""SECDED(72,64): eight check bits for each 64-bit word, so that one flipped bit is corrected and two are detected.

Theory of operation
    Each of the 72 bits has a column of eight bits, and all 72 are different and of odd weight: the check bits the eight
    of weight 1, the data bits the 56 of weight 3 and eight of weight 5 (which of the 56 of weight 5 are taken is free).
    A word's check byte is the XOR of the columns of the data bits that are set. The syndrome is the XOR of the check
    byte that is there and the one that ought to be: the columns of the flipped bits, added up. One flip gives a column,
    which says where. Two give an even weight that is not zero, which is no column: known to be wrong.
    Source: M. Y. Hsiao, "A class of optimal minimum odd-weight-column SEC-DED codes", IBM J. Res. Dev. 14(4), 1970.

    Three flips and more may look like one: what is then "corrected" is wrong. cells.py has more against that.
"""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

WORD_BITS, CHECK_BITS = 64, 8
CODE_BITS = WORD_BITS + CHECK_BITS
UNCORRECTABLE = -1
CLEAN = CODE_BITS
"""What `positions` says of a syndrome besides the number of a bit."""

Words = NDArray[np.uint64]
Checks = NDArray[np.uint8]
Positions = NDArray[np.int8]


def columns() -> list[int]:
    """Of data bits 0..63, then of check bits 0..7."""
    odd = [sum(1 << bit for bit in bits) for weight in (3, 5) for bits in combinations(range(CHECK_BITS), weight)]
    return [*odd[:WORD_BITS], *(1 << bit for bit in range(CHECK_BITS))]


def _byte_tables() -> NDArray[np.uint8]:
    """[byte of the word, its value] -> its part of the check byte."""
    of = np.array(columns()[:WORD_BITS], dtype=np.uint8).reshape(8, 8)
    values = np.arange(256)
    tables = np.zeros((8, 256), dtype=np.uint8)
    for bit in range(8):
        tables ^= np.where(values >> bit & 1, of[:, bit, None], 0).astype(np.uint8)
    return tables


def _syndromes() -> Positions:
    """Syndrome -> bit that was flipped."""
    found = np.full(1 << CHECK_BITS, UNCORRECTABLE, dtype=np.int8)
    found[columns()] = np.arange(CODE_BITS)
    found[0] = CLEAN
    return found


_TABLES = _byte_tables()
_POSITIONS = _syndromes()


def encode(words: Words) -> Checks:
    """Check bytes of words."""
    octets = words.reshape(-1, 1).view(np.uint8).reshape(-1, 8)
    checks: Checks = _TABLES[0][octets[:, 0]]
    for byte in range(1, 8):
        checks ^= _TABLES[byte][octets[:, byte]]
    return checks


def positions(words: Words, checks: Checks) -> Positions:
    """Of each word: the bit that was flipped (0..63 data, 64..71 check), CLEAN or UNCORRECTABLE."""
    found: Positions = _POSITIONS[encode(words) ^ checks]
    return found


def correct(words: Words, checks: Checks, found: Positions) -> None:
    """Put right, in place, what `positions` found to be one flipped bit."""
    data = np.flatnonzero((found >= 0) & (found < WORD_BITS))
    words[data] ^= np.uint64(1) << found[data].astype(np.uint64)
    check = np.flatnonzero((found >= WORD_BITS) & (found < CODE_BITS))
    checks[check] ^= np.uint8(1) << (found[check] - WORD_BITS).astype(np.uint8)
