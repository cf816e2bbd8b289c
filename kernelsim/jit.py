# SPDX-License-Identifier: GPL-2.0-only
"""The one way hot loops are compiled: cached on disk, GIL released, exact integer arithmetic.

The compiled loops take structure-of-arrays and never raise: they return a count or a negative errno, as kernel
functions do. `parallel=True` is not used: its thread pool is not safe under the caller's own threads.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba

F = TypeVar("F", bound=Callable[..., Any])


def njit(function: F) -> F:
    """Compile `function` in nopython mode; the type checker goes on seeing its plain signature."""
    return cast(F, numba.njit(cache=True, nogil=True)(function))
