# SPDX-License-Identifier: MIT
"""Many pages through liblz4 in one call, without the interpreter's lock.

Theory of operation
    `lz4.block.compress` lets go of the interpreter's lock and takes it back for every page. If another thread has it
    just then, to take it back is to be put to sleep and woken, which may cost half as much as compressing 64 KiB. So
    the loop over pages is compiled, and calls the C functions that the packages lz4 and xxhash themselves call: their
    extension modules have them, or the libraries that these are linked with. Where one is not to be found there are no
    batches.

    A page's checksum is made right after it was compressed, when it is still in the core's cache. Short pages are
    joined first, which costs less than to find out where each of them is.

Invariants
    - The streams are those of `lz4.block.compress`: a fresh state for each page, and acceleration 1.
"""

import ctypes
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from itertools import accumulate, pairwise
from typing import Any, TypeAlias, cast

import lz4.block
import numpy as np
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic
from numpy.typing import NDArray

from kernelsim.jit import njit

BATCH_BYTES = 1 << 20
LONG_BYTES = 16 << 10
"""Pages as long as this are worth being looked for."""
Summed: TypeAlias = tuple[memoryview, int]
"""A page's stream, and the checksum of the page."""

_POINTER, _WORD, _INT = ir.IntType(8).as_pointer(), ir.IntType(64), ir.IntType(32)


def _emit_continue(_context: Any, *arguments: Any) -> Any:
    """int LZ4_compress_fast_continue(LZ4_stream_t *, const char *, char *, int, int, int acceleration)"""
    kind = ir.FunctionType(_INT, [_POINTER] * 3 + [_INT] * 3)

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        function = builder.inttoptr(args[0], kind.as_pointer())
        addresses = [builder.inttoptr(arg, _POINTER) for arg in args[1:4]]
        numbers = [builder.trunc(arg, _INT) for arg in args[4:]]
        return builder.sext(builder.call(function, [*addresses, *numbers, _INT(1)]), _WORD)

    return types.int64(*arguments), codegen


def _typed_continue(context: Any, function: Any, state: Any, source: Any, target: Any, nr: Any, most: Any) -> Any:
    return _emit_continue(context, *[types.int64] * 6)


def _emit_sum(_context: Any, _function: Any, _source: Any, _nr_bytes: Any) -> Any:
    """XXH64_hash_t XXH3_64bits(const void *, size_t)"""
    kind = ir.FunctionType(_WORD, [_POINTER, _WORD])

    def codegen(_target: Any, builder: Any, _signature: Any, args: Any) -> Any:
        function = builder.inttoptr(args[0], kind.as_pointer())
        return builder.call(function, [builder.inttoptr(args[1], _POINTER), args[2]])

    return types.uint64(types.int64, types.int64, types.int64), codegen


_continue = cast(Callable[[int, int, int, int, int, int], int], intrinsic(_typed_continue))
"""(function, state, source, target, bytes of the source, bytes there are at the target) -> bytes written; 0: none."""
_sum = cast(Callable[[int, int, int], int], intrinsic(_emit_sum))
"""(function, source, bytes) -> checksum"""


@njit
def compress_pages(
    functions: tuple[int, int],
    state: NDArray[np.uint64],
    sources: NDArray[np.int64],
    nr_bytes: int,
    out: NDArray[np.uint8],
    lengths: NDArray[np.int64],
    sums: NDArray[np.uint64],
) -> None:
    """The pages at these addresses, one stream behind the other."""
    nr_written = 0
    for page in range(len(sources)):
        state[:] = 0
        target, room = out.ctypes.data + nr_written, len(out) - nr_written
        lengths[page] = _continue(functions[0], state.ctypes.data, sources[page], target, nr_bytes, room)
        nr_written += lengths[page]
        sums[page] = _sum(functions[1], sources[page], nr_bytes)


@njit
def address(array: NDArray[np.uint8]) -> int:
    """`array.ctypes.data`, several times as fast."""
    return array.ctypes.data


@dataclass(frozen=True)
class Library:
    functions: tuple[int, int]
    """Addresses of LZ4_compress_fast_continue and XXH3_64bits."""
    state_words: int
    """Of 64 bits, that a compressor's state has."""


@cache
def library() -> Library | None:
    """None where a function is not to be had."""
    try:
        modules: tuple[Any, ...] = lz4.block._block, import_module("xxhash._xxhash")
        lz, xx = (ctypes.CDLL(module.__file__) for module in modules)
        found = lz.LZ4_compress_fast_continue, getattr(xx, "XXH3_64bits_dispatch", None) or xx.XXH3_64bits
        nr_bytes = lz.LZ4_sizeofState()
    except (AttributeError, ImportError, OSError):  # built in another way
        return None
    compress, add_up = (ctypes.cast(function, ctypes.c_void_p).value or 0 for function in found)
    return Library((compress, add_up), -(-nr_bytes // 8))


def compress_many(known: Library, pages: Sequence[memoryview]) -> Iterator[Summed]:
    """Pages of one size, in order."""
    step = max(BATCH_BYTES // len(pages[0]), 1)
    for begin in range(0, len(pages), step):
        yield from _compress(known, pages[begin : begin + step])


def _compress(known: Library, pages: Sequence[memoryview]) -> Iterator[Summed]:
    nr, most = len(pages), compress_bound(len(pages[0]))
    lengths, sums, out = np.empty(nr, np.int64), np.empty(nr, np.uint64), np.empty(nr * most, np.uint8)
    sources, _kept = _addresses(pages)
    compress_pages(known.functions, np.empty(known.state_words, np.uint64), sources, len(pages[0]), out, lengths, sums)
    found, ends = out.data, accumulate(lengths.tolist(), initial=0)
    return zip((found[begin:end] for begin, end in pairwise(ends)), sums.tolist(), strict=True)


def _addresses(pages: Sequence[memoryview]) -> tuple[NDArray[np.int64], object]:
    """Where each page lies, or its copy, and what has to be kept meanwhile."""
    nr_bytes = len(pages[0])
    if nr_bytes < LONG_BYTES:
        joined = np.frombuffer(b"".join(pages), np.uint8)
        return address(joined) + nr_bytes * np.arange(len(pages)), joined
    arrays = [np.frombuffer(page, np.uint8) for page in pages]
    return np.array([address(array) for array in arrays]), arrays


def compress_bound(nr_bytes: int) -> int:
    """LZ4_COMPRESSBOUND of lz4.h: the longest that so many bytes can become."""
    return nr_bytes + nr_bytes // 255 + 16
