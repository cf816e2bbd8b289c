# SPDX-License-Identifier: GPL-2.0-only
"""What the kernel side sees of a DPU: the seam at which hardware is injected.

The kernel hands over a batch as `dpu_hw_compact_execute(base_addr, frag_addrs, num_frags)` and gets back how far the
device came. The layout rule that both sides compute on their own, and compare:

    cursor = base_addr
    for each fragment, in ascending address order:
        move cursor up to the next page that lies in no skip run
        the fragment's new address is cursor; cursor moves on by one page

Skip runs are the pages that may not be written: unmovable, pinned, or in a pageblock of another type. The kernel only
hands over fragments for which that slot lies *below* the fragment, so every move goes down and a batch may be retired
in order: a destination is either free or was vacated by an earlier move. Pages are never lost on a device failure,
because a move counts as retired only after the written bytes were read back and summed; up to `nr_retired` the new
place is valid, from there on the old one still is.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]


@dataclass(frozen=True)
class DpuResult:
    """Outcome of one batch."""

    nr_retired: int
    """Moves valid at their new address, counted from the front of the batch."""
    new_addrs: U64
    """uint64[num_frags]: the layout as the device computed it (byte addresses)."""
    device_ns: int
    """Modelled device time by the engine's profile, or measured time with the `host` profile."""
    wall_ns: int
    """What the batch really took on this machine."""
    error: str | None = None
    """SDK text of the failure (`dpu is in fault`, `result timeout`, ...); None when the whole batch retired."""


class DpuCompletion(Protocol):
    """A batch in flight; also a waitable that a long operation may yield."""

    def done(self) -> bool: ...

    def wait(self, timeout_s: float) -> bool:
        """True once the batch is over (retired or failed)."""
        ...

    def result(self) -> DpuResult:
        """The outcome; only once `done()`."""
        ...


class DpuHardware(Protocol):
    """One or more ranks behind a driver."""

    @property
    def max_in_flight(self) -> int:
        """Batches worth having under way at once (a rank copies while the kernel prepares the next batch)."""
        ...

    def attach(self, memory: U64) -> None:
        """Give the device its view of physical memory: uint64[nr_pages, words_per_page]."""
        ...

    def dpu_hw_compact_execute(
        self, base_addr: int, frag_addrs: U64, num_frags: int, skip_runs: U64 | None = None
    ) -> DpuResult:
        """Run one batch to its end. `frag_addrs` uint64[num_frags], ascending byte addresses; `skip_runs`
        uint64[n, 2], ascending (byte address, nr_pages). Raises OSError(ENODEV) if no device is there, ENOMEM if
        no DPU could be allocated."""
        ...

    def submit(self, base_addr: int, frag_addrs: U64, num_frags: int, skip_runs: U64 | None = None) -> DpuCompletion:
        """Start the same batch and return at once."""
        ...

    def mapping_update_ns(self, nr_ptes: int, wall_ns: int) -> int:
        """What updating so many PTEs takes by the profile, or `wall_ns` where the profile is the host itself."""
        ...
