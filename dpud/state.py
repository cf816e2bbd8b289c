# SPDX-License-Identifier: GPL-2.0-only
"""The state directory: what makes the machine be there again after the daemon was killed.

    journal, journal.N   its turns since it was booted, or since checkpoint N (journal_turns.py); the first is there
                         from the end of the first boot on
    checkpoint.N         the machine at the moment from which journal.N goes on (checkpoint.py)
    stores               values written into files that are in no journal yet (state_stores.py)
    gpu-checkpoints/     clients' checkpoints of the GPU side, where no folder is configured for them
    *.damaged-N          what was found damaged and put aside
    *.new                what was being written; of no use

The machine is built from its configuration, gets what is in the newest checkpoint, and is given all turns since again.
So the configuration has to be the one that the journal was begun with, and so has this program: both stand in the first
record of each file.

Rules. A last record that was being written when the machine lost power is cut off, and a line says so. For a checkpoint
that is damaged, the one before it and the journals since are used, and a line says so. A journal that is damaged before
its end, or that comes to something else when it is replayed, is not used unless the user asks for it with `--recover`:
what was acknowledged is lost then, and the file is put aside, never deleted. Nothing ever starts afresh where a journal
is.
"""

import hashlib
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from dpud import __version__, checkpoint_file, state_lock, state_segments
from dpud.config import Config
from dpud.errors import UserError
from dpud.inject import NotedClock, Outside
from dpud.journal import End, Journal
from dpud.journal_turns import BOOT, FORMAT, Head, Turn, encode
from dpud.state_kobject import StateFiles
from dpud.state_segments import CHECKPOINT, JOURNAL, Segment, checkpoint_at, journal_at, numbers, put_aside
from dpud.state_stores import FILE_NAME, KeptStores

if TYPE_CHECKING:
    from dpud.checkpoint import Whole

GPU_CHECKPOINTS = "gpu-checkpoints"
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
    segments: list[Segment] = field(default_factory=list)
    """The journals that have to be done again, in order; none where there is nothing yet."""
    checkpoint: checkpoint_file.Head | None = None
    """What the first of them goes on from; None: the boot."""
    boot: Turn | None = None
    whole: "Whole | None" = None
    """The machine, once it is built."""
    files: StateFiles = field(default_factory=StateFiles)

    def __post_init__(self) -> None:
        self.clock = NotedClock(self.outside)

    @property
    def path(self) -> Path:
        """Of the journal that grows."""
        return self.segments[-1].path if self.segments else self.directory / JOURNAL

    @property
    def end(self) -> End | None:
        """Where that ends; None: there is none."""
        return self.segments[-1].end if self.segments else None

    @property
    def nr_turns(self) -> int:
        """Records that have to be done again."""
        return sum(segment.end.number for segment in self.segments)

    # Before the machine is built.

    def look(self) -> None:
        """Find out what is there. Raises UserError where that cannot be used."""
        for unfinished in self.directory.glob("*.new"):
            unfinished.unlink()
        if not numbers(self.directory, JOURNAL) and not numbers(self.directory, CHECKPOINT):
            return
        self.checkpoint = state_segments.usable_checkpoint(self.directory, self.tell)
        first = self.checkpoint.number if self.checkpoint else 0
        if self.checkpoint is not None:
            self._check(checkpoint_at(self.directory, first), self.checkpoint, replays=False)
        self.segments = state_segments.chain(self.directory, first)
        self._close_gap(first)
        self._judge(self.segments[-1])
        self._check(self.path, self.segments[-1].head)
        self.boot = self.segments[0].boot

    def _close_gap(self, first: int) -> None:
        """Every journal that is there has to go on from the end of the one before, or else the user has to say so."""
        found = state_segments.gap(self.segments, first)
        if found is None:
            return
        last, why = found
        if last < 0 or not self.recover:
            way_out = "" if last < 0 else ": start with --recover to go on from what is whole before that"
            raise UserError(f"{self.directory}: {why}. What was acknowledged is lost{way_out}")
        self.tell(f"{self.directory}: {why}")
        self.cut(last)

    def cut(self, last: int) -> None:
        """Nothing behind that one of the segments counts: it is put aside."""
        limit = self.segments[last].number
        self.segments = self.segments[: last + 1]
        for name, at in ((JOURNAL, journal_at), (CHECKPOINT, checkpoint_at)):
            for number in numbers(self.directory, name):
                if number > limit:
                    path = at(self.directory, number)
                    self.tell(f"{path}: kept as {put_aside(path).name}")

    def _judge(self, segment: Segment) -> None:
        end = segment.end
        where = f"{segment.path}: record {end.number}, at offset {end.offset}"
        if end.next_whole is not None and not self.recover:
            raise UserError(
                f"{where}: {end.problem}, and there are whole records from offset {end.next_whole} on. What was "
                "acknowledged is lost: start with --recover to go on from the record before"
            )
        if end.next_whole is not None:
            self.keep_good_part(segment, end, f"record {end.number} is damaged: {end.problem}")
        elif end.problem:
            self.tell(f"{where}: {end.problem}, and nothing is behind it: cut off")

    def _check(self, path: Path, head: Head | checkpoint_file.Head, replays: bool = True) -> None:
        if head.version != build_of() and not (self.recover and replays):
            way_out = ", or this one with --recover if it may do" if replays else ""
            raise UserError(f"{path}: written by dpud {head.version}, this is {build_of()}: start that one{way_out}")
        if problem := difference(head.config, machine_keys(self.config)):
            raise UserError(f"{path}: the machine was begun with another configuration: {problem}")

    def keep_good_part(self, segment: Segment, end: End, why: str) -> None:
        """Keep a damaged journal under another name, and go on with the records before `end`; later journals go too."""
        good = segment.path.with_name(f"{segment.path.name}.new")
        with open(segment.path, "rb") as bad, open(good, "wb") as file:
            left = end.offset
            while left and (piece := bad.read(min(left, 1 << 20))):
                left -= file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        aside = put_aside(segment.path)
        os.replace(good, segment.path)
        self.sync()
        segment.end = End(end.offset, end.number)
        self.tell(f"{segment.path}: {why}: kept as {aside.name}; going on from record {end.number - 1}")
        self.cut(self.segments.index(segment))

    def tell(self, line: str) -> None:
        """Say something to who starts the daemon."""
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
        if self.end is not None:
            return Journal(self.path, self.end, self.sync_ms)
        journal = self.new_journal(0, 0)
        self.name(journal, 0)
        return journal

    @cached_property
    def stores(self) -> KeptStores:
        """Values that are taken without the machine. Raises UserError."""
        path = self.directory / FILE_NAME
        try:
            if self.end is None and path.exists() and any(path.read_bytes()):
                self.tell(f"{path}: of a machine whose journal is not there: kept as {put_aside(path).name}")
            return KeptStores(path, self.sync_ms)
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}") from error

    @property
    def sync_ms(self) -> int | None:
        sync = self.config.state.sync
        return {"none": None, "always": 0}[sync] if isinstance(sync, str) else sync

    def new_journal(self, number: int, nr_before: int, nr_stores: int = 0) -> Journal:
        """One that has no name yet. Raises OSError."""
        assert self.boot is not None
        new = self.directory / f"{JOURNAL}.new"
        new.unlink(missing_ok=True)
        journal = Journal(new, None, self.sync_ms)
        head = Head(FORMAT, build_of(), machine_keys(self.config), number, nr_before, nr_stores)
        for record in (head, self.boot):
            journal.append(encode(record))
        return journal

    def name(self, journal: Journal, number: int, *, syncs: bool = True) -> None:
        """It counts from now on; without `syncs`, the disk has to be told. Raises OSError."""
        journal.rename(journal_at(self.directory, number), syncs=syncs)
        if syncs:
            self.sync()

    def sync(self) -> None:
        """Have the disk have the names of the files. Raises OSError."""
        state_segments.sync(self.directory)


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
            state_lock.hold(held)
            state = State(directory, config, recover)
            state.look()
        except BlockingIOError:
            raise UserError(f"state.directory: {directory}: another dpud uses it") from None
        except OSError as error:
            raise UserError(f"state.directory: {directory}: {error.strerror}") from error
        yield state
