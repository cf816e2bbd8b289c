# SPDX-License-Identifier: MIT
"""How fast a tier is, and how that is enforced.

Theory of operation
    A transfer of n bytes takes the tier's engine for n / bandwidth, and is there a latency later (hal/engine.py has the
    same formula for copy engines). Whoever reads sleeps until then, by an absolute deadline: the time that the real
    file took counts, and errors do not add up. Reads that are asked for together wait for their latencies together.
    Whoever writes may go on while its bytes are in the tier's queue, and sleeps only where the queue holds more than
    QUEUE_BYTES; that is the back-pressure of a slow tier.

    Flash and memory read and write at once (two engines). A disk has one head (one engine), and moves it, which takes
    the engine for `seek_ns`, and waits half a turn, unless the transfer begins where the last one ended.
"""

from dataclasses import dataclass

from dpud.gpu.clock import Clock
from dpud.gpu.hal.engine import CopyEngine
from dpud.gpu.swap.blockfile import BLOCK_BYTES

QUEUE_BYTES = 4 << 20
_TERA = 10**12


@dataclass(frozen=True)
class TierProfile:
    """Bytes/s and ns, for one request at a time."""

    name: str
    read_bytes_per_s: int
    write_bytes_per_s: int
    read_latency_ns: int
    write_latency_ns: int
    seek_ns: int = 0
    """Of the one head; 0 for none."""
    endurance_bytes: int = 0
    """What may be written in the tier's life; 0 for no limit."""


MEMORY = TierProfile("ddr4-3200", 25_600_000_000, 25_600_000_000, 100, 100)
"""One channel: 3200 MT/s x 8 bytes, JEDEC JESD79-4. The latency is uncalibrated."""

NVME = TierProfile("980-pro-1tb", 7_000_000_000, 5_000_000_000, 45_455, 16_667, endurance_bytes=600 * _TERA)
"""Samsung 980 PRO 1 TB data sheet: 7000 and 5000 MB/s; 22,000 and 60,000 IOPS of 4 KiB at queue depth 1, whose inverse
are the latencies; 600 TBW."""

SSD = TierProfile("870-evo-1tb", 560_000_000, 530_000_000, 76_923, 27_778, endurance_bytes=600 * _TERA)
"""Samsung 870 EVO 1 TB data sheet: 560 and 530 MB/s; 13,000 and 36,000 IOPS at queue depth 1; 600 TBW."""

HDD = TierProfile("st1000dm003", 156_000_000, 156_000_000, 4_166_667, 4_166_667, seek_ns=8_500_000)
"""Seagate Desktop HDD ST1000DM003 data sheet: 156 MB/s on average, average seek below 8.5 ms; half a turn at 7200/min
is 4.17 ms."""


class TierTiming:
    """The engines of one tier. Bandwidth and latency may be changed at any time."""

    def __init__(self, profile: TierProfile, clock: Clock) -> None:
        self.clock = clock
        self.reads = CopyEngine(profile.read_bytes_per_s, profile.read_latency_ns)
        self.writes = CopyEngine(profile.write_bytes_per_s, profile.write_latency_ns)
        self.seek_ns = profile.seek_ns
        self._head = 0

    def read(self, at: int, nr_bytes: int, began_ns: int) -> int:
        """A read that was asked for then -> when it is done, in ns; who asked has to wait for that."""
        return self._transfer(self.reads, at, nr_bytes, began_ns)

    def write(self, at: int, nr_bytes: int, began_ns: int) -> int:
        """Queue a write, and wait while the queue is too long -> ns until it will be done."""
        end_ns = self._transfer(self.writes, at, nr_bytes, began_ns)
        queue_ns = QUEUE_BYTES * 1_000_000_000 // self.writes.bandwidth_bytes_per_s
        self.clock.sleep_until(end_ns - queue_ns)
        return end_ns - began_ns

    def _transfer(self, engine: CopyEngine, at: int, nr_bytes: int, began_ns: int) -> int:
        if not self.seek_ns:
            return engine.transfer(nr_bytes, began_ns)
        engine.free_at_ns = max(self.reads.free_at_ns, self.writes.free_at_ns)
        follows = self._head - BLOCK_BYTES <= at <= self._head  # slots share blocks
        self._head = at + nr_bytes
        if follows:
            return engine.transfer(nr_bytes, began_ns) - engine.latency_ns
        engine.free_at_ns = max(engine.free_at_ns, began_ns) + self.seek_ns
        return engine.transfer(nr_bytes, began_ns)
