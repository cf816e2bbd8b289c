# SPDX-License-Identifier: GPL-2.0-only
"""dpu_checkpoint_*: the memories and the fault of one DPU, saved, restored, serialized.

Programs here are Python (tasklet.py), so there are no instructions, registers and program counters to save: `iram` is
None, and `threads` is empty.
"""

from collections.abc import Sequence
from enum import IntFlag

import msgspec
import numpy as np

from dpud.dpu.dpu_set import DpuSet
from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.rank import DpuFault, Space


class CheckpointFlags(IntFlag):
    DPU_CHECKPOINT_INTERNAL = 1
    DPU_CHECKPOINT_IRAM = 2
    DPU_CHECKPOINT_MRAM = 8
    DPU_CHECKPOINT_WRAM = 0x10
    DPU_CHECKPOINT_ALL = 0x1B


_SPACES = {"mram": Space.MRAM, "wram": Space.WRAM}
_FLAGS = {"mram": CheckpointFlags.DPU_CHECKPOINT_MRAM, "wram": CheckpointFlags.DPU_CHECKPOINT_WRAM}


class _Saved(msgspec.Struct, frozen=True):
    memories: dict[str, bytes]
    fault: tuple[str, int, int] | None


class DpuContext:
    """What a checkpoint holds."""

    threads: Sequence[object] = ()

    def __init__(self, saved: _Saved) -> None:
        self._saved = saved

    @staticmethod
    def from_buffer(buffer: bytes | bytearray | memoryview) -> "DpuContext":
        """The inverse of `serialize`; DpuError(INTERNAL) for anything else."""
        try:
            return DpuContext(msgspec.msgpack.decode(bytes(buffer), type=_Saved))
        except msgspec.MsgspecError:
            raise DpuError(DpuErr.INTERNAL) from None

    def serialize(self) -> bytearray:
        return bytearray(msgspec.msgpack.encode(self._saved))

    def iram(self) -> None:
        """There are no instructions."""

    def mram(self) -> memoryview | None:
        """MRAM bytes, if they were saved."""
        return self._memory("mram")

    def wram(self) -> memoryview | None:
        """WRAM words of 32 bits, if they were saved."""
        memory = self._memory("wram")
        return None if memory is None else memory.cast("I")

    def _memory(self, name: str) -> memoryview | None:
        memory = self._saved.memories.get(name)
        return None if memory is None else memoryview(memory)

    def bkp_fault(self) -> tuple[int, int] | None:
        """(tasklet, fault id) of a breakpoint fault."""
        kind, tasklet, number = self._saved.fault or ("", 0, 0)
        return (tasklet, number) if kind == "bkp" else None

    def dma_fault(self) -> int | None:
        """The tasklet that asked for an impossible DMA."""
        return self._tasklet("dma")

    def mem_fault(self) -> int | None:
        """The tasklet that went outside WRAM."""
        return self._tasklet("mem")

    def _tasklet(self, wanted: str) -> int | None:
        kind, tasklet, _ = self._saved.fault or ("", 0, 0)
        return tasklet if kind == wanted else None


def checkpoint_save(dpus: DpuSet, flags: CheckpointFlags) -> DpuContext:
    """dpu_checkpoint_save, of a single DPU that does not run."""
    rank, dpu = dpus.single()
    rank.check_access(Space.MRAM, np.array([dpu]))
    memories = {
        name: rank.bytes_of(space)[dpu, : rank.size_of(space)].tobytes()
        for name, space in _SPACES.items()
        if flags & _FLAGS[name]
    }
    fault = rank.dpu_faults.get(dpu)
    return DpuContext(_Saved(memories, (fault.kind, fault.tasklet, fault.bkp_id) if fault else None))


def checkpoint_restore(dpus: DpuSet, context: DpuContext, flags: CheckpointFlags) -> None:
    """dpu_checkpoint_restore; DpuError(INVALID_MEMORY_TRANSFER) for one of a DPU with other memories."""
    rank, dpu = dpus.single()
    rank.check_access(Space.MRAM, np.array([dpu]))
    chosen = {name: data for name, data in context._saved.memories.items() if flags & _FLAGS[name]}
    if any(len(data) != rank.size_of(_SPACES[name]) for name, data in chosen.items()):
        raise DpuError(DpuErr.INVALID_MEMORY_TRANSFER)
    for name, data in chosen.items():
        space = _SPACES[name]
        rank.bytes_of(space)[dpu, : rank.size_of(space)] = np.frombuffer(data, np.uint8)
    if flags & CheckpointFlags.DPU_CHECKPOINT_INTERNAL:
        rank.dpu_faults.pop(dpu, None)
        if context._saved.fault:
            rank.dpu_faults[dpu] = DpuFault(*context._saved.fault)
