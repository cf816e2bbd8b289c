# SPDX-License-Identifier: GPL-2.0-only
"""When checkpoints are made, and how without the machine standing still.

Theory of operation
    A thread waits until the journal is long enough, or somebody asks. Then it takes the machine again and again for a
    moment, until it finds it at rest (flights.py). In that turn the next journal begins, and a child of this process
    keeps the memory as it is (checkpoint_fork.py); what the turn took is the stall. The child writes
    `checkpoint.N.new`. Tiers' files are shared with it, so what is overwritten there meanwhile is kept first and goes
    behind what the child has read. Once the disk has all of it, and the journals around it, it gets its name, and what
    is before the last two checkpoints goes.

    A kill at any moment leaves either the new file whole under its name, or the old ones, and journals that lead on
    from each other: journal.N is there before the first turn that is in it.

    One that fails is no harm but a longer journal: it says why, and the next one is tried when that has grown again.
"""

import errno
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from dpud import state_segments
from dpud.checkpoint import Beside, Whole
from dpud.checkpoint_file import Head, Writer
from dpud.checkpoint_fork import Child, ChildFailed
from dpud.gpu.swap.blockfile import BLOCK_BYTES, BlockFile
from dpud.journal import Journal
from dpud.journal_turns import ROOM_BYTES, Recorder
from dpud.owner import NoRoom
from dpud.state import GPU_CHECKPOINTS, State, build_of, machine_keys

MAX_TURNS = 200_000
"""So many turns are done again in some seconds: the next start is not to take longer, however short they are."""
PATIENCE_S = 30.0
"""How long the machine may keep from being at rest before it is said."""
LAST_PATIENCE_S = 2.0
_AGAIN_S = 10.0
"""How long to wait after a failure."""
_LOOK_S = 0.002
_CHILD_S = 600.0
STEPS = ("named", "begun", "synced", "written", "whole", "there", "dropped")

_log = logging.getLogger("dpud")


class NotAtRest(Exception):
    """Its text says what was under way all the time."""


@dataclass
class Stats:
    """For people, of this daemon."""

    nr_made: int = 0
    nr_failed: int = 0
    number: int = 0
    nr_bytes: int = 0
    stall_ns: int = 0
    """For which the last one held the machine."""
    write_ns: int = 0
    problem: str = ""
    """Why the last try failed, or what it waits for."""


@dataclass
class _Begun:
    """One that a child writes."""

    path: Path
    fd: int
    child: Child
    before: Journal
    overwritten: list[dict[int, bytes]] = field(default_factory=list)


class Keeper:
    """Of one machine that is kept."""

    on_step: Callable[[str], object] = staticmethod(str)
    """Told which of STEPS has just been done, for those who kill it there."""

    def __init__(self, state: State, whole: Whole, recorder: Recorder) -> None:
        self.stats = Stats()
        self._state, self._whole, self._recorder = state, whole, recorder
        self._limit_bytes = state.config.state.checkpoint_bytes
        self._wanted = threading.Event()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dpud-checkpoint", daemon=True)
        recorder.on_record = self._look

    def start(self) -> None:
        self._thread.start()

    def ask(self) -> None:
        """Have one made as soon as may be."""
        self._wanted.set()

    def figures(self) -> dict[str, int]:
        """For the file `stats`. For whoever holds the machine."""
        stats, journal = self.stats, self._recorder.journal
        return {
            "journal_bytes": journal.nr_bytes,
            "journal_turns": self._recorder.nr_turns,
            "checkpoints": stats.nr_made,
            "checkpoints_failed": stats.nr_failed,
            "last_number": stats.number,
            "last_bytes": stats.nr_bytes,
            "last_stall_us": stats.stall_ns // 1000,
            "last_write_ms": stats.write_ns // 1_000_000,
        }

    def close(self) -> None:
        """End the thread, and make a last one, if there is anything that it would save the next start."""
        self._closing.set()
        self._wanted.set()
        self._thread.join()
        if self._limit_bytes and self._recorder.nr_turns:
            self._try(LAST_PATIENCE_S, logging.INFO)

    def _look(self) -> None:
        """At the end of each turn that is noted."""
        recorder = self._recorder
        if self._limit_bytes and (recorder.journal.nr_bytes >= self._limit_bytes or recorder.nr_turns >= MAX_TURNS):
            self._wanted.set()

    def _run(self) -> None:
        while self._wanted.wait():
            self._wanted.clear()
            if self._closing.is_set():
                return
            if not self._try(PATIENCE_S, logging.WARNING):
                self._closing.wait(_AGAIN_S)

    def _try(self, patience_s: float, level: int) -> bool:
        try:
            self.make(patience_s)
            self.stats.problem = ""
            return True
        except (OSError, ChildFailed, NotAtRest) as error:
            self.stats.nr_failed += 1
            self.stats.problem = str(error)
            _log.log(level, "no checkpoint: %s", error)
            return False

    def make(self, patience_s: float = PATIENCE_S) -> None:
        """One checkpoint, from beginning to end. Raises OSError, ChildFailed, NotAtRest; the machine is as it was."""
        number = self._next_number()
        path = state_segments.checkpoint_at(self._state.directory, number)
        new = path.with_name(f"{path.name}.new")
        fd = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        begin_ns = time.perf_counter_ns()
        try:
            begun = self._begun(number, new, fd, patience_s)
            self.on_step("begun")
            self._finish(begun, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        self.stats.write_ns = time.perf_counter_ns() - begin_ns
        self.stats.nr_bytes = path.stat().st_size
        self.stats.number = number
        self.stats.nr_made += 1

    def _next_number(self) -> int:
        there = [state_segments.numbers(self._state.directory, name) for name in ("journal", "checkpoint")]
        return max(max(found, default=0) for found in there) + 1

    # With the machine held.

    def _begun(self, number: int, new: Path, fd: int, patience_s: float) -> _Begun:
        deadline = time.monotonic() + patience_s
        while True:
            found: _Begun | str = self._whole.owner.call(self._begin, number, new, fd)
            if isinstance(found, _Begun):
                return found
            self.stats.problem = f"waits for {found}"
            if time.monotonic() >= deadline:
                raise NotAtRest(f"{found} was under way for {patience_s:.0f} s")
            time.sleep(_LOOK_S)

    def _begin(self, number: int, new: Path, fd: int) -> _Begun | str:
        """Write the machine down as it is now; or what is in the way. Raises OSError."""
        begin_ns = time.perf_counter_ns()
        if (waits_for := self._whole.in_the_way()) is not None:
            return waits_for
        before = self._next_journal(number)
        self.on_step("named")
        try:
            child = self._child(number, fd)
        except OSError:
            before.close()
            raise
        overwritten = [_kept(file) for file in self._whole.block_files()]
        self.stats.stall_ns = time.perf_counter_ns() - begin_ns
        return _Begun(new, fd, child, before, overwritten)

    def _next_journal(self, number: int) -> Journal:
        """The turns from here on go into another one -> the one before."""
        state, recorder = self._state, self._recorder
        if not recorder.journal.reserve(ROOM_BYTES):
            raise NoRoom
        self._whole.owner.put_off()
        recorder.flush()
        before = recorder.journal
        journal = state.new_journal(number, before.nr_records, self._whole.owner.changes.nr_settled)
        if not journal.reserve(ROOM_BYTES):
            journal.close()
            raise NoRoom
        state.name(journal, number, syncs=state.sync_ms == 0)
        recorder.go_on_in(journal)
        self._wanted.clear()  # the journal was long enough until now
        if self._closing.is_set():
            self._wanted.set()
        return before

    def _child(self, number: int, fd: int) -> Child:
        """Somebody who writes. What it needs open is open when it begins."""
        whole, folder = self._whole, self._state.directory / GPU_CHECKPOINTS
        head = whole.head(number, build_of(), machine_keys(self._state.config), str(folder))
        beside = _opened(folder)
        keep = {fd, *(file.fd for file in whole.block_files()), *(each for _, each in beside)}
        try:
            return Child(lambda: _written(fd, whole, head, beside), keep, whole.born.mappings())
        finally:
            for _, each in beside:
                os.close(each)

    # Without.

    def _finish(self, begun: _Begun, path: Path) -> None:
        try:
            self._sync_journals(begun)
            self.on_step("synced")
            told = [int(number) for number in begun.child.wait(_CHILD_S).split()]
        finally:
            for file in self._whole.block_files():
                file.before_write = None
        self.on_step("written")
        writer = Writer(begun.fd, told[0])
        for section, blocks in zip(told[1:], begun.overwritten, strict=True):
            for block, data in blocks.items() if section >= 0 else ():
                writer.bulk(section, block * BLOCK_BYTES, data)
        writer.end()
        os.fsync(begun.fd)
        self.on_step("whole")
        os.replace(begun.path, path)
        self._state.sync()
        self.on_step("there")
        state_segments.drop_old(self._state.directory)
        self.on_step("dropped")

    def _sync_journals(self, begun: _Begun) -> None:
        """The disk has to have them before the checkpoint that is between them."""
        try:
            begun.before.close()
            self._recorder.journal.sync()
            self._state.sync()
        except OSError:
            begun.child.kill()
            with suppress(ChildFailed):
                begun.child.wait(_CHILD_S)
            raise


def _opened(folder: Path) -> Beside:
    found = sorted(path for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    return [(path.name, os.open(path, os.O_RDONLY | os.O_CLOEXEC)) for path in found]


def _written(fd: int, whole: Whole, head: Head, beside: Beside) -> str:
    """In the child -> the number of records, and the section of each tier's file."""
    writer = Writer(fd)
    sections = whole.write(writer, head, beside)
    return " ".join(map(str, [writer.nr_records, *sections]))


def _kept(file: BlockFile) -> dict[int, bytes]:
    """From now on, blocks as they were before they were overwritten."""
    blocks: dict[int, bytes] = {}

    def keep(block: int, nr_blocks: int) -> None:
        for each in range(block, block + nr_blocks):
            if each not in blocks:
                blocks[each] = _peeked(file, each)

    file.before_write = keep
    return blocks


def _peeked(file: BlockFile, block: int) -> bytes:
    try:
        data = file.peek(block, 1)
    except OSError as error:
        if error.errno not in (errno.EIO, errno.EINVAL):
            raise
        data = b""
    return data.ljust(BLOCK_BYTES, b"\0")
