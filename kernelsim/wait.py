# SPDX-License-Identifier: GPL-2.0-only
"""Wait queues: where a reader sleeps until there is something to read.

The core has no threads, so its own WaitQueue never sleeps: whoever drives an operation in library mode polls. A daemon
injects a subclass that blocks the calling thread.
"""


class WaitQueue:
    def wait(self, timeout_s: float, /) -> bool:
        """True once woken up since the call began, False after `timeout_s`; this one never blocks."""
        return True

    def wake_up(self) -> None:
        """Wake all who wait."""
