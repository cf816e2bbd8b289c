# SPDX-License-Identifier: GPL-2.0-only
"""Metrics of compaction, from debugfs dpu_compact: counters of `stats`, and `histograms` as Prometheus has them.

The kernel side counts values by powers of two. Prometheus wants the same buckets at each scrape, so all of a fixed
range are there from the first value on. Sums are not kept by any file: there is no `_sum`, and so no mean.
"""

from collections.abc import Callable, Iterator
from itertools import accumulate, groupby
from operator import attrgetter

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric

from dpud import status_files as state

_STATS, _HISTOGRAMS, _ENGINE = (f"{state.DPU}/{name}" for name in ("stats", "histograms", "engine"))
_SECONDS = {
    "modelled_ns": ("modelled", "Time that compaction took by the engine's model."),
    "device_ns": ("device", "Time that moves took by the engine's model; part of the modelled time."),
    "update_ns": ("update", "Time that mappings took by the model; part of the modelled time."),
    "wall_ns": ("wall", "Time that compaction took on the machine that runs dpud, measured."),
}
_COUNTERS = {
    "regions": "Regions that were compacted.",
    "runs": "Compactions that were asked for or began by themselves.",
    "fallbacks": "Regions that the CPU took over from the engine.",
    "too_few_fragments": "Regions with too few fragments for the engine.",
}
_HISTOGRAM = {  # of -> name, label, exponents of two of the buckets' upper bounds, unit, help
    "latency": (
        "region_seconds",
        "phase",
        range(10, 37),
        1e9,
        "Time of a region; wall is measured, the others modelled.",
    ),
    "unavailable": ("page_unavailable_seconds", "clock", range(10, 37), 1e9, "How long pages could not be used."),
    "batch_size": ("batch_pages", "what", range(21), 1.0, "Pages that were unmapped together."),
}


def compaction(files: state.Files, doc: Callable[[str], str]) -> Iterator[Metric]:
    """None at all where the kernel has no such debugfs."""
    stats = state.pairs(files, _STATS)
    if not stats:
        return
    yield InfoMetricFamily("dpud_compaction_engine", doc(_ENGINE), value={"engine": state.engine(files) or ""})
    yield GaugeMetricFamily("dpud_compaction_regions_in_flight", "Regions being compacted.", stats["regions_in_flight"])
    for name, (short, text) in _SECONDS.items():
        yield CounterMetricFamily(f"dpud_compaction_{short}_seconds", text, stats[name] / 1e9)
    for name, text in _COUNTERS.items():
        yield CounterMetricFamily(f"dpud_compaction_{name}", text, stats[name])
    for what in ("pages_moved", "ptes_updated"):
        family = CounterMetricFamily(f"dpud_compaction_{what}", f"{doc(_STATS)} ({what})", labels=("by",))
        family.add_metric(("engine",), stats[what])
        family.add_metric(("cpu",), stats[f"cpu_{what}"])
        yield family
    yield _labelled(stats, "failed_", "failures", "Batches that failed, by reason.")
    yield _labelled(stats, "skipped_", "skipped_pages", "Pages that were left where they are, by reason.")
    yield from _histograms(files, doc)


def _labelled(stats: dict[str, int], prefix: str, name: str, text: str) -> Metric:
    family = CounterMetricFamily(f"dpud_compaction_{name}", text, labels=("reason",))
    for key, value in stats.items():
        if key.startswith(prefix):
            family.add_metric((key.removeprefix(prefix),), value)
    return family


def _histograms(files: state.Files, doc: Callable[[str], str]) -> Iterator[Metric]:
    buckets = state.histograms(files)
    for of, (name, label, exponents, unit, text) in _HISTOGRAM.items():
        family = Metric(f"dpud_compaction_{name}", f"{text} {doc(_HISTOGRAMS)}", "histogram")
        those = [bucket for bucket in buckets if bucket.of == of]
        for (engine, what), group in groupby(those, key=attrgetter("engine", "what")):
            _add(family, {"engine": engine, label: what}, list(group), exponents, unit)
        yield family


def _add(family: Metric, labels: dict[str, str], group: list[state.Bucket], exponents: range, unit: float) -> None:
    """Cumulative counts: a bucket of the file ends just below a power of two, which is the bound here."""
    counts = [0] * (len(exponents) + 1)
    for bucket in group:
        at = max(bucket.high.bit_length() - exponents.start, 0)
        counts[min(at, len(exponents))] += bucket.count
    bounds = [repr((1 << exponent) / unit) for exponent in exponents] + ["+Inf"]
    for bound, count in zip(bounds, accumulate(counts), strict=True):
        family.add_sample(f"{family.name}_bucket", {**labels, "le": bound}, count)
    family.add_sample(f"{family.name}_count", labels, sum(counts))
