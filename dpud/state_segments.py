# SPDX-License-Identifier: GPL-2.0-only
"""Which files of a state directory make the machine: the newest checkpoint that is whole, and the journals from it on.

    journal            from the boot on
    checkpoint.N       the machine at one moment
    journal.N          from that moment on

A journal says in its head how many records the one before it has. So a file that is missing, or that lost its end in a
loss of power while the next one did not, is noticed. Journals are there from the older one of the last two checkpoints
on: when the newer one is damaged, the older and what came after it make the same machine.
"""

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice, pairwise
from pathlib import Path

import msgspec

from dpud import checkpoint_file
from dpud.errors import UserError
from dpud.journal import End, Reader
from dpud.journal_turns import FORMAT, Head, Turn, decode_head, decode_turn

JOURNAL, CHECKPOINT = "journal", "checkpoint"
_NR_FIRST = 2
"""Records that a journal is made with."""
NR_KEPT = 2
Tell = Callable[[str], object]


def journal_at(directory: Path, number: int) -> Path:
    return directory / (f"{JOURNAL}.{number}" if number else JOURNAL)


def checkpoint_at(directory: Path, number: int) -> Path:
    return directory / f"{CHECKPOINT}.{number}"


def numbers(directory: Path, name: str) -> list[int]:
    """Of the files of that name, in order."""
    found = [path.name.removeprefix(f"{name}.") for path in directory.glob(f"{name}.*")]
    there = [int(number) for number in found if number.isdecimal()]
    return sorted(([0] if name == JOURNAL and (directory / name).exists() else []) + there)


def sync(directory: Path) -> None:
    """Have the disk have the names in a directory."""
    fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def aside_of(path: Path) -> Path:
    """A name that nobody looks at, for what a file has now."""
    return next(to for n in count(1) if not (to := path.with_name(f"{path.name}.damaged-{n}")).exists())


def put_aside(path: Path) -> Path:
    """Keep a file under such a name -> that one."""
    aside = aside_of(path)
    os.rename(path, aside)
    sync(path.parent)
    return aside


@dataclass
class Segment:
    """One journal, up to where it is whole."""

    number: int
    path: Path
    end: End
    head: Head
    boot: Turn

    @classmethod
    def read(cls, directory: Path, number: int) -> "Segment":
        """Look at all of it. Raises UserError for one that has no beginning or another format; OSError."""
        path = journal_at(directory, number)
        reader = Reader(path)
        records = iter(reader)
        first = [payload for _, payload in islice(records, _NR_FIRST)]
        for _ in records:
            pass  # their checksums are looked at
        try:
            head, boot = decode_head(first[0]), decode_turn(first[1])
        except (msgspec.DecodeError, IndexError, RecursionError) as error:
            raise UserError(f"{path}: it has no beginning: {error}") from None
        if head.format != FORMAT:
            raise UserError(f"{path}: a journal of format {head.format}, this dpud writes {FORMAT}")
        return cls(number, path, reader.end, head, boot)

    def turns(self) -> Iterator[tuple[int, int, Turn]]:
        """(record, offset, turn). Raises UserError for one that is no turn."""
        for number, (offset, payload) in enumerate(islice(Reader(self.path), self.end.number)):
            if number >= _NR_FIRST:
                try:
                    yield number, offset, decode_turn(payload)
                except (msgspec.DecodeError, RecursionError) as error:
                    raise UserError(f"{self.path}: record {number}, at offset {offset}: {error}") from None


def usable_checkpoint(directory: Path, tell: Tell) -> checkpoint_file.Head | None:
    """The newest that is whole; those that are not are put aside, and a line says so.

    None where the journal from the boot on is there instead. Raises UserError where neither is.
    """
    bad: list[str] = []
    for number in reversed(numbers(directory, CHECKPOINT)):
        path = checkpoint_at(directory, number)
        try:
            head = checkpoint_file.check(path)
            if head.number != number:
                raise checkpoint_file.Unusable(f"it is checkpoint {head.number}")
            return head
        except checkpoint_file.Unusable as error:
            bad.append(f"{path}: {error}")
            _can_do_without(directory, number, bad)
            tell(f"{path}: {error}: kept as {put_aside(path).name}; what was before it is used")
    if bad or 0 in (there := numbers(directory, JOURNAL)) or not there:
        return None
    raise UserError(
        f"{directory}: {JOURNAL}.{there[0]} goes on from a checkpoint that is not there: put back the files that are "
        "missing, or move the directory away to begin anew"
    )


def _can_do_without(directory: Path, number: int, why: list[str]) -> None:
    """Is there another way to where checkpoint `number` leads? Raises UserError."""
    older = [n for n in numbers(directory, CHECKPOINT) if n < number]
    if older or 0 in numbers(directory, JOURNAL):
        return
    raise UserError(
        f"{'; '.join(why)}: no other checkpoint is there, and the journal from the boot on is gone. Put back the files "
        "from a copy, or move the directory away to begin anew"
    )


def chain(directory: Path, first: int) -> list[Segment]:
    """The journals from `first` on, as far as each is whole where the next one begins: see `gap`."""
    found: list[Segment] = []
    for number in numbers(directory, JOURNAL):
        if number >= first:
            found.append(Segment.read(directory, number))
    return found


def gap(segments: list[Segment], first: int) -> tuple[int, str] | None:
    """(which segment of the list is the last that counts, why); None if all do, each to its end."""
    if not segments or segments[0].number != first:
        return -1, f"{JOURNAL}.{first} is not there" if first else f"{JOURNAL} is not there"
    for at, (segment, after) in enumerate(pairwise(segments)):
        if after.number != segment.number + 1:
            return at, f"{JOURNAL}.{segment.number + 1} is not there"
        if segment.end.number != after.head.nr_before:
            return at, f"{after.head.nr_before} records were in {segment.path.name}, {segment.end.number} are whole"
    return None


def drop_old(directory: Path) -> None:
    """Remove what is before the last NR_KEPT checkpoints. Raises OSError."""
    kept = numbers(directory, CHECKPOINT)[-NR_KEPT:]
    if len(kept) < NR_KEPT:
        return
    for name, at in ((CHECKPOINT, checkpoint_at), (JOURNAL, journal_at)):
        for number in numbers(directory, name):
            if number < kept[0]:
                _remove(at(directory, number))


def _remove(path: Path) -> None:
    try:
        os.unlink(path)
    except OSError as error:
        if error.errno != errno.ENOENT:
            raise
