# SPDX-License-Identifier: GPL-2.0-only
"""Metrics of simulated GPUs: where their pages are, whose they are, what was moved, and what the modules counted."""

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from dpud.status_files import Files
from dpud.status_gpu import Gpu, gpus

_COUNTING = ("address_space", "overcommit", "swap", "fault")
"""Modules whose stat files only go up."""


def gpu(files: Files) -> Iterator[Metric]:
    """Of all devices; families without samples where there is none."""
    found = gpus(files)
    yield from _tiers(found)
    yield from _clients(found)
    traffic = CounterMetricFamily("dpud_gpu_traffic_bytes", "Bytes moved, by cause.", labels=("gpu", "client", "cause"))
    events = CounterMetricFamily(
        "dpud_gpu_events", "Counters of modules' stat files.", labels=("gpu", "module", "event")
    )
    for device in found:
        for (client, cause), nr_bytes in device.traffic.items():
            traffic.add_metric((device.name, client, cause), nr_bytes)
        for module in _COUNTING:
            for event, count in device.modules[module].items():
                events.add_metric((device.name, module, event), count)
    yield from (traffic, events)


def _tiers(found: list[Gpu]) -> Iterator[Metric]:
    used = GaugeMetricFamily("dpud_gpu_tier_used_bytes", "Memory in use: device, pool, swap.", labels=("gpu", "tier"))
    size = GaugeMetricFamily("dpud_gpu_tier_size_bytes", "How much there can be; 0: no limit.", labels=("gpu", "tier"))
    for device in found:
        for tier in device.tiers:
            used.add_metric((device.name, tier.name), tier.used_bytes)
            size.add_metric((device.name, tier.name), tier.size_bytes)
    yield from (used, size)


def _clients(found: list[Gpu]) -> Iterator[Metric]:
    texts = {"granted": "Bytes granted to the client.", "used": "Bytes it uses.", "resident": "Of these, in memory."}
    for what, text in texts.items():
        family = GaugeMetricFamily(f"dpud_gpu_client_{what}_bytes", text, labels=("gpu", "client"))
        for device in found:
            for client in device.clients:
                family.add_metric((device.name, client.name), getattr(client, f"{what}_bytes"))
        yield family
