# SPDX-License-Identifier: MIT
"""How often to make a checkpoint: as often as what it costs and how often something fails say.

Young's first-order optimum is sqrt(2 C M) for a cost of C and a mean time M between failures (J. W. Young, CACM 17(9),
1974). Daly's has two more terms, and M itself where C is not small against it (J. T. Daly, FGCS 22(3), 2006).

C is measured, a moving average over checkpoints. M is the time that was watched over the failures in it, together with
what is known beforehand, as a gamma prior weighs it: one failure in PRIOR_MTBF_NS.
"""

import math
from dataclasses import dataclass

_NS_PER_HOUR = 3600 * 1_000_000_000
PRIOR_MTBF_NS = round(1 / 3.4e-6) * _NS_PER_HOUR
"""72 HBM3 faults in 54 days on 16,384 GPUs (Llama 3, arXiv 2407.21783, table 5): 3.4e-6 an hour and GPU."""

_WEIGHT = 0.3
"""Of the newest checkpoint in the average."""


def young(cost_ns: float, mtbf_ns: float) -> float:
    return math.sqrt(2 * cost_ns * mtbf_ns)


def daly(cost_ns: float, mtbf_ns: float) -> float:
    """Between the end of a checkpoint and the beginning of the next."""
    if cost_ns >= 2 * mtbf_ns:
        return mtbf_ns
    ratio = cost_ns / (2 * mtbf_ns)
    return young(cost_ns, mtbf_ns) * (1 + math.sqrt(ratio) / 3 + ratio / 9) - cost_ns


@dataclass
class Interval:
    """What is known of costs and failures."""

    started_ns: int
    cost_ns: float = 0.0
    """0 until there was a checkpoint."""
    nr_failures: int = 0
    fixed_ns: int = 0
    """What was asked for instead; 0: nothing."""
    fixed_mtbf_ns: int = 0

    def measured(self, cost_ns: int) -> None:
        """A checkpoint took so long."""
        self.cost_ns = cost_ns if not self.cost_ns else (1 - _WEIGHT) * self.cost_ns + _WEIGHT * cost_ns

    def mtbf_ns(self, now_ns: int, nr_devices: int = 1) -> float:
        if self.fixed_mtbf_ns:
            return self.fixed_mtbf_ns
        prior_ns = PRIOR_MTBF_NS / nr_devices
        return (now_ns - self.started_ns + prior_ns) / (self.nr_failures + 1)

    def best_ns(self, now_ns: int, nr_devices: int = 1) -> float:
        """How long to wait from one checkpoint to the next; 0 while no cost is known."""
        if self.fixed_ns:
            return self.fixed_ns
        return daly(self.cost_ns, self.mtbf_ns(now_ns, nr_devices)) if self.cost_ns else 0.0
