# SPDX-License-Identifier: GPL-2.0-only
"""What the kernel side sees of a DPU: the seam at which hardware is injected.

The kernel hands over a batch as `dpu_hw_compact_execute(base_addr, frag_addrs, num_frags)` and gets back how far the
device came. A fragment is a folio of 2^order pages, aligned to its size; its entry in the list is its byte address with
the order in the low 12 bits (`pfn << 12 | order`). The layout rule that both sides compute on their own, and compare:

    cursor = base_addr
    for each fragment, in ascending address order:
        move cursor up to the next multiple of the fragment's size from which on no page of that size lies in a skip run
        the fragment's new address is cursor; cursor moves on by the fragment's size

Skip runs are the pages that may not be written: unmovable, pinned, in a pageblock of another type, or of a folio for
which this rule finds no place that ends below it (such a folio is not in the batch). So every move goes down, source
and destination of a move do not overlap, and a batch may be retired in order: a destination is either free or was
vacated by an earlier move. Pages are never lost on a device failure,
because a move counts as retired only after the written bytes were read back and summed; up to `nr_retired` the new
place is valid, from there on the old one still is.

An engine is who copies, and how long a batch takes by which model. All engines but `cpu` and `cpu-batched`, where the
kernel copies, are served by the same device. What is modelled is a whole batch: the time until its pages can be used
again, and whose it is (BatchTimes).

The other thing a device does is to move listed pages to listed places, `dpu_hw_move_execute(src_addrs, dst_addrs, n)`.
A range of memory is emptied with it (contig.py). An entry of `src_addrs` is `pfn << 12 | order`, a folio of 2^order
pages at its natural alignment; `dst_addrs` has the byte address it goes to. No destination may overlap a source or
another destination, so the moves may go in any order; they retire in the order of the list, by the same rule.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

U64 = NDArray[np.uint64]

ENGINES = ("cpu", "cpu-batched", "ptdma", "dsa", "upmem-v1a", "upmem-v1b", "host", "seed", "ideal")
"""The engines, as debugfs dpu_compact/engine lists them."""


@dataclass(frozen=True)
class HostWork:
    """What the kernel did around the copies of a batch."""

    nr_folios: int
    nr_scanned: int
    """Page frames looked at."""
    nr_flushes: int
    """TLB flushes of one mm each, on `nr_cpus` CPUs."""
    nr_cpus: int
    nr_ptes: int
    prepare_wall_ns: int = 0
    """What isolation, unmapping and flushing, and the update of the mappings really took."""
    update_wall_ns: int = 0


@dataclass(frozen=True)
class BatchTimes:
    """One batch by its engine's clock, in ns. `device_ns` is the copies, whoever makes them."""

    isolate_ns: int
    unmap_ns: int
    flush_ns: int
    device_ns: int
    remap_ns: int

    @property
    def total_ns(self) -> int:
        return self.isolate_ns + self.unmap_ns + self.flush_ns + self.device_ns + self.remap_ns


class Engine(Protocol):
    """A name in ENGINES with its model."""

    @property
    def name(self) -> str: ...

    @property
    def copier(self) -> Literal["device", "cpu", "cpu-batched"]:
        """Who copies: the device, the kernel in clusters of 32 pages, or the kernel region by region."""
        ...

    @property
    def measured(self) -> bool:
        """Its clock is this machine's own."""
        ...

    def describe(self) -> str:
        """Its model: one line of text, then each constant with value, unit, where it is from and what that is worth."""
        ...

    def copy_ns(self, nr_pages: int, wall_ns: int) -> int:
        """What copying so many pages takes the CPU; it really took `wall_ns`."""
        ...

    def mapping_update_ns(self, nr_ptes: int, wall_ns: int) -> int:
        """What updating so many PTEs takes; it really took `wall_ns`."""
        ...

    def times(self, work: HostWork, device_ns: int) -> BatchTimes:
        """A whole batch whose copies took `device_ns`."""
        ...


@dataclass(frozen=True)
class MeasuredCpu:
    """The CPU of a machine without any device, and so without a profile: all it knows is what things took here."""

    name: str
    copier: Literal["cpu", "cpu-batched"]
    measured: bool = True

    def describe(self) -> str:
        return "No model: what things took on this machine\n"

    def copy_ns(self, nr_pages: int, wall_ns: int) -> int:
        return wall_ns

    def mapping_update_ns(self, nr_ptes: int, wall_ns: int) -> int:
        return wall_ns

    def times(self, work: HostWork, device_ns: int) -> BatchTimes:
        return BatchTimes(work.prepare_wall_ns, 0, 0, device_ns, work.update_wall_ns)


NO_DEVICE: Mapping[str, Engine] = {
    "cpu": MeasuredCpu("cpu", "cpu"),
    "cpu-batched": MeasuredCpu("cpu-batched", "cpu-batched"),
}


@dataclass(frozen=True)
class DpuResult:
    """Outcome of one batch."""

    nr_retired: int
    """Fragments, not pages, that are valid at their new address, counted from the front of the batch."""
    new_addrs: U64
    """uint64[num_frags]: the layout as the device computed it (byte addresses, without the orders)."""
    device_ns: int
    """Modelled device time by the engine's profile, or measured time with the `host` profile."""
    wall_ns: int
    """What the batch really took on this machine."""
    error: str | None = None
    """SDK text of the failure (`dpu is in fault`, `result timeout`, ...); None when the whole batch retired."""
    reason: str | None = None
    """SDK name of that failure in lower case (`dpu_fault`, `timeout`, ...)."""


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
    def nr_present(self) -> int:
        """Ranks that are there now, in use or not."""
        ...

    @property
    def max_in_flight(self) -> int:
        """Batches worth having under way at once (a rank copies while the kernel prepares the next batch)."""
        ...

    @property
    def engines(self) -> Mapping[str, Engine]:
        """Every engine that can be chosen: all, or those of the CPU where no rank is built in."""
        ...

    @property
    def engine(self) -> Engine:
        """The one that new batches are timed by."""
        ...

    def select_engine(self, name: str) -> None:
        """Time batches that are submitted from now on by one of `engines`; those under way end as they began."""
        ...

    def attach(self, memory: U64) -> None:
        """Give the device its view of physical memory: uint64[nr_pages, words_per_page]."""
        ...

    def dpu_hw_compact_execute(
        self, base_addr: int, frag_addrs: U64, num_frags: int, skip_runs: U64 | None = None
    ) -> DpuResult:
        """Run one batch to its end. `frag_addrs` uint64[num_frags], ascending `pfn << 12 | order`; `skip_runs`
        uint64[n, 2], ascending (byte address, nr_pages). Raises OSError(ENODEV) if no device is there, ENOMEM if
        no DPU could be allocated."""
        ...

    def submit(self, base_addr: int, frag_addrs: U64, num_frags: int, skip_runs: U64 | None = None) -> DpuCompletion:
        """Start the same batch and return at once."""
        ...

    def dpu_hw_move_execute(self, src_addrs: U64, dst_addrs: U64, num: int) -> DpuResult:
        """Move `num` listed folios to their destinations, both uint64[num] as above. `nr_retired` counts folios and
        `new_addrs` is where they are, as the device has it. Raises as dpu_hw_compact_execute does."""
        ...

    def submit_move(self, src_addrs: U64, dst_addrs: U64, num: int) -> DpuCompletion:
        """Start the same batch and return at once."""
        ...
