# SPDX-License-Identifier: GPL-2.0-only
"""Batches that failed: how many for which reason, and the last of them, as debugfs shows them."""

from collections import Counter, deque
from collections.abc import Iterator

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.dpu_hw import DpuResult
from kernelsim.timer import Clock

REASONS = ("dpu_fault", "timeout", "internal", "corrupted_memory", "driver", "other")
"""SDK error names in lower case, those that a batch usually ends with; every other name counts as `other`."""
NR_REMEMBERED = 16


class DpuFailures(Kobject):
    """Failed batches since boot."""

    last_failures = Attr(
        Text(), doc=f"The last {NR_REMEMBERED} batches that failed: time, reason, first address, moves retired, moves."
    )

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._counts: Counter[str] = Counter()
        self._last: deque[str] = deque(maxlen=NR_REMEMBERED)

    def note(self, result: DpuResult, base_addr: int, nr_moves: int) -> None:
        """Count a batch that ended with an error."""
        reason = result.reason or "other"
        self._counts[reason if reason in REASONS else "other"] += 1
        seconds = self._clock.now_ns() / 1e9
        self._last.append(f"{seconds:.6f} {reason} {base_addr:#x} {result.nr_retired} {nr_moves}\n")

    def counts(self) -> Iterator[tuple[str, int]]:
        """(`failed_REASON`, how many) for each of REASONS."""
        for reason in REASONS:
            yield f"failed_{reason}", self._counts[reason]

    @last_failures.show
    def _show(self) -> str:
        return "time reason address retired moves\n" + "".join(self._last)
