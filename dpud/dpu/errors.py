# SPDX-License-Identifier: GPL-2.0-only
"""dpu_error_t: the SDK's error names, numbers and texts, and the exception that carries one.

Numbers follow SDK 2025.1 (reference dpu.md 1.4). They moved between releases, so code matches by name. The
texts are what `dpu_error_to_string` prints; for the few codes whose text we could not read, the name is
spelled out in words.
"""

from enum import IntEnum
from typing import Self

ASYNC_JOBS_BIT = 31
ASYNC_JOB_TYPE_SHIFT = 16


class DpuErr(IntEnum):
    """One dpu_error_t; `text` is its SDK text."""

    text: str

    def __new__(cls, number: int, text: str) -> Self:
        member = int.__new__(cls, number)
        member._value_ = number
        member.text = text
        return member

    OK = 0, "success"
    INTERNAL = 1, "internal error"
    SYSTEM = 2, "system error"
    DRIVER = 3, "driver error"
    ALLOCATION = 4, "dpu allocation error"
    INVALID_DPU_SET = 5, "invalid action for this dpu set"
    INVALID_THREAD_ID = 6, "invalid thread id"
    INVALID_NOTIFY_ID = 7, "invalid notify id"
    INVALID_WRAM_ACCESS = 8, "invalid wram access"
    INVALID_IRAM_ACCESS = 9, "invalid iram access"
    INVALID_MRAM_ACCESS = 10, "invalid mram access"
    INVALID_SYMBOL_ACCESS = 11, "invalid memory symbol access"
    MRAM_BUSY = 12, "mram is busy"
    TRANSFER_ALREADY_SET = 13, "dpu transfer is already set"
    INVALID_PARALLEL_MEMORY_TRANSFER = 14, "invalid parallel memory transfer"
    WRAM_FIFO_FULL = 15, "wram fifo is full"
    NO_PROGRAM_LOADED = 16, "no program has been loaded in the dpu set"
    DIFFERENT_DPU_PROGRAMS = 17, "cannot access symbol on dpus with different programs"
    CORRUPTED_MEMORY = 18, "corrupted memory"
    DPU_DISABLED = 19, "dpu is disabled"
    DPU_ALREADY_RUNNING = 20, "dpu is already running"
    INVALID_MEMORY_TRANSFER = 21, "invalid memory transfer"
    INVALID_LAUNCH_POLICY = 22, "invalid launch policy"
    DPU_FAULT = 23, "dpu is in fault"
    ELF_INVALID_FILE = 24, "invalid ELF file"
    ELF_NO_SUCH_FILE = 25, "no such ELF file"
    ELF_NO_SUCH_SECTION = 26, "no such ELF section"
    TIMEOUT = 27, "result timeout"
    INVALID_PROFILE = 28, "invalid profile"
    UNKNOWN_SYMBOL = 29, "undefined symbol"
    LOG_FORMAT = 30, "logging format error"
    LOG_CONTEXT_MISSING = 31, "logging context missing"
    LOG_BUFFER_TOO_SMALL = 32, "logging buffer too small"
    VPD_INVALID_FILE = 33, "invalid VPD file"
    VPD_NO_REPAIR = 34, "repairs have not been generated"
    NO_THREAD_PER_RANK = 35, "no thread to perform multiple-rank operation"
    INVALID_BUFFER_SIZE = 36, "invalid buffer size"
    NONBLOCKING_SYNC_CALLBACK = 37, "nonblocking and synchronous callback is invalid"
    TOO_MANY_TASKLETS = 38, "dpu program uses more tasklets than the hardware has threads"
    SG_TOO_MANY_BLOCKS = 39, "too many scatter gather blocks"
    SG_LENGTH_MISMATCH = 40, "scatter gather length mismatch"
    SG_NOT_ACTIVATED = 41, "scatter gather is not activated"
    SG_NOT_MRAM_SYMBOL = 42, "scatter gather needs an mram symbol"

    @property
    def sdk_name(self) -> str:
        """The C spelling, `DPU_OK` or `DPU_ERR_...`."""
        return "DPU_OK" if self is DpuErr.OK else f"DPU_ERR_{self.name}"


class DpuJob(IntEnum):
    """What an asynchronous job was doing; the value sits from bit 16 of an asynchronous dpu_error_t.

    The SDK's own numbers (enum dpu_thread_job_type, SDK 2024.2), of which these are used here.
    """

    LAUNCH_RANK = 0
    LAUNCH_DPU = 1
    COPY_WRAM_TO_MATRIX = 3
    COPY_IRAM_TO_MATRIX = 4
    COPY_MRAM_TO_MATRIX = 5
    COPY_WRAM_FROM_MATRIX = 6
    COPY_IRAM_FROM_MATRIX = 7
    COPY_MRAM_FROM_MATRIX = 8
    CALLBACK = 12


def dpu_error_to_string(status: int) -> str:
    """dpu_error_to_string: the text of a dpu_error_t, of an asynchronous one too; ValueError for no such number."""
    by_number = {int(code): code for code in DpuErr}
    code = by_number.get(status & 0xFFFF if status >> ASYNC_JOBS_BIT else status)
    if code is None:
        raise ValueError(f"{status} is no dpu_error_t")
    job = DpuJob(status >> ASYNC_JOB_TYPE_SHIFT & 0x7FFF) if status >> ASYNC_JOBS_BIT else None
    return str(DpuError(code, job))


class DpuError(Exception):
    """A call that did not return DPU_OK; `str()` is the SDK's text, and the job that failed, if any."""

    def __init__(self, code: DpuErr, job: DpuJob | None = None) -> None:
        self.code = code
        self.job = job
        super().__init__(self._text())

    def _text(self) -> str:
        if self.job is None:
            return self.code.text
        job = self.job.name.lower()
        return f"asynchronous operation error ({job}): {self.code.text} (0x{self.status & 0x7FFFFFFF:x})"

    @property
    def status(self) -> int:
        """The number the C function would have returned."""
        if self.job is None:
            return int(self.code)
        return 1 << ASYNC_JOBS_BIT | self.job << ASYNC_JOB_TYPE_SHIFT | self.code
