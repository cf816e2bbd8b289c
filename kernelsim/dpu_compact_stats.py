# SPDX-License-Identifier: GPL-2.0-only
"""What DPU compaction took: distributions by engine, and the last regions.

For each engine, of every region that it compacted: the time from isolating its pages to having remapped them, by the
engine's clock (`modelled`, and its parts) and as it really passed here (`wall`); how many pages were unmapped together;
and for every page, how long it was unavailable: from the moment when it was unmapped to the moment when it was mapped
again. In a batch the first page waits for all others:

    page i of n:  (n - i) unmap + flush + device + (i + 1) remap        unmap, remap: per page; device: of the batch

and where the CPU goes through a cluster of n folios, for those before it only:

    page of folio i of n:  (n - i) unmap + flush + (pages of folios 0 .. i) copy + (i + 1) remap

unmap and remap are then per folio: all pages of a large one go and come together.

A distribution keeps exact counts, sums and maxima; its quantiles are the upper edges of buckets that are 1/16 wide, and
never above the maximum.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from kernelsim.dpu_hw import BatchTimes
from kernelsim.jit import i64, njit

NR_LAST_REGIONS = 64
_SUB_BITS = 4  # buckets per power of two: 16
_NR_BUCKETS = 62 << _SUB_BITS
_BAR = 40
QUANTILES = ((50, "p50"), (95, "p95"), (99, "p99"))


NO_FOLIO = 0xFF


@dataclass(frozen=True)
class ClusterStep:
    """What the parts of going through a cluster take: unmapping and remapping a folio, a flush, copying a page."""

    unmap_ns: float
    flush_ns: float
    copy_ns: float
    remap_ns: float


@dataclass(frozen=True)
class Ramp:
    """nr values: first, first + step, first + 2 step, ..."""

    first: float
    step: float
    nr: int

    def values(self) -> NDArray[np.float64]:
        return np.float64(self.first) + self.step * np.arange(self.nr, dtype=np.float64)


class Distribution:
    """Counts of values from 0 to 2^62 in buckets that are at most 1/16 wide."""

    def __init__(self) -> None:
        self.nr = 0
        self.max = 0
        self._buckets: NDArray[np.int64] = np.zeros(_NR_BUCKETS, dtype=np.int64)

    def add(self, value: int, times: int = 1) -> None:
        """Count a value so many times."""
        shift = max(value.bit_length() - _SUB_BITS - 1, 0)
        self._buckets[(shift << _SUB_BITS) + (value >> shift)] += times
        self.nr += times
        if times:
            self.max = max(self.max, value)

    def add_ramp(self, ramp: Ramp, times: int = 1) -> None:
        """Count each of a ramp's values so many times."""
        if ramp.nr and times:
            count_ramp(self._buckets, float(ramp.first), float(ramp.step), ramp.nr, times)
            self.nr += ramp.nr * times
            last = ramp.first + ramp.step * (ramp.nr - 1)
            self.max = max(self.max, round(ramp.first), round(last))

    def add_cluster(self, orders: NDArray[np.uint8], step: "ClusterStep", times: int = 1) -> None:
        """Count each page of a cluster of folios so many times; `orders` ends with NO_FOLIO or with the array."""
        sizes = 1 << orders[orders != NO_FOLIO].astype(np.int64)
        longest = count_cluster(self._buckets, sizes, step.unmap_ns, step.flush_ns, step.copy_ns, step.remap_ns, times)
        self.nr += int(sizes.sum()) * times
        self.max = max(self.max, longest)

    def quantile(self, percent: int) -> int:
        """The value that `percent` percent are not above (nearest rank); 0 if there are none."""
        if not self.nr:
            return 0
        rank = max(-(-self.nr * percent // 100), 1)
        bucket = int(np.searchsorted(np.cumsum(self._buckets), rank))
        return min(_upper_edge(bucket), self.max)

    def octaves(self) -> Iterator[tuple[int, int, int]]:
        """(lowest value, highest value, how many) for 0 and for each power of two, from the first that has any to the
        last."""
        counts: dict[int, int] = {}
        for bucket in np.flatnonzero(self._buckets).tolist():
            octave = _upper_edge(bucket).bit_length()
            counts[octave] = counts.get(octave, 0) + int(self._buckets[bucket])
        for octave in range(min(counts, default=0), max(counts, default=-1) + 1):
            yield (1 << octave) >> 1, (1 << octave) - 1, counts.get(octave, 0)

    def cells(self) -> Iterator[int]:
        """Count, quantiles, maximum."""
        yield self.nr
        yield from (self.quantile(percent) for percent, _ in QUANTILES)
        yield self.max


@njit
def count_ramp(buckets: NDArray[np.int64], first: float, step: float, nr: int, times: int) -> None:
    """Count nr values; neighbours lie close together, so the search for a bucket begins at the last one's."""
    shift = 0
    for i in range(nr):
        value = i64(first + step * i + 0.5)
        while value >> shift >= 2 << _SUB_BITS:
            shift += 1
        while shift > 0 and value >> shift < 1 << _SUB_BITS:
            shift -= 1
        buckets[(shift << _SUB_BITS) + (value >> shift)] += times


@njit
def count_cluster(
    buckets: NDArray[np.int64],
    sizes: NDArray[np.int64],
    unmap: float,
    flush: float,
    copy: float,
    remap: float,
    times: int,
) -> int:
    """Count how long each page of a cluster's folios is unavailable; returns the longest."""
    longest = 0
    since_flush = 0.0
    for i in range(len(sizes)):
        since_flush += copy * sizes[i] + remap
        value = i64((len(sizes) - i) * unmap + flush + since_flush + 0.5)
        shift = 0
        while value >> shift >= 2 << _SUB_BITS:
            shift += 1
        buckets[(shift << _SUB_BITS) + (value >> shift)] += sizes[i] * times
        longest = max(longest, value)
    return longest


def _upper_edge(bucket: int) -> int:
    """The largest value that falls into a bucket."""
    shift = max((bucket >> _SUB_BITS) - 1, 0)
    first = bucket - (shift << _SUB_BITS)
    return ((first + 1) << shift) - 1


@dataclass(frozen=True)
class RegionRecord:
    """One line of debugfs dpu_compact/regions."""

    base_addr: int
    nr_fragments: int
    nr_retired: int
    engine: str
    times: BatchTimes
    wall_ns: int
    error: str | None


@dataclass
class Wall:
    """When a batch's pages were unmapped and remapped, in readings of the wall clock: first to last of each."""

    unmap_begin: int = 0
    unmap_end: int = 0
    remap_begin: int = 0
    remap_end: int = 0

    def unavailable_ns(self, nr_pages: int) -> Ramp:
        """Of each page."""
        unmap, remap = self.unmap_end - self.unmap_begin, self.remap_end - self.remap_begin
        first = self.remap_begin + remap / nr_pages - self.unmap_begin
        return Ramp(first, (remap - unmap) / nr_pages, nr_pages)


def unavailable_ns(nr_pages: int, times: BatchTimes) -> Ramp:
    """Of each page that was unmapped together with the others and remapped after the last copy."""
    unmap, remap = times.unmap_ns / nr_pages, times.remap_ns / nr_pages
    return Ramp(times.unmap_ns + times.flush_ns + times.device_ns + remap, remap - unmap, nr_pages)


@dataclass
class EngineStats:
    """Distributions of one engine."""

    latency: dict[str, Distribution] = field(default_factory=dict)
    unavailable: dict[str, Distribution] = field(default_factory=dict)
    batch_size: dict[str, Distribution] = field(default_factory=dict)


class BatchStats:
    """All engines' distributions, and the last regions."""

    def __init__(self) -> None:
        self.engines: dict[str, EngineStats] = {}
        self.last: deque[RegionRecord] = deque(maxlen=NR_LAST_REGIONS)

    def add(self, record: RegionRecord) -> None:
        """A region is done, or has failed."""
        self.last.append(record)
        times = record.times
        parts = {"modelled": times.total_ns, **vars(times), "wall": record.wall_ns}
        latency = self._of(record.engine).latency
        for what, ns in parts.items():
            _find(latency, what.removesuffix("_ns")).add(ns)

    def add_pages(self, engine: str, modelled: Ramp, wall: Ramp, times: int = 1) -> None:
        """So many times, pages were unmapped together that were unavailable for so long."""
        stats = self._of(engine)
        _find(stats.batch_size, "pages").add(modelled.nr, times)
        _find(stats.unavailable, "modelled").add_ramp(modelled, times)
        _find(stats.unavailable, "wall").add_ramp(wall, times)

    def add_clusters(
        self, engine: str, orders: NDArray[np.uint8], modelled: ClusterStep, wall: Ramp, times: int = 1
    ) -> None:
        """So many times, a cluster of folios of these orders was unmapped together and remapped one by one."""
        stats = self._of(engine)
        _find(stats.batch_size, "pages").add(wall.nr, times)
        _find(stats.unavailable, "modelled").add_cluster(orders, modelled, times)
        _find(stats.unavailable, "wall").add_ramp(wall, times)

    def _of(self, engine: str) -> EngineStats:
        return self.engines.setdefault(engine, EngineStats())

    def table(self, which: str, unit: str) -> str:
        """The text of one of the files `latency`, `unavailable`, `batch_size`."""
        heads = ["count", *(name for _, name in QUANTILES), "max"]
        lines = [f"{'engine':<12}{'what':<10}" + "".join(f"{head:>14}" for head in heads) + f"  {unit}\n"]
        for engine, stats in self.engines.items():
            for what, distribution in getattr(stats, which).items():
                cells = "".join(f"{cell:>14}" for cell in distribution.cells())
                lines.append(f"{engine:<12}{what:<10}{cells}\n")
        return "".join(lines)

    def histograms(self) -> str:
        """The text of the file `histograms`."""
        lines = [f"{'engine':<12}{'of':<12}{'what':<10}{'from':>16}{'to':>16}{'count':>12}\n"]
        for engine, stats in self.engines.items():
            for of, distributions in vars(stats).items():
                for what, distribution in distributions.items():
                    head = f"{engine:<12}{of:<12}{what:<10}"
                    lines += (
                        f"{head}{low:>16}{high:>16}{nr:>12}  {_bar(nr, distribution.nr)}".rstrip() + "\n"
                        for low, high, nr in distribution.octaves()
                    )
        return "".join(lines)

    def regions_table(self) -> str:
        """The text of the file `regions`, oldest first."""
        lines = [
            f"{'base':<20}{'fragments':>10}{'retired':>10}  {'engine':<12}{'device_ns':>14}{'total_ns':>14}"
            f"{'wall_ns':>14}  error\n"
        ]
        for record in self.last:
            times = record.times
            lines.append(
                f"{record.base_addr:#018x}  {record.nr_fragments:>10}{record.nr_retired:>10}  {record.engine:<12}"
                f"{times.device_ns:>14}{times.total_ns:>14}{record.wall_ns:>14}  {record.error or '-'}\n"
            )
        return "".join(lines)


def _bar(nr: int, total: int) -> str:
    """A part of the whole as a line of up to 40 signs; at least one for anything."""
    return "#" * -(-nr * _BAR // total)


def _find(distributions: dict[str, Distribution], what: str) -> Distribution:
    found = distributions.get(what)
    if found is None:
        found = distributions[what] = Distribution()
    return found
