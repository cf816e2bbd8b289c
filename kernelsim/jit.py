# SPDX-License-Identifier: GPL-2.0-only
"""The one way hot loops are compiled: cached on disk, GIL released, exact integer arithmetic.

The compiled loops take structure-of-arrays and never raise: they return a count or a negative errno, as kernel
functions do. `parallel=True` is not used: its thread pool is not safe under the caller's own threads.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np

F = TypeVar("F", bound=Callable[..., Any])


def njit(function: F) -> F:
    """Compile a loop over arrays it is given; the type checker goes on seeing its plain signature.

    Without numba's reference counting (`_nrt`): counting every array in and out of every call made the small functions
    that kernel loops consist of several times slower. Such a function cannot make arrays; `njit_alloc` can.
    """
    return cast(F, numba.njit(cache=True, nogil=True, _nrt=False)(function))


def njit_alloc(function: F) -> F:
    """The same for functions that make arrays."""
    return cast(F, numba.njit(cache=True, nogil=True)(function))


i64 = cast(Callable[[Any], int], np.int64)
u64 = cast(Callable[[Any], Any], np.uint64)
"""numpy's conversions, as the type checker should see them. Mixing uint64 with signed integers gives floats in numba,
so every crossing between page-table words and page numbers is written out."""
