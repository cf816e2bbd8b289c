# SPDX-License-Identifier: GPL-2.0-only
"""Real machines as input: a captured folder (`dpud snapshot`), or the host we run on.

A folder is not trusted: whatever is in it, reading ends in a HostImage or in a CaptureError of one line, and
takes no more memory than the zones in its zoneinfo imply (`rawcapture` has the files)."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import zstandard
from numpy.typing import NDArray

from dpud.live import Progress, read_live
from dpud.proctext import CaptureError
from dpud.rawcapture import (
    MAX_MAPPINGS_PER_PAGE,
    MAX_TEXT_BYTES,
    OPTIONAL_TEXTS,
    TEXTS,
    RawCapture,
    alloc_pages,
    alloc_words,
    end_pfn,
    nr_mappings,
    zones_of,
)
from kernelsim.hostimage import HostImage

__all__ = ["DEMO", "CaptureError", "read_capture", "read_host", "read_raw"]

DEMO = Path(__file__).parent / "data" / "captures" / "demo"
"""A real machine with 4 GiB of fragmented memory; comes with the package.
"""

MAX_WINDOW_BYTES = 128 << 20  # of a zstd frame; what `zstd --long` makes at most without asking
READ_BYTES = 1 << 20  # of a compressed file
CHUNK_BYTES = 4 << 20  # of its content


def read_capture(path: Path, guess: int = 0) -> HostImage:
    """The machine captured in folder `path`; `guess` seeds what can only be guessed. Raises CaptureError."""
    with _naming(path):
        return _read_folder(path).image(guess)


def read_raw(path: Path) -> RawCapture:
    """What is in folder `path`, with nothing inferred from it. Raises CaptureError."""
    with _naming(path):
        return _read_folder(path)


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Whatever goes wrong in the block is a CaptureError that names the folder."""
    try:
        if not path.is_dir():
            raise CaptureError("no such folder")
        yield
    except CaptureError as error:
        raise CaptureError(f"{path}: {error}") from None
    except OSError as error:
        raise CaptureError(f"{error.filename or path}: {error.strerror}") from None


def read_host(attempts: int = 10, progress: Progress | None = None) -> HostImage:
    """This machine, read until its free lists held still, `attempts` times at most. Needs root. Raises
    CaptureError."""
    return read_live(attempts, progress).raw.image()


def _read_folder(folder: Path) -> RawCapture:
    texts = {name: _read_text(folder, name) for name in TEXTS}
    texts |= {name: _read_text(folder, name) for name in OPTIONAL_TEXTS if _find(folder, name)}
    zones = zones_of(texts)
    kpageflags, kpagecount = alloc_pages(zones), alloc_pages(zones)
    nr_pages = end_pfn(zones)
    _read_words(folder, "kpageflags", kpageflags, nr_pages)
    _read_words(folder, "kpagecount", kpagecount, nr_pages)
    raw = RawCapture(texts, zones, kpageflags, kpagecount)
    if nr := nr_mappings(texts.get("maps", "")):
        if nr > nr_pages * MAX_MAPPINGS_PER_PAGE:
            raise CaptureError(f"maps: {nr} mappings are more than {nr_pages} pages can have")
        entries = alloc_words(2 * nr, "maps")
        _read_words(folder, "pagemap", entries, len(entries))
        raw.pagemap = entries.reshape(-1, 2)
    return raw


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.zst") if path.is_file()), None)


@contextmanager
def _open(folder: Path, name: str) -> Iterator[IO[bytes]]:
    """The content of a file of the capture; whatever goes wrong with it in the block is a CaptureError."""
    path = _find(folder, name)
    if not path:
        raise CaptureError(f"{name}: missing (nor is there a {name}.zst)")
    try:
        with path.open("rb", buffering=0) as file:
            if path.suffix == ".zst":
                unpacker = zstandard.ZstdDecompressor(max_window_size=MAX_WINDOW_BYTES)
                with unpacker.stream_reader(file, read_size=READ_BYTES, read_across_frames=True) as content:
                    yield content
            else:
                yield file
    except zstandard.ZstdError as error:
        raise CaptureError(f"{path.name}: broken zstd data ({error})") from None


def _read_text(folder: Path, name: str) -> str:
    with _open(folder, name) as file:
        content = io.BytesIO()
        while chunk := file.read(CHUNK_BYTES):
            content.write(chunk)
            if content.tell() > MAX_TEXT_BYTES:
                raise CaptureError(f"{name}: more than {MAX_TEXT_BYTES >> 20} MiB of text")
    try:
        return content.getvalue().decode()
    except UnicodeDecodeError:
        raise CaptureError(f"{name}: not text") from None


def _read_words(folder: Path, name: str, words: NDArray[np.uint64], needed: int) -> None:
    """Fill `words`; the file must have the first `needed` of them. What it has beyond is not looked at."""
    buffer = words.data.cast("B")
    nr_bytes = 0
    with _open(folder, name) as file:
        while nr_bytes < len(buffer):
            nr = file.readinto(buffer[nr_bytes : nr_bytes + CHUNK_BYTES])  # type: ignore[attr-defined]
            if not nr:
                break
            nr_bytes += nr
        file.read(1)  # a compressed file that ends here has its checksum verified now
    if nr_bytes % 8:
        raise CaptureError(f"{name}: cut short: {nr_bytes} bytes are not whole 8-byte entries")
    if nr_bytes < needed * 8:
        raise CaptureError(f"{name}: cut short: {nr_bytes // 8} entries, {needed} needed")
