# SPDX-License-Identifier: GPL-2.0-only
"""A filled template is what Python's own `%` makes of it."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernelsim.seq_counters import CounterText, Words, number

NUMBERS = st.one_of(st.integers(-(2**63) + 1, 2**63 - 1), st.integers(-200, 2000), st.just(0))
PIECES = st.text(st.characters(codec="ascii", exclude_characters="%\0"), max_size=5)
PLACES = st.sampled_from(["%d", "%1d", "%6d", "%12d", "%30d"])


@given(st.lists(st.tuples(PIECES, PLACES, NUMBERS), max_size=6), PIECES)
def test_it_is_what_python_prints(parts: list[tuple[str, str, int]], last: str) -> None:
    form = "".join(piece + place for piece, place, _ in parts) + last
    numbers = [value for *_, value in parts]
    words = Words(np.array(numbers, dtype=np.int64))
    text = CounterText(form, [number([words.at(at, 0)]) for at in range(len(numbers))], (), (words,))
    for _ in range(2):
        assert text.text() == (form % tuple(numbers)).encode()
