# SPDX-License-Identifier: MIT
"""How long reads took, in buckets four to each power of two: a quantile is at most a quarter too high."""

_STEPS = 4


class Latencies:
    """A histogram of ns."""

    def __init__(self) -> None:
        self._counts = [0] * (64 * _STEPS)
        self.nr = 0
        self.max_ns = 0

    def add(self, ns: int) -> None:
        self._counts[_bucket(ns)] += 1
        self.nr += 1
        self.max_ns = max(self.max_ns, ns)

    def quantile(self, share: float) -> int:
        """The smallest upper bound of a bucket that at least `share` of all are not above; 0 if there are none."""
        left = share * self.nr
        for bucket, count in enumerate(self._counts):
            left -= count
            if count and left <= 0:
                return min(_upper(bucket), self.max_ns)
        return 0


def _bucket(ns: int) -> int:
    """Exact below 4 ns; then by the highest bit and the two below it."""
    if ns < _STEPS:
        return max(ns, 0)
    shift = ns.bit_length() - 3
    return (shift + 1) * _STEPS + (ns >> shift) - _STEPS


def _upper(bucket: int) -> int:
    octave, step = divmod(bucket, _STEPS)
    return bucket if octave == 0 else ((_STEPS + step + 1) << (octave - 1)) - 1
