# SPDX-License-Identifier: MIT
"""When does a page move? Judged at each hint fault.

cost       to where all who use it get it cheapest, if what that saves within HORIZON is more than the move costs
two-fault  to who missed it twice in a row: the kernel's NUMA balancing (should_numa_migrate_memory, without groups)
tpp        from a node without CPUs to who missed it soon after it was unmapped (TPP, ASPLOS 2023; the kernel's
           NUMA_BALANCING_MEMORY_TIERING, with its hot threshold)
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.numa.heat import Heat
from dpud.gpu.numa.paths import Costs

HOT_NS = 1_000_000_000
"""numa_balancing_hot_threshold_ms of the kernel: 1000."""


@dataclass(frozen=True)
class Setting:
    """What is the same for all pages of one size. Locations are numbers, hosts those from `first_host` on."""

    first_host: int
    access_ns: Costs
    """[who accesses, whose memory]"""
    copy_ns: Costs
    """[from, to]"""
    users: NDArray[np.int64]
    """Locations that may access: devices, and nodes with CPUs."""
    node_of: Callable[[int], int]
    """The host location that a location is, or hangs at."""
    horizon_ns: float
    """How long what a move saves is reckoned."""
    hot_ns: int = HOT_NS


@dataclass(frozen=True)
class Wish:
    """Where a page had better be. `benefit_ns` within the horizon, `cost_ns` of the move."""

    to: int
    benefit_ns: float
    cost_ns: float
    why: str

    @property
    def net_ns(self) -> float:
        return self.benefit_ns - self.cost_ns


@dataclass(frozen=True)
class Fault:
    """Who missed a page, who did so the last time (-1: nobody), and how long it had been unmapped."""

    at: int
    last_at: int
    waited_ns: int


Rule = Callable[[Setting, Heat, int, Fault, int], "list[Wish]"]
"""(setting, heat with the fault in it, home, the fault, now) -> wishes, best first."""


def benefits_ns(setting: Setting, heat: Heat, home: int, now_ns: int) -> NDArray[np.float64]:
    """What the page's users would save within the horizon, by host node, were it there."""
    per_access: NDArray[np.float64] = heat.shares(setting.users) @ setting.access_ns[:, setting.first_host :]
    saved: NDArray[np.float64] = per_access[home - setting.first_host] - per_access
    return saved * heat.rate(now_ns) * setting.horizon_ns


def wish(setting: Setting, heat: Heat, home: int, to: int, now_ns: int, why: str) -> Wish:
    """For whoever has decided already: what it is worth, all the same."""
    benefit = benefits_ns(setting, heat, home, now_ns)[to - setting.first_host]
    return Wish(to, float(benefit), float(setting.copy_ns[home, to]), why)


def cost(setting: Setting, heat: Heat, home: int, _fault: Fault, now_ns: int) -> list[Wish]:
    first = setting.first_host
    found = [
        Wish(first + node, benefit, float(setting.copy_ns[home, first + node]), "pays")
        for node, benefit in enumerate(benefits_ns(setting, heat, home, now_ns).tolist())
    ]
    return sorted((each for each in found if each.net_ns > 0), key=lambda each: -each.net_ns)


def two_fault(setting: Setting, heat: Heat, home: int, fault: Fault, now_ns: int) -> list[Wish]:
    node = setting.node_of(fault.at)
    if node == home or fault.last_at < 0 or setting.node_of(fault.last_at) != node:
        return []
    return [wish(setting, heat, home, node, now_ns, "missed-twice")]


def tpp(setting: Setting, heat: Heat, home: int, fault: Fault, now_ns: int) -> list[Wish]:
    node = setting.node_of(fault.at)
    if node == home or home in setting.users or fault.waited_ns > setting.hot_ns:
        return []
    return [wish(setting, heat, home, node, now_ns, "hot")]


RULES: dict[str, Rule] = {"cost": cost, "two-fault": two_fault, "tpp": tpp}
OFF = "off"
