# SPDX-License-Identifier: GPL-2.0-only
"""The state directory: what makes the machine be there again after the daemon was killed.

    journal              its turns since it was booted (journal_turns.py); there from the end of the first boot on
    journal.damaged-N    what `--recover` found damaged and put aside

The machine is built from its configuration and given all turns again. So the configuration has to be the one that the
journal was begun with, and so has this program: both stand in its first record.

Rules. A last record that was being written when the machine lost power is cut off, and a line says so. A journal that
is damaged before its end, or that comes to something else when it is replayed, is not used unless the user asks for it
with `--recover`: what was acknowledged is lost then, and the file is put aside, never deleted. Nothing ever starts
afresh where a journal is.
"""

import fcntl
import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from itertools import count, islice
from pathlib import Path
from typing import Any

import msgspec

from dpud import __version__
from dpud.config import Config
from dpud.errors import UserError
from dpud.inject import NotedClock, Outside
from dpud.journal import End, Journal, Reader
from dpud.journal_turns import BOOT, FORMAT, Head, Turn, decode_head, decode_turn, encode

JOURNAL = "journal"
_ROOT = Path(__file__).resolve().parent.parent
_PACKAGES = ("kernelsim", "fs", "dpud")
_ENVIRONMENT = ("UPMEM_PROFILE_BASE", "UPMEM_PROFILE")
_NOT_THE_MACHINE = ("mount", "state", "log", "scenario", "sysctl", "files", "workload")
"""Tables of the configuration that may be changed: where the machine is shown, what is done to it at first."""


@cache
def build_of(root: Path = _ROOT) -> str:
    """A hash of this program: other code may come to something else from the same turns. Looked up once: as loaded."""
    digest = hashlib.sha256(__version__.encode())
    for package in _PACKAGES:
        for path in sorted((root / package).rglob("*.py")):
            digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes())
    return f"{__version__}+{digest.hexdigest()[:12]}"


def machine_keys(config: Config) -> dict[str, Any]:
    """What the machine is built from, by key."""
    tables: dict[str, Any] = msgspec.to_builtins(config, enc_hook=str)
    tables = {name: table for name, table in tables.items() if name not in _NOT_THE_MACHINE}
    environment = {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ}
    return dict(_flat("", tables)) | environment


def _flat(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _flat(f"{prefix}.{name}" if prefix else name, entry)
    elif isinstance(value, list | tuple) and any(isinstance(entry, Mapping) for entry in value):
        for number, entry in enumerate(value):
            yield from _flat(f"{prefix}[{number}]", entry)
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value


def difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """The first key that is not what it was, and how."""
    for key in [*before, *(key for key in now if key not in before)]:
        if before.get(key) != now.get(key):
            return f"{key}: it was {before.get(key, 'not there')}, and is {now.get(key, 'not there')} now"
    return None


@dataclass
class State:
    """One directory, held by this process."""

    directory: Path
    config: Config
    recover: bool = False
    outside: Outside = field(default_factory=Outside)
    end: End | None = None
    """Where the journal ends that is there; None: there is none."""
    boot: Turn | None = None

    def __post_init__(self) -> None:
        self.clock = NotedClock(self.outside)

    @property
    def path(self) -> Path:
        return self.directory / JOURNAL

    # Before the machine is built.

    def look(self) -> None:
        """Find out what is there. Raises UserError where that cannot be used."""
        if not self.path.exists():
            return
        reader = Reader(self.path)
        records = iter(reader)
        first = [payload for _, payload in islice(records, 2)]
        for _ in records:
            pass  # their checksums are looked at
        self.end = reader.end
        self._judge(reader.end)
        try:
            head = decode_head(first[0])
            self.boot = decode_turn(first[1])
            self._check(head)
        except (msgspec.DecodeError, IndexError, RecursionError) as error:
            raise UserError(f"{self.path}: it has no beginning: {error}") from None

    def _judge(self, end: End) -> None:
        where = f"{self.path}: record {end.number}, at offset {end.offset}"
        if end.next_whole is not None and not self.recover:
            raise UserError(
                f"{where}: {end.problem}, and there are whole records from offset {end.next_whole} on. What was "
                "acknowledged is lost: start with --recover to go on from the record before"
            )
        if end.next_whole is not None:
            self.put_aside(end, f"record {end.number} is damaged: {end.problem}")
        elif end.problem:
            self._tell(f"{where}: {end.problem}, and nothing is behind it: cut off")

    def _check(self, head: Head) -> None:
        if head.format != FORMAT:
            raise UserError(f"{self.path}: a journal of format {head.format}, this dpud writes {FORMAT}")
        if head.version != build_of() and not self.recover:
            raise UserError(
                f"{self.path}: written by dpud {head.version}, this is {build_of()}: start that one, or this one "
                "with --recover if it may do"
            )
        if problem := difference(head.config, machine_keys(self.config)):
            raise UserError(f"{self.path}: the machine was begun with another configuration: {problem}")

    def put_aside(self, end: End, why: str) -> None:
        """Keep a damaged journal under another name, and go on with the records before `end`."""
        aside = next(path for n in count(1) if not (path := self.directory / f"{JOURNAL}.damaged-{n}").exists())
        good = self.directory / f"{JOURNAL}.new"
        with open(self.path, "rb") as bad, open(good, "wb") as file:
            left = end.offset
            while left and (piece := bad.read(min(left, 1 << 20))):
                left -= file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        os.link(self.path, aside)
        os.replace(good, self.path)
        self._sync_directory()
        self.end = End(end.offset, end.number)
        self._tell(f"{self.path}: {why}: kept as {aside.name}; going on from record {end.number - 1}")

    def _tell(self, line: str) -> None:
        print(f"dpud: {line}", file=sys.stderr, flush=True)

    # Once it is built.

    def begin_boot(self) -> None:
        """The machine is going to be built, by this thread."""
        self.outside.begin(self.boot.values if self.boot else None)

    def end_boot(self) -> None:
        """It was built."""
        values = self.outside.end()
        if self.boot is None:
            self.boot = Turn(BOOT, 0, None, values, None)

    def journal(self) -> Journal:
        """The journal to go on with: a new one, or the one whose turns have been done again."""
        return self._begin() if self.end is None else Journal(self.path, self.end, self.sync_ms)

    @property
    def sync_ms(self) -> int | None:
        sync = self.config.state.sync
        return {"none": None, "always": 0}[sync] if isinstance(sync, str) else sync

    def turns(self) -> Iterator[tuple[int, int, Turn]]:
        """(record, offset, turn) of the journal that is there. Raises UserError for one that is no turn."""
        if self.end is None:
            return
        for number, (offset, payload) in enumerate(islice(Reader(self.path), self.end.number)):
            if number >= 2:
                try:
                    yield number, offset, decode_turn(payload)
                except (msgspec.DecodeError, RecursionError) as error:
                    raise UserError(f"{self.path}: record {number}, at offset {offset}: {error}") from None

    def _begin(self) -> Journal:
        """It gets its name when it is whole."""
        assert self.boot is not None
        new = self.directory / f"{JOURNAL}.new"
        new.unlink(missing_ok=True)
        journal = Journal(new, None, self.sync_ms)
        for record in (Head(FORMAT, build_of(), machine_keys(self.config)), self.boot):
            journal.append(encode(record))
        journal.rename(self.path)
        self._sync_directory()
        return journal

    def _sync_directory(self) -> None:
        fd = os.open(self.directory, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@contextmanager
def opened(config: Config, recover: bool = False) -> Iterator[State | None]:
    """The configured directory, made where missing, and held; None if none is configured. Raises UserError."""
    if not config.state.directory:
        yield None
        return
    directory = Path(config.state.directory)
    with ExitStack() as undo:
        try:
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            held = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            undo.callback(os.close, held)
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            state = State(directory, config, recover)
            state.look()
        except BlockingIOError:
            raise UserError(f"state.directory: {directory}: another dpud uses it") from None
        except OSError as error:
            raise UserError(f"state.directory: {directory}: {error.strerror}") from error
        yield state
