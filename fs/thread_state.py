# SPDX-License-Identifier: GPL-2.0-only
"""Keeps CPython's thread state from one FUSE request to the next.

libfuse's threads are not Python's. ctypes enters Python from them by PyGILState_Ensure(), which makes a
thread state at each request and throws it away at its end; that is a third of the time of a small read.
One more Ensure per thread, not released while the thread lives, keeps the state. glibc runs the thread's
own exit handlers while its thread-specific data is still there, so that is where the state is released:
threads that come and go leave nothing behind. Where the C library has no such handlers, nothing is kept
and requests just cost more.
"""

import ctypes
import threading

_PYGILSTATE_LOCKED = 0  # the caller holds the GIL: Release only takes the count down


def _release(_unused: int | None) -> None:
    """Runs as the thread ends, in a ctypes callback whose own Release then frees the state."""
    ctypes.pythonapi.PyGILState_Release(_PYGILSTATE_LOCKED)


_handler = ctypes.CFUNCTYPE(None, ctypes.c_void_p)(_release)  # C keeps a pointer: never to be collected
_at_thread_exit = getattr(ctypes.CDLL(None), "__cxa_thread_atexit_impl", None)
_main = threading.main_thread().ident
_thread = threading.local()


def keep() -> None:
    """Keep the calling thread's state until the thread ends. Cheap when it is kept already."""
    if hasattr(_thread, "is_kept"):
        return
    _thread.is_kept = True
    # The main thread has a state anyway, and its exit handlers run after Python is gone.
    if _at_thread_exit is not None and threading.get_ident() != _main:
        ctypes.pythonapi.PyGILState_Ensure()
        _at_thread_exit(_handler, None, _handler)  # registered by an address in no library: the program
