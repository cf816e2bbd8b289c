# SPDX-License-Identifier: GPL-2.0-only
"""`dpud snapshot DIR`: this host's memory layout as a folder that `--from DIR` reads (`rawcapture` has the
files).

Everything is read before anything is written, because writing fills the page cache. The folder appears whole
or not at all: it is written beside its place under another name, then renamed. It is readable by its owner
only, as the files in /proc are: it shows where every process' memory lies.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import zstandard

from dpud.live import LiveCapture, Progress, read_live
from dpud.proctext import CaptureError

ZSTD_LEVEL = 9


@dataclass(frozen=True)
class SnapshotReport:
    """What was captured."""

    directory: Path
    quiet: bool
    """The free lists held still: buddyinfo was the same before and after the pages were read."""
    attempts: int
    nr_pages: int
    nr_tasks: int
    nr_tasks_skipped: int
    nr_bytes: int
    """Size of the folder."""

    def __str__(self) -> str:
        held = (
            f"free lists held still (attempt {self.attempts})"
            if self.quiet
            else f"free lists never held still in {self.attempts} attempts: counts will differ a little"
        )
        skipped = f" ({self.nr_tasks_skipped} skipped)" if self.nr_tasks_skipped else ""
        return (
            f"{self.directory}: {self.nr_pages} pages, {self.nr_tasks} processes{skipped}, "
            f"{self.nr_bytes / 1e6:.1f} MB; {held}"
        )


def snapshot(directory: Path, *, attempts: int = 10, progress: Progress | None = None) -> SnapshotReport:
    """Capture this host into `directory`, which must be empty or not there. Needs root. Raises
    CaptureError."""
    check_target(directory)
    live = read_live(attempts, progress)
    try:
        nr_bytes = write_whole(directory, files_of(live))
    except OSError as error:
        raise CaptureError(f"{error.filename or directory}: {error.strerror}") from None
    return SnapshotReport(
        directory=directory,
        quiet=live.quiet,
        attempts=live.attempts,
        nr_pages=len(live.raw.kpageflags),
        nr_tasks=live.nr_tasks,
        nr_tasks_skipped=live.nr_tasks_skipped,
        nr_bytes=nr_bytes,
    )


def check_target(directory: Path) -> None:
    """CaptureError if a folder cannot come to be there."""
    try:
        if directory.exists() and any(directory.iterdir()):
            raise CaptureError(f"{directory}: not empty")
        if not directory.resolve().parent.is_dir():
            raise CaptureError(f"{directory}: its parent folder does not exist")
    except OSError as error:
        raise CaptureError(f"{directory}: {error.strerror}") from None


def files_of(live: LiveCapture) -> dict[str, bytes]:
    """The files of a captured folder, by name."""
    pack = zstandard.ZstdCompressor(level=ZSTD_LEVEL, write_checksum=True).compress
    raw = live.raw
    files = {name: text.encode() for name, text in raw.texts.items() if name != "maps"}
    files["maps.zst"] = pack(raw.texts["maps"].encode())
    arrays = {"kpageflags": raw.kpageflags, "kpagecount": raw.kpagecount, "pagemap": raw.pagemap}
    return files | {f"{name}.zst": pack(words.tobytes()) for name, words in arrays.items()}


def write_whole(directory: Path, files: dict[str, bytes]) -> int:
    """Make the folder with these files, by names that may have one folder in them; all or nothing. Returns its size."""
    with drafted(directory) as draft:
        for name, content in files.items():
            (draft / name).parent.mkdir(exist_ok=True)
            (draft / name).write_bytes(content)
    return sum(map(len, files.values()))


@contextmanager
def drafted(directory: Path) -> Iterator[Path]:
    """A folder to fill, which becomes `directory` when the block ends; nothing is left if the block raises."""
    place = directory.resolve()
    draft = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
    try:
        yield draft
        os.rename(draft, place)  # takes the place of an empty folder
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise
