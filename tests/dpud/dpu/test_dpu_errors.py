# SPDX-License-Identifier: GPL-2.0-only
import pytest

from dpud.dpu.errors import DpuErr, DpuError, DpuJob, dpu_error_to_string

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


# Texts typed from dpu.md 1.4.
TEXTS = {
    0: "success",
    1: "internal error",
    2: "system error",
    3: "driver error",
    4: "dpu allocation error",
    5: "invalid action for this dpu set",
    10: "invalid mram access",
    11: "invalid memory symbol access",
    12: "mram is busy",
    13: "dpu transfer is already set",
    16: "no program has been loaded in the dpu set",
    17: "cannot access symbol on dpus with different programs",
    20: "dpu is already running",
    21: "invalid memory transfer",
    22: "invalid launch policy",
    23: "dpu is in fault",
    25: "no such ELF file",
    27: "result timeout",
    28: "invalid profile",
    29: "undefined symbol",
    38: "dpu program uses more tasklets than the hardware has threads",
    0x80000017: "asynchronous operation error (launch_rank): dpu is in fault (0x17)",
    0x80010014: "asynchronous operation error (launch_dpu): dpu is already running (0x10014)",
}


@pytest.mark.parametrize("status", TEXTS)
def test_dpu_error_to_string(status: int) -> None:
    assert dpu_error_to_string(status) == TEXTS[status]


def test_no_such_error() -> None:
    with pytest.raises(ValueError, match="99 is no dpu_error_t"):
        dpu_error_to_string(99)
