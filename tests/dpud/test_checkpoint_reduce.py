# SPDX-License-Identifier: GPL-2.0-only
"""Errors that something in a machine remembers, in a checkpoint."""

import errno
import pickle

import pytest

from dpud.checkpoint_reduce import make_error, reduce_error
from dpud.gpu.errors import CorruptPage, GpuError, HalfBack, UncorrectableError
from kernelsim.kinds import PartialWrite, StreamOverrun
from kernelsim.page_isolation import RangeBusy
from kernelsim.trace_filter import FilterError

ERRORS = (
    *(OSError(errno.EIO, "why"), FileNotFoundError(errno.ENOENT, "why"), ValueError("a", 3), ValueError()),
    *(FilterError(errno.EINVAL, "Field not found", "a == 1", 3), FilterError(errno.EINVAL, None, "a")),
    *(RangeBusy(5, "mapped"), PartialWrite((1, 2)), StreamOverrun(7)),
    *(GpuError(errno.EBUSY, "why"), CorruptPage(0x1000, "checksum"), UncorrectableError(1, 2)),
    HalfBack(errno.EIO, 3, 2, "why"),
)


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_it_is_what_it_was(error: Exception) -> None:
    make, args, state = reduce_error(error)
    again = make(*args)
    again.__setstate__(state)
    assert type(again) is type(error)
    assert (str(again), again.args, vars(again)) == (str(error), error.args, vars(error))
    if isinstance(error, OSError):
        assert (again.errno, again.strerror) == (error.errno, error.strerror)


def test_only_errors_are_made() -> None:
    with pytest.raises(pickle.UnpicklingError, match="is no error"):
        make_error(dict, ())  # type: ignore[arg-type]
