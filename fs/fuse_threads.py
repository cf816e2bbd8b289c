# SPDX-License-Identifier: GPL-2.0-only
"""The threads of a connection: a few that serve, one for each request that waits, and spare ones that sleep.

A request that has to wait says so by asking for the first time whether it was interrupted; at that moment another
thread serves in place of its own: a spare one, or a new one if there is none. A thread whose request has waited serves
again where one is missing, else it is spare from then on. Nobody who waits is asked anything: an interrupt rouses it.
"""

import threading
import time
from collections import deque
from collections.abc import Callable

_NR_SERVING = 3  # at all times. The kernel wakes them in turns, so more would be on the wrong CPU, with cold caches
_MAX_SPARE = 128
_DRAIN_S = 2.0


def _nothing() -> None:
    pass


class Request:
    """One request; called, it tells whether its caller has gone. The first call gives the turn away.

    One that must not wait is told that its caller has gone, and its caller EAGAIN.
    """

    __slots__ = ("give_way", "has_turn", "interrupted", "is_left", "refused", "rouse", "uid", "unique", "waits")

    def __init__(self, give_way: Callable[["Request"], bool], unique: int, uid: int, interrupted: bool) -> None:
        self.give_way = give_way
        self.unique = unique
        self.uid = uid
        self.has_turn = True
        self.is_left = False
        """Are there others that its thread has to see to, now that it is over?"""
        self.waits = False
        self.refused = False
        self.interrupted = interrupted
        self.rouse: Callable[[], object] = _nothing
        """Ends the sleep of who waits; set by himself, before he looks whether he was interrupted."""

    def __call__(self) -> bool:
        if not self.waits and not self.refused:
            self.waits = self.give_way(self)
            self.has_turn = self.refused = not self.waits
        return self.interrupted or self.refused

    def goes_on(self) -> bool:
        """The same for what cannot be interrupted."""
        self()
        return False

    def interrupt(self) -> None:
        self.interrupted = True
        self.rouse()


class Threads:
    """Of one connection. `serve`: what a thread does all its life."""

    def __init__(self, serve: Callable[[], None]) -> None:
        self._serve = serve
        self._guard = threading.Lock()
        self._nr_serving = 0
        self._spare: deque[threading.Lock] = deque()
        self.waiting: dict[int, Request] = {}
        """By number."""
        self._closing = False

    def start(self) -> None:
        """Have enough that serve."""
        for _ in range(_NR_SERVING):
            self._nr_serving += 1
            self.start_one()

    def start_one(self) -> None:
        threading.Thread(target=self._serve, name="dpud-fuse", daemon=True).start()

    def one_waits(self, request: Request, is_left: bool) -> bool:
        """The thread of `request` is going to wait, and another one serves. False: there is none, so it must not.

        `is_left`: there are others that one has to see to which begins now.
        """
        with self._guard:
            is_missed = is_left or self._nr_serving <= _NR_SERVING
            spare = self._spare.popleft() if is_missed and self._spare else None
        if is_missed and spare is None:
            try:
                self.start_one()
            except RuntimeError:  # the system has no more
                return False
        with self._guard:
            self.waiting[request.unique] = request
            if self._closing:
                request.interrupted = True
            self._nr_serving += is_missed - 1
        if spare is not None:
            spare.release()
        return True

    def one_is_back(self, request: Request) -> bool:
        """The request waits no longer; comes back when its thread is to serve again. False: it can end."""
        with self._guard:
            del self.waiting[request.unique]
            if self._nr_serving < _NR_SERVING or request.is_left:
                self._nr_serving += 1
                return True
            if self._closing or len(self._spare) >= _MAX_SPARE:
                return False
            wanted = threading.Lock()
            wanted.acquire()
            self._spare.append(wanted)
        wanted.acquire()  # released by whoever is going to wait
        return True

    def interrupt(self, unique: int) -> bool:
        """Tell a request that its caller has gone. False: it does not wait."""
        with self._guard:
            request = self.waiting.get(unique)
            if request is not None:
                request.interrupt()
        return request is not None

    def close(self) -> None:
        """Interrupt all that wait, and see them answered. Spare ones find out for themselves that it is over."""
        with self._guard:
            self._closing = True
            for request in self.waiting.values():
                request.interrupt()
        deadline = time.monotonic() + _DRAIN_S
        while self.waiting and time.monotonic() < deadline:
            time.sleep(0.01)
        with self._guard:
            while self._spare:
                self._spare.popleft().release()
