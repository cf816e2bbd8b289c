# SPDX-License-Identifier: MIT
"""What a worker thread does: a group of pages to blobs, and blobs to pages. Nothing here changes shared state."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dpud.gpu.blob import RAW, SAME_FILLED, Blob, checksum, same_filled_word
from dpud.gpu.compression.chooser import Choice, Memory, Widths, plan, probe, worth
from dpud.gpu.compression.codec import CODECS, Codec, Dictionary, Quality
from dpud.gpu.errors import CorruptPage

_WORD_BYTES = 8


@dataclass(frozen=True, slots=True)
class Rules:
    """What holds for a whole batch."""

    fixed: int | None
    """The codec for all pages; None to choose."""
    quality: Quality
    copy: bool
    """Whether a page that is kept raw is copied, or its blob is a view of it."""
    regret_every: int
    """One page in so many is tried with every codec where there is a choice; 0: none."""
    timer: Callable[[], int]


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring pages of one size, and what is known before they are encoded."""

    pages: Sequence[memoryview]
    ordinal: int
    first_page: int
    memory: Memory
    dictionary: Dictionary | None


@dataclass(slots=True)
class Encoded:
    """A group's blobs and what there is to learn from them."""

    blobs: list[Blob]
    widths: Widths = frozenset()
    nr_surprised: int = 0
    regrets: tuple[tuple[int, int], ...] = ()
    """Bytes as chosen and of the shortest there is, of the pages that were tried with every codec."""
    ns: int = 0


def encode_group(group: Group, rules: Rules) -> Encoded:
    """One blob a page."""
    begin = rules.timer()
    if rules.fixed is not None:
        done = Encoded([_encode(page, rules.fixed, group.dictionary, rules) for page in group.pages])
    else:
        done = _encode_adaptively(group, rules)
    done.ns = rules.timer() - begin
    if rules.fixed is None and rules.regret_every:
        done.regrets = tuple(_regrets(group, done.blobs, rules))
    return done


def _encode_adaptively(group: Group, rules: Rules) -> Encoded:
    choice = plan(group.pages, group.ordinal, group.memory, rules.quality, group.dictionary)
    done = Encoded([], choice.widths)
    for page in group.pages:
        blob = _encode(page, choice.codec, group.dictionary, rules)
        if blob.codec != SAME_FILLED and choice.is_surprised_by(len(blob.data), len(page)):
            done.nr_surprised += 1
            blob = _second_try(page, blob, choice, group, rules)
        done.blobs.append(blob)
    return done


def _second_try(page: memoryview, first: Blob, choice: Choice, group: Group, rules: Rules) -> Blob:
    """The page was not what its neighbours are: probe it alone."""
    other = probe([page], rules.quality, group.dictionary).codec
    if other in (choice.codec, RAW):
        return first
    second = _encode(page, other, group.dictionary, rules)
    return second if len(second.data) < len(first.data) else first


def _encode(page: memoryview, codec_id: int, dictionary: Dictionary | None, rules: Rules) -> Blob:
    # The first byte is compared here, since nearly all pages differ in it and a call costs something.
    may_be_same = len(page) >= _WORD_BYTES and page[0] == page[-_WORD_BYTES]
    word = same_filled_word(page) if may_be_same else None
    if word is not None:
        return Blob(word, SAME_FILLED, len(page), checksum(page))
    codec = CODECS.get(codec_id)
    if codec is not None and codec.takes(len(page)):
        data = run(codec, page, rules.quality, dictionary)
        if worth(len(data), len(page)):
            number = dictionary.number if dictionary is not None and codec.takes_dictionary else 0
            return Blob(data, codec_id, len(page), checksum(page), number)
    return Blob(bytes(page) if rules.copy else page, RAW, len(page), checksum(page))


def run(codec: Codec, page: memoryview, quality: Quality, dictionary: Dictionary | None) -> bytes:
    """One codec at its level for a quality, with the dictionary if it takes any."""
    return codec.encode(page, codec.level(quality), dictionary if codec.takes_dictionary else None)


def best_of_all(page: memoryview, quality: Quality, dictionary: Dictionary | None = None) -> int:
    """Bytes of the shortest encoding that any codec makes, at most the page's own."""
    lengths = [len(run(codec, page, quality, dictionary)) for codec in CODECS.values() if codec.takes(len(page))]
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
