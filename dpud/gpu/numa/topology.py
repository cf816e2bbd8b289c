# SPDX-License-Identifier: MIT
"""Which nodes there are, how far from each other, and what hangs where.

A topology is read from /sys/devices/system/node (sysfs.py) or from a TOML file:

    source = "where the figures are from"
    latency_ns = [[80, 140], [140, 80]]            # row: who accesses; column: whose memory, as in ACPI's HMAT
    bandwidth_MBps = [[80000, 30000], [30000, 80000]]
    distance = [[10, 18], [18, 10]]                # ACPI's SLIT; without: latencies relative to the node's own
    devices = [0, 1]                               # the node that each GPU's link ends at; without: all at the first
    tiers = { nvme = 1, ssd = [0, 1] }             # of swap; without: at the first. [0, 1]: one at each, ssd0, ssd1

    [[node]]
    id = 0
    cpus = "0-3"                                   # "" for a node of memory only
    memory_MiB = 4096

Rows and columns are in the order of the nodes. Ids may have holes. MB are 10^6 bytes, as sysfs has them.
"""

import errno
import tomllib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.errors import GpuError

LOCAL_DISTANCE = 10
"""Of a node to itself (ACPI 6.5, 5.2.17); all others are relative to it."""
MAX_DISTANCE = 254
MAX_NODES = 64
WEIGHTINESS = 32
"""What `auto` weights add up to at most: weightiness of mm/mempolicy.c (Linux 6.16)."""
MAX_CPUS = 8192
"""The most that a kernel for x86 can be built for (NR_CPUS)."""
_MB = 1_000_000
_MOST = 1 << 40
_FOLDER = Path(__file__).with_name("topologies")

Matrix = NDArray[np.int64]


@dataclass(frozen=True)
class Node:
    """One node. Without CPUs it is only memory."""

    nid: int
    cpus: tuple[int, ...]
    memory_bytes: int


@dataclass(frozen=True)
class Topology:
    """Matrices are [who accesses, whose memory], by position in `nodes`, not by nid."""

    nodes: tuple[Node, ...]
    distance: Matrix
    latency_ns: Matrix
    bandwidth: Matrix
    """bytes/s"""
    source: str
    devices: tuple[int, ...] = ()
    """nid of each device's node; those not named hang at the first node."""
    tiers: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _check_nodes([node.nid for node in self.nodes])
        for name in ("distance", "latency_ns", "bandwidth"):
            _check_matrix(name, getattr(self, name), len(self.nodes))
        own = np.diagonal(self.distance)
        if (own != LOCAL_DISTANCE).any() or (self.distance < LOCAL_DISTANCE).any():
            raise GpuError(errno.EINVAL, f"a node's distance to itself is {LOCAL_DISTANCE}, others are not less")
        for nid in (*self.devices, *self.tiers.values()):
            self.position(nid)

    def position(self, nid: int) -> int:
        """Row of a node. Raises GpuError(EINVAL)."""
        for at, node in enumerate(self.nodes):
            if node.nid == nid:
                return at
        raise GpuError(errno.EINVAL, f"no node {nid}")

    def device_node(self, device: int) -> int:
        """Position of the node that a device hangs at."""
        return self.position(self.devices[device]) if device < len(self.devices) else 0

    def tiers_of(self, kind: str) -> list[str]:
        """Names of the swap tiers of a kind: where several nodes have one, each by its node's number."""
        return [name for name in self.tiers if name.rstrip("0123456789") == kind] or [kind]

    def tier_node(self, name: str) -> int:
        """Position of the node that a swap tier hangs at."""
        return self.position(self.tiers[name]) if name in self.tiers else 0

    def fallback(self, at: int) -> list[int]:
        """Positions of all nodes, nearest first; of equally near ones those that come next after `at`, so that not
        all nodes fall back to the same one (as find_next_best_node of mm/page_alloc.c has it)."""
        nr = len(self.nodes)
        return sorted(range(nr), key=lambda other: (int(self.distance[at, other]), (other - at) % nr))

    def auto_weights(self) -> list[int]:
        """Weights of weighted interleave by each node's own bandwidth, reduced (mm/mempolicy.c, Linux 6.16)."""
        bandwidth = [int(best) for best in self.bandwidth.max(axis=0)]
        weights = [max(1, WEIGHTINESS * each // sum(bandwidth)) for each in bandwidth]
        divisor = gcd(*weights)
        return [weight // divisor for weight in weights]


def _check_nodes(nids: Sequence[int]) -> None:
    if not 0 < len(nids) <= MAX_NODES or sorted(set(nids)) != list(nids) or nids[0] < 0:
        raise GpuError(errno.EINVAL, f"nodes {list(nids)}: 1 to {MAX_NODES}, in order")


def _check_matrix(name: str, matrix: Matrix, nr: int) -> None:
    if matrix.shape != (nr, nr) or (matrix <= 0).any():
        raise GpuError(errno.EINVAL, f"{name} is no {nr} x {nr} matrix of positive numbers")


def shipped() -> list[str]:
    """Names of the topologies that come with dpud."""
    return sorted(path.stem for path in _FOLDER.glob("*.toml"))


def load(name: str | Path) -> Topology:
    """A file, or a shipped one by name. Raises GpuError(EINVAL) for what is none, OSError."""
    path = _FOLDER / f"{name}.toml" if str(name) in shipped() else Path(name)
    try:
        return _from_table(tomllib.loads(path.read_text()))
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise GpuError(errno.EINVAL, f"{path.name}: {error or type(error).__name__}") from error


def _from_table(table: Mapping[str, Any]) -> Topology:
    nodes = tuple(
        Node(_number(each["id"]), tuple(parse_list(each["cpus"])), _number(each["memory_MiB"]) << 20)
        for each in table["node"]
    )
    latency_ns = _matrix(table["latency_ns"])
    distance = _matrix(table["distance"]) if "distance" in table else relative(latency_ns)
    bandwidth = _matrix(table["bandwidth_MBps"]) * _MB
    devices, tiers = tuple(table.get("devices", ())), dict(_tiers(table.get("tiers", {})))
    return Topology(nodes, distance, latency_ns, bandwidth, table["source"], devices, tiers)


def _tiers(table: Mapping[str, int | list[int]]) -> Iterator[tuple[str, int]]:
    """(name, nid)"""
    for kind, nids in table.items():
        if isinstance(nids, int):
            yield kind, nids
        else:
            yield from ((f"{kind}{nid}", nid) for nid in nids)


def _matrix(rows: Iterable[Iterable[int]]) -> Matrix:
    return np.array([[_number(cell) for cell in row] for row in rows], dtype=np.int64)


def _number(value: object) -> int:
    """Raises ValueError for what is none, or could not be reckoned with in 64 bits."""
    if not isinstance(value, int) or not 0 <= value < _MOST:
        raise ValueError(f"{str(value)[:40]} is no number below {_MOST}")
    return value


def relative(latency_ns: Matrix) -> Matrix:
    """Distances from latencies: each row's relative to its least, which is the node's own, or stands for it."""
    own = np.minimum(np.diagonal(latency_ns), latency_ns.min(axis=1)).clip(min=1)
    found: Matrix = np.rint(LOCAL_DISTANCE * latency_ns / own[:, None]).astype(np.int64)
    found = found.clip(LOCAL_DISTANCE, MAX_DISTANCE)
    np.fill_diagonal(found, LOCAL_DISTANCE)
    return found


def parse_list(text: str) -> list[int]:
    """The kernel's lists of CPUs and nodes: "0-3,8" (bitmap_parselist). Raises ValueError."""
    found: set[int] = set()
    for piece in filter(None, text.strip().split(",")):
        first, _, last = piece.partition("-")
        low, high = int(first), int(last or first)
        if not 0 <= low <= high < MAX_CPUS:
            raise ValueError(f"{piece[:40]!r}: no range below {MAX_CPUS}")
        found.update(range(low, high + 1))
    return sorted(found)


def format_list(numbers: Sequence[int]) -> str:
    """The other way."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
