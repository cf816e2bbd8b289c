# SPDX-License-Identifier: GPL-2.0-only
"""DPU programs written in Python: what a compiled C program is to a real DPU.

    class Checksum(Program):
        nr_tasklets = 16
        dpu_mram_buffer = Mram(8 << 20)       # __mram_noinit uint8_t dpu_mram_buffer[8 << 20]
        dpu_wram_results = Wram(16 * 8)       # __host uint64_t dpu_wram_results[16]

        def main(self, t: Tasklet) -> None:   # runs once for each tasklet
            cache = t.mem_alloc(256)
            total = 0
            for at in range(256 * t.me(), 8 << 20, 256 * self.nr_tasklets):
                t.mram_read(self.dpu_mram_buffer + at, cache, 256)
                total += int(t.wram(cache, 256).sum())
            t.wram(self.dpu_wram_results + 8 * t.me(), 8).view("<u8")[0] = total
            t.printf(f"[{t.me():02}] checksum {total:#x}")

Inside a program a variable is its address. Tasklets run one after the other; where `main` is a generator, each `yield`
is a barrier of all tasklets, so there are no mutexes. So do DPUs, but for programs with FIFOs (dpu_fifo.py): their DPUs
go on from barrier to barrier side by side, since the host talks to all of them while they run. A program that waits for
the host yields.

What a DPU would not do ends it with a fault, which the host sees as "dpu is in fault" and finds in a checkpoint:
a DMA outside 8 to 2048 bytes, not a multiple of 8, or outside MRAM or WRAM is a DMA fault; an address that is no
multiple of 8 is breakpoint 8; WRAM outside its end a memory fault; a full heap, a division by 0, a failed assert,
`halt` and a full print buffer are breakpoints 1 to 5 (dpu.md 1.4). Other exceptions are bugs of the program, and reach
the caller.

`perfcounter_get` counts the cycles of the DMA engine only (77 + B/2 to read, 61 + B/2 to write): instructions are not
modelled, because there are none.
"""

import time
from collections.abc import Generator, Mapping
from enum import IntEnum
from typing import Any, ClassVar, TypeAlias, overload

import numpy as np
from numpy.typing import NDArray

from dpud.dpu import move
from dpud.dpu.dpu_fifo import HEADER_BYTES, FifoShape, get, put
from dpud.dpu.faults import FaultKind
from dpud.dpu.move import I64
from dpud.dpu.profile import Dma, load_profile
from dpud.dpu.program import DPU_MRAM_HEAP_POINTER_NAME, PRINT_BUFFER, PRINT_LENGTH
from dpud.dpu.rank import DpuFault, Rank, Space, Symbol

DMA_MIN_BYTES, DMA_MAX_BYTES = 8, 2048
ALIGNMENT_BYTES = 8
PRINT_BYTES = move.PRINT_WORDS * 8
MRAM_BYTES = move.MRAM_WORDS * 8
TURN_S = 0.00005
"""Programs with FIFOs give the host that long after each barrier: it needs the interpreter too."""


class BkpFault(IntEnum):
    """Why a DPU ran into a breakpoint (dpu.md 1.4)."""

    HEAP_FULL = 1
    DIVISION_BY_ZERO = 2
    ASSERT = 3
    HALT = 4
    PRINTF_OVERFLOW = 5
    MRAM_UNALIGNED = 8


class _Stopped(Exception):
    """A tasklet did what the hardware does not allow."""

    def __init__(self, kind: str, bkp_id: int = 0) -> None:
        super().__init__(kind)
        self.kind, self.bkp_id = kind, bkp_id


class Variable:
    """A host-visible variable of `nr_bytes`, rounded up to 8."""

    space: ClassVar[Space]

    def __init__(self, nr_bytes: int) -> None:
        if nr_bytes <= 0:
            raise ValueError("a variable has at least one byte")
        self.nr_bytes = nr_bytes
        self.name = ""
        self.address = 0

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    @overload
    def __get__(self, program: None, owner: type) -> "Variable": ...
    @overload
    def __get__(self, program: "Program", owner: type) -> int: ...
    def __get__(self, program: "Program | None", owner: type) -> "int | Variable":
        return self if program is None else self.address


class Mram(Variable):
    space = Space.MRAM


class Wram(Variable):
    space = Space.WRAM


class Fifo(Wram):
    """A queue to or from the host: INPUT_FIFO_INIT or OUTPUT_FIFO_INIT with `nr_elements`, a power of two."""

    is_input: ClassVar[bool]

    def __init__(self, nr_elements: int, element_bytes: int) -> None:
        if nr_elements < 1 or nr_elements & (nr_elements - 1) or element_bytes < 1 or element_bytes % ALIGNMENT_BYTES:
            raise ValueError(f"a FIFO of {nr_elements} elements of {element_bytes} bytes")
        super().__init__(HEADER_BYTES + nr_elements * element_bytes)
        self.nr_elements, self.element_bytes = nr_elements, element_bytes

    @property
    def shape(self) -> FifoShape:
        return FifoShape(self.address, self.is_input, self.nr_elements, self.element_bytes)


class InputFifo(Fifo):
    is_input = True


class OutputFifo(Fifo):
    is_input = False


class Program:
    """Base of all programs; `symbols` by name is what the host can reach."""

    nr_tasklets: ClassVar[int] = 11
    iram_bytes: ClassVar[int] = 4096
    symbols: ClassVar[dict[str, Symbol]] = {}
    fifos: ClassVar[dict[str, FifoShape]] = {}
    heap_start: ClassVar[int] = 0
    """Where in WRAM mem_alloc begins."""

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        ends = {Space.WRAM: ALIGNMENT_BYTES, Space.MRAM: PRINT_BYTES}
        cls.fifos = {}
        symbols = {
            PRINT_LENGTH: Symbol(Space.WRAM, 0, ALIGNMENT_BYTES),
            PRINT_BUFFER: Symbol(Space.MRAM, 0, PRINT_BYTES),
        }
        for variable in [value for base in reversed(cls.__mro__) for value in vars(base).values()]:
            if isinstance(variable, Variable):
                variable.address = ends[variable.space]
                symbols[variable.name] = Symbol(variable.space, variable.address, variable.nr_bytes)
                ends[variable.space] += -(-variable.nr_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
            if isinstance(variable, Fifo):
                cls.fifos[variable.name] = variable.shape
        left = max(MRAM_BYTES - ends[Space.MRAM], 0)
        symbols[DPU_MRAM_HEAP_POINTER_NAME] = Symbol(Space.MRAM, ends[Space.MRAM], left, True)
        cls.symbols, cls.heap_start = symbols, ends[Space.WRAM]

    def main(self, t: "Tasklet") -> Generator[None, None, None] | None:
        """What each tasklet runs; a generator yields at barriers."""
        raise NotImplementedError


class Dpu:
    """One DPU while it runs: its memories, the heap, what was printed, the cycle counter."""

    def __init__(self, rank: Rank, dpu: int, program: Program) -> None:
        self.wram: NDArray[np.uint8] = rank.bytes_of(Space.WRAM)[dpu, : rank.size_of(Space.WRAM)]
        self.mram: NDArray[np.uint8] = rank.bytes_of(Space.MRAM)[dpu, : rank.size_of(Space.MRAM)]
        self.heap_start = self.heap = program.heap_start
        self.fifos = {shape.address: shape for shape in program.fifos.values()}
        self.printed = bytearray()
        self.dma_cycles = 0.0

    def flush(self) -> None:
        """Leave what was printed where the host looks for it."""
        self.mram[: len(self.printed)] = np.frombuffer(self.printed, np.uint8)
        self.wram[:ALIGNMENT_BYTES] = np.frombuffer(len(self.printed).to_bytes(ALIGNMENT_BYTES, "little"), np.uint8)


class Tasklet:
    """What `main` sees of the DPU: the runtime library of the SDK, as far as it is here."""

    def __init__(self, dpu: Dpu, number: int, dma: Dma) -> None:
        self._dpu = dpu
        self._number = number
        self._dma = dma

    def me(self) -> int:
        """Number of the tasklet, from 0."""
        return self._number

    def mem_alloc(self, nr_bytes: int) -> int:
        """Address of so many bytes of the WRAM heap, which all tasklets share and every run begins anew."""
        address = self._dpu.heap
        self._dpu.heap += -(-nr_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        if self._dpu.heap > len(self._dpu.wram):
            raise _Stopped("bkp", BkpFault.HEAP_FULL)
        return address

    def mem_reset(self) -> None:
        """Give the whole heap back."""
        self._dpu.heap = self._dpu.heap_start

    def wram(self, address: int, nr_bytes: int) -> NDArray[np.uint8]:
        """Bytes of WRAM, to read and write in place (`.view("<u4")` for words)."""
        if address < 0 or nr_bytes < 0 or address + nr_bytes > len(self._dpu.wram):
            raise _Stopped("mem")
        return self._dpu.wram[address : address + nr_bytes]

    def mram_read(self, mram: int, wram: int, nr_bytes: int) -> None:
        """DMA from MRAM to WRAM: 8 to 2048 bytes, all three numbers multiples of 8."""
        self._check_dma(mram, wram, nr_bytes)
        self._dpu.wram[wram : wram + nr_bytes] = self._dpu.mram[mram : mram + nr_bytes]
        self._dpu.dma_cycles += self._dma.dma_read_fixed_cycles.value + nr_bytes * self._dma.dma_per_byte_cycles.value

    def mram_write(self, wram: int, mram: int, nr_bytes: int) -> None:
        """DMA from WRAM to MRAM, with the same limits."""
        self._check_dma(mram, wram, nr_bytes)
        self._dpu.mram[mram : mram + nr_bytes] = self._dpu.wram[wram : wram + nr_bytes]
        self._dpu.dma_cycles += self._dma.dma_write_fixed_cycles.value + nr_bytes * self._dma.dma_per_byte_cycles.value

    def _check_dma(self, mram: int, wram: int, nr_bytes: int) -> None:
        if mram % ALIGNMENT_BYTES or wram % ALIGNMENT_BYTES:
            raise _Stopped("bkp", BkpFault.MRAM_UNALIGNED)
        if not DMA_MIN_BYTES <= nr_bytes <= DMA_MAX_BYTES or nr_bytes % ALIGNMENT_BYTES:
            raise _Stopped("dma")
        if min(mram, wram) < 0 or mram + nr_bytes > len(self._dpu.mram) or wram + nr_bytes > len(self._dpu.wram):
            raise _Stopped("dma")

    def input_fifo_pop(self, fifo: int) -> NDArray[np.uint8] | None:
        """The oldest element that the host pushed, taken out; None where there is none yet."""
        return get(self._dpu.wram, self._shape(fifo, is_input=True))

    def output_fifo_push(self, fifo: int, data: Any) -> bool:
        """One element of bytes more for the host; False where there is no room until it takes some."""
        return put(self._dpu.wram, self._shape(fifo, is_input=False), data)

    def _shape(self, fifo: int, *, is_input: bool) -> FifoShape:
        shape = self._dpu.fifos[fifo]
        if shape.is_input != is_input:
            raise ValueError("a FIFO of the other direction")
        return shape

    def printf(self, text: str) -> None:
        """Print; the host reads it with log_read."""
        self._dpu.printed += text.encode()
        if len(self._dpu.printed) > PRINT_BYTES:
            del self._dpu.printed[PRINT_BYTES:]
            raise _Stopped("bkp", BkpFault.PRINTF_OVERFLOW)

    def halt(self) -> None:
        """Stop the DPU with a fault."""
        raise _Stopped("bkp", BkpFault.HALT)

    def perfcounter_config(self) -> None:
        """Start counting from 0."""
        self._dpu.dma_cycles = 0.0

    def perfcounter_get(self) -> int:
        """Cycles that the DMA engine was busy."""
        return round(self._dpu.dma_cycles)


class Binary:
    """A program as the loader sees it (rank.DpuProgram)."""

    def __init__(self, program: type[Program]) -> None:
        self._program = program()
        self.name = program.__name__
        self.symbols = program.symbols
        self.nr_tasklets = program.nr_tasklets
        self.iram_bytes = program.iram_bytes
        dma = load_profile("upmem-v1a").device
        assert isinstance(dma, Dma)
        self._dma = dma

    @property
    def fifos(self) -> dict[str, FifoShape]:
        """What the host can link, by name."""
        return self._program.fifos

    def main(self, rank: Rank, dpus: I64) -> FaultKind | None:
        """Run on each DPU; those that stop early are noted in `rank.dpu_faults`."""
        for number in dpus.tolist():
            rank.dpu_faults.pop(number, None)
        runs = {number: self._run(Dpu(rank, number, self._program)) for number in dpus.tolist()}
        faults = self._side_by_side(runs) if self.fifos else {number: _ended(run) for number, run in runs.items()}
        found = {number: fault for number, fault in faults.items() if fault}
        rank.dpu_faults.update(found)
        return FaultKind.DPU_FAULT if found else None

    def _side_by_side(self, runs: Mapping[int, "Run"]) -> dict[int, DpuFault | None]:
        """All DPUs to their next barrier, again and again. The host gets its turn in between."""
        faults: dict[int, DpuFault | None] = {}
        while len(faults) < len(runs):
            for number in runs.keys() - faults.keys():
                try:
                    next(runs[number])
                except StopIteration as stop:
                    faults[number] = stop.value
            time.sleep(TURN_S)
        return faults

    def _run(self, dpu: Dpu) -> "Run":
        """All tasklets, from barrier to barrier -> what stopped them early."""
        number = 0
        try:
            waiting: dict[int, Generator[None, None, None]] = {}
            for number in range(self.nr_tasklets):
                started = self._program.main(Tasklet(dpu, number, self._dma))
                if isinstance(started, Generator):
                    waiting[number] = started
            while waiting:
                for number, tasklet in list(waiting.items()):
                    if next(tasklet, "ended") is not None:
                        del waiting[number]
                yield
        except _Stopped as stopped:
            return DpuFault(stopped.kind, number, stopped.bkp_id)
        except ZeroDivisionError:
            return DpuFault("bkp", number, BkpFault.DIVISION_BY_ZERO)
        except AssertionError:
            return DpuFault("bkp", number, BkpFault.ASSERT)
        finally:
            dpu.flush()
        return None


Run: TypeAlias = Generator[None, None, DpuFault | None]


def _ended(run: Run) -> DpuFault | None:
    """Run it to its end."""
    while True:
        try:
            next(run)
        except StopIteration as stop:
            fault: DpuFault | None = stop.value
            return fault
