# SPDX-License-Identifier: GPL-2.0-only
"""Trees like /sys/devices/system/node of machines that are not here, as the kernel's documentation has them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Machine:
    """Nodes that are online: nid -> (CPUs as a list, MiB); distances in their order."""

    nodes: Mapping[int, tuple[str, int]]
    distances: Sequence[Sequence[int]]
    possible: str

    def write(self, root: Path) -> Path:
        online = ",".join(map(str, self.nodes))
        with_memory = ",".join(str(nid) for nid, (_, mib) in self.nodes.items() if mib)
        for name, text in {"online": online, "possible": self.possible, "has_memory": with_memory}.items():
            (root / name).write_text(f"{text}\n")
        for (nid, (cpus, mib)), row in zip(self.nodes.items(), self.distances, strict=True):
            folder = root / f"node{nid}"
            folder.mkdir()
            (folder / "cpulist").write_text(f"{cpus}\n")
            (folder / "cpumap").write_text(f"{_mask(cpus):08x}\n")
            (folder / "distance").write_text(" ".join(map(str, row)) + "\n")
            (folder / "meminfo").write_text(
                f"Node {nid} MemTotal:       {mib << 10:8d} kB\nNode {nid} MemFree:            1024 kB\n"
            )
        return root


def _mask(cpus: str) -> int:
    pieces = [piece.split("-") for piece in cpus.split(",") if piece]
    return sum(1 << cpu for piece in pieces for cpu in range(int(piece[0]), int(piece[-1]) + 1))


def _ring(nr: int) -> list[list[int]]:
    steps = [[min((a - b) % nr, (b - a) % nr) for b in range(nr)] for a in range(nr)]
    return [[10 + 6 * step for step in row] for row in steps]


MACHINES = {
    "two": Machine({0: ("0-3", 2048), 1: ("4-7", 4096)}, [[10, 21], [21, 10]], "0-1"),
    "four": Machine({nid: (f"{4 * nid}-{4 * nid + 3}", 1024) for nid in range(4)}, _ring(4), "0-3"),
    "eight": Machine({nid: (f"{nid},{nid + 8}", 512) for nid in range(8)}, _ring(8), "0-7"),
    "without-cpus": Machine({0: ("0-1", 2048), 1: ("", 8192)}, [[10, 17], [28, 10]], "0-1"),
    "holes": Machine(
        {0: ("0", 1024), 2: ("1", 1024), 5: ("", 4096)}, [[10, 12, 30], [12, 10, 31], [30, 31, 10]], "0-7"
    ),
}
