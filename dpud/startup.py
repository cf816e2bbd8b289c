# SPDX-License-Identifier: GPL-2.0-only
"""Coming to the code quickly, for a process that is started often and finds what it needs compiled.

Theory of operation
    Machine code from numba's cache is linked with libc and numba's own libraries, no more. But before numba looks into
    its cache for a function, it teaches its compiler every Python and numpy function there is: it imports all that it
    has for them, and scipy's linear algebra where there is a scipy. That takes twice as long as loading all the loops
    that a daemon starts with. Here it is left to the compiler, which does the same by itself before it compiles
    anything (numba.core.compiler.CompilerBase.__init__), should a loop not be in the cache.

    Nor does a function look for its file in the cache as it is declared, only when it is called: most never are.

    What is imported stays. Collections of garbage in the meantime would walk all of it over and over and find nothing.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any


@contextmanager
def quick() -> Iterator[None]:
    """Around the imports: the loops that they declare are loaded without the compiler, and nothing is collected."""
    from dpud.stored_loops import StoredLoops

    dispatcher: Any = import_module("numba.core.dispatcher")
    usual = dispatcher.FunctionCache
    gc.disable()
    dispatcher.FunctionCache = StoredLoops
    try:
        yield
    finally:
        dispatcher.FunctionCache = usual
        gc.freeze()
        gc.enable()


def find_stored() -> None:
    """Let each function that was declared quickly look for its file now: numba does not without trying to write."""
    if module := sys.modules.get("dpud.stored_loops"):
        module.StoredLoops.find_all()
