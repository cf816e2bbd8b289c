# SPDX-License-Identifier: GPL-2.0-only
"""The owner: order, slices, interruption. Threads meet at events; no test waits for real time to pass."""

import errno
import threading
from collections.abc import Callable, Generator
from typing import Any

import pytest

from dpud.inject import BlockingWaitQueue
from dpud.owner import FairLock, Owner

TIMEOUT_S = 10.0


def in_thread(work: Callable[[], Any]) -> threading.Thread:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    return thread


def queued(owner: Owner, nr: int) -> None:
    """Come back once `nr` requests wait for the machine."""
    deadline = threading.Event()
    for _ in range(int(TIMEOUT_S * 1000)):
        if len(owner._lock._queue) == nr:
            return
        deadline.wait(0.001)
    raise AssertionError(f"{nr} requests never queued")


class Flag:
    """A waitable that the test sets; counts how often it was asked."""

    def __init__(self) -> None:
        self.event, self.asked = threading.Event(), threading.Event()

    def wait(self, timeout_s: float) -> bool:
        self.asked.set()
        return self.event.wait(timeout_s)


def test_call_returns_the_value_and_passes_exceptions_on() -> None:
    owner = Owner()
    assert owner.call(divmod, 7, 3) == (2, 1)
    with pytest.raises(ZeroDivisionError):
        owner.call(divmod, 7, 0)
    assert owner.call(divmod, 9, 3) == (3, 0), "an exception must not keep the machine"


def test_call_drives_a_generator_to_its_return_value() -> None:
    def operation() -> Generator[None, None, str]:
        yield
        yield
        return "done"

    assert Owner().call(operation) == "done"


def test_exception_inside_a_later_slice_reaches_the_caller() -> None:
    def operation() -> Generator[None, None, None]:
        yield
        raise OSError(errno.ENOMEM, "no")

    owner = Owner()
    with pytest.raises(OSError, match="no") as caught:
        owner.call(operation)
    assert caught.value.errno == errno.ENOMEM
    assert owner.call(lambda: 1) == 1


def test_requests_are_served_in_the_order_of_asking() -> None:
    owner, order = Owner(), list[int]()
    first_runs, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        first_runs.set()
        go_on.wait(TIMEOUT_S)

    threads = [in_thread(lambda: owner.call(hold))]
    assert first_runs.wait(TIMEOUT_S)
    for number in range(8):
        threads.append(in_thread(lambda number=number: owner.call(order.append, number)))
        queued(owner, number + 1)
    go_on.set()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert order == list(range(8))


def test_every_queued_request_runs_between_two_slices_of_a_long_one() -> None:
    """Whoever asks during a slice waits for that slice only, however many slices are to come."""
    owner, log = Owner(), list[str]()
    slice_runs = threading.Event()

    def long_operation() -> Generator[None, None, None]:
        for number in range(20):
            if number == 1:
                slice_runs.set()
                queued(owner, 5)
            log.append("slice")
            yield

    long_thread = in_thread(lambda: owner.call(long_operation))
    assert slice_runs.wait(TIMEOUT_S)
    short = [in_thread(lambda: owner.call(log.append, "short")) for _ in range(5)]
    for thread in (*short, long_thread):
        thread.join(TIMEOUT_S)
    assert log == ["slice"] * 2 + ["short"] * 5 + ["slice"] * 18


def test_waiting_does_not_hold_the_machine() -> None:
    owner, flag = Owner(), Flag()

    def reader() -> Generator[Flag, None, bytes]:
        yield flag
        return b"record"

    got = list[bytes]()
    thread = in_thread(lambda: got.append(owner.call(reader)))
    assert flag.asked.wait(TIMEOUT_S)
    assert owner.call(lambda: "served") == "served"
    assert not got
    flag.event.set()
    thread.join(TIMEOUT_S)
    assert got == [b"record"]


@pytest.mark.parametrize("waits", [True, False], ids=["while waiting", "between slices"])
def test_an_interrupted_operation_is_closed_and_gives_eintr(waits: bool) -> None:
    owner, undone = Owner(), list[bool]()

    def operation() -> Generator[Flag | None, None, None]:
        try:
            while True:
                yield Flag() if waits else None
        finally:
            undone.append(owner._holder == threading.get_ident())

    answers = iter([False, True])
    with pytest.raises(InterruptedError) as caught:
        owner.call(operation, interrupted=lambda: next(answers) if not waits else True)
    assert caught.value.errno == errno.EINTR
    assert undone == [True], "the operation's clean-up must run, as owner of the machine"
    assert owner.call(lambda: 1) == 1


class Caller:
    """An `interrupted` that rouses who sleeps; counts how often it was asked."""

    def __init__(self) -> None:
        self.gone, self.nr_asked = False, 0
        self.rouse: Callable[[], object] = lambda: None

    def __call__(self) -> bool:
        self.nr_asked += 1
        return self.gone


def test_who_waits_is_left_alone_until_it_is_interrupted() -> None:
    owner, queue, caller, errors = Owner(), BlockingWaitQueue(), Caller(), list[int | None]()

    def blocked() -> Generator[BlockingWaitQueue, None, None]:
        while True:
            yield queue

    def read() -> None:
        try:
            owner.call(blocked, interrupted=caller)
        except OSError as error:
            errors.append(error.errno)

    thread = in_thread(read)
    for _ in range(int(TIMEOUT_S * 100)):
        if queue._asleep:
            break
        thread.join(0.01)
    thread.join(0.3)  # six times as long as it would be asked after
    assert caller.nr_asked == 2, "its first wait of all ends at once"
    caller.gone = True
    caller.rouse()
    thread.join(TIMEOUT_S)
    assert errors == [errno.EINTR]


def test_who_does_not_get_the_machine_soon_is_told_so() -> None:
    """A FUSE thread then gives away what others need."""
    owner, holds, told, order = Owner(), threading.Event(), threading.Event(), list[str]()

    def hold() -> None:
        holds.set()
        assert told.wait(TIMEOUT_S)
        order.append("held")

    first = in_thread(lambda: owner.call(hold))
    assert holds.wait(TIMEOUT_S)
    owner.call(order.append, "then", interrupted=lambda: bool(told.set()))
    first.join(TIMEOUT_S)
    assert order == ["held", "then"]


@pytest.mark.slow
def test_close_ends_blocked_readers_but_not_short_requests() -> None:
    owner, flag, errors = Owner(), Flag(), list[int | None]()

    def blocked() -> None:
        try:
            owner.call(lambda: (item for item in [flag] * 1000))
        except OSError as error:
            errors.append(error.errno)

    thread = in_thread(blocked)
    assert flag.asked.wait(TIMEOUT_S)
    owner.close()
    thread.join(TIMEOUT_S)
    assert errors == [errno.EINTR]
    assert owner.call(lambda: 5) == 5


def test_a_request_inside_a_request_is_refused() -> None:
    owner = Owner()
    with pytest.raises(RuntimeError, match="already owns the machine"):
        owner.call(lambda: owner.call(lambda: 1))
    assert owner.call(lambda: 1) == 1


def test_background_runs_and_logs_a_failure(caplog: pytest.LogCaptureFixture) -> None:
    def operation() -> Generator[None, None, None]:
        yield
        raise ValueError("broken kthread")

    thread = Owner().background(operation())
    thread.join(TIMEOUT_S)
    assert "broken kthread" in caplog.text


def test_after_slice_runs_while_the_machine_is_held() -> None:
    owner, holders = Owner(), list[bool]()
    owner.after_slice.append(lambda: holders.append(owner._holder == threading.get_ident()))

    def operation() -> Generator[None, None, None]:
        yield

    owner.call(operation)
    assert holders == [True, True]


def test_fair_lock_excludes() -> None:
    lock, inside, most = FairLock(), 0, 0

    def work() -> None:
        nonlocal inside, most
        for _ in range(500):
            lock.acquire()
            inside += 1
            most = max(most, inside)
            inside -= 1
            lock.release()

    threads = [in_thread(work) for _ in range(4)]
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert (inside, most) == (0, 1)
    assert not lock._held
