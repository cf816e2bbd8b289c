# SPDX-License-Identifier: GPL-2.0-only
"""Wait queues: where a reader sleeps until there is something to read.

The core has no threads, so its own WaitQueue never sleeps: whoever drives an operation in library mode polls. A daemon
injects a subclass that blocks the calling thread.
"""

from collections.abc import Callable


class WaitQueue:
    """Also calls back, once each, those who cannot sleep (poll)."""

    def __init__(self) -> None:
        self._callbacks: dict[Callable[[], object], None] = {}

    def notify_once(self, callback: Callable[[], object]) -> None:
        """Call `callback` at the next `wake_up`, once however often it is asked for.

        For whoever holds the machine, as the waker does.
        """
        self._callbacks[callback] = None

    def wait(self, timeout_s: float, /) -> bool:
        """True once woken up since the call began, False after `timeout_s`; this one never blocks."""
        return True

    def wake_up(self) -> None:
        """Wake all who wait."""
        callbacks, self._callbacks = self._callbacks, {}
        for callback in callbacks:
            callback()
