# SPDX-License-Identifier: GPL-2.0-only
"""The live clock of the emulated kernel: peek at the next timer, sleep until it is due, step.

Nothing else makes machine time pass. `now_ns` and `sleep` are injected, so a test paces a machine without
real time.
"""

import logging
import threading
import time
from collections.abc import Callable
from typing import Any, Protocol

from dpud.owner import NoRoom, Owner

_ROOM_WAIT_S = 0.2

_log = logging.getLogger("dpud")


class Paced(Protocol):
    """The two things that a pacer asks of a machine."""

    def peek(self) -> int | None:
        """Machine time of the next timer in ns; None if none is armed."""
        ...

    def step(self, now_ns: int) -> Any:
        """Run every timer due by `now_ns`; may be a generator."""
        ...


class Pacer:
    """Steps `machine` through `owner` at the pace of `now_ns`.

    `sleep(seconds)` (None: without end) must return early when `notice()` found an earlier timer; the
    default waits on an event that does.
    """

    def __init__(
        self,
        machine: Paced,
        owner: Owner,
        now_ns: Callable[[], int] = time.monotonic_ns,
        sleep: Callable[[float | None], object] | None = None,
    ) -> None:
        self._machine, self._owner, self._now_ns = machine, owner, now_ns
        self._woken = threading.Event()
        self._sleep = sleep or self._woken.wait
        self._planned: int | None = None
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="dpud-pacer", daemon=True)
        owner.after_slice.append(self.notice)

    def start(self) -> None:
        self._thread.start()

    def stop(self) -> None:
        """End the thread; machine time stands still from here on."""
        self._stopping = True
        self._woken.set()
        if self._thread.is_alive():
            self._thread.join()

    def notice(self) -> None:
        """Called by the owner after each slice: wake up if a timer was armed that is due before the planned
        one.
        """
        next_ns = self._machine.peek()
        if next_ns is not None and (self._planned is None or next_ns < self._planned):
            self._woken.set()

    def pace(self) -> None:
        """One round: step if a timer is due, else sleep until it is."""
        self._owner.look(self._plan)
        if self._planned is None:
            self._sleep(None)
        elif (early_ns := self._planned - self._now_ns()) > 0:
            self._sleep(early_ns / 1e9)
        else:
            self._step()
        self._woken.clear()  # whatever set it is seen by the next round's plan

    def _step(self) -> None:
        try:
            self._owner.request(self._machine.step, self._now_ns())
        except NoRoom:  # time stands still until it can be noted again
            self._sleep(_ROOM_WAIT_S)

    def _plan(self) -> None:
        self._planned = self._machine.peek()

    def _run(self) -> None:
        while not self._stopping:
            try:
                self.pace()
            except OSError:
                if not self._owner.closed:  # a closing owner ends a long step with EINTR
                    raise
                return
