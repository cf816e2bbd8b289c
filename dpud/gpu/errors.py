# SPDX-License-Identifier: MIT
"""How the data path says no: an errno and one line.

ENOMEM     no memory of the kind that was asked for, and none can be made free
EACCES     the client may not do that there
EFAULT     nothing is mapped there
EINVAL     a value that makes no sense
EBUSY      not while it is in use
EIO        the bytes are lost, and known to be: a checksum, a torn slot, a vanished file
ENOSPC     a store behind the device is full
EAGAIN     less was done than was asked for
ETIMEDOUT  waited for, in vain
ENODEV     the device is gone

Of migrations besides: EPROTO (the other side said what makes no sense), ECONNRESET (it is gone), ESTALE (the client
has other memory than at first), ECANCELED, EEXIST, ENOENT, ENODATA, ESRCH.
"""

import errno


class GpuError(OSError):
    """`errno` and a line of text. A file's reader or writer gets the same number."""

    nr_done = 0
    """Of a write: bytes that were written before it failed."""

    def __init__(self, number: int, why: str) -> None:
        super().__init__(number, why)


class CorruptPage(GpuError):
    """The stored bytes of a page are not the ones that were put there. `key`: which page, or which of a batch."""

    def __init__(self, key: int, why: str) -> None:
        super().__init__(errno.EIO, f"page {key:#x}: {why}")
        self.key = key


class HalfBack(GpuError):
    """A client went back to a checkpoint, but for `nr_lost` pages, which are lost. To go back again makes them good."""

    def __init__(self, number: int, sequence: int, nr_lost: int, why: str) -> None:
        super().__init__(number, f"{nr_lost} pages did not get back to checkpoint {sequence}, and are lost: {why}")
        self.sequence, self.nr_lost = sequence, nr_lost


class UncorrectableError(GpuError):
    """ECC found more wrong in a frame of a memory than it can correct. Nothing was handed out."""

    def __init__(self, location: int, frame: int) -> None:
        super().__init__(errno.EIO, f"uncorrectable error in frame {frame:#x} of location {location}")
        self.location, self.frame = location, frame
