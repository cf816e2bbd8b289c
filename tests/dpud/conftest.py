# SPDX-License-Identifier: GPL-2.0-only
"""What differs between two states whose hashes do."""

from itertools import zip_longest

from kept import Hash

_BEFORE, _AFTER = 40, 5


def pytest_assertrepr_compare(op: str, left: object, right: object) -> list[str] | None:
    if op != "==" or not isinstance(left, Hash) or not isinstance(right, Hash):
        return None
    pairs = list(zip_longest(left.trail, right.trail))
    first = next(at for at, (one, other) in enumerate(pairs) if one != other)
    shown = pairs[max(first - _BEFORE, 0) : first + _AFTER]
    lines = [f"  {one}" if one == other else f"  {one} != {other}" for one, other in shown]
    return [f"states differ, first at {first} of {len(left.trail)} and {len(right.trail)}:", *lines]
