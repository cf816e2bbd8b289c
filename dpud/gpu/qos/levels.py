# SPDX-License-Identifier: MIT
"""Priority levels: their buckets, their latency targets, and what was seen of each."""

from collections import Counter
from dataclasses import dataclass, field

from dpud.gpu.qos.bucket import Bucket
from dpud.gpu.qos.guard import Guard, Period
from dpud.gpu.swap.latency import Latencies


@dataclass
class Level:
    """What decisions depend on. `bucket` is between the total and the clients."""

    number: int
    bucket: Bucket = field(default_factory=Bucket)
    target_ns: int = 0
    """Of the time that its requests wait, 99 percent of them; 0 for none."""
    guard: Guard = field(default_factory=Guard)
    period: Period = field(default_factory=Period)
    queued_bytes: int = 0


class LevelStat:
    """Counters, which only grow."""

    def __init__(self) -> None:
        self.waits = Latencies()
        self.counts: Counter[str] = Counter(
            dict.fromkeys(("granted", "granted_bytes", "missed", "owed_bytes", "cancelled"), 0)
        )

    def granted(self, nr_bytes: int, waited_ns: int, target_ns: int) -> None:
        self.waits.add(waited_ns)
        self.counts["granted"] += 1
        self.counts["granted_bytes"] += nr_bytes
        self.counts["missed"] += bool(target_ns) and waited_ns > target_ns
