# SPDX-License-Identifier: MIT
"""/sys/class/gpu_memvirt/gpu0/numa: nodes, where new pages are put, which pages move and why.

Names and units are Linux's where it has the same: weighted_interleave (Documentation/ABI/testing/
sysfs-kernel-mm-mempolicy-weighted-interleave), numastat, promote_rate_limit_MBps (in MiB, as its sysctl counts them).
Counters only grow.
"""

from collections.abc import Callable
from typing import Any

from dpud.gpu.attrs import number, value
from dpud.gpu.numa.module import NumaModule
from dpud.gpu.numa.placement import MAX_WEIGHT
from dpud.gpu.numa.rules import OFF, RULES
from dpud.gpu.numa.topology import Matrix, format_list
from kernelsim.attr import Attr, Bool, Bytes, Choice, Int, Kobject, Size, Text

_NS_PER_MS = 1_000_000
_MAX_MS = 2**31 - 1


def _limit(name: str) -> tuple[Callable[[Any], int], Callable[[Any, int], None]]:
    """Getter and setter, in ms, of a limit of the scan period."""

    def get(files: Any) -> int:
        return int(getattr(files.numa.balancer, name)) // _NS_PER_MS

    def put(files: Any, value: int) -> None:
        balancer = files.numa.balancer
        setattr(balancer, name, value * _NS_PER_MS)
        balancer.max_period_ns = max(balancer.max_period_ns, balancer.min_period_ns)
        balancer.set_period(balancer.period_ns)

    return get, put


def _long(doc: str, read: Callable[[Any], str]) -> Attr[bytes]:
    """A text that may be longer than the page that a file of sysfs has; read in pieces, so it is kept meanwhile."""
    attr: Attr[bytes] = Attr(Bytes(), doc=doc, mode=0o444)

    def size(files: Any) -> int:
        files.shown[attr.name] = read(files).encode()
        return len(files.shown[attr.name])

    def piece(files: Any, pos: int, size: int, _nonblock: bool) -> bytes:
        if pos == 0 or attr.name not in files.shown:
            files.shown[attr.name] = read(files).encode()
        return bytes(files.shown[attr.name][pos : pos + size])

    attr.size(size)
    attr.read(piece)
    return attr


class NumaFiles(Kobject):
    """What concerns all nodes."""

    topology = Attr(Text(), doc="Nodes, then distances, latencies in ns and MB/s, row: who accesses; and the source.")
    policy = Attr(Text(), doc="Where new pages are put: local, prefer:N, bind:NODES, interleave:NODES, weighted:NODES.")
    balancing = Attr(Choice(OFF, *RULES), doc="By which rule pages move to who uses them.")
    promote_rate_limit_MBps = number(
        Int(0, 2**31 - 1),
        "MiB that hint faults may move in a second.",
        lambda files: files.numa.balancer.limit_MBps,
        lambda files, value: setattr(files.numa.balancer, "limit_MBps", value),
    )
    scan_period_ms = number(
        Int(1, _MAX_MS),
        "How often pages are unmapped to see who uses them; adapts between the limits, to which it is cut.",
        lambda files: files.numa.balancer.period_ns // _NS_PER_MS,
        lambda files, ms: files.numa.balancer.set_period(ms * _NS_PER_MS),
    )
    scan_period_min_ms = number(Int(1, _MAX_MS), "It never gets shorter.", *_limit("min_period_ns"))
    scan_period_max_ms = number(
        Int(1, _MAX_MS), "It never gets longer; at least scan_period_min_ms.", *_limit("max_period_ns")
    )
    horizon_ms = number(Int(1, _MAX_MS), "How far ahead what a move saves is reckoned.", *_limit("horizon_ns"))
    scan_size = number(
        Size(1),
        "Bytes that are unmapped at once.",
        lambda files: files.numa.balancer.scan_bytes,
        lambda files, value: setattr(files.numa.balancer, "scan_bytes", value),
    )
    access_bytes = number(
        Size(1, 1 << 30),
        "How large an access is taken to be where benefits are reckoned.",
        lambda files: files.numa.balancer.access_bytes,
        lambda files, value: setattr(files.numa.balancer, "access_bytes", value),
    )
    stat = Attr(Text(), doc="Scans, hint faults, moves, refusals by reason, swapping over nodes, pages as in numastat.")
    swap_tiers = _long(
        "Why pages go to which tier: node, tier, rank, ns of the tier and of the way there and back, pages out, in.",
        lambda files: "".join(
            f"node{files.numa.topology.nodes[way.node].nid} {way.tier} {way.rank} {way.tier_ns} {way.crossing_ns}"
            f" {way.nr_out} {way.nr_in}\n"
            for way in files.numa.ways()
        ),
    )
    decisions = _long(
        "The last wishes: ns, address, from, to, verdict, ns of benefit, cost, and net.",
        lambda files: "".join(f"{each}\n" for each in files.numa.balancer.decisions),
    )
    pingpong = _long(
        "Pages that came back to the node they had left: address, how often, ns until they stay.",
        lambda files: "".join(
            f"{va:x} {heat.nr_pingpongs} {heat.backoff_until_ns}\n" for va, heat in files.numa.balancer.playing()
        ),
    )

    def __init__(self, numa: NumaModule) -> None:
        self.numa = numa
        self.shown: dict[str, bytes] = {}
        """Of long files: what their reader began with."""

    @topology.show
    def _topology(self) -> str:
        known = self.numa.topology
        nodes = [
            f"node{node.nid} cpus={format_list(node.cpus) or '-'} bytes={host.frames.nr_bytes}\n"
            for node, host in zip(known.nodes, self.numa.placement.hosts, strict=True)
        ]
        tables = (known.distance, known.latency_ns, known.bandwidth // 1_000_000)
        parts = [
            f"{name}\n{_table(table)}"
            for name, table in zip(("distance", "latency_ns", "bandwidth_MBps"), tables, strict=True)
        ]
        return "".join([*nodes, *parts, f"source {known.source}\n"])

    @policy.show
    def _policy_show(self) -> str:
        return self.numa.placement.policy

    @policy.store
    def _policy_store(self, text: str) -> None:
        self.numa.placement.set_policy(text)

    @balancing.show
    def _balancing_show(self) -> str:
        return self.numa.balancer.rule

    @balancing.store
    def _balancing_store(self, rule: str) -> None:
        self.numa.balancer.rule = rule

    @stat.show
    def _stat(self) -> str:
        return "".join(f"{name} {nr}\n" for name, nr in self.numa.stats().items())


def _table(matrix: Matrix) -> str:
    return "".join(" ".join(f"{cell:>6}" for cell in row) + "\n" for row in matrix.tolist())


class NodeFiles(Kobject):
    """One node."""

    cpulist = value("Its CPUs; empty for a node of memory only.", lambda files: format_list(files.node.cpus))
    distance = value(
        "To each node, its own is 10.",
        lambda files: " ".join(map(str, files.numa.topology.distance[files.at].tolist())),
    )
    fallback = value(
        "Nodes in the order in which they are tried.",
        lambda files: " ".join(
            str(files.numa.topology.nodes[other].nid) for other in files.numa.topology.fallback(files.at)
        ),
    )
    total_bytes = value("Of its memory.", lambda files: files.host.frames.nr_bytes)
    free_bytes = value("Of it, in free frames.", lambda files: files.host.frames.nr_free_bytes)
    devices = value("GPUs that hang here.", lambda files: " ".join(files.device_names()))
    tiers = value(
        "Swap tiers that hang here.",
        lambda files: " ".join(name for name in files.numa.topology.tiers if files.tier_is_here(name)),
    )
    numastat = Attr(Text(), doc="Pages put here, as Linux's numastat: name and count.")

    def __init__(self, numa: NumaModule, at: int) -> None:
        self.numa, self.at = numa, at
        self.node, self.host = numa.topology.nodes[at], numa.placement.hosts[at]

    def device_names(self) -> list[str]:
        memory = self.numa.memory
        numbers = [nr for nr in range(memory.nr_devices) if self.numa.topology.device_node(nr) == self.at]
        return [f"gpu{number}" for number in numbers]

    def tier_is_here(self, name: str) -> bool:
        return self.numa.topology.tier_node(name) == self.at

    @numastat.show
    def _numastat(self) -> str:
        return "".join(f"{name} {nr}\n" for name, nr in self.numa.placement.stat[self.at].items())


class WeightFiles(Kobject):
    """Weights of the policy `weighted`."""

    auto = Attr(Bool(), doc="Whether weights follow bandwidth; writing a weight switches it off.")

    def __init__(self, numa: NumaModule) -> None:
        self.numa = numa

    @auto.show
    def _auto_show(self) -> int:
        return int(self.numa.placement.auto)

    @auto.store
    def _auto_store(self, on: int) -> None:
        self.numa.placement.set_auto(bool(on))


def weight_file(numa: NumaModule, at: int) -> Kobject:
    """`nodeN` beside `auto`: a directory has as many as there are nodes."""
    attr = number(
        Int(0, MAX_WEIGHT),
        "Pages put here in each turn, 1 to 255; 0 takes what auto would.",
        lambda _files: numa.placement.weights[at],
        lambda _files, weight: numa.placement.set_weight(at, weight),
    )
    made: type[Kobject] = type("NodeWeight", (Kobject,), {f"node{numa.topology.nodes[at].nid}": attr})
    return made()
