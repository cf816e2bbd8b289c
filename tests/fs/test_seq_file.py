# SPDX-License-Identifier: GPL-2.0-only
"""Chunked reads of a text that changes all the time."""

from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from fs.seq_file import SeqFile


def changing() -> "tuple[SeqFile, object]":
    numbers = count()
    return SeqFile(), lambda: b"%04d" % next(numbers) * 50


@given(st.integers(1, 300))
def test_chunks_of_any_size_agree(size: int) -> None:
    file, make = changing()
    text = b""
    while piece := file.read(make, size, len(text)):  # type: ignore[arg-type]
        text += piece
    assert text == b"0000" * 50


def test_offset_zero_makes_the_text_anew() -> None:
    file, make = changing()
    assert file.read(make, 4, 100) == b"0000"  # type: ignore[arg-type]
    assert file.read(make, 4, 0) == b"0001"  # type: ignore[arg-type]
    assert file.read(make, 4, 4) == b"0001"  # type: ignore[arg-type]
    assert file.read(make, 4, 200) == b""  # type: ignore[arg-type]
