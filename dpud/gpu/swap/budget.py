# SPDX-License-Identifier: MIT
"""How much may be written to a tier, and how much has been.

`limit_blocks` is zram's writeback_limit (Documentation/admin-guide/blockdev/zram.rst): in units of 4 KiB, counted down
by what is written, nothing goes once it is used up, and it holds only while it is enabled. Beyond zram, a budget may
fill itself up again each day (`daily_bytes`), by the clock of the data path.
"""

from dpud.gpu.clock import Clock
from dpud.gpu.swap.blockfile import BLOCK_BYTES

DAY_NS = 86_400 * 1_000_000_000
_NO_LIMIT = 1 << 62


class WriteBudget:
    """Of one tier."""

    def __init__(self, clock: Clock, endurance_bytes: int = 0) -> None:
        self._clock = clock
        self.endurance_bytes = endurance_bytes
        self.enabled = False
        self.limit_blocks = 0
        self.daily_bytes = 0
        self.nr_written_bytes = 0
        """Ever: the wear counter."""
        self._day = clock.now_ns() // DAY_NS

    @property
    def left_bytes(self) -> int:
        """What may be written now."""
        self._refill()
        return self.limit_blocks * BLOCK_BYTES if self.enabled else _NO_LIMIT

    def allows(self, nr_blocks: int) -> bool:
        return nr_blocks * BLOCK_BYTES <= self.left_bytes

    def spend(self, nr_blocks: int) -> None:
        """So much was written."""
        self.nr_written_bytes += nr_blocks * BLOCK_BYTES
        if self.enabled:
            self.limit_blocks = max(0, self.limit_blocks - nr_blocks)

    def set_daily(self, nr_bytes: int) -> None:
        """So much each day, from now on; 0 for no refill."""
        self.daily_bytes = nr_bytes
        if nr_bytes:
            self.enabled, self.limit_blocks = True, nr_bytes // BLOCK_BYTES
            self._day = self._clock.now_ns() // DAY_NS

    def _refill(self) -> None:
        day = self._clock.now_ns() // DAY_NS
        if self.daily_bytes and day > self._day:
            self.limit_blocks = self.daily_bytes // BLOCK_BYTES
        self._day = day

    @property
    def wear_percent(self) -> float:
        """Of what it may have written in its life; 0 where that has no limit."""
        return 100 * self.nr_written_bytes / self.endurance_bytes if self.endurance_bytes else 0.0
