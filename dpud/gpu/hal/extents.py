# SPDX-License-Identifier: MIT
"""First-fit allocation of few, large pieces: a device's memory, or addresses. Pages are cut from them elsewhere."""

import errno
from bisect import bisect

from dpud.gpu.errors import GpuError

ALIGNMENT = 256


class Extents:
    """Which parts of [0, size) are free. Free extents are kept in order and never touch each other."""

    def __init__(self, size: int, alignment: int = ALIGNMENT) -> None:
        self._alignment = alignment
        self._free: list[tuple[int, int]] = [(0, size)] if size else []  # (start, end)
        self._taken: dict[int, int] = {}  # start -> end

    @property
    def nr_free_bytes(self) -> int:
        return sum(end - start for start, end in self._free)

    def take(self, size: int) -> int | None:
        """Start of `size` bytes, aligned; None where no free extent is long enough. Raises GpuError(EINVAL)."""
        if size < 1:
            raise GpuError(errno.EINVAL, f"an allocation of {size} bytes")
        length = -(-size // self._alignment) * self._alignment
        for index, (start, end) in enumerate(self._free):
            if end - start >= length:
                self._free[index : index + 1] = [(start + length, end)] if end - start > length else []
                self._taken[start] = start + length
                return start
        return None

    def give(self, start: int) -> None:
        """Free what `take` gave, and join it with its neighbours."""
        end = self._taken.pop(start)
        at = bisect(self._free, (start, end))
        if at < len(self._free) and self._free[at][0] == end:
            end = self._free.pop(at)[1]
        if at and self._free[at - 1][1] == start:
            start = self._free.pop(at - 1)[0]
            at -= 1
        self._free.insert(at, (start, end))
