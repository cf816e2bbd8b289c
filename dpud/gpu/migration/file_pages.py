# SPDX-License-Identifier: MIT
"""Pages in a file: memory that survives its process. Migrated like any other, and what the crash tests kill.

A file has the areas of its manifest one behind the other. It is mapped shared, so what was written is there after
kill -9 (not after a power failure).
"""

import errno
import mmap
import os
from pathlib import Path

import numpy as np

from dpud.gpu.errors import GpuError
from dpud.gpu.hal.interface import Bytes
from dpud.gpu.migration.pages import Dirty, Manifest, Mask, Pages
from kernelsim.operation import Operation


class FilePages:
    """Areas of pages in a file."""

    def __init__(self, path: Path, manifest: Manifest, *, create: bool = False) -> None:
        """Raises OSError."""
        self.path, self.manifest = path, manifest
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | (os.O_CREAT | os.O_EXCL if create else 0), 0o600)
        try:
            if create:
                os.posix_fallocate(fd, 0, manifest.nr_bytes)
            if os.fstat(fd).st_size != manifest.nr_bytes:
                raise GpuError(errno.EIO, f"{path} has not the size of its pages")
            self._map = mmap.mmap(fd, manifest.nr_bytes)
        finally:
            os.close(fd)
        self.rows: list[Bytes] = []
        whole, at = np.frombuffer(self._map, dtype=np.uint8), 0
        for area in manifest.areas:
            nr_bytes = area.nr_pages * area.page_bytes
            self.rows.append(whole[at : at + nr_bytes].reshape(area.nr_pages, area.page_bytes))
            at += nr_bytes

    def read(self, area: int, pages: Pages) -> tuple[Bytes, Mask]:
        return self.rows[area][pages], np.zeros(len(pages), dtype=np.bool_)

    def admission(self, area: int, nr_pages: int) -> Operation[None]:
        """Nobody limits a file."""
        yield from ()


class FileSource(FilePages):
    """A pages.Source; the writer writes with `put`."""

    def __init__(self, path: Path, manifest: Manifest, *, create: bool = False) -> None:
        super().__init__(path, manifest, create=create)
        self._dirty: Dirty | None = None
        self.held = False
        self.released = False

    def put(self, area: int, page: int, data: bytes) -> None:
        """The writer's write, to the begin of a page. Raises GpuError(EBUSY) while it is held."""
        if self.held:
            raise GpuError(errno.EBUSY, "held")
        self.rows[area][page, : len(data)] = np.frombuffer(data, dtype=np.uint8)
        if self._dirty is not None:
            self._dirty.logs[area].mark(page, 1)

    def start(self) -> None:
        self._dirty = Dirty(self.manifest.areas)

    def take(self, area: int) -> Pages:
        assert self._dirty is not None
        return self._dirty.take(area)

    @property
    def nr_dirty_bytes(self) -> int:
        return 0 if self._dirty is None else self._dirty.nr_bytes

    def throttle(self, percent: int, pages_per_s: float) -> None:
        """Its writer is not ours to slow down."""

    def freeze(self) -> None:
        self.held = True
        if self._dirty is None:
            self.start()

    def thaw(self) -> None:
        self.held = False

    def stop(self) -> None:
        self._dirty = None

    def release(self) -> None:
        """The file goes."""
        self.released = True
        self.path.unlink(missing_ok=True)


class FileSink(FilePages):
    """A pages.Sink."""

    def write(self, area: int, pages: Pages, rows: Bytes, lost: Mask) -> None:
        """Raises GpuError(EIO): a file has no way to say that a page is lost."""
        if lost.any():
            raise GpuError(errno.EIO, "lost pages cannot be kept in a file")
        self.rows[area][pages] = rows

    def lost(self, area: int) -> Mask:
        """None: a file has no way to lose a page and say so."""
        return np.zeros(self.manifest.areas[area].nr_pages, dtype=np.bool_)

    def expect(self, area: int, missing: Mask) -> None:
        """What is in the file for them is overwritten when they come."""

    def own(self) -> None:
        """Whose it is stands in the journal."""

    def abandon(self) -> None:
        self.path.unlink(missing_ok=True)


class FileSinks:
    """receiver.Sinks: a file for each client, in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, manifest: Manifest) -> Path:
        return self.folder / f"{manifest.client}.pages"

    def open(self, manifest: Manifest) -> Operation[FileSink]:
        """Raises OSError: EEXIST where the client is here already, ENOSPC."""
        sink = FileSink(self.path(manifest), manifest, create=True)
        yield None
        return sink

    def reopen(self, manifest: Manifest) -> FileSink:
        """After a crash. Raises OSError; a file that was not made to its end is gone then."""
        try:
            return FileSink(self.path(manifest), manifest)
        except GpuError:
            self.path(manifest).unlink()
            raise
