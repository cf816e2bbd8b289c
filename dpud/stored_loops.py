# SPDX-License-Identifier: GPL-2.0-only
"""numba's cache of one function's machine code, as startup.py wants it: see there. Importing this imports numba."""

from collections.abc import Callable
from typing import Any, ClassVar

from numba.core.caching import FunctionCache
from numba.core.runtime import rtsys


class StoredLoops(FunctionCache):  # type: ignore[misc]
    """It has numba's attributes only when one of them is asked for: to make them takes some files and a hash."""

    waiting: ClassVar[list["StoredLoops"]] = []
    """Those that have to be made."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self.waiting.append(self)

    def __getattr__(self, name: str) -> Any:
        if "_enabled" in vars(self):  # the last that numba sets
            raise AttributeError(name)
        super().__init__(self._function)
        self.waiting.remove(self)
        return getattr(self, name)

    @classmethod
    def find_all(cls) -> None:
        """Make all attributes now."""
        for each in tuple(cls.waiting):
            assert each._enabled

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """The compiled function for these types, None if there is none: FunctionCache's, but for refresh()."""
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)
