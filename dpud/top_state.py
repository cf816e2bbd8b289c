# SPDX-License-Identifier: GPL-2.0-only
"""What one screen of `dpud top` shows, read from the mount's files, and what changed since the one before."""

import time
from dataclasses import dataclass, field

from dpud import status_files as state
from dpud.errors import UserError
from dpud.pageblocks import PAGES_PER_BLOCK, Sweep
from dpud.status_gpu import Gpu, gpus

_MESSAGE_S = 6.0


@dataclass(frozen=True)
class Sample:
    """The files at one moment."""

    at_s: float
    zones: list[state.Zone]
    engine: str | None
    stats: dict[str, int]
    """debugfs dpu_compact/stats; empty if that is not there or not for us."""
    vmstat: dict[str, int]
    gpus: list[Gpu]


@dataclass
class View:
    """Everything a screen is drawn from; `refresh` brings it up to date."""

    files: state.MountFiles
    node: int = 0
    paused: bool = False
    message: str = ""
    message_s: float = 0.0
    """When it was said: it makes room for the keys again."""
    spans: list[state.Span] = field(default_factory=list)
    maps: dict[str, Sweep] = field(default_factory=dict)
    """By zone, of the node shown; empty where kpageflags may not be read."""
    before: Sample | None = None
    now: Sample | None = None

    def start(self) -> None:
        """Look for the zones. Raises UserError."""
        try:
            self.spans = state.spans(self.files)
            self.show_node(self.nodes[0])
            self.refresh()
        except OSError as error:
            raise UserError(f"cannot read {error.filename}: {error.strerror}") from error

    @property
    def nodes(self) -> list[int]:
        return sorted({span.node for span in self.spans})

    def show_node(self, node: int) -> None:
        """Have the map of that node."""
        self.node = node
        self.maps = {span.name: self._sweep(span) for span in self.spans if span.node == node}

    def step_node(self, by: int) -> None:
        nodes = self.nodes
        self.show_node(nodes[(nodes.index(self.node) + by) % len(nodes)])

    def _sweep(self, span: state.Span) -> Sweep:
        first, end = span.start_pfn // PAGES_PER_BLOCK, -(-(span.start_pfn + span.spanned) // PAGES_PER_BLOCK)
        return Sweep(self.files.root / "proc/kpageflags", first, end)

    def refresh(self) -> None:
        """Read everything once. Raises OSError: the daemon is gone."""
        self.before, self.now = self.now, sample(self.files)
        if time.monotonic() - self.message_s > _MESSAGE_S and not self.message.endswith("..."):
            self.message = ""
        try:
            for sweep in self.maps.values():
                sweep.read()
        except PermissionError:
            self.maps = {}

    def say(self, message: str) -> None:
        """For the last line, for some seconds."""
        self.message, self.message_s = message, time.monotonic()

    def per_s(self, name: str) -> float:
        """How fast a number of /proc/vmstat went up between the last two samples."""
        if self.before is None or self.now is None:
            return 0.0
        seconds = self.now.at_s - self.before.at_s
        return (self.now.vmstat.get(name, 0) - self.before.vmstat.get(name, 0)) / seconds if seconds > 0 else 0.0


def sample(files: state.Files) -> Sample:
    """Raises OSError."""
    return Sample(
        time.monotonic(),
        state.zones(files),
        state.engine(files),
        state.pairs(files, f"{state.DPU}/stats"),
        state.pairs(files, state.VMSTAT),
        gpus(files),
    )
