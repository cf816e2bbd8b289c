# SPDX-License-Identifier: MIT
"""What a codec is, and the registry of them.

Theory of operation
    A codec turns one page into fewer bytes and back. Nobody else knows its format; its id is what a Blob carries, on
    disk too, so an id is never given to another format. A new codec is one class:

        @register
        class Deflate(Codec):
            id, name, levels = 40, "deflate", {Quality.FAST: 1, Quality.BALANCED: 6, Quality.BEST: 9}
            errors = (zlib.error,)

            def encode(self, page, level, dictionary=None): return zlib.compress(page, level)
            def decode(self, data, out, dictionary=None): out[:] = zlib.decompress(data)

    From then on it is tried by the adaptive chooser, is counted, is decoded wherever its id turns up, and can be
    selected by name if it is `selectable`.

Invariants
    - `encode` and `decode` may run on several threads at once: what a library's context is bound to is per thread.
    - `decode` writes exactly `len(out)` bytes, never allocates much more than that whatever the input, and raises one
      of `errors` for a stream that is not right. A stream that is right and wrong is what the checksum is for.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from enum import IntEnum
from typing import Any, ClassVar, TypeVar

from dpud.gpu.blob import RAW, SAME_FILLED, checksum


class Quality(IntEnum):
    """How much time a page may take; each codec has its own level for it."""

    FAST = 0
    BALANCED = 1
    BEST = 2


class Dictionary(ABC):
    """Bytes that pages of one client have in common. `number` is what a Blob carries."""

    number: int
    data: bytes


class Codec(ABC):
    """One compressed format."""

    id: ClassVar[int]
    name: ClassVar[str]
    levels: ClassVar[Mapping[Quality, int]]
    """Level of the library at a quality; at one that is not there, that of the nearest."""
    candidate: ClassVar[frozenset[Quality]] = frozenset(Quality)
    """Qualities at which the adaptive chooser tries it."""
    element_bytes: ClassVar[int] = 1
    """Pages whose size is no multiple of it cannot be encoded."""
    refines: ClassVar[int | None] = None
    """Id of the codec that has to be the best so far for this one to be probed at all."""
    takes_dictionary: ClassVar[bool] = False
    selectable: ClassVar[bool] = False
    """Whether `algorithm` offers it by name; the rest are for the adaptive choice."""
    errors: ClassVar[tuple[type[Exception], ...]] = ()
    """What the library raises for a bad stream, besides ValueError."""

    @abstractmethod
    def encode(self, page: memoryview, level: int, dictionary: Dictionary | None = None) -> bytes:
        """The page in this format; may be longer than the page."""

    def encode_many(
        self, pages: Sequence[memoryview], level: int, dictionary: Dictionary | None = None
    ) -> Iterable[bytes]:
        """`encode` of pages of one size, in order; overridden where a library does them all in one go.

        Threads hand the interpreter's lock to each other around every call of a library, which costs as much as to
        compress some KiB. The fewer and longer the calls are, the more threads gain. Where there is a call for each
        page all the same, it is made when its result is asked for, and the page is still in the cache then.
        """
        return (self.encode(page, level, dictionary) for page in pages)

    def encode_summed(
        self, pages: Sequence[memoryview], level: int, dictionary: Dictionary | None = None
    ) -> Iterable[tuple[bytes | memoryview, int]]:
        """What `encode_many` makes of each page, or a view of it, and the page's checksum.

        Overridden where both are made in one go.
        """
        return zip(self.encode_many(pages, level, dictionary), map(checksum, pages), strict=True)

    def lengths(self, pages: Sequence[memoryview], level: int, dictionary: Dictionary | None = None) -> Sequence[int]:
        """Those of what `encode_many` makes, for who only compares; overridden where that costs less."""
        return list(map(len, self.encode_many(pages, level, dictionary)))

    @abstractmethod
    def decode(self, data: bytes | memoryview, out: memoryview, dictionary: Dictionary | None = None) -> None:
        """Fill `out`. Raises ValueError or one of `errors`."""

    def __init__(self) -> None:
        known = self.levels
        self._nearest = {quality: min(known, key=lambda at: abs(at - quality)) for quality in Quality}

    def level(self, quality: Quality) -> int:
        """The level at a quality, or at the one nearest to it."""
        return self.levels[self._nearest[quality]]

    def takes(self, raw_bytes: int) -> bool:
        return raw_bytes % self.element_bytes == 0


CODECS: dict[int, Codec] = {}
"""Every codec by its id, in the order they were registered: faster ones first, which decides ties."""

C = TypeVar("C", bound=type[Any])


def register(kind: C) -> C:
    """Class decorator. Raises ValueError for an id or a name that is taken."""
    if kind.id in (RAW, SAME_FILLED) or kind.id in CODECS or kind.name in names():
        raise ValueError(f"codec {kind.name} ({kind.id}) is there already")
    CODECS[kind.id] = kind()
    return kind


def names() -> dict[str, int]:
    """Id of every codec, and of what needs none, by name."""
    return {"raw": RAW, "same": SAME_FILLED} | {codec.name: codec.id for codec in CODECS.values()}


def name_of(codec_id: int) -> str:
    """The name of an id; a number where there is none."""
    return next((name for name, known in names().items() if known == codec_id), str(codec_id))
