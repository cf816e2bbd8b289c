# SPDX-License-Identifier: GPL-2.0-only
"""WRAM FIFOs: queues between the host and running DPUs, the `dpu_link_*_fifo` and `dpu_fifo_*_xfer` of the host API.

A FIFO is a ring of 2^n elements of one size in WRAM, behind two words: how many were read and how many were written,
ever. Of an input FIFO the host owns the second, of an output FIFO the first; so neither side ever waits for a lock.

    link = dpus.link_input_fifo("requests")
    dpus.fifo_prepare_xfer(link, request)        # one buffer for all DPUs of the set
    dpus.fifo_push_xfer(link)                    # one element more in each; WRAM_FIFO_FULL where none came free in time
    results = dpus.link_output_fifo("results")
    one.fifo_prepare_xfer(results, buffer)       # room for the whole ring, for each DPU
    dpus.fifo_push_xfer(results)                 # all there is, and the rings are empty
    [results.element(one, buffer, i) for i in range(results.size(one))]

As the SDK does it (2024.2, read, not copied): an input push takes one element a DPU, and retries those that are full;
those that were not have it already when it fails. An output push moves whole rings, read pointers after them.

Differs from the SDK: there a DPU whose buffer was prepared already keeps that one in silence, here it is
TRANSFER_ALREADY_SET as with prepare_xfer. What is asynchronous there happens at once here, and fails at once: behind
the run that waits for it in the rank's order of jobs it would wait for ever. Where a ring lies behind its symbol is
ours; the program says its shape.
"""

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dpud.dpu.dpu_xfer import DEFAULT, Buffer, DpuTransfers, XferFlags, as_bytes
from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.rank import Rank, Space

if TYPE_CHECKING:
    from dpud.dpu.dpu_set import DpuSet

POINTER_BYTES = 8
HEADER_BYTES = 2 * POINTER_BYTES
MAX_RETRIES = 1000
RETRY_US = 100
"""How long an input push waits for a DPU whose FIFO is full; may be changed in the link."""

US_PER_S = 1_000_000
Words = NDArray[np.uint64]


@dataclass(frozen=True)
class FifoShape:
    """What a program says of one: `address` in WRAM of the two pointers, behind which the ring lies."""

    address: int
    is_input: bool
    nr_elements: int
    element_bytes: int

    @property
    def nr_bytes(self) -> int:
        """Of the ring."""
        return self.nr_elements * self.element_bytes


@dataclass(eq=False)
class FifoLink:
    """dpu_fifo_link_t: a FIFO of all DPUs of a set."""

    shape: FifoShape
    max_retries: int = MAX_RETRIES
    time_for_retry_us: int = RETRY_US
    prepared: dict[tuple[Rank, int], memoryview] = field(default_factory=dict)
    pointers: dict[tuple[Rank, int], tuple[int, int]] = field(default_factory=dict)
    """(read, written) of each DPU's output FIFO at the last push."""

    def size(self, dpu: "DpuSet") -> int:
        """get_fifo_size: elements that the last push brought from one DPU."""
        read, written = self.pointers.get(dpu.single(), (0, 0))
        return written - read

    def element(self, dpu: "DpuSet", buffer: Buffer, index: int) -> memoryview:
        """get_fifo_elem: the `index`-th oldest of them, in the buffer that was prepared. IndexError beyond the last."""
        if not 0 <= index < self.size(dpu):
            raise IndexError(f"element {index} of {self.size(dpu)}")
        read, _ = self.pointers[dpu.single()]
        begin = (read + index) % self.shape.nr_elements * self.shape.element_bytes
        return as_bytes(buffer)[begin : begin + self.shape.element_bytes]


def pointers_of(wram: NDArray[np.uint8], shape: FifoShape) -> Words:
    """[read, written] of one DPU's FIFO, in place."""
    words: Words = wram[shape.address : shape.address + HEADER_BYTES].view(np.uint64)
    return words


def ring_of(wram: NDArray[np.uint8], shape: FifoShape) -> NDArray[np.uint8]:
    """[element, byte] of one DPU's FIFO, in place."""
    begin = shape.address + HEADER_BYTES
    return wram[begin : begin + shape.nr_bytes].reshape(shape.nr_elements, shape.element_bytes)


def get(wram: NDArray[np.uint8], shape: FifoShape) -> NDArray[np.uint8] | None:
    """The oldest element, taken out; None where there is none."""
    pointers = pointers_of(wram, shape)
    read, written = pointers.tolist()
    if read == written:
        return None
    found: NDArray[np.uint8] = ring_of(wram, shape)[read % shape.nr_elements].copy()
    pointers[0] = read + 1
    return found


def put(wram: NDArray[np.uint8], shape: FifoShape, data: Any) -> bool:
    """One element more; False where there is no room. The pointer last: who sees it sees the element."""
    pointers = pointers_of(wram, shape)
    read, written = pointers.tolist()
    if written - read >= shape.nr_elements:
        return False
    ring_of(wram, shape)[written % shape.nr_elements] = data
    pointers[1] = written + 1
    return True


class DpuFifos(DpuTransfers):
    """The FIFOs of a set of DPUs; dpu_set.DpuSet is the whole."""

    def link_input_fifo(self, name: str) -> FifoLink:
        """dpu_link_input_fifo. DpuError UNKNOWN_SYMBOL; INVALID_SYMBOL_ACCESS for what is no such FIFO."""
        return self._link(name, is_input=True)

    def link_output_fifo(self, name: str) -> FifoLink:
        """dpu_link_output_fifo; fails like the other."""
        return self._link(name, is_input=False)

    def _link(self, name: str, *, is_input: bool) -> FifoLink:
        self.get_symbol(name)  # of all DPUs, or it raises
        rank, dpus = self.live_parts()[0]
        shape = getattr(rank.program_of(dpus), "fifos", {}).get(name)  # programs without FIFOs need not say so
        if shape is None or shape.is_input != is_input:
            raise DpuError(DpuErr.INVALID_SYMBOL_ACCESS)
        return FifoLink(shape)

    def fifo_prepare_xfer(self, link: FifoLink, buffer: Buffer) -> None:
        """dpu_fifo_prepare_xfer: what the next push moves to or from each DPU of the set.

        DpuError, nothing prepared: TRANSFER_ALREADY_SET; INVALID_MEMORY_TRANSFER for a buffer that is too small (one
        element in, a ring out) or cannot be written.
        """
        view, shape = as_bytes(buffer), link.shape
        wanted = shape.element_bytes if shape.is_input else shape.nr_bytes
        if len(view) < wanted or (not shape.is_input and view.readonly):
            raise DpuError(DpuErr.INVALID_MEMORY_TRANSFER)
        keys = [(rank, dpu) for rank, dpus in self.live_parts() for dpu in dpus.tolist()]
        if any(key in link.prepared for key in keys):
            raise DpuError(DpuErr.TRANSFER_ALREADY_SET)
        link.prepared.update(dict.fromkeys(keys, view))

    def fifo_push_xfer(self, link: FifoLink, flags: XferFlags = DEFAULT) -> None:
        """dpu_fifo_push_xfer, while the DPUs run or not. DpuError WRAM_FIFO_FULL, DRIVER for a rank that is lost."""
        moves: list[tuple[Rank, dict[int, memoryview]]] = []
        for rank, dpus in self.live_parts():
            rank.check_access(Space.WRAM, dpus)
            keys = [(rank, dpu) for dpu in dpus.tolist() if (rank, dpu) in link.prepared]
            moves.append((rank, {key[1]: link.prepared[key] for key in keys}))
            if not flags & XferFlags.DPU_XFER_NO_RESET:
                for key in keys:
                    del link.prepared[key]
        if link.shape.is_input:
            _push(link, moves)
        else:
            _flush(link, moves)


def _push(link: FifoLink, moves: list[tuple[Rank, dict[int, memoryview]]]) -> None:
    """One element to each DPU. Raises DpuError(WRAM_FIFO_FULL); those that had room have it."""
    waiting = {(rank, dpu): view for rank, buffers in moves for dpu, view in buffers.items()}
    for retry in range(link.max_retries + 1):
        for (rank, dpu), view in list(waiting.items()):
            data = np.frombuffer(view, np.uint8)[: link.shape.element_bytes]
            if put(rank.bytes_of(Space.WRAM)[dpu], link.shape, data):
                del waiting[rank, dpu]
        if not waiting:
            return
        if retry < link.max_retries:
            time.sleep(link.time_for_retry_us / US_PER_S)
    raise DpuError(DpuErr.WRAM_FIFO_FULL)


def _flush(link: FifoLink, moves: list[tuple[Rank, dict[int, memoryview]]]) -> None:
    """Whole rings, which are empty then."""
    for rank, buffers in moves:
        wram = rank.bytes_of(Space.WRAM)
        for dpu, view in buffers.items():
            pointers = pointers_of(wram[dpu], link.shape)
            read, written = pointers.tolist()
            np.frombuffer(view, np.uint8)[: link.shape.nr_bytes] = ring_of(wram[dpu], link.shape).reshape(-1)
            link.pointers[rank, dpu] = read, written
            pointers[0] = written
