# SPDX-License-Identifier: MIT
"""What a sample of bytes looks like: counts that say of which elements it may be an array, and in which planes it is
worth coding.

One call in compiled code, without the interpreter's lock, counts in many samples: as a dozen numpy calls on each 4 KiB
it held the lock for most of the time that probing takes, and two threads were hardly faster than one.
"""

import math

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit

WIDTHS = (1, 2, 4, 8)
MAX_BYTES = 1 << 12
"""Of a sample."""

HALF_NAT = 0.5 / math.log(2)
_COUNTS = np.arange(MAX_BYTES + 1, dtype=np.float64)
N_LOG_N: NDArray[np.float64] = _COUNTS * np.log2(np.maximum(_COUNTS, 1))
"""n log2 n by n: a plane's entropy is that of its length, less that of each byte's count."""


@njit
def count_phases(values: NDArray[np.uint8], phases: NDArray[np.int64]) -> None:
    """phases[p]: how often a byte at place p modulo 8 equals the one behind it, in whole groups of 8."""
    for i in range((len(values) - 8) & ~7):
        phases[i & 7] += values[i + 1] == values[i]


@njit
def count_equal(values: NDArray[np.uint8], equal: NDArray[np.int64]) -> None:
    """equal[log2 w]: how often a byte equals the one w bytes behind."""
    for index in range(len(equal)):
        width = 1 << index
        nr = 0
        for i in range(len(values) - width):
            nr += values[i] == values[i + width]
        equal[index] = nr


@njit
def count_neighbours(samples: NDArray[np.uint8], counts: NDArray[np.int64]) -> None:
    """Of each sample, a row: count_phases() into counts[:8], count_equal() into the rest."""
    for row in range(len(samples)):
        count_phases(samples[row], counts[row, :8])
        count_equal(samples[row], counts[row, 8:])


@njit
def plane_bits(
    samples: NDArray[np.uint8], counts: NDArray[np.int64], n_log_n: NDArray[np.float64], bits: NDArray[np.float64]
) -> None:
    """sample_bits() of each sample, a row."""
    for row in range(len(samples)):
        sample_bits(samples[row], counts, n_log_n, bits[row])


@njit
def sample_bits(
    values: NDArray[np.uint8], counts: NDArray[np.int64], n_log_n: NDArray[np.float64], bits: NDArray[np.float64]
) -> None:
    """bits[log2 w]: what the planes of w-byte elements have of entropy, byte by byte, in all. `counts`: 256 zeros.

    A short sample's entropy is too small, so each plane gets (bytes that occur - 1) / 2 nats more (Miller and Madow).
    """
    for index in range(len(bits)):
        width = 1 << index
        total = 0.0
        for plane in range(width):
            nr = 0
            for i in range(plane, len(values), width):
                counts[values[i]] += 1
                nr += 1
            total += n_log_n[nr]
            nr_kinds = 0
            for byte in range(256):
                total -= n_log_n[counts[byte]]
                nr_kinds += counts[byte] > 0
                counts[byte] = 0
            total += (nr_kinds - 1) * HALF_NAT
        bits[index] = total
