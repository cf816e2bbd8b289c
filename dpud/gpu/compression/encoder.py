# SPDX-License-Identifier: MIT
"""What a worker thread does: a group of pages to blobs, and blobs to pages. Nothing here changes shared state."""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import TypeAlias

from dpud.gpu.blob import RAW, SAME_FILLED, Blob, checksum, same_filled_word
from dpud.gpu.compression.chooser import Choice, Group, Widths, plan, probe, worth
from dpud.gpu.compression.codec import CODECS, Dictionary, Quality
from dpud.gpu.errors import CorruptPage

_WORD_BYTES = 8


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for a whole batch."""

    fixed: int | None
    """The codec for all pages; None to choose."""
    quality: Quality
    copy: bool
    """Whether blobs have bytes of their own, or may be views: of the page, or of what a codec made of several."""
    regret_every: int
    """One page in so many is tried with every codec where there is a choice; 0: none."""
    timer: Callable[[], int]


Count: TypeAlias = tuple[int, int, int, int]
"""(codec, pages, raw bytes, encoded bytes)."""


@dataclass(slots=True)
class Encoded:
    """A group's blobs and what there is to learn from them."""

    blobs: list[Blob]
    counts: list[Count]
    widths: Widths = frozenset()
    nr_surprised: int = 0
    regrets: tuple[tuple[int, int], ...] = ()
    """Bytes as chosen and of the shortest there is, of the pages that were tried with every codec."""
    ns: int = 0


def encode_groups(groups: Sequence[Group], rules: Rules) -> list[Encoded]:
    """One blob a page. Groups of one kind that follow each other are done together."""
    found: list[Encoded] = []
    for _, run in groupby(groups, lambda group: group.kind):
        alike = list(run)
        found += _encode_chosen(alike, rules) if rules.fixed is None else _encode_fixed(alike, rules.fixed, rules)
    return found


def _encode_fixed(groups: Sequence[Group], codec_id: int, rules: Rules) -> list[Encoded]:
    """Of one kind, where nothing is to be chosen."""
    begin = rules.timer()
    pages = [page for group in groups for page in group.pages]
    same = _all_same_filled(pages)
    others = [page for at, page in enumerate(pages) if at not in same] if same else pages
    coded = _coded(others, codec_id, groups[0].dictionary, rules)
    blobs = [same.get(at) or next(coded) for at in range(len(pages))] if same else list(coded)
    return _shared_out(groups, blobs, rules.timer() - begin)


def _encode_chosen(groups: Sequence[Group], rules: Rules) -> list[Encoded]:
    """Of one kind."""
    begin = rules.timer()
    choices = plan(groups, rules.quality)
    pages = [page for group in groups for page in group.pages]
    chosen = [choice for group, choice in zip(groups, choices, strict=True) for _ in group.pages]
    blobs = _encode(pages, [choice.codec for choice in chosen], groups[0].dictionary, rules)
    surprised = _surprised(pages, blobs, chosen)
    if surprised:
        _try_again(pages, blobs, chosen, surprised, groups, rules)
    found = _shared_out(groups, blobs, rules.timer() - begin)
    at = 0
    for group, choice, done in zip(groups, choices, found, strict=True):
        end = at + len(group.pages)
        done.widths = choice.widths
        done.nr_surprised = bisect_left(surprised, end) - bisect_left(surprised, at)
        if rules.regret_every:
            done.regrets = tuple(_regrets(group, done.blobs, rules))
        at = end
    return found


def _shared_out(groups: Sequence[Group], blobs: list[Blob], ns: int) -> list[Encoded]:
    """To each group its blobs, and of the time what is due to so many pages."""
    ends = accumulate(len(group.pages) for group in groups)
    ns_by_page = ns / len(blobs)
    found = []
    for group, end in zip(groups, ends, strict=True):
        own = blobs[end - len(group.pages) : end]
        found.append(Encoded(own, _by_codec(own), ns=int(ns_by_page * len(own))))
    return found


def _by_codec(blobs: Sequence[Blob]) -> list[Count]:
    if len(blobs) == 1:  # large pages: as many groups as pages
        (blob,) = blobs
        return [(blob.codec, 1, blob.raw_bytes, len(blob.data))]
    counts = []
    for codec in {blob.codec for blob in blobs}:
        alike = [blob for blob in blobs if blob.codec == codec]
        counts.append((codec, len(alike), sum(blob.raw_bytes for blob in alike), sum(len(blob.data) for blob in alike)))
    return counts


def _surprised(pages: Sequence[memoryview], blobs: Sequence[Blob], chosen: Sequence[Choice]) -> list[int]:
    """Indices of the pages that came out otherwise than promised."""
    return [
        at
        for at, (page, blob, choice) in enumerate(zip(pages, blobs, chosen, strict=True))
        if blob.codec != SAME_FILLED and choice.is_surprised_by(len(blob.data), len(page))
    ]


def _try_again(
    pages: Sequence[memoryview],
    blobs: list[Blob],
    chosen: Sequence[Choice],
    surprised: Sequence[int],
    groups: Sequence[Group],
    rules: Rules,
) -> None:
    """Pages that are not what their neighbours are: probe each alone. One that was, alone as it is, would not gain."""
    dictionary = groups[0].dictionary
    are_single = len(pages) == len(groups)
    asked = [at for at in surprised if not are_single or chosen[at].untried]
    others = probe([pages[at] for at in asked], rules.quality, dictionary)
    again = {
        at: other.codec for at, other in zip(asked, others, strict=True) if other.codec not in (chosen[at].codec, RAW)
    }
    seconds = _encode([pages[at] for at in again], list(again.values()), dictionary, rules)
    for at, second in zip(again, seconds, strict=True):
        if len(second.data) < len(blobs[at].data):
            blobs[at] = second


def _encode(
    pages: Sequence[memoryview], codecs: Sequence[int], dictionary: Dictionary | None, rules: Rules
) -> list[Blob]:
    """Pages of one size, each with its codec; those of one codec together."""
    same = _all_same_filled(pages)
    by_codec: dict[int, list[int]] = {}
    for at, codec_id in enumerate(codecs):
        if at not in same:
            by_codec.setdefault(codec_id, []).append(at)
    for codec_id, indices in by_codec.items():
        same.update(zip(indices, _coded([pages[at] for at in indices], codec_id, dictionary, rules), strict=True))
    return [same[at] for at in range(len(pages))]


def _all_same_filled(pages: Sequence[memoryview]) -> dict[int, Blob]:
    """Those of the pages that one word fills, by index."""
    return {at: blob for at, page in enumerate(pages) if (blob := _same_filled(page)) is not None}


def _same_filled(page: memoryview) -> Blob | None:
    # The first byte is compared here, since nearly all pages differ in it and a call costs something.
    if len(page) < _WORD_BYTES or page[0] != page[-_WORD_BYTES]:
        return None
    word = same_filled_word(page)
    return None if word is None else Blob(word, SAME_FILLED, len(page), checksum(page))


def _coded(pages: Sequence[memoryview], codec_id: int, dictionary: Dictionary | None, rules: Rules) -> Iterator[Blob]:
    """By one codec where that is worth it, else raw."""
    codec = CODECS.get(codec_id)
    if codec is None or not codec.takes(len(pages[0])):
        yield from (_raw(page, checksum(page), rules) for page in pages)
        return
    known = dictionary if codec.takes_dictionary else None
    number = 0 if known is None else known.number
    raw_bytes, copy = len(pages[0]), rules.copy
    made = codec.encode_summed(pages, codec.level(rules.quality), known)
    for page, (data, check) in zip(pages, made, strict=True):
        if worth(len(data), raw_bytes):
            yield Blob(bytes(data) if copy else data, codec_id, raw_bytes, check, number)
        else:
            yield _raw(page, check, rules)


def _raw(page: memoryview, check: int, rules: Rules) -> Blob:
    return Blob(bytes(page) if rules.copy else page, RAW, len(page), check)


def best_of_all(page: memoryview, quality: Quality, dictionary: Dictionary | None = None) -> int:
    """Bytes of the shortest encoding that any codec makes, at most the page's own."""
    takers = [codec for codec in CODECS.values() if codec.takes(len(page))]
    lengths = [
        len(codec.encode(page, codec.level(quality), dictionary if codec.takes_dictionary else None))
        for codec in takers
    ]
    return min([length for length in lengths if worth(length, len(page))], default=len(page))


def _regrets(group: Group, blobs: Sequence[Blob], rules: Rules) -> list[tuple[int, int]]:
    indices = range(-group.first_page % rules.regret_every, len(blobs), rules.regret_every)
    return [
        (len(blobs[index].data), best_of_all(group.pages[index], rules.quality, group.dictionary))
        for index in indices
        if blobs[index].codec != SAME_FILLED
    ]


def decode_blob(index: int, blob: Blob, out: memoryview, dictionary_of: Callable[[int], Dictionary | None]) -> None:
    """Fill `out`. Raises CorruptPage(index)."""
    if len(out) != blob.raw_bytes:
        raise CorruptPage(index, f"{blob.raw_bytes} bytes for a page of {len(out)}")
    codec = CODECS.get(blob.codec)
    errors: tuple[type[Exception], ...] = (ValueError, KeyError, *(codec.errors if codec else ()))
    try:
        if codec is not None:
            codec.decode(blob.data, out, dictionary_of(blob.dictionary))
        else:
            _decode_plain(blob, out)
    except errors as error:
        raise CorruptPage(index, f"codec {blob.codec}: {error}") from error
    if (found := checksum(out)) != blob.checksum:
        raise CorruptPage(index, f"checksum {found:016x}, expected {blob.checksum:016x}")


def _decode_plain(blob: Blob, out: memoryview) -> None:
    if blob.dictionary:
        raise ValueError("a dictionary for a page without a codec")
    if blob.codec == SAME_FILLED and len(blob.data) == _WORD_BYTES and len(out) % _WORD_BYTES == 0:
        out[:] = bytes(blob.data) * (len(out) // _WORD_BYTES)
    elif blob.codec == RAW and len(blob.data) == len(out):
        out[:] = blob.data
    else:
        raise ValueError(f"{len(blob.data)} bytes for a page of {len(out)}")
