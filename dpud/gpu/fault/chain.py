# SPDX-License-Identifier: MIT
"""A client's last checkpoint: where each page of it is, in a full file and the increments to it."""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dpud.gpu.address_space.regions import Region
from dpud.gpu.address_space.space import Pages
from dpud.gpu.dirty import DirtyLog
from dpud.gpu.fault.checkpoint_file import Label


@dataclass(frozen=True)
class Record:
    """One checkpoint, for who looks at the list."""

    label: Label
    path: Path
    nr_pages: int
    nr_bytes: int
    cost_ns: int
    """What making it took."""
    time_ns: int
    """The moment that it is of."""
    digest: int

    @property
    def is_full(self) -> bool:
        return not self.label.parent


@dataclass
class KeptRegion:
    """What the chain has of a region."""

    region: Region
    log: DirtyLog
    """Pages written to since."""
    places: dict[int, tuple[Path, int]] = field(default_factory=dict)
    """Page -> its blob. One that is not there read as zeros."""
    taken: set[int] = field(default_factory=set)
    """Pages that went into a file that is not finished: the chain does not have them as they are now."""

    def changed(self) -> Pages:
        """Pages that may differ from what the chain has."""
        dirty = self.log.has(np.arange(self.region.nr_pages))
        dirty[list(self.taken)] = True
        return np.flatnonzero(dirty)

    def is_current(self, page: int) -> bool:
        return page not in self.taken and not self.log.has(np.array([page]))[0]

    def watch(self) -> None:
        if self.log not in self.region.dirty_logs:
            self.region.dirty_logs.append(self.log)

    def release(self) -> None:
        if self.log in self.region.dirty_logs:
            self.region.dirty_logs.remove(self.log)


@dataclass
class Chain:
    """Of one client."""

    record: Record
    """The last of it."""
    nr_increments: int
    kept: dict[int, KeptRegion]
    """By the region's first key."""
