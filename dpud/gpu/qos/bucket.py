# SPDX-License-Identifier: MIT
"""A token bucket that is kept as one moment: when it will be full again.

Tokens come at `rate` bytes/s up to `burst` bytes, and a request takes as many as it has bytes. Kept as a moment,
nothing has to be done while time passes, and a grant that comes late takes nothing from the next: its moment stays
where it was. (The virtual scheduling form of ITU-T I.371's generic cell rate algorithm.)

A request of more than a burst is let through when the bucket is full, and leaves a debt. So in any window of T seconds
at most rate * T + max(burst, largest request) bytes pass.
"""

from dataclasses import dataclass

NS_PER_S = 1_000_000_000
MIN_BURST_BYTES = 1 << 20
"""The data path's largest access in one piece (memory.EXCHANGE_BYTES)."""
BURST_NS = 20_000_000
"""Of the rate, as burst where none is set: longer than a sleeper of a busy host oversleeps."""


@dataclass
class Bucket:
    """`rate` in bytes/s, 0 for no limit; `burst_set` in bytes, 0 for what suits the rate."""

    rate: int = 0
    burst_set: int = 0
    full_ns: int = 0
    """When it will be full, if nothing is taken."""

    def __post_init__(self) -> None:
        self.burst = self.burst_set or max(MIN_BURST_BYTES, self.rate * BURST_NS // NS_PER_S)
        """Bytes that may pass at once."""
        self._span_ns = self.burst * NS_PER_S // self.rate if self.rate else 0

    def cost_ns(self, nr_bytes: int) -> int:
        """How long so many tokens take to come; rounded up, so that no rate is exceeded."""
        return -(-nr_bytes * NS_PER_S // self.rate)

    def ready_ns(self, nr_bytes: int) -> int:
        """From when on a request may pass."""
        rate = self.rate
        if not rate:
            return 0
        if nr_bytes >= self.burst:
            return self.full_ns
        return self.full_ns - self._span_ns - (-nr_bytes * NS_PER_S // rate)

    def take(self, nr_bytes: int, now_ns: int) -> None:
        """Take tokens, if need be those to come."""
        if self.rate:
            self.full_ns = max(self.full_ns, now_ns) - (-nr_bytes * NS_PER_S // self.rate)

    def set(self, rate: int, burst: int, now_ns: int) -> None:
        """Change it; tokens that are missing stay missing, up to a burst."""
        missing = max(0, self.full_ns - now_ns) * self.rate // NS_PER_S
        self.rate, self.burst_set = rate, burst
        self.__post_init__()
        self.full_ns = now_ns + self.cost_ns(min(missing, self.burst)) if rate else 0
