# SPDX-License-Identifier: GPL-2.0-only
from dpud.dpu.errors import DpuErr, DpuError, DpuJob

# SDK 2025.1, typed from reference dpu.md 1.4.
NAMES = """
OK INTERNAL SYSTEM DRIVER ALLOCATION INVALID_DPU_SET INVALID_THREAD_ID INVALID_NOTIFY_ID
INVALID_WRAM_ACCESS INVALID_IRAM_ACCESS INVALID_MRAM_ACCESS INVALID_SYMBOL_ACCESS MRAM_BUSY
TRANSFER_ALREADY_SET INVALID_PARALLEL_MEMORY_TRANSFER WRAM_FIFO_FULL NO_PROGRAM_LOADED
DIFFERENT_DPU_PROGRAMS CORRUPTED_MEMORY DPU_DISABLED DPU_ALREADY_RUNNING INVALID_MEMORY_TRANSFER
INVALID_LAUNCH_POLICY DPU_FAULT ELF_INVALID_FILE ELF_NO_SUCH_FILE ELF_NO_SUCH_SECTION TIMEOUT
INVALID_PROFILE UNKNOWN_SYMBOL LOG_FORMAT LOG_CONTEXT_MISSING LOG_BUFFER_TOO_SMALL VPD_INVALID_FILE
VPD_NO_REPAIR NO_THREAD_PER_RANK INVALID_BUFFER_SIZE NONBLOCKING_SYNC_CALLBACK TOO_MANY_TASKLETS
SG_TOO_MANY_BLOCKS SG_LENGTH_MISMATCH SG_NOT_ACTIVATED SG_NOT_MRAM_SYMBOL
"""


def test_names_have_their_numbers() -> None:
    assert {code.name: int(code) for code in DpuErr} == {name: i for i, name in enumerate(NAMES.split())}


def test_texts_and_c_names() -> None:
    assert str(DpuError(DpuErr.DPU_FAULT)) == "dpu is in fault"
    assert str(DpuError(DpuErr.TIMEOUT)) == "result timeout"
    assert str(DpuError(DpuErr.ALLOCATION)) == "dpu allocation error"
    assert (DpuErr.OK.sdk_name, DpuErr.MRAM_BUSY.sdk_name) == ("DPU_OK", "DPU_ERR_MRAM_BUSY")


def test_asynchronous_error_names_its_job() -> None:
    error = DpuError(DpuErr.DPU_FAULT, DpuJob.LAUNCH_RANK)
    assert str(error) == "asynchronous operation error (launch_rank): dpu is in fault (0x17)"
    assert error.status == 0x80000017
