# SPDX-License-Identifier: GPL-2.0-only
"""What makes the declaration of a pseudo-file impossible (kernelsim.attr)."""

from typing import TYPE_CHECKING, Any

from kernelsim.kinds import Bytes

if TYPE_CHECKING:
    from kernelsim.attr import Attr


_CO_GENERATOR = 0x20

_sound: set["Attr[Any]"] = set()
"""Declarations that were looked at before: many directories are of one class."""


def problem_of(attr: "Attr[Any]") -> str | None:
    """Why a declaration cannot work; None if it can."""
    if attr in _sound:
        return None
    problem = _problem_of(attr)
    if problem is None:
        _sound.add(attr)
    return problem


def _problem_of(attr: "Attr[Any]") -> str | None:
    if not attr.name or "/" in attr.name or attr.name in (".", ".."):
        return "bad file name"
    if not attr.readable and not attr.writable:
        return "no default, no show and no store"
    if not attr.is_stream and (attr._read or attr._write or attr._write_at or attr._size or attr._open):
        return "read, write, size and open hooks are for streams"
    if (attr._write if isinstance(attr.kind, Bytes) else attr._write_at) is not None:
        return "streams have write hooks, bytes have write_at hooks"
    if attr.is_stream and (attr._show or attr._counters or attr._store or attr._stored or attr.default is not None):
        return "a stream has read and write hooks only"
    if attr._stored and (attr._store or attr.default is None):
        return "a stored hook needs a default and no store hook"
    if attr._late and (not attr._stored or attr._stored.__code__.co_flags & _CO_GENERATOR):
        return "late is about a stored hook, one that does not take long"
    if attr._counters and (attr._show or attr.default is not None):
        return "counters are instead of a show hook"
    if attr.mode & ~0o777 or not attr.mode:
        return f"bad mode 0{attr.mode:o}"
    if (attr.mode & 0o222 and not attr.writable) or (attr.mode & 0o444 and not attr.readable):
        return f"mode 0{attr.mode:o} promises what no hook does"
    if attr.default is not None:
        try:
            attr.kind.check(attr.default)
        except OSError as error:
            return f"bad default: {error.strerror}"
    return None
