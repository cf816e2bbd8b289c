# SPDX-License-Identifier: MIT
"""The directory `swap`, and one below `swap/tiers` for each tier.

`bd_stat`, `writeback_limit` and `writeback_limit_enable` are zram's (Documentation/admin-guide/blockdev/zram.rst):
counts and limits in units of 4 KiB. Other sizes are in bytes, times in ns. Counters only grow.
"""

import errno

from dpud.gpu.address_space.pagetable import FRAME_BYTES
from dpud.gpu.attrs import value
from dpud.gpu.errors import GpuError
from dpud.gpu.swap import policy, prefetch
from dpud.gpu.swap.module import SwapModule
from dpud.gpu.swap.shadow import Verdict
from dpud.gpu.swap.tier import Tier
from kernelsim.attr import Attr, Bool, Choice, Int, Kobject, Operation, Size, Text

_SLICE_BYTES = 4 << 20
"""How much is moved before others may use the machine."""

_BELADY_HEAD = (
    "location",
    "accesses",
    "pages",
    "sampled",
    "capacity",
    "lru",
    "policy",
    "optimal",
    "gap_closed_percent",
)


class SwapFiles(Kobject):
    """What concerns all tiers."""

    policy = Attr(Choice(*policy.names()), doc="Which page leaves a device's memory first.")
    prefetch = Attr(Choice(*prefetch.names()), doc="Which pages come in besides the one that was missing.")
    swap_threshold = Attr(Int(1, 100), doc="Percent of a device in use from which on pages leave it in background.")
    low_watermark = Attr(Int(0, 100), doc="Percent free below which a tier moves its coldest pages down.")
    high_watermark = Attr(Int(0, 100), doc="Percent free at which it stops.")
    cluster = Attr(Size(), doc="Bytes that an access which has to wait for room evicts at once; 0: what it lacks.")
    thrash_guard = Attr(Bool(), doc="Whether who thrashes is throttled, and pages that go on thrashing are held.")
    stat = Attr(Text(), doc="Pages written, read, moved, lost; prefetching; thrashing: name and count.")
    bd_stat = Attr(Text(), doc="zram's three columns, of all tiers: 4 KiB units in use, read and written, ever.")
    belady = Attr(Text(), doc="Misses of LRU, of the policy and the fewest possible, on a sample of the accesses.")

    verify = Attr(Text(), doc="Checks that no two slots overlap and every count is right: ok, or what is not.")

    used_bytes = value("Of all tiers, headers and padding included.", lambda files: files.swap.space.used_bytes)
    free_bytes = value("Of the tiers that take pages.", lambda files: files.swap.space.nr_free_bytes)
    nr_pages = value("Pages kept.", lambda files: len(files.swap.space))
    prefetch_accuracy = value(
        "Percent of the pages brought in unasked that were used.",
        lambda files: f"{100 * files.swap.accuracy.accuracy:.1f}",
    )
    prefetch_coverage = value(
        "Percent of the pages that were to be read from tiers or pool that had been brought in before.",
        lambda files: f"{100 * files.swap.accuracy.coverage:.1f}",
    )

    def __init__(self, swap: SwapModule) -> None:
        self.swap = swap

    @policy.show
    def _policy_show(self) -> str:
        return self.swap.policy

    @policy.store
    def _policy_store(self, name: str) -> None:
        self.swap.set_policy(name)

    @prefetch.show
    def _prefetch_show(self) -> str:
        return self.swap.prefetch

    @prefetch.store
    def _prefetch_store(self, name: str) -> None:
        self.swap.set_prefetch(name)

    @swap_threshold.show
    def _threshold_show(self) -> int:
        return self.swap.swap_threshold

    @swap_threshold.store
    def _threshold_store(self, percent: int) -> None:
        self.swap.set_swap_threshold(percent)

    @low_watermark.show
    def _low_show(self) -> int:
        return self.swap.space.marks.low

    @low_watermark.store
    def _low_store(self, percent: int) -> None:
        marks = self.swap.space.marks
        marks.low, marks.high = percent, max(percent, marks.high)

    @high_watermark.show
    def _high_show(self) -> int:
        return self.swap.space.marks.high

    @high_watermark.store
    def _high_store(self, percent: int) -> None:
        marks = self.swap.space.marks
        marks.low, marks.high = min(percent, marks.low), percent

    @cluster.show
    def _cluster_show(self) -> int:
        return self.swap.memory.residency.cluster_bytes

    @cluster.store
    def _cluster_store(self, nr_bytes: int) -> None:
        if 0 < nr_bytes < FRAME_BYTES:
            raise GpuError(errno.EINVAL, f"{nr_bytes} bytes: no page is smaller than {FRAME_BYTES}")
        self.swap.memory.residency.cluster_bytes = nr_bytes

    @thrash_guard.show
    def _guard_show(self) -> int:
        return int(self.swap.guard.enabled)

    @thrash_guard.store
    def _guard_store(self, on: int) -> None:
        self.swap.guard.enabled = bool(on)

    @stat.show
    def _stat(self) -> str:
        return "".join(f"{name} {nr}\n" for name, nr in self.swap.stats().items())

    @verify.show
    def _verify(self) -> str:
        return "\n".join(self.swap.space.violations()) or "ok"

    @bd_stat.show
    def _bd_stat(self) -> str:
        columns = zip(*(bd_counts(tier) for tier in self.swap.space.tiers), strict=True)
        return bd_line(*(sum(column) for column in columns))

    @belady.show
    def _belady(self) -> str:
        rows = [_BELADY_HEAD, *(_belady_row(name, each) for name, each in self.swap.judge().items())]
        return "".join(" ".join(f"{cell:>9}" for cell in row) + "\n" for row in rows)


def _belady_row(name: str, verdict: Verdict) -> tuple[str, ...]:
    closed = verdict.gap_closed_percent
    numbers = verdict.capacity, verdict.lru, verdict.policy, verdict.optimal
    return (
        name,
        str(verdict.accesses),
        str(verdict.pages),
        f"1/{1 / verdict.rate:.0f}",
        *map(str, numbers),
        "-" if closed is None else f"{closed:.1f}",
    )


def bd_counts(tier: Tier) -> tuple[int, int, int]:
    """zram's bd_stat of one tier: units of 4 KiB in use, read, written."""
    return tier.used_bytes >> 12, tier.nr_read_blocks, tier.nr_written_blocks


def bd_line(used: int, read: int, written: int) -> str:
    return f"{used:8} {read:8} {written:8}\n"


class TierFiles(Kobject):
    """One tier."""

    bandwidth = Attr(Size(1), doc="Bytes/s that reads get.")
    write_bandwidth = Attr(Size(1), doc="Bytes/s that writes get.")
    latency = Attr(Int(0), doc="ns from the end of a read's turn until its bytes are there.")
    write_latency = Attr(Int(0), doc="The same of a write.")
    writeback_limit = Attr(Int(0, 2**62), doc="4 KiB units that may still be written, if writeback_limit_enable is 1.")
    writeback_limit_enable = Attr(Bool(), doc="Whether writeback_limit holds.")
    daily_limit = Attr(Size(), doc="Fill writeback_limit up to this many bytes each day; 0: never.")
    demote = Attr(Size(1), doc="Move this much of the coldest down. EAGAIN where less could go.")
    bd_stat = Attr(Text(), doc="zram's three columns: 4 KiB units in use, read and written, ever.")
    fault_latency = Attr(Text(), doc="Of reads: number, and ns of the median, of 99 percent, and of the slowest.")

    profile = value("Whose data sheet bandwidth and latency are from.", lambda files: files.tier.profile.name)
    size = value("Bytes for pages.", lambda files: files.tier.size_bytes)
    used = value("Bytes in use, headers and padding included.", lambda files: files.tier.used_bytes)
    nr_pages = value("Pages kept here.", lambda files: files.tier.nr_pages)
    orig_data_size = value("Their raw bytes.", lambda files: files.tier.nr_stored_bytes)
    wear = value("Bytes written, ever.", lambda files: files.tier.budget.nr_written_bytes)
    wear_percent = value(
        "The same in percent of what the data sheet allows; 0 for no limit.",
        lambda files: f"{files.tier.budget.wear_percent:.6f}",
    )
    direct_io = value("Whether the file is used past the page cache.", lambda files: int(files.tier.file.is_direct))
    errors = value("Transfers that failed, and records that were damaged.", lambda files: files.tier.nr_errors)
    state = value("ok, or why nothing is written here any more.", lambda files: files.tier.trouble or "ok")

    def __init__(self, swap: SwapModule, tier: Tier) -> None:
        self.swap = swap
        self.tier = tier

    @bandwidth.show
    def _bandwidth_show(self) -> int:
        return self.tier.timing.reads.bandwidth_bytes_per_s

    @bandwidth.store
    def _bandwidth_store(self, bytes_per_s: int) -> None:
        self.tier.timing.reads.bandwidth_bytes_per_s = bytes_per_s

    @write_bandwidth.show
    def _write_bandwidth_show(self) -> int:
        return self.tier.timing.writes.bandwidth_bytes_per_s

    @write_bandwidth.store
    def _write_bandwidth_store(self, bytes_per_s: int) -> None:
        self.tier.timing.writes.bandwidth_bytes_per_s = bytes_per_s

    @latency.show
    def _latency_show(self) -> int:
        return self.tier.timing.reads.latency_ns

    @latency.store
    def _latency_store(self, ns: int) -> None:
        self.tier.timing.reads.latency_ns = ns

    @write_latency.show
    def _write_latency_show(self) -> int:
        return self.tier.timing.writes.latency_ns

    @write_latency.store
    def _write_latency_store(self, ns: int) -> None:
        self.tier.timing.writes.latency_ns = ns

    @writeback_limit.show
    def _limit_show(self) -> int:
        return self.tier.budget.limit_blocks

    @writeback_limit.store
    def _limit_store(self, nr_blocks: int) -> None:
        self.tier.budget.limit_blocks = nr_blocks

    @writeback_limit_enable.show
    def _enable_show(self) -> int:
        return int(self.tier.budget.enabled)

    @writeback_limit_enable.store
    def _enable_store(self, on: int) -> None:
        self.tier.budget.enabled = bool(on)

    @daily_limit.show
    def _daily_show(self) -> int:
        return self.tier.budget.daily_bytes

    @daily_limit.store
    def _daily_store(self, nr_bytes: int) -> None:
        self.tier.budget.set_daily(nr_bytes)

    @demote.store
    def _demote(self, nr_bytes: int) -> Operation[None]:
        left = nr_bytes
        while left > 0:
            moved = self.swap.space.demote(self.tier.name, min(left, _SLICE_BYTES))
            if not moved:
                raise GpuError(errno.EAGAIN, f"{nr_bytes - left} of {nr_bytes} bytes could go")
            left -= moved
            yield None

    @bd_stat.show
    def _bd_stat(self) -> str:
        return bd_line(*bd_counts(self.tier))

    @fault_latency.show
    def _fault_latency(self) -> str:
        seen = self.tier.latencies
        values = {"nr": seen.nr, "p50": seen.quantile(0.5), "p99": seen.quantile(0.99), "max": seen.max_ns}
        return "".join(f"{name} {value}\n" for name, value in values.items())
