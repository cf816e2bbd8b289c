# SPDX-License-Identifier: GPL-2.0-only
"""How a server on the main thread learns that it shall end."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


@contextmanager
def ending_signals() -> Iterator[tuple[int, Callable[[], None]]]:
    """A descriptor that can be read as soon as a signal has come or `end()` was called, and `end`."""
    ended, end = os.pipe2(os.O_CLOEXEC)
    os.set_blocking(end, False)
    before = {number: signal.signal(number, lambda _number, _frame: None) for number in _SIGNALS}
    woken = signal.set_wakeup_fd(end)
    try:
        yield ended, lambda: void(os.write(end, b"."))
    finally:
        signal.set_wakeup_fd(woken)
        for number, handler in before.items():
            signal.signal(number, handler)
        # the pipe stays: a thread that serves may still call `end`


def void(_result: object) -> None:
    """For a callback of which no result is wanted."""
