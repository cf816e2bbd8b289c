# SPDX-License-Identifier: GPL-2.0-only
"""A real `dpu` package (the UPMEM SDK's) under the same driver: `[dpu] backend = "dpu"`, `binary = "FILE"`.

The driver goes on as ever, over an emulated rank: allocation, arguments, fragment list, results, log. Only the program
differs: `PackageCompact` hands its run to the package. A DPU of real hardware cannot reach the host's pages, so their
bytes travel with the batch. The binary has the host symbols of `dpu_compact` (program.py) with the heap laid out as in
move.py, and one more:

    DPU_PAGES    MRAM   in: the bytes of this DPU's fragments, all pages of each, one after the other; out: the same,
                        after the DPU has moved each through its WRAM and noted the sum of what it wrote

Lists of moves (CMA, `dpu_move`) stay with the emulated program.

The host puts the pages in their places, in order, as far as DPU_RESULTS says they retired and the sums agree. The
package raises for everything else; its text decides which fault that was. Nothing of the SDK is part of dpud, and none
of this has run on hardware: it is tested against a stand-in with the package's calls.
"""

import importlib
import logging
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpud.dpu import move
from dpud.dpu.errors import DpuErr
from dpud.dpu.faults import FaultKind
from dpud.dpu.move import I64
from dpud.dpu.program import DPU_COMPACT, DPU_INPUT_ARGUMENTS, DPU_MRAM_HEAP_POINTER_NAME, DPU_RESULTS
from dpud.dpu.rank import Rank, Space

DPU_PAGES = "DPU_PAGES"
NAMES = ("DpuSet",)


class NoPackage(Exception):
    """The package cannot be used; the text says why."""


def import_package(name: str = "dpu") -> Any:
    """The package; raises NoPackage where it is missing, or does not look like the SDK's."""
    try:
        package = importlib.import_module(name)
    except ImportError as problem:
        raise NoPackage(f"{problem}; the package comes with the UPMEM SDK") from problem
    missing = [wanted for wanted in NAMES if not hasattr(package, wanted)]
    if missing:
        raise NoPackage(f"the package {name} has no {', '.join(missing)}")
    return package


class PackageCompact:
    """`dpu_compact` on the package's DPUs (rank.DpuProgram)."""

    name = DPU_COMPACT.name
    symbols = DPU_COMPACT.symbols
    nr_tasklets = DPU_COMPACT.nr_tasklets
    iram_bytes = DPU_COMPACT.iram_bytes

    def __init__(self, package: Any, binary: str, profile: str = "") -> None:
        self._package = package
        self._binary = binary
        self._profile = profile

    def main(self, rank: Rank, dpus: I64) -> FaultKind | None:
        """Run one batch there; whatever the package raises, or a wrong layout, leaves every page in place."""
        mram, wram = rank.words_of(Space.MRAM), rank.words_of(Space.WRAM)
        nr_moves = move.plan_layout(mram, wram, dpus, rank.memory.shape[0])
        if nr_moves < 0:
            wram[dpus, move.RES_STATUS] = -nr_moves
            return None
        expected = mram[dpus, move.HEAP : move.HEAP + move.NR_COLS * int(wram[dpus[0], move.ARG_NR_SLOTS])].copy()
        try:
            with self._package.DpuSet(nr_dpus=len(dpus), profile=self._profile, binary=self._binary) as real:
                pages = self._run(real, rank, dpus)
        except Exception as error:
            logging.warning("dpu package: %s", error)
            return FaultKind.TIMEOUT if DpuErr.TIMEOUT.text in str(error) else FaultKind.DPU_FAULT
        if not self._agrees(rank, dpus, expected):
            logging.error("dpu package: the binary's layout differs from the rule")
            return FaultKind.DPU_FAULT
        self._retire(rank, dpus, pages)
        return None

    @staticmethod
    def _agrees(rank: Rank, dpus: I64, expected: I64) -> bool:
        """The new addresses in the rank are the expected ones, as far as the batch goes."""
        mram, wram = rank.words_of(Space.MRAM), rank.words_of(Space.WRAM)
        for i, dpu in enumerate(dpus.tolist()):
            new_at, nr = move.COL_NEW * int(wram[dpu, move.ARG_NR_SLOTS]), int(wram[dpu, move.ARG_NR_FRAGS])
            if (mram[dpu, move.HEAP + new_at : move.HEAP + new_at + nr] != expected[i, new_at : new_at + nr]).any():
                return False
        return True

    def _run(self, real: Any, rank: Rank, dpus: I64) -> list[NDArray[np.uint64]]:
        """Copy in, execute, copy the results into the emulated rank -> what became of each DPU's pages."""
        mram, wram = rank.words_of(Space.MRAM), rank.words_of(Space.WRAM)
        heaps = [self._heap(mram[dpu], wram[dpu]) for dpu in dpus.tolist()]
        frags = [heap[: int(wram[dpu, move.ARG_NR_FRAGS])] for heap, dpu in zip(heaps, dpus.tolist(), strict=True)]
        pages = [np.ascontiguousarray(rank.memory[_pfns(mine)]) for mine in frags]
        real.copy(DPU_INPUT_ARGUMENTS, [bytearray(wram[dpu, : move.NR_ARGS].tobytes()) for dpu in dpus.tolist()])
        real.copy(DPU_MRAM_HEAP_POINTER_NAME, [bytearray(heap.tobytes()) for heap in heaps])
        buffers = self._padded([page.tobytes() for page in pages])
        real.copy(DPU_PAGES, buffers)
        real.exec()
        results = [bytearray(8 * move.NR_RESULTS) for _ in heaps]
        real.copy(results, DPU_RESULTS)
        after = [bytearray(heap.nbytes) for heap in heaps]
        real.copy(after, DPU_MRAM_HEAP_POINTER_NAME)
        real.copy(buffers, DPU_PAGES)
        for i, dpu in enumerate(dpus.tolist()):
            heap = np.frombuffer(after[i], np.int64)
            mram[dpu, move.HEAP : move.HEAP + len(heap)] = heap
            wram[dpu, move.RES_STATUS : move.RES_STATUS + move.NR_RESULTS] = np.frombuffer(results[i], np.int64)
        words = rank.memory.shape[1]
        return [
            np.frombuffer(buffer, np.uint64)[: page.size].reshape(-1, words)
            for buffer, page in zip(buffers, pages, strict=True)
        ]

    @staticmethod
    def _heap(mram: I64, wram: I64) -> I64:
        """The part of one DPU's heap that the batch uses, on the first DPU's word for the skip runs."""
        nr_words = move.NR_COLS * int(wram[move.ARG_NR_SLOTS]) + 2 * int(wram[move.ARG_NR_SKIP_RUNS])
        return mram[move.HEAP : move.HEAP + nr_words]

    @staticmethod
    def _padded(contents: list[bytes]) -> list[bytearray]:
        """Buffers of one length, since a transfer has one."""
        length = max(8, *map(len, contents))
        return [bytearray(content.ljust(length, b"\0")) for content in contents]

    def _retire(self, rank: Rank, dpus: I64, pages: list[NDArray[np.uint64]]) -> None:
        """Put the pages where the layout says, in the order of the batch, up to the first that did not retire."""
        mram, wram = rank.words_of(Space.MRAM), rank.words_of(Space.WRAM)
        nr_retired = 0
        for dpu, mine in zip(dpus.tolist(), pages, strict=True):
            nr_slots, nr_done = int(wram[dpu, move.ARG_NR_SLOTS]), int(wram[dpu, move.RES_NR_RETIRED])
            heap, at = mram[dpu, move.HEAP :], 0
            for k in range(min(nr_done, int(wram[dpu, move.ARG_NR_FRAGS]))):
                nr_pages = 1 << int(heap[k] % move.PAGE_SIZE)
                folio = mine[at : at + nr_pages]
                if move.page_sum(folio.reshape(-1)) != heap[move.COL_SUM * nr_slots + k]:
                    wram[dpu, move.RES_STATUS] = move.STATUS_CORRUPTED
                    break
                new = int(heap[move.COL_NEW * nr_slots + k]) // move.PAGE_SIZE
                rank.memory[new : new + nr_pages] = folio
                at += nr_pages
                nr_retired += 1
            else:
                if nr_done == wram[dpu, move.ARG_NR_FRAGS]:
                    continue
            break
        rank.completion[0] = nr_retired


def _pfns(frags: I64) -> I64:
    """The pages of some fragments (pfn << 12 | order), in order."""
    runs = [np.arange(frag // move.PAGE_SIZE, frag // move.PAGE_SIZE + (1 << frag % move.PAGE_SIZE)) for frag in frags]
    return np.concatenate([*runs, np.zeros(0, np.int64)]).astype(np.int64)
