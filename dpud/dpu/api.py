# SPDX-License-Identifier: GPL-2.0-only
"""The SDK's Python API (reference dpu.md 1.3) over emulated DPUs, usable on its own.

    from dpud.dpu.api import DpuSet             # or, after PYTHONPATH=$(dpud dpu-path): from dpu import DpuSet
    with DpuSet(nr_dpus=4, binary="build/checksum_dpu", log=sys.stdout) as dpus:
        dpus.copy("dpu_mram_buffer", data)      # one buffer: the same to every DPU; a list: one for each
        dpus.exec()
        print([dpu.dpu_wram_results.uint64() for dpu in dpus])

Every failure is a `DpuError` with the SDK's text. A DPU binary is a Python program (binaries.py, tasklet.py); C and
assembly sources cannot be compiled here. Ranks come from $DPUD_RANKS (1), profiles from properties.py.

Not here: of a checkpoint what belongs to instructions (checkpoint.py). WRAM FIFOs the SDK has in C only (dpu_fifo.py).
"""

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TextIO, TypeAlias

from dpud.dpu import checkpoint, errors
from dpud.dpu.binaries import find_program
from dpud.dpu.binaries import register as register
from dpud.dpu.checkpoint import CheckpointFlags
from dpud.dpu.checkpoint import DpuContext as DpuContext
from dpud.dpu.dpu_set import DPU_ALLOCATE_ALL, CallbackFlags, LaunchPolicy
from dpud.dpu.dpu_set import DpuSet as CSet
from dpud.dpu.dpu_xfer import FROM_DPU, TO_DPU, Buffer, XferFlags
from dpud.dpu.rank import Symbol
from dpud.dpu.system import System

ALLOCATE_ALL = DPU_ALLOCATE_ALL
NR_RANKS_VARIABLE = "DPUD_RANKS"

_system = System(int(os.environ.get(NR_RANKS_VARIABLE, "1")))

Source: TypeAlias = str | TextIO | list[str | TextIO]


class DpuError(Exception):
    """Error raised by the API; its text is the SDK's."""


@contextmanager
def _sdk() -> Iterator[None]:
    """Give the errors of the C-like layer the API's own type."""
    try:
        yield
    except errors.DpuError as error:
        ours = DpuError(str(error))
        for note in getattr(error, "__notes__", ()):
            ours.add_note(note)
        raise ours from None


class DpuSymbol:
    """A symbol of a loaded program."""

    def __init__(self, name: str, symbol: Symbol) -> None:
        self.name = name
        self.symbol = symbol

    def value(self) -> int:
        """Its address in its memory."""
        return self.symbol.offset_bytes

    def size(self) -> int:
        """Its size in bytes."""
        return self.symbol.size_bytes


class DpuProgram:
    """A loaded program."""

    def __init__(self, symbols: Mapping[str, Symbol]) -> None:
        self.symbols = {name: DpuSymbol(name, symbol) for name, symbol in symbols.items()}

    def get_symbol(self, symbol: str) -> DpuSymbol | None:
        """The symbol of that name, or None."""
        return self.symbols.get(symbol)

    def fetch_all_symbols(self) -> dict[str, DpuSymbol]:
        return self.symbols


def _unwrapped(items: Sequence[Any]) -> Any:
    """A single element instead of a sequence of one."""
    return items[0] if len(items) == 1 else items


class DpuVariable:
    """What a variable held on each DPU when it was read: one value or sequence for each, or just that for one DPU."""

    def __init__(self, contents: list[memoryview]) -> None:
        self.contents = contents

    def _as(self, kind: Any) -> Any:
        return _unwrapped([_unwrapped(view.cast(kind)) for view in self.contents])

    def data(self) -> Any:
        """The bytes."""
        return _unwrapped(self.contents)

    def int8(self) -> Any:
        return self._as("b")

    def uint8(self) -> Any:
        return self._as("B")

    def int16(self) -> Any:
        return self._as("h")

    def uint16(self) -> Any:
        return self._as("H")

    def int32(self) -> Any:
        return self._as("i")

    def uint32(self) -> Any:
        return self._as("I")

    def int64(self) -> Any:
        return self._as("q")

    def uint64(self) -> Any:
        return self._as("Q")

    def float(self) -> Any:
        return self._as("f")

    def double(self) -> Any:
        return self._as("d")


class DpuSet:
    """Some DPUs. Symbols of the loaded program are attributes: reading one copies it from the DPUs, setting one to a
    buffer (or a list, one for each DPU) copies it to them."""

    _set: CSet
    _log: Any
    _async_mode: bool
    _free: Callable[[], None] | None
    _ranks: "list[DpuSet]"
    _dpus: "list[DpuSet]"

    def __init__(
        self,
        nr_dpus: int | None = None,
        nr_ranks: int | None = None,
        profile: str = "",
        binary: str | bytes | None = None,
        c_source: Source | None = None,
        asm_source: Source | None = None,
        log: Any = None,
        async_mode: bool = False,
    ) -> None:
        """Allocate `nr_dpus` DPUs or `nr_ranks` ranks, all if neither is given, and load a program if one is."""
        if nr_dpus is not None and nr_ranks is not None:
            raise DpuError("cannot specify nr_dpus and nr_ranks")
        if nr_dpus is None and nr_ranks is None:
            nr_dpus = ALLOCATE_ALL
        with _sdk():
            c_set, free = _system.alloc(profile or "", nr_dpus, nr_ranks or 0)
        self._adopt(c_set, log, async_mode)
        self._free = free
        self._ranks = [DpuSet._view(view, log, async_mode) for view in c_set.ranks()]
        for rank in self._ranks:
            rank._dpus = [DpuSet._view(view, log, async_mode) for view in rank._set.dpus()]
            rank._ranks = [rank]
            for dpu in rank._dpus:
                dpu._dpus, dpu._ranks = [dpu], [rank]
        self._dpus = [dpu for rank in self._ranks for dpu in rank._dpus]
        try:
            self._log_to(log)
            if binary is not None or c_source is not None or asm_source is not None:
                self.load(binary, c_source, asm_source)
        except BaseException:
            self.free()
            raise

    def _adopt(self, c_set: CSet, log: Any, async_mode: bool) -> None:
        self._set = c_set
        self._log = None if isinstance(log, list) else log
        self._async_mode = async_mode
        self._free = None
        self._ranks = []
        self._dpus = []

    @classmethod
    def _view(cls, c_set: CSet, log: Any, async_mode: bool) -> "DpuSet":
        view = cls.__new__(cls)
        view._adopt(c_set, log, async_mode)
        return view

    def _log_to(self, log: Any) -> None:
        if isinstance(log, list):
            if len(log) != len(self._dpus):
                raise DpuError("log list length does not match number of DPUs in DpuSet")
            for dpu, stream in zip(self._dpus, log, strict=True):
                dpu._log = stream

    def __enter__(self) -> "DpuSet":
        return self

    def __exit__(self, *_exception: object) -> None:
        self.free()

    def __iter__(self) -> "Iterator[DpuSet]":
        return iter(self._dpus)

    def __len__(self) -> int:
        return len(self._dpus)

    def dpus(self) -> "list[DpuSet]":
        """The DPUs, each a set of its own."""
        return self._dpus

    def ranks(self) -> "list[DpuSet]":
        """The ranks, each a set of its own."""
        return self._ranks

    def free(self) -> None:
        """Give the DPUs back; of the set that allocated them, once."""
        with _sdk():
            if self._free is None:
                raise errors.DpuError(errors.DpuErr.INVALID_DPU_SET)
            self._free()

    # --- symbols as attributes ---

    def _symbol(self, name: str) -> Symbol | None:
        c_set: CSet | None = self.__dict__.get("_set")
        if c_set is None:
            return None
        try:
            return c_set.symbols().get(name)
        except errors.DpuError:
            return None

    def __getattr__(self, name: str) -> DpuVariable:
        symbol = self._symbol(name)
        if symbol is None:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        buffers = [bytearray(symbol.size_bytes) for _ in self._dpus]
        self.copy(list(buffers), DpuSymbol(name, symbol), async_mode=False)
        return DpuVariable([memoryview(buffer) for buffer in buffers])

    def __setattr__(self, name: str, value: Any) -> None:
        symbol = None if name in self.__dict__ else self._symbol(name)
        if symbol is None:
            super().__setattr__(name, value)
        else:
            self.copy(DpuSymbol(name, symbol), value)

    # --- program ---

    def load(
        self, binary: str | bytes | None = None, c_source: Source | None = None, asm_source: Source | None = None
    ) -> DpuProgram:
        """Load a program on every DPU of the set."""
        if (binary is None) == (c_source is None and asm_source is None):
            raise DpuError("one and only one source or binary program must be defined")
        if binary is None:
            raise DpuError("no DPU compiler is installed: load a Python program by its name as binary")
        with _sdk():
            if isinstance(binary, bytes):
                raise errors.DpuError(errors.DpuErr.ELF_INVALID_FILE)
            self._set.load(find_program(binary))
            return DpuProgram(self._set.symbols())

    def exec(self, log: Any = None, async_mode: bool | None = None) -> None:
        """Run the program; its log goes to `log`, or to where the constructor was told, unless asynchronous."""
        with _sdk():
            if self._is_async(async_mode):
                self._set.launch(LaunchPolicy.DPU_ASYNCHRONOUS)
                return
            self._set.launch(LaunchPolicy.DPU_SYNCHRONOUS)
        self._write_logs(log, None)

    def _is_async(self, async_mode: bool | None) -> bool:
        return self._async_mode if async_mode is None else async_mode

    def sync(self) -> None:
        """Wait for everything asynchronous; raises the first error among it."""
        with _sdk():
            self._set.sync()

    def call(
        self,
        fn: "Callable[[DpuSet, int, Any], object]",
        arg: Any = None,
        async_mode: bool | None = None,
        is_blocking: bool = True,
        single_call: bool = False,
    ) -> None:
        """Call `fn(rank, index, arg)` for each rank of the set, or once for the whole of it."""
        flags = CallbackFlags.DPU_CALLBACK_DEFAULT
        if self._is_async(async_mode):
            flags |= CallbackFlags.DPU_CALLBACK_ASYNC
        if not is_blocking:
            flags |= CallbackFlags.DPU_CALLBACK_NONBLOCKING
        if single_call:
            flags |= CallbackFlags.DPU_CALLBACK_SINGLE_CALL

        def call(_c_set: CSet, index: int, arg: Any) -> None:
            fn(self if single_call else self._ranks[index], index, arg)

        with _sdk():
            self._set.callback(call, arg, flags)

    # --- transfers ---

    def copy(
        self, dst: Any, src: Any, size: int | None = None, offset: int = 0, async_mode: bool | None = None
    ) -> None:
        """Copy between host and DPUs: one side is a symbol (name or DpuSymbol), the other a buffer for all DPUs of the
        set or a list with one for each, None for those to leave out."""
        to_dpu, from_dpu = (isinstance(side, str | DpuSymbol) for side in (dst, src))
        if to_dpu == from_dpu:
            raise DpuError("can only execute Host <-> DPU transfers")
        device, host = (dst, src) if to_dpu else (src, dst)
        symbol = device.symbol if isinstance(device, DpuSymbol) else device
        flags = XferFlags.DPU_XFER_ASYNC if self._is_async(async_mode) else XferFlags.DPU_XFER_DEFAULT
        if isinstance(host, list):
            if len(host) != len(self._dpus):
                raise DpuError("invalid number of host buffers for this DPU set")
            targets = [(dpu._set, buffer) for dpu, buffer in zip(self._dpus, host, strict=True) if buffer is not None]
        else:
            targets = [(self._set, host)]
        length = self._length([buffer for _, buffer in targets], size)
        with _sdk():
            if to_dpu and not isinstance(host, list):
                self._set.broadcast_to(symbol, offset, memoryview(host).cast("B")[:length], flags)
                return
            self._push(targets, TO_DPU if to_dpu else FROM_DPU, symbol, offset, length, flags)

    @staticmethod
    def _length(buffers: list[Buffer], size: int | None) -> int:
        lengths = {memoryview(buffer).nbytes for buffer in buffers}  # type: ignore[arg-type]
        if size is None:
            if len(lengths) > 1:
                raise DpuError(errors.DpuErr.INVALID_MEMORY_TRANSFER.text)
            return lengths.pop() if lengths else 0
        if any(length < size for length in lengths):
            raise DpuError("host buffer is too small")
        return size

    def _push(
        self,
        targets: list[tuple[CSet, Buffer]],
        direction: Any,
        symbol: str | Symbol,
        offset: int,
        length: int,
        flags: XferFlags,
    ) -> None:
        prepared: list[CSet] = []
        try:
            for c_set, buffer in targets:
                c_set.prepare_xfer(buffer)
                prepared.append(c_set)
            self._set.push_xfer(direction, symbol, offset, length, flags)
        except errors.DpuError:
            for c_set in prepared:
                c_set.unprepare_xfer()
            raise

    # --- log ---

    def log(self, stream: Any = None) -> None:
        """Write what the DPUs printed to `stream`, where the constructor was told, or to standard output."""
        self._write_logs(stream, sys.stdout)

    def _write_logs(self, log: Any, default: Any) -> None:
        streams = [default if dpu._log is None else dpu._log for dpu in self._dpus]
        if isinstance(log, list):
            if len(log) != len(self._dpus):
                raise DpuError("cannot log, log list length does not match the number of DPUs in DpuSet")
            streams = [old if new is None else new for old, new in zip(streams, log, strict=True)]
        elif isinstance(log, dict):
            streams = [log.get(dpu, old) for dpu, old in zip(self._dpus, streams, strict=True)]
        elif log is not None:
            streams = [log] * len(self._dpus)
        for dpu, stream in zip(self._dpus, streams, strict=True):
            if stream is None:
                continue
            if not callable(getattr(stream, "write", None)):
                raise DpuError("stream argument is not an object with a 'write' method")
            with _sdk():
                stream.write(dpu._set.log_read())

    # --- checkpoints ---

    def checkpoint(self, iram: bool = True, mram: bool = True, wram: bool = True) -> DpuContext:
        """The memories and the fault of a single DPU."""
        with _sdk():
            return checkpoint.checkpoint_save(self._set, _flags(iram, mram, wram))

    def restore(self, context: DpuContext, iram: bool = True, mram: bool = True, wram: bool = True) -> None:
        """Put a checkpoint back."""
        with _sdk():
            checkpoint.checkpoint_restore(self._set, context, _flags(iram, mram, wram))


def _flags(iram: bool, mram: bool, wram: bool) -> CheckpointFlags:
    flags = CheckpointFlags.DPU_CHECKPOINT_ALL
    for wanted, flag in (
        (iram, CheckpointFlags.DPU_CHECKPOINT_IRAM),
        (mram, CheckpointFlags.DPU_CHECKPOINT_MRAM),
        (wram, CheckpointFlags.DPU_CHECKPOINT_WRAM),
    ):
        if not wanted:
            flags &= ~flag
    return flags


def allocate(nr_dpus: int = ALLOCATE_ALL, profile: str = "", binary: str | None = None) -> DpuSet:
    """The older spelling of `DpuSet(...)`, which the SDK's demonstrations use."""
    return DpuSet(nr_dpus, profile=profile, binary=binary)
