# SPDX-License-Identifier: MIT
"""The topology of a real machine, from its /sys/devices/system/node (Documentation/ABI/stable/sysfs-devices-node).

Nodes are those that are online and have memory; ids may have holes, and a directory of a node that is offline is not
looked at. A `distance` file has a number for each node that is online, in order.

What a machine does not say is modelled: latency and bandwidth follow from distances alone. HMAT's figures in
accessN/initiators are of the nearest initiator only, so they cannot make a matrix.
"""

import errno
import re
from pathlib import Path

import numpy as np

from dpud.gpu.errors import GpuError
from dpud.gpu.numa.topology import LOCAL_DISTANCE, Matrix, Node, Topology, parse_list

SYSFS = Path("/sys/devices/system/node")
LOCAL_LATENCY_NS = 100
LOCAL_BYTES_PER_S = 25_600_000_000
"""Of a node to itself: memory.HOST_PROFILE's. Uncalibrated."""
_TOTAL = re.compile(r"Node \d+ MemTotal:\s+(\d+) kB")


def read(root: Path = SYSFS) -> Topology:
    """Raises GpuError(ENODEV) where there is no such tree, GpuError(EINVAL) for one that makes no sense."""
    try:
        return _read(root)
    except FileNotFoundError as error:
        raise GpuError(errno.ENODEV, f"no NUMA topology: {error.filename}") from error
    except (ValueError, IndexError) as error:
        raise GpuError(errno.EINVAL, f"{root}: {error}") from error


def _read(root: Path) -> Topology:
    online = parse_list((root / "online").read_text())
    every = [_node(root, nid) for nid in online]
    rows = [[int(word) for word in (root / f"node{nid}/distance").read_text().split()] for nid in online]
    if any(len(row) != len(online) for row in rows):
        raise ValueError("a distance file does not have a number for each node that is online")
    used = [at for at, node in enumerate(every) if node.memory_bytes]
    distance = np.array(rows, dtype=np.int64)[np.ix_(used, used)]
    latency_ns, bandwidth = modelled(distance)
    source = f"{root}: distances are the machine's, latency and bandwidth are modelled from them"
    return Topology(tuple(every[at] for at in used), distance, latency_ns, bandwidth, source)


def _node(root: Path, nid: int) -> Node:
    folder = root / f"node{nid}"
    total = _TOTAL.search((folder / "meminfo").read_text())
    if total is None:
        raise ValueError(f"node{nid}/meminfo has no MemTotal")
    return Node(nid, tuple(parse_list((folder / "cpulist").read_text())), int(total[1]) << 10)


def modelled(distance: Matrix) -> tuple[Matrix, Matrix]:
    """Latency grows with distance, bandwidth falls with it."""
    latency_ns = LOCAL_LATENCY_NS * distance // LOCAL_DISTANCE
    bandwidth = LOCAL_BYTES_PER_S * LOCAL_DISTANCE // distance
    return latency_ns, bandwidth
