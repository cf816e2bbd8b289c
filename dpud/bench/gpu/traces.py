# SPDX-License-Identifier: GPL-2.0-only
"""Page traces made from a seed, of the shapes that programs on GPUs have."""

from collections.abc import Callable, Mapping

import numpy as np
from numpy.typing import NDArray

_SEED = 5

Trace = list[int]


def _listed(pages: NDArray[np.int64]) -> Trace:
    return [int(page) for page in pages]


def sequential(nr: int, pages: int) -> Trace:
    """One pass after the other over all pages."""
    return _listed(np.arange(nr) % pages)


def strided(nr: int, pages: int, stride: int = 7) -> Trace:
    """Every seventh page; the next pass begins one page further on."""
    per_pass = -(-pages // stride)
    passes, step = np.divmod(np.arange(nr), per_pass)
    return _listed((step * stride + passes) % pages)


def uniform(nr: int, pages: int) -> Trace:
    """Any page at any time."""
    return _listed(np.random.default_rng(_SEED).integers(0, pages, nr))


def zipf(nr: int, pages: int) -> Trace:
    """Few pages often: page of rank r as often as 1/r."""
    rng = np.random.default_rng(_SEED)
    weights = 1 / np.arange(1, pages + 1)
    return _listed(rng.permutation(pages)[rng.choice(pages, nr, p=weights / weights.sum())])


def columns(nr: int, pages: int) -> Trace:
    """A matrix whose row is 16 pages, read by columns: each row's page once for each of 8 columns that lie in it."""
    rows = max(1, pages // 16)
    at = np.arange(nr)
    column_page, row = (at // (8 * rows)) % 16, at % rows
    return _listed(row * 16 + column_page)


def kv_append(nr: int, pages: int) -> Trace:
    """Key-value caches of 8 sequences: a step reads a sequence's first and latest pages, and may add one."""
    rng, lengths, trace = np.random.default_rng(_SEED), [1] * 8, Trace()
    per_sequence = pages // 8
    while len(trace) < nr:
        sequence = int(rng.integers(8))
        length, first = lengths[sequence], sequence * per_sequence
        recent = range(max(0, length - 12), length)
        trace += [first + page for page in sorted({0, *recent})]
        lengths[sequence] = length + 1 if length < per_sequence and rng.random() < 0.5 else length
        if length == per_sequence:
            lengths[sequence] = 1
    return trace[:nr]


TRACES: Mapping[str, Callable[[int, int], Trace]] = {
    "sequential": sequential,
    "strided": strided,
    "random": uniform,
    "zipf": zipf,
    "2-D columns": columns,
    "KV append": kv_append,
}
"""By name: (accesses, pages) -> page numbers."""
