# SPDX-License-Identifier: GPL-2.0-only
"""What single pages cost in the emulated kernel, as library code: touching, checking and freeing anonymous memory."""

from collections.abc import Iterator
from itertools import pairwise
from statistics import median
from time import perf_counter_ns

from dpud.bench.report import Figure, Report
from dpud.inject import LiveClock
from dpud.physmem import PhysMem
from kernelsim.machine import Machine, MachineConfig, NodeConfig
from kernelsim.mmap import Mm
from kernelsim.operation import complete

NR_PAGES = 1 << 15
NR_ROUNDS = 5
_NODE_BYTES = 1 << 29
STAGES = ("fault in and write", "read back and compare", "unmap and free")


def _round(machine: Machine) -> Iterator[float]:
    """ns per page of each of STAGES: every page of a new mapping is written, read back and unmapped."""
    mm = Mm(machine.vm)
    vma = mm.mmap(NR_PAGES)
    marks = [perf_counter_ns()]
    complete(mm.write(vma))
    marks.append(perf_counter_ns())
    assert complete(mm.count_wrong(vma)) == 0
    marks.append(perf_counter_ns())
    complete(mm.munmap(vma))
    marks.append(perf_counter_ns())
    complete(mm.exit())
    for begin, end in pairwise(marks):
        yield (end - begin) / NR_PAGES


def _figures(contents: str, label: str) -> Iterator[Figure]:
    config = MachineConfig(nodes=(NodeConfig(_NODE_BYTES),), bytes=contents)
    machine = Machine(config, clock=LiveClock(), alloc_words=PhysMem().alloc)
    rounds = [list(_round(machine)) for _ in range(1 + NR_ROUNDS)][1:]
    for what, *values in zip(STAGES, *rounds, strict=True):
        yield Figure(f"{what}, {label}", median(values), "ns")


def run() -> Report:
    report = Report(
        "pages",
        "cost of a page in the emulated kernel",
        f"Anonymous memory, {NR_PAGES} pages, ns per page; medians of {NR_ROUNDS} rounds on one machine.",
    )
    report.figures = [*_figures("full", "4096 real bytes"), *_figures("stamp", "content stamp")]
    return report
