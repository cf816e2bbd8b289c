# SPDX-License-Identifier: MIT
"""Which pages of a region were written to: for who copies them while they are in use (migration, checkpoints).

Each who wants to know has a log of his own, so that one who takes does not rob another. A new log has every page: the
first round copies all of them.
"""

import numpy as np
from numpy.typing import NDArray


class DirtyLog:
    """Pages written to since they were last taken. Belongs in `Region.dirty_logs` as long as it is wanted."""

    def __init__(self, nr_pages: int) -> None:
        self._dirty: NDArray[np.bool_] = np.ones(nr_pages, dtype=np.bool_)

    def mark(self, first: int, nr_pages: int) -> None:
        """Pages are about to be, or were, written to."""
        self._dirty[first : first + nr_pages] = True

    def mark_pages(self, pages: NDArray[np.int64]) -> None:
        """The same for pages that are not in a row, whose writer is nobody to be slowed down."""
        self._dirty[pages] = True

    def __len__(self) -> int:
        """How many pages there are to take."""
        return int(np.count_nonzero(self._dirty))

    def has(self, pages: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of these pages there are to take."""
        found: NDArray[np.bool_] = self._dirty[pages]
        return found

    def take(self, limit: int | None = None) -> NDArray[np.int64]:
        """The pages, lowest first and at most `limit`, which are clean from now on."""
        pages = self.peek(limit)
        self._dirty[pages] = False
        return pages

    def peek(self, limit: int | None = None) -> NDArray[np.int64]:
        """The same pages, which stay."""
        return np.flatnonzero(self._dirty)[:limit]
