# SPDX-License-Identifier: MIT
"""A location's memory as one line of characters, at most NR_CHARACTERS of them, each for an equal part of it."""

import numpy as np

from dpud.gpu.address_space.frames import RETIRED
from dpud.gpu.address_space.pagetable import FRAME_BYTES
from dpud.gpu.defrag.pins import Pins
from dpud.gpu.location import Location

NR_CHARACTERS = 1024
_MIN_FRAMES = 8
_TENTHS = "0123456789"


def picture(location: Location, pins: Pins) -> str:
    """Bytes a character, then `.` where nothing is in use, 0 to 9 for tenths of it, P for pinned, X for retired."""
    owner = location.frames.owner
    per_part = max(_MIN_FRAMES, 1 << (-(-len(owner) // NR_CHARACTERS) - 1).bit_length())
    pinned = np.array(sorted(pins.of_page), dtype=np.int64)
    parts = (owner[at : at + per_part] for at in range(0, len(owner), per_part))
    return f"{per_part * FRAME_BYTES} " + "".join(_character(part, pinned) for part in parts)


def _character(
    owner: "np.ndarray[tuple[int], np.dtype[np.int64]]", pinned: "np.ndarray[tuple[int], np.dtype[np.int64]]"
) -> str:
    if (owner == RETIRED).all():
        return "X"
    nr_used = int(np.count_nonzero(owner >= 0))
    if nr_used and np.isin(owner, pinned).any():
        return "P"
    return _TENTHS[min(9, nr_used * 10 // len(owner))] if nr_used else "."
