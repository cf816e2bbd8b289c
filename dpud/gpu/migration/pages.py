# SPDX-License-Identifier: MIT
"""What is migrated: pages, in areas of one page size each. Who has them, and who takes them, is behind two protocols.

A source is a client's regions (client_source.py), a file (file_pages.py) or a real process's memory
(process_pages.py); so is a sink. The engine, the protocol on the wire and the journal are the same for all.

A page's number counts from 0 in its area. Bytes are uint8[page, byte].
"""

from collections.abc import Iterator, Sequence
from typing import Annotated, Literal, Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from dpud.gpu.dirty import DirtyLog
from dpud.gpu.hal.interface import Bytes
from kernelsim.operation import Operation

Pages = NDArray[np.int64]
Mask = NDArray[np.bool_]

BATCH_BYTES = 1 << 20
"""How much is read, sent or written at once; at least one page."""

_NAME = r"^[A-Za-z0-9_][A-Za-z0-9_.-]{0,63}\Z"


class Area(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Pages of one size in a row; the rest says what they are to whom has them."""

    nr_bytes: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]
    page_bytes: Literal[2048, 4096, 65536, 2097152]
    kind: Literal["host", "device", "managed", "pinned"] = "device"
    name: Annotated[str, msgspec.Meta(pattern=r"^([A-Za-z0-9_][A-Za-z0-9_.-]{0,63})?\Z")] = ""
    priority: Annotated[int, msgspec.Meta(ge=0, le=100)] = 0
    permissions: Annotated[list[tuple[int, int, int]], msgspec.Meta(max_length=4096)] = []
    """Runs of the owner's: first page, end, rwx bits."""

    @property
    def nr_pages(self) -> int:
        return -(-self.nr_bytes // self.page_bytes)


class Manifest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What comes."""

    client: Annotated[str, msgspec.Meta(pattern=_NAME)]
    areas: Annotated[list[Area], msgspec.Meta(max_length=4096)]

    @property
    def nr_pages(self) -> int:
        return sum(area.nr_pages for area in self.areas)

    @property
    def nr_bytes(self) -> int:
        return sum(area.nr_pages * area.page_bytes for area in self.areas)


class Source(Protocol):
    """Who has the pages."""

    manifest: Manifest

    def start(self) -> None:
        """From now on know what is written to. All pages with bytes are dirty at first."""
        ...

    def take(self, area: int) -> Pages:
        """Pages written to since they were last taken, which are clean from now on."""
        ...

    @property
    def nr_dirty_bytes(self) -> int: ...

    def read(self, area: int, pages: Pages, /) -> tuple[Bytes, Mask]:
        """(their bytes, which of them are lost and have none)."""
        ...

    def admission(self, area: int, nr_pages: int, /) -> Operation[None]:
        """Wait until so many pages may be read: whoever limits their owner's traffic says when."""
        ...

    def throttle(self, percent: int, pages_per_s: float, /) -> None:
        """Let the writer do so much less than it did: no more than so many pages a second."""
        ...

    def freeze(self) -> None:
        """The writer stops, and nothing changes any more."""
        ...

    def thaw(self) -> None:
        """It goes on."""
        ...

    def stop(self) -> None:
        """No more tracking."""
        ...

    def release(self) -> None:
        """It is somebody else's now: give it up."""
        ...


class Sink(Protocol):
    """Who takes them. Nobody else sees them before `own`."""

    def admission(self, area: int, nr_pages: int, /) -> Operation[None]:
        """Wait until so many pages may be put there and looked at: whoever limits their owner's traffic says when."""
        ...

    def write(self, area: int, pages: Pages, rows: Bytes, lost: Mask, /) -> None: ...

    def read(self, area: int, pages: Pages, /) -> tuple[Bytes, Mask]: ...

    def lost(self, area: int) -> Mask:
        """Pages that have no bytes (any more), as far as can be told without reading all of them."""
        ...

    def expect(self, area: int, missing: Mask, /) -> None:
        """These pages come after the switch: forget what there is of them."""
        ...

    def own(self) -> None:
        """Whoever uses the pages may run, here."""
        ...

    def abandon(self) -> None:
        """All of it goes."""
        ...


def batches(pages: Pages, page_bytes: int, nr_bytes: int = BATCH_BYTES) -> Iterator[Pages]:
    """Of at most so many bytes, or one page."""
    step = max(1, nr_bytes // page_bytes)
    for start in range(0, len(pages), step):
        yield pages[start : start + step]


class Reader(Protocol):
    def read(self, area: int, pages: Pages, /) -> tuple[Bytes, Mask]: ...


def runs(pages: Pages) -> Iterator[tuple[int, int]]:
    """(first, number) of pages in a row, of an ascending array."""
    breaks = np.flatnonzero(np.diff(pages) != 1) + 1
    for run in np.split(pages, breaks) if len(pages) else ():
        yield int(run[0]), len(run)


class Dirty:
    """The DirtyLogs of all areas."""

    def __init__(self, areas: Sequence[Area]) -> None:
        self.areas = areas
        self.logs = [DirtyLog(area.nr_pages) for area in areas]

    def take(self, area: int) -> Pages:
        return self.logs[area].take()

    @property
    def nr_bytes(self) -> int:
        return sum(len(log) * area.page_bytes for log, area in zip(self.logs, self.areas, strict=True))
