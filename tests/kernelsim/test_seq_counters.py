# SPDX-License-Identifier: GPL-2.0-only
"""A text of counters is what Python's own `%` makes of the sums, now and after they changed, as long as it holds."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from kernelsim.seq_counters import CounterFile, CounterText, Number, Words, number

RECORD = np.dtype([("a", np.int64), ("b", np.int64, (2,))])
NR_ROWS, NR_WORDS = 3, 3
WORDS = st.lists(st.integers(-(10**15), 10**15), min_size=NR_ROWS * NR_WORDS, max_size=NR_ROWS * NR_WORDS)
TERMS = st.lists(st.tuples(st.integers(0, NR_ROWS * NR_WORDS - 1), st.integers(-4, 512)), max_size=5)
NUMBERS = st.lists(st.tuples(TERMS, st.integers(0, 9), st.sampled_from([0, 0, 16])), max_size=6)


def records(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64).view(RECORD)


def expected(values: list[int], terms: list[tuple[int, int]], shift: int, limit: int) -> int:
    total = sum(values[at] * factor for at, factor in terms)
    return int(total >= limit) if limit else total >> shift


@given(WORDS, WORDS, NUMBERS)
def test_it_is_what_python_prints(values: list[int], later: list[int], numbers: list) -> None:
    array = records(values)
    words = Words(array)
    made = [
        Number([(words.at(*divmod(at, NR_WORDS)), factor) for at, factor in terms], shift, limit)
        for terms, shift, limit in numbers
    ]
    form = "head " + "".join(("%d\n", "%6d ")[at % 2] for at in range(len(numbers))) + "end\n"
    text = CounterText(form, made, (), (words,))
    for now in (values, later):
        array[:] = records(now)
        assert text.text() == (form % tuple(expected(now, *of) for of in numbers)).encode()


def test_a_form_holds_as_long_as_the_same_words_are_positive() -> None:
    array = records([1, 0, 0] * NR_ROWS)
    words = Words(array)
    text = CounterText("%d", [number([words.at(2, 1)])], [(words.at(0, 0), True), (words.at(1, 1), False)], (words,))
    assert text.holds()
    array["a"][0] = 7
    assert text.holds()
    array["b"][1, 0] = 1
    assert not text.holds()
    array["b"][1, 0] = 0
    assert text.holds()
    array["a"][0] = 0
    assert not text.holds()


def test_it_is_described_anew_only_when_it_has_to_be() -> None:
    array, described = records([5, 0, 0] * NR_ROWS), []

    def describe() -> CounterText:
        words, rows = Words(array), np.flatnonzero(array["a"] > 0).tolist()
        described.append(rows)
        numbers = [number([words.at(row, 0)]) for row in rows]
        return CounterText("%d " * len(rows), numbers, [(words.at(row, 0), row in rows) for row in range(3)], (words,))

    file = CounterFile(describe)
    assert [file.now().text() for _ in range(2)] == [b"5 5 5 "] * 2
    array["a"] = 6
    assert file.now().text() == b"6 6 6 "
    array["a"][1] = 0
    assert file.now().text() == b"6 6 "
    assert described == [[0, 1, 2], [0, 2]]


def test_the_text_keeps_what_it_reads_from() -> None:
    def make() -> CounterText:
        words = Words(records(list(range(NR_ROWS * NR_WORDS))))
        return CounterText("%d %d", [number([words.at(2, 2)]), number(())], (), (words,))

    text = make()
    _others = [records([10**9] * NR_ROWS * NR_WORDS) for _ in range(100)]
    assert text.text() == b"8 0"
