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

    Groups are probed several at once: what is counted in all their samples is one call, and each codec is given all
    samples that it is tried on. The choices are those that would have been made one by one; but the interpreter's lock,
    of which threads take turns, changes hands some times for a task and no longer some times for a sample.

    How much all of this loses is not left to belief: one page in `regret_every` is encoded with every codec there is,
    and both lengths are added up (`Regret`). At quality `fast` that is much: only fast codecs are candidates.

Invariants
    - A choice depends on the page, its ordinal and the memory as it was when the batch began, never on threads:
      `Memory` is updated after the batch is joined, in the order of the pages.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

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


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring pages of one size, and what is known before they are encoded."""

    pages: Sequence[memoryview]
    ordinal: int
    """The how manieth of its client it is."""
    first_page: int
    memory: Memory
    dictionary: Dictionary | None

    @property
    def kind(self) -> tuple[int, int, Dictionary | None]:
        """Groups with the same one have pages of one size, samples of one length, and one dictionary."""
        size = len(self.pages[0])
        return size, min(size * len(self.pages), SAMPLE_BYTES), self.dictionary

    def is_known(self, widths: Widths) -> bool:
        """Whether it is not to be probed, if its pages look like arrays of such elements."""
        memory = self.memory
        return memory.streak >= STREAK and self.ordinal % PROBE_EVERY > 0 and widths == memory.widths


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


def element_widths(taken: Sequence[memoryview]) -> list[Widths]:
    """Sizes of elements that each of some samples, of one length, may be an array of; 1 is always among them.

    Where neighbouring bytes are equal more often at some places modulo 8 than at others, it may be any. Else it is that
    distance at which bytes are equal more often than next to each other.
    """
    length = len(taken[0])
    possible = frozenset(width for width in WIDTHS if length % width == 0)
    if length < _MIN_STATISTICS:
        return [possible] * len(taken)
    counts = np.zeros((len(taken), 8 + len(WIDTHS)), np.int64)
    count_neighbours(_rows(taken), counts)
    return [_widths(possible, length, each) for each in counts.tolist()]


def _widths(possible: Widths, length: int, counts: list[int]) -> Widths:
    *phases, equal1, equal2, equal4, equal8 = counts
    nr_phase = length // 8 - 1
    if max(phases) - min(phases) > _UNEVEN * nr_phase:
        return possible
    floor = _MORE_EQUAL * sum(phases) / (8 * nr_phase) + _BY_CHANCE
    equal = {1: equal1, 2: equal2, 4: equal4, 8: equal8}
    return frozenset(w for w in possible if w == 1 or equal[w] / (length - w) > floor)


def _rows(taken: Sequence[memoryview]) -> NDArray[np.uint8]:
    return np.frombuffer(b"".join(taken), np.uint8).reshape(len(taken), -1)


def worth_probing(taken: Sequence[memoryview], widths: Sequence[Widths]) -> list[Widths]:
    """Of these sizes, the least of those whose planes have little entropy, and 1: that is coded whatever it is.

    Planes of twice the size are the same planes cut in two, and longer planes are coded better.
    """
    found = list(widths)
    asked = [at for at, each in enumerate(widths) if len(each) >= 3]
    if asked and _MIN_STATISTICS <= len(taken[0]) <= MAX_BYTES:
        bits = np.zeros((len(asked), len(WIDTHS)))
        plane_bits(_rows([taken[at] for at in asked]), np.zeros(256, np.int64), N_LOG_N, bits)
        for at, row in zip(asked, bits.tolist(), strict=True):
            found[at] = _least(widths[at], dict(zip(WIDTHS, row, strict=True)))
    return found


def _least(widths: Widths, bits: Mapping[int, float]) -> Widths:
    least, found = min(bits[width] for width in widths if width > 1), [1]
    for width in sorted(widths - {1}):
        beats = len(found) == 1 or bits[width] * _LIKELY < bits[found[-1]]
        if beats and bits[width] <= _LIKELY * least:
            found.append(width)
    return frozenset(found)


def probe(pages: Sequence[memoryview], quality: Quality, dictionary: Dictionary | None) -> list[Choice]:
    """The codec that does best on a sample of each of some pages of one size."""
    taken = [sample([page]) for page in pages]
    return _probe(taken, element_widths(taken), len(pages[0]), quality, dictionary) if taken else []


def _probe(
    taken: Sequence[memoryview],
    widths: Sequence[Widths],
    page_bytes: int,
    quality: Quality,
    dictionary: Dictionary | None,
) -> list[Choice]:
    """Codec by codec, each for all samples that it is tried on."""
    best, shortest, likely = [RAW] * len(taken), list(map(len, taken)), worth_probing(taken, widths)
    for codec in CODECS.values():
        if quality not in codec.candidate or not codec.takes(page_bytes):
            continue
        tried = [
            at for at, sizes in enumerate(likely) if codec.element_bytes in sizes and codec.refines in (None, best[at])
        ]
        known = dictionary if codec.takes_dictionary else None
        lengths = codec.lengths([taken[at] for at in tried], codec.level(quality), known) if tried else ()
        for at, nr_bytes in zip(tried, lengths, strict=True):
            if nr_bytes < shortest[at]:
                best[at], shortest[at] = codec.id, nr_bytes
    return [_choice(*each) for each in zip(best, shortest, map(len, taken), widths, strict=True)]


def _choice(codec: int, nr_bytes: int, raw_bytes: int, widths: Widths) -> Choice:
    return Choice(codec if worth(nr_bytes, raw_bytes) else RAW, nr_bytes / max(raw_bytes, 1), widths)


def plan(groups: Sequence[Group], quality: Quality) -> list[Choice]:
    """The codec for each of some groups of one kind."""
    taken = [sample(group.pages) for group in groups]
    widths = element_widths(taken)
    asked = [at for at, group in enumerate(groups) if not group.is_known(widths[at])]
    page_bytes, dictionary = len(groups[0].pages[0]), groups[0].dictionary
    probed = iter(_probe([taken[at] for at in asked], [widths[at] for at in asked], page_bytes, quality, dictionary))
    return [
        Choice(group.memory.codec, group.memory.ratio, each, untried=True) if group.is_known(each) else next(probed)
        for group, each in zip(groups, widths, strict=True)
    ]
