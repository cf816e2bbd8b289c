# SPDX-License-Identifier: GPL-2.0-only
"""Memory by address, for compiled loops that are told where something is and are given no array.

Whoever passes an address answers for what lies there. A word is read and written whole.
"""

from collections.abc import Callable
from typing import Any, cast

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

_WORD, _OCTET = ir.IntType(64), ir.IntType(8)


def _emit_load(_context: Any, _address: Any) -> Any:
    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        return builder.load(builder.inttoptr(args[0], _WORD.as_pointer()))

    return types.int64(types.int64), codegen


def _emit_store(_context: Any, _address: Any, _value: Any) -> Any:
    def codegen(target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(args[1], builder.inttoptr(args[0], _WORD.as_pointer()))
        return target.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


def _emit_store_octet(_context: Any, _address: Any, _value: Any) -> Any:
    def codegen(target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        builder.store(builder.trunc(args[1], _OCTET), builder.inttoptr(args[0], _OCTET.as_pointer()))
        return target.get_dummy_value()

    return types.void(types.int64, types.int64), codegen


load = cast(Callable[[int], int], intrinsic(_emit_load))
"""The 64-bit word at an address, signed."""
store = cast(Callable[[int, int], None], intrinsic(_emit_store))
"""(address, word)"""
store_octet = cast(Callable[[int, int], None], intrinsic(_emit_store_octet))
"""(address, octet)"""
