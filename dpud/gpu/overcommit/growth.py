# SPDX-License-Identifier: MIT
"""How much more clients will use, taken together.

Clients do not have their peaks at the same moment. So where the policy looks at them together, what a group is expected
to use is predicted from the sum of their histories, and is at most the sum of what each is expected to use.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from dpud.gpu.overcommit.account import Account
from dpud.gpu.overcommit.predictor import HISTORY, POLICIES, TOGETHER, WARM_UP_SAMPLES, History, Margin

_MAX_PREDICTIONS = 16
"""Groups whose prediction is remembered until the next period, or the next grant."""


class Together:
    """All clients' use, and how well it was predicted."""

    def __init__(self, now_ns: int) -> None:
        self.history = History(now_ns)
        self.margin = Margin()
        self._predictions: dict[tuple[str, int, frozenset[tuple[Account, int]]], float] = {}

    def sample(self, accounts: Sequence[Account], now_ns: int) -> None:
        """Every client's use has been told."""
        if self.history.tell(sum(account.nr_used for account in accounts), now_ns):
            used = float(self.history.window()[-1])
            is_warm = self.history.nr_samples >= WARM_UP_SAMPLES
            self.margin.learn(used, self.peak_bytes(accounts, HISTORY), counts=is_warm)

    def peak_bytes(self, accounts: Sequence[Account], policy: str) -> float:
        """What a group is expected to use at once; young grants in full."""
        nr = max((account.history.nr_samples for account in accounts), default=0)
        young = sum(account.young_bytes for account in accounts)
        if not nr:
            return young
        granted = sum(account.nr_granted for account in accounts)
        key = policy, granted, frozenset((account, account.history.nr_samples) for account in accounts)
        if key not in self._predictions:
            if len(self._predictions) > _MAX_PREDICTIONS:
                self._predictions.clear()
            window = np.sum([account.history.ends(nr) for account in accounts], axis=0)
            self._predictions[key] = float(POLICIES[policy](window, granted))
        margin = self.margin.share if policy == HISTORY else 0.0
        return min(granted, self._predictions[key] * (1 + margin) + young)

    def growth_bytes(self, group: Iterable[Account], policy: str) -> int:
        """How much more than now a group is expected to use at once."""
        accounts = list(group)
        apart = sum(account.growth_bytes(policy) for account in accounts)
        if policy not in TOGETHER or not accounts:
            return apart
        reserved = sum(account.reserved_growth_bytes for account in accounts)
        at_once = int(self.peak_bytes(accounts, policy)) - sum(account.nr_used for account in accounts)
        return min(apart, max(at_once, reserved))
