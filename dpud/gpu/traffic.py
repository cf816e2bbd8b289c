# SPDX-License-Identifier: MIT
"""Every byte that moves on the data path is somebody's: who it is charged to, and for what.

The path calls `charge` before it moves bytes, so that whoever limits bandwidth can let time pass (on the path's clock)
first. Accesses are charged to the client that makes them, all else to the owner of the pages.

Who can wait without holding the machine (a file's operation) asks for `admission` before it begins; then `charge` takes
what was admitted, and lets no time pass.
"""

from collections import Counter
from enum import StrEnum
from typing import Protocol

from dpud.gpu.enums import plain_members
from kernelsim.operation import Operation


@plain_members
class Cause(StrEnum):
    """Why bytes move."""

    ACCESS = "access"
    MIGRATION = "migration"
    """Between memories: to who uses them, by advice, or to another device."""
    SWAP = "swap"
    """Between memory and the stores, both ways."""
    DEMOTION = "demotion"
    """From one store to another, as they lie there: encoded."""
    RELOCATION = "relocation"
    """Within a memory, to put free frames together."""
    CHECKPOINT = "checkpoint"
    """Into a checkpoint and back."""
    EXTERNAL = "external"
    """By a client itself, which asks before it moves them."""


class Traffic(Protocol):
    """Who is told."""

    def charge(self, client: str, cause: Cause, nr_bytes: int, location: int, /) -> None:
        """`nr_bytes` are about to be read from, or written to, a location's memory; of DEMOTION, the store's at it."""
        ...

    def admission(self, client: str, nr_bytes: int, /, cause: Cause = Cause.ACCESS) -> Operation[None]:
        """Wait until so many bytes may move."""
        ...

    def forget(self, client: str, /) -> None:
        """A client is gone."""
        ...


class TrafficCounts:
    """Counts, and makes nobody wait."""

    def __init__(self) -> None:
        self.nr_bytes: Counter[tuple[str, Cause]] = Counter()

    def charge(self, client: str, cause: Cause, nr_bytes: int, location: int) -> None:
        self.nr_bytes[client, cause] += nr_bytes

    def admission(self, client: str, nr_bytes: int, /, cause: Cause = Cause.ACCESS) -> Operation[None]:
        yield from ()

    def forget(self, client: str) -> None:
        """Counters only grow: they stay."""
