# SPDX-License-Identifier: GPL-2.0-only
"""seq_printf() of a text whose form stays the same while its numbers change: the whole of it filled in at once.

Python's own `%` makes an object of each number, and of each piece; the files that monitors read over and over have
hundreds. Here the form is taken apart once, and a compiled loop writes digits between the pieces.
"""

import re

import numpy as np
from numba import types

from kernelsim.jit import i64, njit
from kernelsim.raw_memory import load, store_octet

_PLACE = re.compile(r"%(\d*)d")
_MAX_DIGITS = 20  # of 64 bits, with the sign
_c_memcpy = types.ExternalFunction("memcpy", types.uintp(types.uintp, types.uintp, types.uintp))
_MINUS, _ZERO, _SPACE = b"-0 "


class Template:
    """A text with `%d` or `%6d` where numbers go; it has no other `%`.

    pieces      uint8: what is between them, one piece after the other
    ends        int64: where each of these ends
    widths      int64: of the numbers
    room_bytes  that the text takes at most, whatever the numbers
    """

    def __init__(self, form: str) -> None:
        widths = [int(width or 0) for width in _PLACE.findall(form)]
        pieces = _PLACE.sub("\0", form).encode().split(b"\0")
        self.nr_values = len(widths)
        self.pieces = np.frombuffer(b"".join(pieces), dtype=np.uint8)
        self.ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
        self.widths = np.array(widths, dtype=np.int64)
        self.room_bytes = len(self.pieces) + sum(max(width, _MAX_DIGITS) for width in widths)


@njit
def fill(pieces: int, ends: int, widths: int, values: int, nr_values: int, text: int) -> int:
    """Each value after its piece, and the last piece -> bytes of the text.

    All but the number of values are addresses: of a Template's arrays, of the values, int64 above the lowest there is,
    and of room for the text.
    """
    at, copied = text, 0
    for place in range(nr_values + 1):
        end = load(ends + 8 * place)
        _c_memcpy(at, pieces + copied, end - copied)
        at, copied = at + end - copied, end
        if place < nr_values:
            at = _print_number(at, load(values + 8 * place), load(widths + 8 * place))
    return i64(at - text)


@njit
def _print_number(at: int, value: int, width: int) -> int:
    """In decimal at an address, to the right of `width` places or more -> where it ends."""
    nr_places, rest = 1 + (value < 0), value // 10 if value >= 0 else -value // 10
    while rest:
        nr_places, rest = nr_places + 1, rest // 10
    end = at + max(nr_places, width)
    for place in range(at, end - nr_places):
        store_octet(place, _SPACE)
    rest, place = abs(value), end
    for _ in range(nr_places - (value < 0)):
        place -= 1
        store_octet(place, _ZERO + rest % 10)
        rest //= 10
    if value < 0:
        store_octet(place - 1, _MINUS)
    return end
