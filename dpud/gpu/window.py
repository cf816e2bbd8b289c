# SPDX-License-Identifier: MIT
"""What `GpuMemory.access` gives: memory that is used like a bytearray.

It holds no frame: each use goes through the data path, so a page may leave memory in between and comes back by itself.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dpud.gpu.access import AccessPath


class Window:
    """Bytes [va, va + len) for one client at one location. Reads and writes raise GpuError as an AccessPath's do."""

    def __init__(self, memory: "AccessPath", client: str, va: int, nr_bytes: int, at: int) -> None:
        self._memory, self._client, self._at = memory, client, at
        self.va = va
        self._nr_bytes = nr_bytes

    def __len__(self) -> int:
        return self._nr_bytes

    def __getitem__(self, at: int | slice) -> bytes | int:
        start, nr_bytes = self._range(at)
        data = self._memory.read(self._client, self.va + start, nr_bytes, self._at)
        return data if isinstance(at, slice) else data[0]

    def __setitem__(self, at: int | slice, data: bytes | bytearray | memoryview | int) -> None:
        start, nr_bytes = self._range(at)
        source = bytes([data]) if isinstance(data, int) else data
        if len(source) != nr_bytes:
            raise ValueError(f"{len(source)} bytes into a window of {nr_bytes}")
        self._memory.write(self._client, self.va + start, source, self._at)

    def tobytes(self) -> bytes:
        return self._memory.read(self._client, self.va, self._nr_bytes, self._at)

    def _range(self, at: int | slice) -> tuple[int, int]:
        if isinstance(at, slice):
            start, stop, step = at.indices(self._nr_bytes)
            if step != 1:
                raise ValueError("a window has no steps")
            return start, max(0, stop - start)
        index = at + self._nr_bytes if at < 0 else at
        if not 0 <= index < self._nr_bytes:
            raise IndexError(f"{at} is outside a window of {self._nr_bytes} bytes")
        return index, 1
