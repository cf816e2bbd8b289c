# SPDX-License-Identifier: GPL-2.0-only
"""How soon a serving thread gets a CPU where another one is at work for long.

Theory of operation
    Who runs keeps the CPU to the end of his slice, some milliseconds, whoever wakes up meanwhile; unless who wakes up
    has shorter slices than he (kernel/sched/fair.c, PREEMPT_SHORT, Linux 6.12). So a thread that waits for requests
    has the shortest there are, and one that works in Python on something that may take a while has ordinary ones: the
    many who want an answer that is ready do not wait for the one who asked for more. Anybody may have short slices
    (sched_setattr(2)); older kernels, and those that forbid the call, take no notice.

Two calls for each such request, of less than a microsecond.
"""

import ctypes
import os
import platform
import struct
from collections.abc import Callable

import numpy as np
from numba import types

from fs.fuse_abi import Opcode
from fs.fuse_layout import Buffer, Table
from kernelsim.jit import njit

SHORT_NS = 100_000
"""The shortest that there are (kernel/sched/syscalls.c)."""
_ORDINARY = 0

_SYS_SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274}
_SCHED_ATTR = struct.Struct("=IIQiIQQQ")  # size, policy, flags, nice, priority, runtime, deadline, period
_OP_READ, _OP_WRITE, _OP_MKDIR, _OP_RMDIR, _OP_SETATTR = (
    int(op) for op in (Opcode.READ, Opcode.WRITE, Opcode.MKDIR, Opcode.RMDIR, Opcode.SETATTR)
)
_c_syscall: Callable[..., int] = types.ExternalFunction(
    "syscall", types.intp(types.intp, types.intp, types.uintp, types.intp)
)


def set_up(table: Table) -> None:
    """For threads of the calling one's priority."""
    nice = os.getpriority(os.PRIO_PROCESS, 0)
    for name, slice_ns in (("short_slice", SHORT_NS), ("long_slice", _ORDINARY)):
        attr = _SCHED_ATTR.pack(_SCHED_ATTR.size, os.SCHED_OTHER, 0, nice, 0, slice_ns, 0, 0)
        table[0][name] = np.frombuffer(attr, dtype=np.int64)
    table["slice_call"] = _number_of_call(table)


def _number_of_call(table: Table) -> int:
    """0: there is no such call, it is not allowed, or the thread is not scheduled that way."""
    number = _SYS_SCHED_SETATTR.get(platform.machine(), 0)
    if not number or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return 0
    is_taken = ctypes.CDLL(None).syscall(number, 0, ctypes.c_void_p(table[0]["long_slice"].ctypes.data), 0) == 0
    return number if is_taken else 0


@njit
def be_ready(buffer: Buffer, table: Table) -> None:
    """The thread of this buffer is going to wait for requests."""
    if buffer[0].has_long_slice and table[0].slice_call:
        _c_syscall(table[0].slice_call, 0, table[0].short_slice.ctypes.data, 0)
    buffer[0].has_long_slice = 0


@njit
def set_to_work(buffer: Buffer, table: Table) -> None:
    """It is going to work on its request in Python."""
    if table[0].slice_call and buffer[0].opcode in (_OP_READ, _OP_WRITE, _OP_MKDIR, _OP_RMDIR, _OP_SETATTR):
        _c_syscall(table[0].slice_call, 0, table[0].long_slice.ctypes.data, 0)
        buffer[0].has_long_slice = 1
