# SPDX-License-Identifier: MIT
"""Which codec for which page: the adaptive algorithm.

Theory of operation
    Encoding a page with every codec and keeping the shortest is what `best_of_all` does; it costs as much as all codecs
    together. The chooser encodes a sample instead: SAMPLE_PIECES pieces from all over the page, 4 KiB together, and
    takes what does best on that. Pieces from all over beat one contiguous piece of that size (0.2 % against 0.6 % lost
    to the best on ten kinds of data at 64 KiB pages), because heaps and programs differ from one place to the next.

    Codecs for arrays are only tried where the sample looks like one: `element_widths` says by counting equal bytes,
    which costs less than a single one of them.

    Pages smaller than GROUP_BYTES are probed as a group of neighbours, since a probe of a 4 KiB page is that page.
    What a probe promises is held against what comes out: a page that comes out SURPRISE times as long as promised is
    probed by itself. So a group may be a mixture.

    What a client's pages were is remembered: once STREAK groups in a row had one winner, only one in PROBE_EVERY groups
    is probed again. The others take the winner untried, if they look like arrays of the same elements. Then a page that
    comes out that much shorter is a surprise too. Surprises end a streak.

    How much all of this loses is not left to belief: one page in `regret_every` is encoded with every codec there is,
    and both lengths are added up (`Regret`). At quality `fast` that is much: only fast codecs are candidates.

Invariants
    - A choice depends on the page, its ordinal and the memory as it was when the batch began, never on threads:
      `Memory` is updated after the batch is joined, in the order of the pages.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from dpud.gpu.blob import RAW
from dpud.gpu.compression.codec import CODECS, Dictionary, Quality
from dpud.gpu.compression.statistics import MAX_BYTES, N_LOG_N, WIDTHS, count_neighbours, plane_bits

GROUP_BYTES = 64 << 10
SAMPLE_BYTES = 4096
SAMPLE_PIECES = 8
SURPRISE = 1.15
STREAK = 4
PROBE_EVERY = 8
_MIN_STATISTICS = 512
"""A sample shorter than this is too small to count in."""
_UNEVEN = 0.1
"""Five standard deviations of the share of equal neighbours that 512 pairs of text have (20 %)."""
_MORE_EQUAL = 1.2
_BY_CHANCE = 1 / 256
_LIKELY = 1.03
"""Planes with so much more entropy than others are not probed: less than that is what a sample's entropy is off."""
MIN_GAIN = 32
"""A page is kept raw unless encoding saves one part in this many: decoding costs too."""


Widths: TypeAlias = frozenset[int]


@dataclass(slots=True)
class Memory:
    """What is known of one client's pages."""

    codec: int = RAW
    streak: int = 0
    ratio: float = 1.0
    """Encoded bytes by raw bytes, a moving average of groups that `codec` encoded."""
    widths: Widths = frozenset()
    """`element_widths` of those groups."""

    def learn(self, codec: int, ratio: float, widths: Widths) -> None:
        """A group was encoded with `codec`."""
        if (codec, widths) == (self.codec, self.widths):
            self.streak += 1
            self.ratio += (ratio - self.ratio) / 8
        else:
            self.codec, self.streak, self.ratio, self.widths = codec, 1, ratio, widths


@dataclass(slots=True)
class Regret:
    """Pages encoded both ways, and the bytes that came out."""

    pages: int = 0
    chosen_bytes: int = 0
    best_bytes: int = 0

    def add(self, chosen: int, best: int) -> None:
        self.pages += 1
        self.chosen_bytes += chosen
        self.best_bytes += best

    @property
    def ratio(self) -> float:
        """0.002: what was chosen is 0.2 % longer than the best."""
        return self.chosen_bytes / self.best_bytes - 1 if self.best_bytes else 0.0

    @property
    def percent(self) -> float:
        return 100 * self.ratio


@dataclass(frozen=True, slots=True)
class Choice:
    """A codec, and encoded by raw bytes as far as is known. RAW is not to be encoded."""

    codec: int
    ratio: float
    widths: Widths = frozenset()
    untried: bool = False
    """Taken from memory."""

    def is_surprised_by(self, nr_bytes: int, raw_bytes: int) -> bool:
        """Whether a page came out so long, or where nothing was tried so short, that it seems of another kind."""
        expected = self.ratio * raw_bytes
        return nr_bytes > expected * SURPRISE or (self.untried and nr_bytes * SURPRISE < expected)


def worth(nr_bytes: int, raw_bytes: int) -> bool:
    """Whether an encoding of that length is kept."""
    return nr_bytes <= raw_bytes - raw_bytes // MIN_GAIN


def sample(pages: Sequence[memoryview]) -> memoryview:
    """SAMPLE_BYTES from all over the pages, or all there is if that is less. Pieces begin at multiples of 64 bytes."""
    total = sum(map(len, pages))
    if total <= SAMPLE_BYTES:
        return memoryview(b"".join(pages))
    piece = SAMPLE_BYTES // SAMPLE_PIECES
    starts = [total * index // SAMPLE_PIECES & ~63 for index in range(SAMPLE_PIECES)]
    if len(pages) == 1:
        return memoryview(b"".join([pages[0][start : start + piece] for start in starts]))
    size = len(pages[0])
    cuts = ((start // size, min(start % size, max(size - piece, 0))) for start in starts)
    return memoryview(b"".join([pages[at][begin : begin + piece] for at, begin in cuts]))


def element_widths(taken: memoryview) -> Widths:
    """Sizes of elements that a sample may be an array of; 1 is always among them.

    Where neighbouring bytes are equal more often at some places modulo 8 than at others, it may be any. Else it is that
    distance at which bytes are equal more often than next to each other.
    """
    found = frozenset(width for width in WIDTHS if len(taken) % width == 0)
    if len(taken) < _MIN_STATISTICS:
        return found
    counts = np.zeros(8 + len(WIDTHS), np.int64)
    count_neighbours(np.frombuffer(taken, np.uint8), counts)
    *phases, equal1, equal2, equal4, equal8 = counts.tolist()
    nr_phase = len(taken) // 8 - 1
    if max(phases) - min(phases) > _UNEVEN * nr_phase:
        return found
    floor = _MORE_EQUAL * sum(phases) / (8 * nr_phase) + _BY_CHANCE
    equal = {1: equal1, 2: equal2, 4: equal4, 8: equal8}
    return frozenset(w for w in found if w == 1 or equal[w] / (len(taken) - w) > floor)


def worth_probing(taken: memoryview, widths: Widths) -> Widths:
    """Of these sizes, the least of those whose planes have little entropy, and 1: that is coded whatever it is.

    Planes of twice the size are the same planes cut in two, and longer planes are coded better.
    """
    if len(widths) < 3 or not _MIN_STATISTICS <= len(taken) <= MAX_BYTES:
        return widths
    bits = np.zeros(len(WIDTHS))
    plane_bits(np.frombuffer(taken, np.uint8), np.zeros(256, np.int64), N_LOG_N, bits)
    by_width = dict(zip(WIDTHS, bits.tolist(), strict=True))
    least, found = min(by_width[width] for width in widths if width > 1), [1]
    for width in sorted(widths - {1}):
        beats = len(found) == 1 or by_width[width] * _LIKELY < by_width[found[-1]]
        if beats and by_width[width] <= _LIKELY * least:
            found.append(width)
    return frozenset(found)


def probe(pages: Sequence[memoryview], quality: Quality, dictionary: Dictionary | None) -> Choice:
    """The codec that does best on a sample of pages of one size."""
    taken = sample(pages)
    return _probe(taken, element_widths(taken), len(pages[0]), quality, dictionary)


def _probe(
    taken: memoryview, widths: Widths, page_bytes: int, quality: Quality, dictionary: Dictionary | None
) -> Choice:
    best, shortest, likely = RAW, len(taken), worth_probing(taken, widths)
    for codec in CODECS.values():
        if quality not in codec.candidate or codec.element_bytes not in likely:
            continue
        if (codec.refines is not None and codec.refines != best) or not codec.takes(page_bytes):
            continue
        length = len(codec.encode(taken, codec.level(quality), dictionary if codec.takes_dictionary else None))
        if length < shortest:
            best, shortest = codec.id, length
    ratio = shortest / max(len(taken), 1)
    return Choice(best if worth(shortest, len(taken)) else RAW, ratio, widths)


def plan(
    pages: Sequence[memoryview], ordinal: int, memory: Memory, quality: Quality, dictionary: Dictionary | None
) -> Choice:
    """The codec for a group of pages of one size, the `ordinal`-th of its client."""
    taken = sample(pages)
    widths = element_widths(taken)
    if memory.streak >= STREAK and ordinal % PROBE_EVERY and widths == memory.widths:
        return Choice(memory.codec, memory.ratio, widths, untried=True)
    return _probe(taken, widths, len(pages[0]), quality, dictionary)
