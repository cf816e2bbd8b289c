# SPDX-License-Identifier: GPL-2.0-only
"""The journal's records: a turn each, and one before them that says what machine they are for.

    boot      what was read from outside while the machine was built
    request   a new request, as it was made (fs/requests.py), with the pid of who made it
    step      the clock was at so many ns: timers and kernel threads had their turn
    resume    operation N went on to its next yield or to its end
    close     operation N was ended where it was, because its caller was interrupted
    ticks     operations of the background had so many rounds each, in which nothing happened but that they had them
    stores    values that had been written into files without the machine were set; there were N by then

Each with the values that were read from outside meanwhile, in their order, and with what it came to, by which a replay
that goes another way is noticed. Requests that only look, and are over with their first slice, are not recorded; those
that yield are, because they may hold something meanwhile that others wait for. Steps in which nothing happened are
held back until something does (Recorder.flush): the machine is idle, and only the last of them counts. So are rounds
of the background that say so (`Idle`): they are counted, since what they do is the same each time, and neither the
clock nor their order matters to it.
"""

import errno
import logging
import os
from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import msgspec

from dpud.inject import Outside, Value
from dpud.journal import Journal
from dpud.owner import NoRoom, Slice
from dpud.state_stores import KeptStores
from fs.fuse_layout import NR_STORES
from fs.requests import Request

VALUES_BYTES = 64 << 10
"""Room kept for what a turn reads; a turn of which more has to be noted finds the room then, or the daemon ends."""
STORES_BYTES = NR_STORES * 128
"""Room kept besides for one record of stores, be they all of other files."""
ROOM_BYTES = VALUES_BYTES + STORES_BYTES
HOLD_NS = 60_000_000_000
"""How much of an idle machine's time may be forgotten by a kill."""
_EXIT_NOT_NOTED = 74
"""EX_IOERR of sysexits.h."""

_log = logging.getLogger("dpud")


BOOT, REQUEST, STEP, RESUME, CLOSE, TICKS, STORES = range(7)
KINDS = ("boot", "request", "step", "resume", "close", "ticks", "stores")


class Row(NamedTuple):
    """A request, and the pid of who made it."""

    verb: str
    path: bytes
    ino: int
    data: bytes
    pos: int
    size: int
    flags: int
    user: int
    pid: int

    @property
    def request(self) -> Request:
        return Request(self.verb, os.fsdecode(self.path), *self[2:8])


class Turn(NamedTuple):
    """One record."""

    kind: int
    number: int
    """Of the operation; of stores, how many there had been."""
    what: Row | int | dict[int, int] | str | None
    """The request, the time of a step, how many ticks an operation had, or "value path" of stores, a line each."""
    values: list[Value]
    outcome: int | str | None
    """What the slice came to: None where it goes on; a number; "-ENOENT"."""


class Head(NamedTuple):
    """The first record."""

    format: int
    version: str
    """Of dpud."""
    config: dict[str, Any]
    """What the machine was built from, by key ("gpu.memory")."""
    segment: int = 0
    """Which of the journals this is: it goes on from the checkpoint of that number; 0 from the boot."""
    nr_before: int = 0
    """Records of the journal before."""
    nr_stores: int = 0
    """Stores (state_stores.py) that are in those before."""


FORMAT = 3
_encode = msgspec.msgpack.Encoder().encode
decode_turn = msgspec.msgpack.Decoder(Turn).decode
decode_head = msgspec.msgpack.Decoder(Head).decode
encode: Callable[[Turn | Head], bytes] = _encode


def outcome_of(done: Slice | Exception) -> int | str | None:
    """What of a slice's end must be the same when it is done again. Not texts: in some are times of the host."""
    if not isinstance(done, Exception):
        over, value, _ = done
        return None if not over else int(value) if isinstance(value, int) else 0
    number = done.errno if isinstance(done, OSError) else None
    return f"-{errno.errorcode.get(number, number)}" if number else type(done).__name__


class Recorder:
    """Notes turns as they happen: what dpud.owner.Turns asks for.

    `looks_change`: whether just now even requests that only look leave something behind, because they are traced.
    `stores`: where those are that are taken without the machine; none are taken while they could not be noted.
    """

    def __init__(
        self,
        journal: Journal,
        outside: Outside,
        looks_change: Callable[[], bool],
        stores: KeptStores,
    ) -> None:
        self.journal = journal
        self._stores = stores
        self._outside = outside
        self._looks_change = looks_change
        self._number = 0
        self._kind = BOOT
        self._what: Any = None
        self._args: tuple[Any, ...] = ()
        self._held: list[tuple[frozenset[str], bytes]] = []
        self._ticks: Counter[int] = Counter()
        self._ticks_value: Value = 0
        self.nr_turns = 0
        """In this journal, to be done again by the next start."""
        self.on_record: Callable[[], object] = bool
        """Called after each record, and after each round that is only counted."""
        self._flushed_ns = 0
        self._only_looks = False
        self._has_room = True

    def begin(self, number: int, what: Any = None, *args: Any, closes: bool = False) -> None:
        """A turn begins, see dpud.owner.Turns."""
        nr_bytes, only_looks = ROOM_BYTES, False
        if isinstance(what, Request):
            self._kind = REQUEST
            nr_bytes += len(what.data)
            only_looks = not what.changes and not self._looks_change()
        else:
            self._kind = STEP if what is not None else CLOSE if closes else RESUME
        self._has_room = self.journal.reserve(nr_bytes)
        if not self._has_room and not only_looks:
            raise NoRoom
        if self._has_room and not self._stores.is_open:
            self._stores.is_open = True
        self._number, self._what, self._args, self._only_looks = number, what, args, only_looks
        self._outside.begin()

    def end(self, outcome: Slice | Exception) -> None:
        """It is over, see dpud.owner.Turns."""
        values = self._outside.end()
        if self._only_looks:
            if isinstance(outcome, Exception) or outcome[0]:
                return
            if not self._has_room:
                raise NoRoom
        what = self._what
        if self._kind == REQUEST:  # as Row and Turn, which would take longer to make
            what = (what[0], what[1].encode("utf-8", "surrogateescape"), *what[2:8], self._args[0].pid)
        record = self._encoded((self._kind, self._number, what, values, outcome_of(outcome)))
        if self._kind == STEP and not isinstance(outcome, Exception) and isinstance(outcome[1], frozenset):
            self._hold(outcome[1], record)
            return
        if self._is_tick(outcome) and not self._looks_change():
            self._tick(values)
            return
        if self._held or self._ticks:
            self.flush()
        self._write(record)

    def begin_stores(self) -> None:
        """See dpud.owner.Turns. Until they are noted none is taken: it could be in the place of one of these."""
        self._stores.is_open = False
        self._outside.begin()

    def end_stores(self, done: list[tuple[str, int]], number: int) -> None:
        """See dpud.owner.Turns."""
        values = self._outside.end()
        if self._held or self._ticks:
            self.flush()
        what = "\n".join(f"{value} {path}" for path, value in done)
        self._write(self._encoded((STORES, number, what, values, 0)))
        self.take_stores()

    def take_stores(self) -> None:
        """From now on, if they can be noted."""
        self._stores.is_open = self.journal.reserve(STORES_BYTES)

    def close(self) -> None:
        """No stores are taken any more: what would set them is not noted."""
        self._stores.is_open = False

    def _is_tick(self, outcome: Slice | Exception) -> bool:
        return (
            self._kind == RESUME and not isinstance(outcome, Exception) and bool(getattr(outcome[1], "is_idle", False))
        )

    def _tick(self, values: list[Value]) -> None:
        """Nothing happened in this round: it counts, and that is all."""
        self._ticks[self._number] += 1
        self._ticks_value = values[-1] if values else self._ticks_value
        self.nr_turns += 1
        self.on_record()
        if isinstance(self._ticks_value, int) and self._ticks_value - self._flushed_ns >= HOLD_NS:
            self._flushed_ns = self._ticks_value
            self.flush()

    def _hold(self, looked: frozenset[str], record: bytes) -> None:
        """Nothing happened in this step. It counts only as long as nobody of those looks again: an idle machine is not
        to fill the disk."""
        if self._looks_change():
            self.flush()
            self._write(record)
            return
        self._held = [held for held in self._held if not held[0] <= looked]
        self._held.append((looked, record))
        if self._what - self._flushed_ns >= HOLD_NS:
            self.flush()
            self._flushed_ns = self._what

    def flush(self) -> None:
        """Write what was held back; for whoever holds the machine."""
        held, self._held = self._held, []
        ticks, self._ticks = self._ticks, Counter()
        if ticks:
            self._write(self._encoded((TICKS, 0, dict(ticks), [self._ticks_value], 0)))
        for _, record in held:
            self._write(record)

    def _encoded(self, turn: tuple[Any, ...]) -> bytes:
        try:
            return _encode(turn)
        except (TypeError, ValueError, OverflowError) as error:
            self._end_daemon(error)

    def _write(self, record: bytes) -> None:
        self.nr_turns += 1
        try:
            self.journal.append(record)
        except OSError as error:
            self._end_daemon(error)
        self.on_record()

    def go_on_in(self, journal: Journal) -> None:
        """The next turn is the first of another journal. For whoever holds the machine, with nothing held back."""
        self.journal, self.nr_turns = journal, 0

    def _end_daemon(self, why: Exception) -> NoReturn:
        """A machine that has changed and cannot say so must not go on: the daemon ends at once."""
        _log.critical("%s: %s: the daemon ends; its state is what the journal says", self.journal.path, why)
        os._exit(_EXIT_NOT_NOTED)
