# SPDX-License-Identifier: GPL-2.0-only
"""How much a test tries: all of it in `make test`, a part in the inner loop (plain `pytest`), others each time."""

from hypothesis import settings

FULL, QUICK = 100, 10
"""Examples for a test that does not say how many; FULL is what hypothesis has."""


def examples(nr: int) -> int:
    """`max_examples` for a test that has `nr` when it tries all."""
    return max(3, nr * settings().max_examples // FULL)
