# SPDX-License-Identifier: GPL-2.0-only
"""The static key of tracepoints in compiled loops, and the rows that those loops leave behind.

A tracepoint in a compiled loop has to cost nothing while it is off, and no loop should be handed a buffer for it. So
there is one block of memory for the whole process, known to the compiled code by an external symbol (`kernelsim_trace`,
registered with LLVM when this module is imported and resolved when a loop, cached or not, is loaded). Its first word is
the key, one bit for each tracepoint:

    if trace_key() & MM_PAGE_FREE:
        trace_row(MM_PAGE_FREE, pfn, order)

Off, that is one load, one test and a branch that is not taken. On, a row of numbers is appended; the machine takes the
rows out (`take_rows`) at the next moment that it is in Python and looks: at its next event, at the end of a slice, when
a trace is read. A row has no time of its own, because a compiled loop knows no clock, so all rows of one slice bear the
time of its end. Their order is exact. Rows that find no room are counted.

Differences from Linux: the key belongs to the process, as does the code that tests it. A process that runs several
machines must trace one at a time.
"""

from collections.abc import Callable
from typing import Any, cast

import numpy as np
from llvmlite import binding, ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from kernelsim.jit import njit

NR_ROWS = 1 << 16
_SYMBOL = "kernelsim_trace"
_KEY, _USED, _LOST, _HEADER = 0, 1, 2, 8
NR_VALUES = 8
_ROW = 1 + NR_VALUES

(
    MM_PAGE_ALLOC,
    MM_PAGE_FREE,
    MM_PAGE_ALLOC_EXTFRAG,
    MM_PAGE_ALLOC_ZONE_LOCKED,
    MM_PAGE_PCPU_DRAIN,
    MM_COMPACTION_ISOLATE_MIGRATEPAGES,
    MM_COMPACTION_ISOLATE_FREEPAGES,
    MM_COMPACTION_FAST_ISOLATE_FREEPAGES,
    MM_COMPACTION_MIGRATEPAGES,
    MM_COMPACTION_FINISHED,
    MM_MIGRATE_PAGES_START,
    MM_MIGRATE_PAGES,
    SET_MIGRATION_PTE,
    REMOVE_MIGRATION_PTE,
) = (1 << bit for bit in range(14))
"""The tracepoints in compiled loops, as bits of the key."""

_block = np.zeros(_HEADER + NR_ROWS * _ROW, dtype=np.int64)
binding.add_symbol(_SYMBOL, _block.ctypes.data)


def _word(builder: Any, index: Any) -> Any:
    """Address of a word of the block."""
    word = ir.IntType(64)
    block = builder.module.globals.get(_SYMBOL)
    if block is None:
        block = ir.GlobalVariable(builder.module, word, _SYMBOL)  # without an initializer: external
    return builder.gep(block, [index])


def _emit_load(_context: Any, _index: Any) -> Any:
    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(_word(builder, args[0]))

    return types.int64(types.int64), codegen


def _emit_store(_context: Any, _index: Any, _value: Any) -> Any:
    def codegen(target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[1], _word(builder, args[0]))
        return target.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


_load = cast(Callable[[int], int], intrinsic(_emit_load))
_store = cast(Callable[[int, int], None], intrinsic(_emit_store))


@njit
def trace_key() -> int:
    """The bits of the tracepoints that are on."""
    return int(_load(_KEY))


@njit
def trace_row(
    event: int,
    a: int,
    b: int = 0,
    c: int = 0,
    d: int = 0,
    e: int = 0,
    f: int = 0,
    g: int = 0,
    h: int = 0,
) -> None:
    """Append one hit of the tracepoint whose bit is `event`."""
    used = _load(_USED)
    if used >= NR_ROWS:
        _store(_LOST, _load(_LOST) + 1)
        return
    at = _HEADER + used * _ROW
    _store(at, event)
    _store(at + 1, a)
    _store(at + 2, b)
    _store(at + 3, c)
    _store(at + 4, d)
    _store(at + 5, e)
    _store(at + 6, f)
    _store(at + 7, g)
    _store(at + 8, h)
    _store(_USED, used + 1)


def set_key(bits: int) -> None:
    """Switch tracepoints on and off, all at once."""
    _block[_KEY] = bits


def key() -> int:
    """The same word, for Python."""
    return int(_block[_KEY])


def rows_waiting() -> bool:
    """Whether there is anything to take; cheap."""
    return bool(_block[_USED])


def take_rows() -> tuple[NDArray[np.int64], int]:
    """(int64[n, 1 + NR_VALUES]: bit and values of each hit since the last call, how many found no room)."""
    used, lost = int(_block[_USED]), int(_block[_LOST])
    rows = _block[_HEADER : _HEADER + used * _ROW].reshape(used, _ROW).copy()
    _block[_USED] = _block[_LOST] = 0
    return rows, lost
