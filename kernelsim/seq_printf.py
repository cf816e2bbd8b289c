# SPDX-License-Identifier: GPL-2.0-only
"""seq_printf() of a text whose form stays the same while its numbers change: the whole of it filled in at once.

Python's own `%` makes an object of each number, and of each piece; the files that monitors read over and over have
hundreds. Here the form is taken apart once, and a compiled loop writes digits between the pieces.
"""

import re
from typing import Any

import numpy as np
from numba import types
from numpy.typing import NDArray

from kernelsim.jit import njit

_PLACE = re.compile(r"%(\d*)d")
_MAX_DIGITS = 20  # of 64 bits, with the sign
_c_memcpy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))
_MINUS, _ZERO, _SPACE = b"-0 "


class Template:
    """A text with `%d` or `%6d` where numbers go; it has no other `%`."""

    def __init__(self, form: str) -> None:
        widths = [int(width or 0) for width in _PLACE.findall(form)]
        pieces = _PLACE.sub("\0", form).encode().split(b"\0")
        self.nr_values = len(widths)
        self._pieces = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        self._ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        self._widths = np.array(widths, dtype=np.int64)
        self._text = np.empty(len(self._pieces) + sum(max(width, _MAX_DIGITS) for width in widths), dtype=np.uint8)

    def fill(self, values: NDArray[np.int64]) -> bytes:
        """The text with `values`, int64[nr_values] above the lowest there is, in its places."""
        assert len(values) == self.nr_values
        nr_bytes = fill(self._pieces, self._ends, self._widths, values, self._text)
        return self._text[:nr_bytes].tobytes()


@njit
def fill(pieces: Any, ends: Any, widths: Any, values: Any, text: Any) -> int:
    """Each value after its piece, and the last piece -> bytes of the text."""
    at = copied = 0
    for number in range(len(ends)):
        nr = ends[number] - copied
        _c_memcpy(text.ctypes.data + at, pieces.ctypes.data + copied, nr)
        at, copied = at + nr, copied + nr
        if number < len(values):
            at = _print_number(text, at, values[number], widths[number])
    return at


@njit
def _print_number(text: Any, at: int, value: int, width: int) -> int:
    """In decimal, to the right of `width` places or more -> where it ends."""
    nr_places, rest = 1 + (value < 0), value // 10 if value >= 0 else -value // 10
    while rest:
        nr_places, rest = nr_places + 1, rest // 10
    end = at + max(nr_places, width)
    for place in range(at, end - nr_places):
        text[place] = _SPACE
    rest, place = abs(value), end
    for _ in range(nr_places - (value < 0)):
        place -= 1
        text[place] = _ZERO + rest % 10
        rest //= 10
    if value < 0:
        text[place - 1] = _MINUS
    return end
