# SPDX-License-Identifier: MIT
"""How bandwidth that nobody has reserved is given away.

fair      by share, whatever the level
priority  the most important level first, by share within a level: the others get what it leaves
adaptive  by share; but where a level misses its latency target, all levels below it are capped as far as it takes

A policy orders requests by lane, and by share within a lane.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Policy:
    name: str
    by_level: bool
    """Each level is a lane of its own."""
    adapts: bool
    """Latency targets are pursued."""

    def lane(self, level: int) -> int:
        return level if self.by_level else 0


POLICIES = {
    policy.name: policy
    for policy in (Policy("fair", False, False), Policy("priority", True, False), Policy("adaptive", False, True))
}
DEFAULT_POLICY = "fair"
