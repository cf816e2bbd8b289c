# SPDX-License-Identifier: MIT
"""The folder with checkpoints: CLIENT.SEQUENCE.ckpt, and which of them belong together."""

import errno
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import quote

from dpud.gpu.errors import CorruptPage, GpuError
from dpud.gpu.fault.chain import Record
from dpud.gpu.fault.checkpoint_file import Contents, read

_SUFFIX = ".ckpt"
File = tuple[Path, Contents]


def path_of(folder: Path, client: str, sequence: int) -> Path:
    return folder / f"{quote(client, safe='')}.{sequence:06}{_SUFFIX}"


def sequences(folder: Path, client: str) -> list[int]:
    """Of the files that are there, whole or not."""
    start = f"{quote(client, safe='')}."
    texts = (each.name.removesuffix(_SUFFIX).removeprefix(start) for each in folder.glob(f"*{_SUFFIX}"))
    return sorted(int(text) for text in texts if text.isdecimal())


def last_sequence(folder: Path, client: str) -> int:
    return max(sequences(folder, client), default=0)


def superfluous(records: Sequence[Record], nr_chains: int) -> list[Record]:
    """Those of all chains but the last so many."""
    starts = [at for at, record in enumerate(records) if record.is_full]
    return list(records[: starts[-nr_chains]]) if len(starts) > nr_chains else []


def read_chain(folder: Path, client: str, sequence: int | None) -> list[File]:
    """A full checkpoint and the increments to it, up to `sequence`; if None, up to the last one that is whole.

    Raises GpuError(ENOENT) where there is none, GpuError(EIO) where none is whole.
    """
    there = sequences(folder, client)
    wanted = there[::-1] if sequence is None else [sequence] if sequence in there else []
    if not wanted:
        raise GpuError(errno.ENOENT, f"no checkpoint of {client}")
    why = ""
    for each in wanted:
        try:
            return _chain(folder, client, each)
        except (OSError, CorruptPage) as error:
            why = why or str(error)
    raise GpuError(errno.EIO, f"no checkpoint of {client} is whole: {why}")


def _chain(folder: Path, client: str, sequence: int) -> list[File]:
    files: list[File] = []
    digest: int | None = None
    while sequence:
        path = path_of(folder, client, sequence)
        contents = read(path)
        if contents.label.sequence != sequence:
            raise CorruptPage(0, f"{path.name} says that it is number {contents.label.sequence}")
        if digest not in (None, contents.digest):
            raise CorruptPage(0, f"{path.name} is not what the next one is an increment to")
        files.insert(0, (path, contents))
        sequence, digest = contents.label.parent, contents.label.parent_digest
    return files


def merged(files: Iterable[File]) -> dict[int, dict[int, tuple[Path, int]]]:
    """Region's key -> page -> where its last blob is."""
    places: dict[int, dict[int, tuple[Path, int]]] = {}
    for path, contents in files:
        for (index, page), at in contents.places.items():
            places.setdefault(contents.label.regions[index].key, {})[page] = (path, at)
    return places
