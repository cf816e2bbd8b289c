# SPDX-License-Identifier: GPL-2.0-only
"""Sets of numbers as the kernel prints them (lib/bitmap.c, %*pbl and %*pb)."""

from collections.abc import Sequence


def format_list(numbers: Sequence[int]) -> str:
    """The line `0-3,6`, as the kernel prints sets (%*pbl); an empty one for none."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(f"{first}" if first == last else f"{first}-{last}" for first, last in runs) + "\n"


def format_mask(numbers: Sequence[int], nr_bits: int) -> str:
    """`ff,ffffffff`: groups of 32 bits, the highest first, as wide as there are CPUs (%*pb)."""
    mask = sum(1 << number for number in numbers)
    words = [(mask >> shift) & 0xFFFFFFFF for shift in range(0, nr_bits, 32)]
    width = -(-((nr_bits - 1) % 32 + 1) // 4)
    return ",".join(f"{word:0{width if i == 0 else 8}x}" for i, word in enumerate(reversed(words)))
