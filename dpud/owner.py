# SPDX-License-Identifier: GPL-2.0-only
"""Who may touch the machine, and when.

The emulated kernel has no threads and no locks. A request (one read or write of a pseudo-file) comes in on
a FUSE thread and goes through `Owner.call`, which runs it while it holds the machine. The lock is first
come, first served, so a stream of short requests cannot starve a long one nor the other way round.

A long operation is a generator. It runs slice by slice: between two slices, at a point that the operation
itself chose by yielding, the machine is given up, and every request that queued meanwhile has its turn.
What it yields says what it waits for: None means "others may run now", a waitable is waited for without
holding the machine. The thread of the request is the one that waits, so a blocked reader blocks nobody
else. After None its thread also lets others have its CPU, which the daemon's priority would keep them from:
what is asked of it for long is not to stop all other programs.

Each time that somebody has the machine is a turn. Turns that may change it are told to `turns`, where there is one, as
they end and before anybody else has the machine or gets an answer (journal_turns.py). What they are told as: a request
as it was made, a step of the clock, or "operation N goes on". Operations are numbered as they begin or are spawned,
which happens in turns, so when the turns are done again the numbers are the same.
"""

import ctypes
import errno
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import GeneratorType
from typing import Any, Protocol, runtime_checkable

from dpud.flights import Flights
from dpud.inject import BlockingWaitQueue, sleeper
from fs.requests import Request
from kernelsim.attr import Changes, Operation, Waitable

_WAIT_SLICE_S = 0.05
"""How long a wait goes on before it asks again whether the request was interrupted."""

_LONE_SLICE_S = 1.0
"""The same where only `close` could interrupt it, as what runs in the background: an idle daemon should sleep."""

_TOLD_SLICE_S = 60.0
"""The same where whoever interrupts it rouses the thread: a blocked reader costs nothing."""

_SHORT_WAIT_S = 0.002
"""How long a request waits for the machine before it says that it waits."""

_ROOM_WAIT_S = 0.2
"""How long an operation that cannot be noted waits before it asks again."""

_sched_yield = ctypes.CDLL(None).sched_yield
"""Lets go of the interpreter meanwhile, which os.sched_yield() did not in Python 3.11."""

_log = logging.getLogger("dpud")


class FairLock:
    """A mutex that is handed over in the order of asking; not re-entrant."""

    def __init__(self) -> None:
        self._guard = threading.Lock()
        self._held = False
        self._queue: deque[threading.Lock] = deque()

    def acquire(self, waits: Callable[[], object] | None = None) -> None:
        """`waits` is called if it takes long."""
        with self._guard:
            if not self._held:
                self._held = True
                return
            turn = threading.Lock()
            turn.acquire()
            self._queue.append(turn)
        if waits is not None:
            if turn.acquire(timeout=_SHORT_WAIT_S):
                return
            waits()
        turn.acquire()  # released by whoever hands the lock over to us

    def release(self) -> None:
        with self._guard:
            if self._queue:
                self._queue.popleft().release()
            else:
                self._held = False


def _never() -> bool:
    return False


@runtime_checkable
class Told(Protocol):
    """An `interrupted` that need not be asked again and again: it calls `rouse` as it comes true.

    Asked for the first time it also knows that its request is going to wait.
    """

    rouse: Callable[[], object]

    def __call__(self) -> bool: ...


class NoRoom(OSError):
    """The turn cannot be noted, so it was not begun."""

    def __init__(self) -> None:
        super().__init__(errno.ENOSPC, "the journal cannot grow")


class _PutOff(Exception):
    """The operation was ended by somebody else, and is to be begun again (flights.py)."""


Slice = tuple[bool, Any, Any]
"""What one slice came to: whether that was all; the outcome, or what the operation waits for; the operation."""


class Turns(Protocol):
    """Who is told of turns (journal_turns.Recorder)."""

    def begin(self, number: int, what: Any = None, *args: Any, closes: bool = False) -> None:
        """A turn begins: `what` is new and gets that number, or operation `number` goes on, or is closed.

        `args` are the others of its function.

        Raises NoRoom if it could not be noted; a request that only looks may go on all the same.
        """
        ...

    def end(self, outcome: Slice | Exception) -> None:
        """It is over. Raises NoRoom if it has to be noted and cannot be; its operation will not go on."""
        ...

    def begin_stores(self) -> None:
        """Values that were stored without the machine (Changes.settle) are going to be set."""
        ...

    def end_stores(self, done: list[tuple[str, int]], number: int) -> None:
        """These were, (path, value) of each; there have been `number` stores by now."""
        ...


class Owner:
    """Runs requests one at a time, and long ones in slices.

    The functions in `after_slice` are called at the end of every slice, while the machine is still held (the
    pacer looks there whether a timer was armed), but not of requests for kept texts, which change nothing. `charge` is
    told who held the machine, by the name of the thread, and for how many nanoseconds. `parked`, unless it is None,
    takes operations by number instead of their being driven: (operation, name of its thread or "").

    Who asks for the machine and does not get it soon is told that it waits, by asking it whether it was interrupted:
    what a FUSE thread has besides then goes to another one. Values that were stored without the machine are set first
    of all in each turn (Changes.settle).
    """

    def __init__(self) -> None:
        self.after_slice: list[Callable[[], None]] = []
        self.turns: Turns | None = None
        self.parked: dict[int, tuple[Operation[Any], str]] | None = None
        self.nr_operations = 0
        self.flights = Flights()
        self.charge: Callable[[str, int], None] | None = None
        self.changes = Changes()
        """The machine's, to count its turns in."""
        self._lock = FairLock()
        self._holder: int | None = None
        self._changes_memory = False
        self._begin_ns = 0
        self._closing = threading.Event()

    def call(self, fn: Callable[..., Any], *args: Any, interrupted: Callable[[], bool] = _never) -> Any:
        """Run `fn(*args)` as owner of the machine; drive the operation that it gives, if any, to its value.

        Raises whatever `fn` raises; OSError(EINTR) if `interrupted()` came true, or the owner was closed,
        at a point where a long operation yielded; RuntimeError if the calling thread already owns the
        machine.
        """
        self._take(interrupted)
        return self._call(fn, args, interrupted)

    def look(self, fn: Callable[..., Any], *args: Any, interrupted: Callable[[], bool] = _never) -> Any:
        """The same for what only looks: such a turn is not counted as one that may have changed something."""
        self._take(interrupted, changing=False)
        return self._call(fn, args, interrupted)

    def _call(self, fn: Callable[..., Any], args: tuple[Any, ...], interrupted: Callable[[], bool]) -> Any:
        try:  # most requests end here, so this does the rest of what _turn() does by hand
            over, value, operation = self.slice(fn, args)
        finally:
            self._give()
        while not over:
            self._wait(operation, value, interrupted)
            with self._turn():
                over, value, _ = self.go_on(operation)
        return value

    def request(self, fn: Callable[..., Any], what: Any, *args: Any, interrupted: Callable[[], bool] = _never) -> Any:
        """`call(fn, what, *args)` for what may change the machine: `turns` is told `what` it is, and of its slices.

        Raises NoRoom too, with nothing changed.
        """
        while True:
            try:
                return self._request(fn, what, *args, interrupted=interrupted)
            except _PutOff:
                continue

    def _request(self, fn: Callable[..., Any], what: Any, *args: Any, interrupted: Callable[[], bool]) -> Any:
        changing, apart = True, False
        if what.__class__ is Request:
            changing, apart = not what.kept, what.apart
        self._take(interrupted, changing, apart)
        try:
            number, turns = self.nr_operations, self.turns
            if turns is None:
                over, value, operation = self.slice(fn, (what, *args), changing)
            else:
                over, value, operation = self._first_slice(turns, fn, (what, *args))
        finally:
            self._give()
        return value if over else self._drive(number, operation, value, interrupted, apart)

    def _first_slice(self, turns: Turns, fn: Callable[..., Any], args: tuple[Any, ...]) -> Slice:
        number = self.nr_operations
        turns.begin(number, *args)
        self.nr_operations += 1
        try:
            done = self.slice(fn, args)
        except Exception as error:
            turns.end(error)
            raise
        try:
            turns.end(done)
        except NoRoom:
            done[2].close()
            raise
        if not done[0]:
            self.flights.begin(number, done[2], args[0], done[1])
        return done

    def _drive(
        self,
        number: int,
        operation: Operation[Any],
        waitable: Any,
        interrupted: Callable[[], bool],
        apart: bool = False,
    ) -> Any:
        """From after the first slice to the end."""
        over, value = False, waitable
        while not over:
            self._wait(operation, value, interrupted, number)
            over, value, _ = self._next_turn(number, operation, apart)
        return value

    def _next_turn(self, number: int, operation: Operation[Any], apart: bool = False) -> Slice:
        """One more slice, as soon as it can be noted."""
        while not self._closing.is_set():
            with self._turn(apart), suppress(NoRoom):
                self._check(number)
                if self.turns is not None:
                    self.turns.begin(number)
                return self._followed(number, operation)
            self._closing.wait(_ROOM_WAIT_S)
        self._close_operation(number, operation)
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))

    def _check(self, number: int) -> None:
        """Raises _PutOff for an operation that is no more."""
        if number in self.flights.put_off:
            self.flights.put_off.remove(number)
            raise _PutOff

    def _followed(self, number: int, operation: Operation[Any]) -> Slice:
        """The next slice, in a turn that has begun."""
        over = True
        try:
            done = self._noted(self.go_on, operation)
            over = done[0]
        finally:
            if over:
                self.flights.end(number)
        self.flights.went_on(number, done[1])
        return done

    def put_off(self) -> None:
        """End those who only read and wait; they begin again by themselves. For whoever holds the machine at rest."""
        for number in self.flights.readers():
            self._end_flight(number, self.flights.by_number[number].operation)
            self.flights.put_off.add(number)

    def _end_flight(self, number: int, operation: Operation[Any]) -> None:
        """Raises NoRoom."""
        if self.turns is not None:
            self.turns.begin(number, closes=True)
        self._noted(self.close_operation, operation)
        self.flights.end(number)

    def _noted(self, fn: Callable[..., Slice], *args: Any) -> Slice:
        """The rest of a turn that has begun."""
        turns = self.turns
        if turns is None:
            return fn(*args)
        try:
            done = fn(*args)
        except Exception as error:
            turns.end(error)
            raise
        turns.end(done)
        return done

    def background(self, operation: Operation[Any], name: str = "dpud-background") -> threading.Thread:
        """Drive `operation` on a thread of its own until it ends or the owner is closed; log a failure."""
        number = self.nr_operations
        self.nr_operations += 1
        self.flights.begin(number, operation)
        thread = threading.Thread(target=self._run_background, args=(number, operation), name=name, daemon=True)
        if self.parked is None:
            thread.start()
        else:
            self.parked[number] = operation, name
        return thread

    def unpark(self) -> None:
        """Drive what is parked: on threads of their own what was spawned; requests are interrupted, nobody waits."""
        parked, self.parked = self.parked or {}, None
        for number, (operation, name) in parked.items():
            if name:
                args = (number, operation)
                threading.Thread(target=self._run_background, args=args, name=name, daemon=True).start()
            else:
                self._close_operation(number, operation)

    @property
    def closed(self) -> bool:
        """Whether long operations are being interrupted."""
        return self._closing.is_set()

    def close(self) -> None:
        """Interrupt every long operation at its next yield; short requests are still served."""
        self._closing.set()

    def _run_background(self, number: int, operation: Operation[Any]) -> None:
        try:
            over, value, _ = self._next_turn(number, operation)
            if not over:
                self._drive(number, operation, value, _never)
        except Exception as error:
            if not self.closed:
                _log.error("background operation failed", exc_info=error)

    # Slices, for whoever holds the machine.

    def slice(self, fn: Callable[..., Any], args: tuple[Any, ...], changing: bool = True) -> Slice:
        """Call, and begin with the operation that this gives, if any."""
        try:
            result = fn(*args)
            return _advance(result) if isinstance(result, GeneratorType) else (True, result, None)
        finally:  # what failed may have armed a timer before
            if changing:
                for look in self.after_slice:
                    look()

    def go_on(self, operation: Operation[Any]) -> Slice:
        """The next slice."""
        try:
            return _advance(operation)
        finally:
            self.after()

    def close_operation(self, operation: Operation[Any]) -> Slice:
        """End it where it is."""
        try:
            operation.close()  # its `finally` blocks put the machine right
            return True, None, None
        finally:
            self.after()

    def after(self) -> None:
        """What comes at the end of every slice."""
        for look in self.after_slice:
            look()

    @contextmanager
    def _turn(self, apart: bool = False) -> Iterator[None]:
        self._take(apart=apart)
        try:
            yield
        finally:
            self._give()

    def _take(self, interrupted: Callable[[], bool] = _never, changing: bool = True, apart: bool = False) -> None:
        """`changing`: the turn may change something; `apart`: nothing of the kernel's memory."""
        me = threading.get_ident()
        if self._holder == me:
            raise RuntimeError("this thread already owns the machine: call the function directly")
        self._lock.acquire(None if interrupted is _never else interrupted)
        self._holder = me
        changes = self.changes
        if changing:
            changes.begin_turn()
        self._changes_memory = changing and not apart
        if changes.counts[changes.STORES] != changes.nr_settled:
            self._settle()
        self._begin_ns = time.perf_counter_ns()

    def _settle(self) -> None:
        """Set what was stored without the machine."""
        turns, changes = self.turns, self.changes
        if turns is None:
            changes.settle()
        else:
            turns.begin_stores()
            turns.end_stores(changes.settle(), changes.nr_settled)

    def _give(self) -> None:
        try:
            if self._changes_memory:
                self.changes.end_memory_turn()
            if self.charge is not None:
                self.charge(threading.current_thread().name, time.perf_counter_ns() - self._begin_ns)
        finally:
            self._holder = None
            self.changes.end_turn()
            self._lock.release()

    def _wait(
        self,
        operation: Operation[Any],
        waitable: Waitable | None,
        interrupted: Callable[[], bool],
        number: int | None = None,
    ) -> None:
        slice_s = _LONE_SLICE_S if interrupted is _never else _WAIT_SLICE_S
        if isinstance(interrupted, Told) and isinstance(waitable, BlockingWaitQueue):
            interrupted.rouse = sleeper().rouse
            slice_s = _TOLD_SLICE_S
        while not (self.closed or interrupted()):
            if waitable is None:
                _sched_yield()
                return
            if waitable.wait(slice_s):
                return
        self._close_operation(number, operation)
        raise OSError(errno.EINTR, os.strerror(errno.EINTR))

    def _close_operation(self, number: int | None, operation: Operation[Any]) -> None:
        """As soon as it can be noted; a daemon that ends notes nothing any more."""
        while True:
            with self._turn(), suppress(NoRoom):
                if number in self.flights.put_off:
                    self.flights.put_off.discard(number)
                elif number is None:
                    self.close_operation(operation)
                else:
                    self._end_flight(number, operation)
                return
            time.sleep(_ROOM_WAIT_S)


def _advance(operation: Operation[Any]) -> Slice:
    try:
        return False, next(operation), operation
    except StopIteration as stop:
        return True, stop.value, operation
