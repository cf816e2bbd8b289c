# SPDX-License-Identifier: MIT
"""Patrol scrubbing: all memory is read in turn, so that errors are found before they meet others in the same word.

A corrected word is written back right; a page that cannot be read is made good or retired, as if somebody had wanted
it. Free frames are tested: those with stuck cells are retired, the others written anew. Frames that never had a fault
need not be read to know that they are right (cells.py), so a round over clean memory costs nothing but its time.
"""

from collections.abc import Sequence

import numpy as np

from dpud.gpu.address_space.pagetable import FRAME_BYTES, FRAME_SHIFT
from dpud.gpu.errors import UncorrectableError
from dpud.gpu.fault.cells import Cells
from dpud.gpu.fault.placing import Placing
from dpud.gpu.fault.recovery import Recovery
from dpud.gpu.fault.rows import Cause
from dpud.gpu.location import Location
from dpud.gpu.memory import GpuMemory

BYTES_PER_S = 64 << 20
"""Uncalibrated. Memory controllers take a day for a round as a rule; this takes seconds, so that it can be watched."""


class Scrubber:
    """Goes round over all locations."""

    def __init__(self, memory: GpuMemory, cells: Sequence[Cells], placing: Placing, recovery: Recovery) -> None:
        self.nr_bytes = 0
        self.nr_rounds = 0
        self.bytes_per_s = BYTES_PER_S
        """In the background, for who calls `scrub` there; 0: not at all."""
        self.position = 0
        """Bytes of this round, all locations one behind the other."""
        self._memory, self._cells, self._placing, self._recovery = memory, cells, placing, recovery

    @property
    def total_bytes(self) -> int:
        return sum(cells.nr_frames for cells in self._cells) << FRAME_SHIFT

    @property
    def is_quiet(self) -> bool:
        """A piece of any size would find nothing anywhere."""
        return self._recovery.is_quiet and not any(cells.is_suspect.any() for cells in self._cells)

    def scrub(self, nr_bytes: int) -> None:
        """So many bytes more, and round again at the end."""
        while nr_bytes > 0:
            piece = min(nr_bytes, self.total_bytes - self.position)
            self._span(self.position, piece)
            self.position += piece
            self.nr_bytes += piece
            nr_bytes -= piece
            if self.position >= self.total_bytes:
                self.position = 0
                self.nr_rounds += 1

    def _span(self, position: int, nr_bytes: int) -> None:
        """Bytes of a round."""
        self._recovery.offline_due()
        start = 0
        for location, cells in zip(self._memory.locations, self._cells, strict=True):
            first = max(0, position - start) >> FRAME_SHIFT
            end = -(-max(0, position + nr_bytes - start) >> FRAME_SHIFT)
            start += cells.nr_frames << FRAME_SHIFT
            if location.is_lost:
                continue
            for frame in (first + np.flatnonzero(cells.is_suspect[first:end])).tolist():
                self._frame(location, cells, frame)

    def _frame(self, location: Location, cells: Cells, frame: int) -> None:
        owner = int(location.frames.owner[frame])
        if owner >= 0:
            region, page = self._memory.space.regions.page_of(owner)
            self._recovery.examine(region, np.array([page]))
            if cells.is_suspect[frame] and int(location.frames.owner[frame]) == owner:
                self._read(cells, frame)
        elif self._placing.is_free(location, frame):
            if cells.has_stuck(frame):
                self._placing.retire(location, frame, Cause.CORRECTABLE)
            else:
                location.zero_pages(np.array([frame]), FRAME_BYTES)

    @staticmethod
    def _read(cells: Cells, frame: int) -> None:
        """Have ECC look at it, and write back what it corrects."""
        try:
            cells.read(frame << FRAME_SHIFT, FRAME_BYTES, lambda: None)
        except UncorrectableError:
            return  # counted; it stays until there is a copy to make it good from, or room
