# SPDX-License-Identifier: GPL-2.0-only
"""How much of the server a user may have: open files, texts that these hold, requests that wait.

Theory of operation
    A kernel charges what a program makes it keep to that program: descriptors to RLIMIT_NOFILE and fs.file-max, the
    text behind an open seq_file to its memory cgroup, a blocked read is the sleep of its own thread. Here all three
    are memory of the server: an object, a string, a thread. Nobody charges those, so each user has a share, and all
    of them together have one too, however many users somebody makes up.

    The owner of the files and root are not limited in what they keep: what they could do to the server they can do
    anyway. They may wait in as many threads as there can be, and have some that nobody else gets.

    What is over a share is refused with the error that the kernel has for the like of it: ENFILE, ENOMEM, EAGAIN.
"""

import threading
from collections import Counter

MAX_OPEN, MAX_OPEN_OF_ALL = 1 << 14, 1 << 16
"""Open files and directories of one ordinary user, and of all of them: some 0.5 KB each."""
MAX_TEXT_BYTES, MAX_TEXT_BYTES_OF_ALL = 32 << 20, 128 << 20
"""In texts that they have begun to read. A text that several open files share counts for each."""
MAX_WAITING, MAX_WAITING_OF_ALL = 1024, 3072
"""Requests that wait: some 100 KB each, mostly the thread's stack."""
MAX_WAITING_OF_ANYBODY = 4096


class Share:
    """So much of something for each, and so much for all together."""

    def __init__(self, each: int, together: int) -> None:
        self._each, self._together = each, together
        self._taken: Counter[int] = Counter()
        self.nr_taken = 0

    def take(self, uid: int, nr: int = 1) -> bool:
        """False, and nothing taken: that would be too much."""
        if self._taken[uid] + nr > self._each or self.nr_taken + nr > self._together:
            return False
        self._taken[uid] += nr
        self.nr_taken += nr
        return True

    def give(self, uid: int, nr: int = 1) -> None:
        """Back."""
        self.nr_taken -= nr
        self._taken[uid] -= nr
        if not self._taken[uid]:
            del self._taken[uid]


class Shares:
    """Of one server. `is_limited`: whose share is."""

    def __init__(self, owner_uid: int) -> None:
        self._owner_uid = owner_uid
        self._guard = threading.Lock()
        self._open = Share(MAX_OPEN, MAX_OPEN_OF_ALL)
        self._text = Share(MAX_TEXT_BYTES, MAX_TEXT_BYTES_OF_ALL)
        self._waiting = Share(MAX_WAITING, MAX_WAITING_OF_ALL)
        self._nr_waiting = 0
        self._holders: dict[int, tuple[int, int]] = {}

    def is_limited(self, uid: int) -> bool:
        return uid not in (0, self._owner_uid)

    def open(self, handle: int, uid: int) -> bool:
        """`uid` opens something that is known by `handle` until it is closed. False: too many are open."""
        if not self.is_limited(uid):
            return True
        with self._guard:
            if not self._open.take(uid):
                return False
            self._holders[handle] = uid, 0
            return True

    def close(self, handle: int) -> None:
        """It is no more; that of the owner was never counted."""
        if handle not in self._holders:
            return
        with self._guard:
            uid, nr_bytes = self._holders.pop(handle)
            self._open.give(uid)
            self._text.give(uid, nr_bytes)

    def hold(self, handle: int, nr_bytes: int) -> bool:
        """The text behind an open file has so many bytes now. False: it must not be kept."""
        if handle not in self._holders:
            return True
        with self._guard:
            uid, before = self._holders[handle]
            self._text.give(uid, before)
            is_held = self._text.take(uid, nr_bytes)
            self._holders[handle] = uid, nr_bytes if is_held else 0
            return is_held

    def wait(self, uid: int) -> bool:
        """A request is going to wait. False: it must not."""
        with self._guard:
            if self._nr_waiting >= MAX_WAITING_OF_ANYBODY or (self.is_limited(uid) and not self._waiting.take(uid)):
                return False
            self._nr_waiting += 1
            return True

    def go_on(self, uid: int) -> None:
        """It waits no longer."""
        with self._guard:
            self._nr_waiting -= 1
            if self.is_limited(uid):
                self._waiting.give(uid)
