# SPDX-License-Identifier: GPL-2.0-only
"""A machine's state, read from its files: what `dpud status`, `top`, `report` and the metrics have in common.

The files are a mount's (`MountFiles`) or a tree's in this process (`TreeFiles`). Paths are those below the
mount point. What a kernel was built without, or a user may not read, is None or empty here, and whoever shows it says
so.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from fs.kernfs import Tree

BUDDYINFO, ZONEINFO, VMSTAT = "/proc/buddyinfo", "/proc/zoneinfo", "/proc/vmstat"
UNUSABLE = "/sys/kernel/debug/extfrag/unusable_index"
NODES = "/sys/devices/system/node"
DPU = "/sys/kernel/debug/dpu_compact"
GPUS = "/sys/class/gpu_memvirt"
PAGE_SIZE = 4096
_MAX_BYTES = 1 << 24


class Files(Protocol):
    """Where to read."""

    def text(self, path: str) -> str:
        """A file's text. Raises OSError."""

    def names(self, path: str) -> list[str]:
        """A directory's names, sorted; none where there is no such directory."""


class MountFiles:
    """Those below a mount point."""

    def __init__(self, mountpoint: str) -> None:
        self.root = Path(mountpoint)

    def text(self, path: str) -> str:
        return (self.root / path.lstrip("/")).read_text()

    def names(self, path: str) -> list[str]:
        try:
            return sorted(os.listdir(self.root / path.lstrip("/")))
        except (FileNotFoundError, PermissionError):
            return []


class TreeFiles:
    """Those of the tree in this process, read by root: a state directory notes these requests like anybody's."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree

    def text(self, path: str) -> str:
        file = self._tree.open(path, os.O_RDONLY)
        try:
            return file.read(_MAX_BYTES, 0).decode()
        finally:
            file.release()

    def names(self, path: str) -> list[str]:
        try:
            return sorted(entry.name for entry in self._tree.readdir(path)[2:])
        except (FileNotFoundError, NotADirectoryError):
            return []


@dataclass(frozen=True)
class Zone:
    """One zone with memory: free blocks by order."""

    node: int
    name: str
    nr_free: tuple[int, ...]

    @property
    def free_pages(self) -> int:
        return sum(self.pages_by_order)

    @property
    def pages_by_order(self) -> list[int]:
        return [count << order for order, count in enumerate(self.nr_free)]


def zones(files: Files) -> list[Zone]:
    """From /proc/buddyinfo. Raises OSError."""
    return [Zone(*label, tuple(map(int, words))) for label, words in _by_zone(files.text(BUDDYINFO))]


def unusable_index(files: Files) -> dict[tuple[int, str], tuple[float, ...]] | None:
    """(node, zone) -> by order, share of free memory in blocks too small (mm/vmstat.c); None: no debugfs."""
    text = _text_or_none(files, UNUSABLE)
    return None if text is None else {label: tuple(map(float, words)) for label, words in _by_zone(text)}


def _by_zone(text: str) -> Iterator[tuple[tuple[int, str], list[str]]]:
    """Lines `Node 0, zone   Normal  ...`."""
    for line in text.splitlines():
        label, _, rest = line.partition(" zone ")
        name, *words = rest.split()
        yield (int(label.strip(" ,").removeprefix("Node ")), name), words


@dataclass(frozen=True)
class Span:
    """Where a zone is: page frames [start_pfn, start_pfn + spanned)."""

    node: int
    name: str
    start_pfn: int
    spanned: int


def spans(files: Files) -> list[Span]:
    """Of the zones that have memory, from /proc/zoneinfo, by address. Raises OSError."""
    found, node, name, spanned = [], 0, "", 0
    for line in files.text(ZONEINFO).splitlines():
        words = line.split()
        if words[:1] == ["Node"]:
            node, name, spanned = int(words[1].rstrip(",")), words[3], 0
        elif words[:1] == ["spanned"]:
            spanned = int(words[1])
        elif words[:1] == ["start_pfn:"] and spanned:
            found.append(Span(node, name, int(words[1]), spanned))
    return sorted(found, key=lambda span: span.start_pfn)


def pairs(files: Files, path: str) -> dict[str, int]:
    """`name value` lines; empty where there is no such file, or it may not be read."""
    words = [line.split() for line in (_text_or_none(files, path) or "").splitlines()]
    return {name: int(value) for name, value, *_ in words if value.lstrip("-").isdigit()}


def engine(files: Files) -> str | None:
    """Who moves pages now: the word in brackets."""
    text = _text_or_none(files, f"{DPU}/engine")
    return None if text is None else text.partition("[")[2].partition("]")[0]


@dataclass(frozen=True)
class Bucket:
    """One line of debugfs dpu_compact/histograms: `count` values in [low, high], ns or pages."""

    engine: str
    of: str
    what: str
    low: int
    high: int
    count: int


def histograms(files: Files) -> list[Bucket]:
    """All of them; none where there is no such file, or it may not be read."""
    lines = (_text_or_none(files, f"{DPU}/histograms") or "").splitlines()[1:]
    rows = [line.split() for line in lines]
    return [Bucket(row[0], row[1], row[2], int(row[3]), int(row[4]), int(row[5])) for row in rows]


def text_or(files: Files, path: str, default: str = "") -> str:
    """A file's text without the space around it; `default` where it cannot be read."""
    text = _text_or_none(files, path)
    return default if text is None else text.strip()


def _text_or_none(files: Files, path: str) -> str | None:
    try:
        return files.text(path)
    except (FileNotFoundError, PermissionError):
        return None
