# SPDX-License-Identifier: MIT
"""The cells of one memory: where faults lie, and the ECC between them and whoever reads.

Theory of operation
    Check bits and digests of a frame are kept here, beside the memory, from the moment that a fault is put into it.
    Before that they would be what `secded.encode` makes of the bytes, so there is nothing to keep; a memory that never
    had a fault costs its users one look at `is_quiet`. Damage is real: the bits of the memory itself are flipped. A
    read puts right what can be put right and hands out the result; then stuck cells are stuck again.

    The unit of an error is the sector of 32 bytes, the smallest piece that a GPU's memory is read in (CUDA C++ best
    practices guide, "coalesced access"). A sector has SECDED for each of its four words and a digest of 64 bits, in
    the place of the data integrity field that disks have: SECDED takes some patterns of three and more flips for a
    single one, or for none, and the digest finds them (`nr_miscorrected`).

    A write that covers a sector makes it good, but for its stuck cells. One that covers a part of it reads the rest
    first; where that cannot be read, the sector stays known to be bad (poisoned), whatever was written.

Invariants
    - `is_suspect[frame]` where, and only where, `lines` has the frame.
    - The check bits and digests of a line belong to the bytes that were last written, not to those that are there.
    - A frame without errors and without stuck cells is no suspect.

Differs from hardware: check bits lie outside the memory; no digest is there in HBM, where some damage to whole rows
goes unseen.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.pagetable import FRAME_BYTES, FRAME_SHIFT
from dpud.gpu.errors import UncorrectableError
from dpud.gpu.fault import secded
from dpud.gpu.fault.secded import CLEAN, CODE_BITS, UNCORRECTABLE, WORD_BITS, Checks, Positions, Words
from dpud.gpu.hal.interface import Bytes

FRAME_WORDS = FRAME_BYTES // 8
SECTOR_BYTES = 32
SECTOR_WORDS = SECTOR_BYTES // 8
FRAME_SECTORS = FRAME_BYTES // SECTOR_BYTES

Mask = NDArray[np.bool_]
Digests = NDArray[np.uint64]
Corrected = Callable[[int, NDArray[np.int64], Positions], None]
"""(frame, words, the bit of each): errors that were just corrected for a reader."""

_GOLDEN, _MIX1, _MIX2 = np.uint64(0x9E3779B97F4A7C15), np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_PLACES = np.arange(1, SECTOR_WORDS + 1, dtype=np.uint64) * _GOLDEN
_POISON = np.uint8(0b11)
"""Two flipped check bits: what makes any word uncorrectable."""


def digests(words: Words) -> Digests:
    """Of each sector. SplitMix64's finalizer (Steele, Lea, Flood, OOPSLA 2014) of each word and its place, added up."""
    mixed = words.reshape(-1, SECTOR_WORDS) + _PLACES
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX1
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX2
    total: Digests = (mixed ^ (mixed >> np.uint64(31))).sum(axis=1, dtype=np.uint64)
    return total


class Stuck:
    """Cells of a frame that always read the same: `mask` says which, `value` what."""

    def __init__(self) -> None:
        self.mask: Words = np.zeros(FRAME_WORDS, dtype=np.uint64)
        self.value: Words = np.zeros(FRAME_WORDS, dtype=np.uint64)
        self.check_mask: Checks = np.zeros(FRAME_WORDS, dtype=np.uint8)
        self.check_value: Checks = np.zeros(FRAME_WORDS, dtype=np.uint8)

    def add(self, word: int, bit: int, value: int) -> None:
        if bit < WORD_BITS:
            one = np.uint64(1 << bit)
            self.mask[word] |= one
            self.value[word] = self.value[word] & ~one | (one if value else np.uint64(0))
        else:
            small = np.uint8(1 << (bit - WORD_BITS))
            self.check_mask[word] |= small
            self.check_value[word] = self.check_value[word] & ~small | (small if value else np.uint8(0))

    def hold(self, words: Words, checks: Checks) -> None:
        """They are what they are, whatever was written."""
        words[:] = words & ~self.mask | self.value & self.mask
        checks[:] = checks & ~self.check_mask | self.check_value & self.check_mask


@dataclass(eq=False)
class Line:
    """What is kept of a frame that may have errors."""

    checks: Checks
    """As they lie in the memory: they can be flipped too."""
    digests: Digests
    stuck: Stuck | None = None


@dataclass(frozen=True)
class Verdict:
    """What ECC says of a frame: the bytes as they ought to be, but for the sectors that are bad."""

    words: Words
    checks: Checks
    found: Positions
    bad: Mask
    """Sectors."""
    nr_miscorrected: int
    """Sectors that SECDED alone would have handed out wrong."""


class Cells:
    """Of one memory, given as its bytes; `number` is its location's, for errors."""

    def __init__(self, memory: Bytes, number: int) -> None:
        self.number = number
        self.nr_frames = len(memory) >> FRAME_SHIFT
        self._words = memory[: self.nr_frames << FRAME_SHIFT].view(np.uint64).reshape(-1, FRAME_WORDS)
        self.lines: dict[int, Line] = {}
        """Of suspect frames."""
        self.is_suspect: Mask = np.zeros(self.nr_frames, dtype=np.bool_)
        self.on_corrected: Corrected = lambda _frame, _words, _bits: None
        self.nr_corrected = 0
        """Words."""
        self.nr_uncorrectable = 0
        """Reads that were refused."""
        self.nr_miscorrected = 0
        """Sectors."""

    @property
    def is_quiet(self) -> bool:
        """No frame has errors or stuck cells: reads and writes need not ask."""
        return not self.lines

    def suspects(self) -> list[int]:
        """Frames, in order."""
        return sorted(self.lines)

    # Damage.

    def flip(self, frame: int, word: int, bit: int) -> None:
        """One bit (0..63 data, 64..71 check) of a word changes, once."""
        line = self._line(frame)
        if bit < WORD_BITS:
            self._words[frame, word] ^= np.uint64(1 << bit)
        else:
            line.checks[word] ^= np.uint8(1 << (bit - WORD_BITS))
        self._forget_if_clean(frame)

    def stick(self, frame: int, word: int, bit: int, value: int) -> None:
        """A cell reads `value` from now on."""
        line = self._line(frame)
        line.stuck = line.stuck or Stuck()
        line.stuck.add(word, bit, value)
        line.stuck.hold(self._words[frame], line.checks)

    def break_row(self, frame: int, rng: np.random.Generator) -> None:
        """About half of all cells of a row are stuck, at anything."""
        line = self._line(frame)
        line.stuck = stuck = Stuck()
        for array in (stuck.mask, stuck.value, stuck.check_mask, stuck.check_value):
            array[:] = rng.integers(0, np.iinfo(array.dtype).max, FRAME_WORDS, array.dtype, endpoint=True)
        stuck.hold(self._words[frame], line.checks)

    def replace(self, frame: int) -> None:
        """Other cells are at this address from now on. What is in them nobody knows, so write before you read."""
        self.lines.pop(frame, None)
        self.is_suspect[frame] = False

    def has_stuck(self, frame: int) -> bool:
        line = self.lines.get(frame)
        return line is not None and line.stuck is not None

    def _line(self, frame: int) -> Line:
        if frame not in self.lines:
            words = self._words[frame]
            self.lines[frame] = Line(secded.encode(words), digests(words))
            self.is_suspect[frame] = True
        return self.lines[frame]

    def _forget_if_clean(self, frame: int) -> None:
        line = self.lines[frame]
        verdict = self._judge(frame, line)
        if line.stuck is None and not verdict.bad.any() and (verdict.found == CLEAN).all():
            self.replace(frame)

    # Looking.

    def bad_sectors(self, frame: int) -> Mask:
        """Which sectors a reader could not get."""
        line = self.lines.get(frame)
        return np.zeros(FRAME_SECTORS, dtype=np.bool_) if line is None else self._judge(frame, line).bad

    def count_miscorrected(self, frame: int) -> None:
        """Note what SECDED alone would have handed out wrong of a frame that nobody gets to read as it is."""
        if frame in self.lines:
            self.nr_miscorrected += self._judge(frame, self.lines[frame]).nr_miscorrected

    def _judge(self, frame: int, line: Line) -> Verdict:
        words, checks = self._words[frame].copy(), line.checks.copy()
        found = secded.positions(words, checks)
        secded.correct(words, checks, found)
        refused = (found == UNCORRECTABLE).reshape(-1, SECTOR_WORDS).any(axis=1)
        wrong = digests(words) != line.digests
        return Verdict(words, checks, found, refused | wrong, int(np.count_nonzero(wrong & ~refused)))

    # Reading and writing.

    def read(self, at: int, nr_bytes: int, work: Callable[[], None]) -> None:
        """Have `work` copy bytes [at, at + nr_bytes) out of the memory. Raises UncorrectableError before that."""
        opened: list[int] = []
        try:
            for frame, first, end in self._touched(at, nr_bytes):
                self._open(frame, slice(first // SECTOR_BYTES, -(-end // SECTOR_BYTES)))
                opened.append(frame)
            work()
        finally:
            for frame in opened:
                self._close(frame)

    def _open(self, frame: int, sectors: slice) -> None:
        """Put right what is to be read."""
        line = self.lines[frame]
        verdict = self._judge(frame, line)
        if verdict.bad[sectors].any():
            self.nr_uncorrectable += 1
            raise UncorrectableError(self.number, frame)
        span = slice(sectors.start * SECTOR_WORDS, sectors.stop * SECTOR_WORDS)
        self._words[frame, span], line.checks[span] = verdict.words[span], verdict.checks[span]
        corrected = span.start + np.flatnonzero((verdict.found[span] >= 0) & (verdict.found[span] < CODE_BITS))
        if len(corrected):
            self.nr_corrected += len(corrected)
            self.on_corrected(frame, corrected, verdict.found[corrected])

    def _close(self, frame: int) -> None:
        line = self.lines[frame]
        if line.stuck is not None:
            line.stuck.hold(self._words[frame], line.checks)
        else:
            self._forget_if_clean(frame)

    def write(self, at: int, nr_bytes: int, work: Callable[[], None]) -> None:
        """Have `work` fill bytes [at, at + nr_bytes) of the memory."""
        touched = [
            (frame, first, end, self._keep(frame, first, end)) for frame, first, end in self._touched(at, nr_bytes)
        ]
        work()
        for frame, first, end, poisoned in touched:
            line, words = self.lines[frame], self._words[frame]
            sectors = slice(first // SECTOR_BYTES, -(-end // SECTOR_BYTES))
            span = slice(sectors.start * SECTOR_WORDS, sectors.stop * SECTOR_WORDS)
            line.checks[span], line.digests[sectors] = secded.encode(words[span]), digests(words[span])
            for sector in poisoned:
                line.checks[sector * SECTOR_WORDS] ^= _POISON
                line.digests[sector] = ~line.digests[sector]
            self._close(frame)

    def _keep(self, frame: int, first: int, end: int) -> list[int]:
        """Sectors of which bytes [first, end) are only a part: put right what stays -> those that are bad."""
        partial = {edge // SECTOR_BYTES for edge in (first, end) if edge % SECTOR_BYTES}
        if not partial:
            return []
        line = self.lines[frame]
        verdict = self._judge(frame, line)
        for sector in partial:
            span = slice(sector * SECTOR_WORDS, (sector + 1) * SECTOR_WORDS)
            if not verdict.bad[sector]:
                self._words[frame, span], line.checks[span] = verdict.words[span], verdict.checks[span]
        return [sector for sector in partial if verdict.bad[sector]]

    def _touched(self, at: int, nr_bytes: int) -> Iterator[tuple[int, int, int]]:
        """(frame, first, end) in bytes of each suspect frame of a range."""
        first, end = at >> FRAME_SHIFT, -(-(at + nr_bytes) >> FRAME_SHIFT)
        for frame in (first + np.flatnonzero(self.is_suspect[first:end])).tolist():
            start = frame << FRAME_SHIFT
            yield frame, max(at - start, 0), min(at + nr_bytes - start, FRAME_BYTES)
