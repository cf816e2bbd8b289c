# SPDX-License-Identifier: GPL-2.0-only
"""What the emulated compaction does on a captured machine, beside what that machine's own did.

A case is a folder with `before`, `after` and `result.txt`, made by `dpud snapshot --compact`. The machine of `before`
is built in this process, 1 is written to its compact_memory, and the outcome is held against result.txt and `after`.
What a capture cannot tell is inferred, and the notes say what; how the real run ended is not looked at for it. Only the
CPU that the real compaction ran on is taken over where result.txt has it, since it is a circumstance of the run.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpud.bench.ending import ends
from dpud.bench.report import Report
from dpud.capture import DEMO, CaptureError, read_capture, read_raw
from dpud.errors import UserError
from dpud.physmem import PhysMem
from dpud.proctext import ZoneKey, parse_buddyinfo
from kernelsim.machine import Machine
from kernelsim.page import PG_lru, PG_tail, PG_thp

WITHIN = 0.05
"""The relative error asked for, of the figures that are judged."""
JUDGED_ORDERS = (9, 10)
OTHER_GUESSES = range(1, 5)
"""Seeds of what can only be guessed; `--from` takes 0.
"""
FEW_LISTED = 1024
"""So few pages on per-CPU lists, as a prepared host has, that no other order of them is tried.
"""
HEADINGS = ("Figure", "Real", "Ours", "Error", "Verdict")

_COUNTERS = {
    "pgmigrate_success": "pages migrated",
    "pgmigrate_fail": "pages that failed to migrate",
    "compact_migrate_scanned": "pages the migrate scanner looked at",
    "compact_free_scanned": "pages the free scanner looked at",
    "compact_isolated": "pages isolated",
}
"""vmstat counters compared: name in result.txt -> what it is. The first is judged."""
_RESULT = re.compile(r"([a-z0-9_]{1,64}) (\S.{0,200})")
_MAX_RESULT_BYTES = 64 << 10


@dataclass(frozen=True)
class Comparison:
    """A line of the table: a count of the real kernel, ours, and whether they have to agree."""

    what: str
    real: int
    ours: int
    judged: bool

    @property
    def error(self) -> float | None:
        """Of ours, relative to the real count; None where that is 0 and ours is not."""
        if self.real == 0:
            return 0.0 if self.ours == 0 else None
        return self.ours / self.real - 1

    @property
    def verdict(self) -> str:
        if not self.judged:
            return ""
        return "met" if abs(self.ours - self.real) <= WITHIN * self.real else "missed"

    def cells(self) -> tuple[str, ...]:
        error = "" if self.error is None else f"{100 * self.error:+.1f} %"
        return self.what, f"{self.real:,}", f"{self.ours:,}", error, self.verdict


@dataclass(frozen=True)
class Case:
    """A folder of a real compaction, without its `before`."""

    folder: Path
    result: dict[str, str]
    nr_free: dict[ZoneKey, tuple[int, ...]]
    """After the real compaction: free blocks by order."""
    texts: dict[str, str]
    """Of `after`, where there: extfrag_index, unusable_index."""


def read_case(folder: Path) -> Case:
    """Raises CaptureError if it is no such folder or its figures cannot be read."""
    try:
        if not folder.is_dir():
            raise CaptureError("no such folder")
        for part in ("before", "after", "result.txt"):
            if not (folder / part).exists():
                raise CaptureError(f"has no `{part}`: it is not a folder that `dpud snapshot --compact` made")
        result = parse_result(_read(folder / "result.txt"))
        nr_free = parse_buddyinfo(_read(folder / "after" / "buddyinfo"))
        names = ("extfrag_index", "unusable_index")
        there = [name for name in names if (folder / "after" / name).is_file()]
        return Case(folder, result, nr_free, {name: _read(folder / "after" / name) for name in there})
    except CaptureError as error:
        raise CaptureError(f"{folder}: {error}") from None
    except OSError as error:
        raise CaptureError(f"{error.filename or folder}: {error.strerror}") from None


def _read(path: Path) -> str:
    with path.open("rb") as file:
        content = file.read(_MAX_RESULT_BYTES + 1)
    if len(content) > _MAX_RESULT_BYTES:
        raise CaptureError(f"{path.name}: more than {_MAX_RESULT_BYTES >> 10} KiB of text")
    try:
        return content.decode()
    except UnicodeDecodeError:
        raise CaptureError(f"{path.name}: not text") from None


def parse_result(text: str) -> dict[str, str]:
    """`name value` lines. CaptureError if the counts that are compared are missing or no numbers."""
    values = {}
    for line in text.splitlines():
        found = _RESULT.fullmatch(line)
        if not found:
            raise CaptureError(f"result.txt: not a `name value` line: {line[:60]!r}")
        values[found[1]] = found[2]
    for name in _COUNTERS:
        if name == "compact_isolated":  # hostfrag.c did not write it
            continue
        if not re.fullmatch(r"-?[0-9]{1,15}", values.get(name, "")):
            raise CaptureError(f"result.txt: no count {name}")
    for name in ("others_allocated", "others_freed"):
        if not re.fullmatch(r"[0-9]{1,15}", values.get(name, "0")):
            raise CaptureError(f"result.txt: {name} is no count")
    return values


def run(folder: str | None = None) -> Report:
    """Compare one case; without one, the demo's capture if a real compaction comes with it. Raises UserError."""
    title = f"{folder or 'no capture'}: the real kernel's compact_memory and ours"
    how = f"1 written to compact_memory of the machine of `before`; judged: {WITHIN:.0%} of the real kernel's."
    report = Report("fidelity", title, how, headings=HEADINGS)
    if folder is None:
        if not (DEMO / "after").is_dir():
            report.notes.append(
                "nothing to compare: make a case on a real machine, as root, with `dpud snapshot --compact DIR` "
                "(--fragment random --mb 1024 fragments it first), then `dpud bench fidelity DIR`"
            )
            return report
        folder = str(DEMO)
    try:
        compare(read_case(Path(folder)), report)
    except CaptureError as error:
        raise UserError(str(error)) from error
    return report


def compare(case: Case, report: Report) -> None:
    """Run the emulated compaction and fill in the report. Raises CaptureError, UserError."""
    run = Emulated(case)
    report.figures = [*_counters(case, run.deltas), *_free_blocks(case, run.machine), *_indices(case, run.machine)]
    report.notes += _notes(case, run)
    before, after = (read_raw(case.folder / part).kpageflags for part in ("before", "after"))
    report.notes += ends(run.image.zones, before, after, run.movable_before, _movable(run.machine))
    if len(run.image.pcp_pfn) > FEW_LISTED:
        others = [Emulated(case, guess).deltas["pgmigrate_success"] for guess in OTHER_GUESSES]
        report.notes.append(
            "uncertain: in which order pages reached the per-CPU lists is a guess, and decides what the free scanner "
            f"finds; with {len(others)} other guesses the pages migrated are {', '.join(f'{nr:,}' for nr in others)}"
        )


class Emulated:
    """The machine of `before` after its compaction, and by how much its vmstat rose. Raises as compare() does."""

    def __init__(self, case: Case, guess: int = 0) -> None:
        folder = case.folder / "before"
        self.image = read_capture(folder, guess)
        self._memory = PhysMem()
        try:
            self.machine = Machine.from_image(self.image, alloc_words=self._memory.alloc)
        except (ValueError, OSError) as error:
            raise UserError(f"{folder}: {error}") from error
        if re.fullmatch(r"[0-9]{1,4}", cpu := case.result.get("cpu", "")):
            self.machine.compaction.cpu = int(cpu)
        self.movable_before = _movable(self.machine)
        before = _vmstat(self.machine)
        self.machine.registry.write("/proc/sys/vm/compact_memory", "1")
        self.deltas = {name: value - before[name] for name, value in _vmstat(self.machine).items()}


def _movable(machine: Machine) -> NDArray[np.bool_]:
    """bool[nr_pages]: pages of folios on an LRU list."""
    flags = machine.vm.mem.pages["flags"][: machine.vm.mem.nr_pages]
    tail = np.uint32(PG_tail | PG_thp)
    found: NDArray[np.bool_] = (flags & np.uint32(PG_lru) != 0) | (flags & tail == tail)
    return found


def _vmstat(machine: Machine) -> dict[str, int]:
    lines = machine.registry.read("/proc/vmstat").decode().splitlines()
    return {name: int(value) for name, value in (line.split() for line in lines)}


def _counters(case: Case, deltas: dict[str, int]) -> Iterator[Comparison]:
    for name, what in _COUNTERS.items():
        if name in case.result:
            yield Comparison(what, int(case.result[name]), deltas[name], judged=name == "pgmigrate_success")


def _free_blocks(case: Case, machine: Machine) -> Iterator[Comparison]:
    ours = parse_buddyinfo(machine.registry.read("/proc/buddyinfo").decode())
    for key in ours:
        if key not in case.nr_free:
            raise CaptureError(f"after/buddyinfo: no line for zone {key[1]} of node {key[0]}")
        for order, (real, nr) in enumerate(zip(case.nr_free[key], ours[key], strict=True)):
            judged = order in JUDGED_ORDERS
            if judged or real or nr:
                what = f"node {key[0]} {key[1]}: free blocks of order {order}"
                yield Comparison(what, real, nr, judged)


def _indices(case: Case, machine: Machine) -> Iterator[Comparison]:
    """How many of the values (one per zone and order) of each debugfs index are as after the real compaction."""
    for name, text in case.texts.items():
        real = _index_values(text)
        ours = _index_values(machine.registry.read(f"/sys/kernel/debug/extfrag/{name}").decode())
        nr = sum(abs(ours[key] - value) <= WITHIN for key, value in real.items() if key in ours)
        yield Comparison(f"{name}: values within {WITHIN} of the real ones", len(real), nr, judged=False)


def _index_values(text: str) -> dict[tuple[str, str, int], float]:
    found: dict[tuple[str, str, int], float] = {}
    for line in text.splitlines():
        head = re.fullmatch(r"Node (\d+), zone +(\w+) ([-0-9. ]+)", line)
        if not head:
            raise CaptureError(f"not a line of an extfrag index: {line[:60]!r}")
        try:
            found |= {(head[1], head[2], order): float(word) for order, word in enumerate(head[3].split())}
        except ValueError:
            raise CaptureError(f"not numbers: {line[:60]!r}") from None
    return found


def _circumstances(case: Case) -> Iterator[str]:
    names = ("pattern", "mb", "keep_percent", "kernel", "cpu", "seconds", "prepared")
    yield "real run: " + ", ".join(f"{name} {case.result[name]}" for name in names if name in case.result)
    if case.result.get("prepared", "no") == "no":
        yield (
            "the host was taken as it was: dirty large folios, which can end a run, and the order of its per-CPU lists "
            "are not visible"
        )
    others = [int(case.result.get(name, "0")) for name in ("others_allocated", "others_freed")]
    if sum(others):
        yield (
            f"while the real compaction ran, something else allocated {others[0]:,} pages and freed {others[1]:,}; "
            "ours ran alone"
        )


def _notes(case: Case, run: Emulated) -> Iterator[str]:
    image, machine = run.image, run.machine
    yield from _circumstances(case)
    if "cpu" not in case.result:
        yield (
            f"inferred: the real compaction ran on CPU {machine.compaction.cpu_at_work()}, whose lists are fullest, "
            "so that the pages it freed went onto them (result.txt has no `cpu`)"
        )
    if not image.mappings:
        yield "inferred: who maps what; no pagemaps were captured, so that synthetic processes map every page"
    for zone in image.zones:
        counts = ", ".join(map(str, zone.nr_blocks))
        yield f"inferred: {zone.label}: which pageblocks have which type (Unmovable, Movable, ... are {counts})"
    yield "inferred: the order of the LRU and of the free lists, by address; no page is under writeback or isolated"
    yield f"inferred: {len(image.pinned_pfn)} pages are pinned (pins are invisible in kpageflags); there may be others"
    yield from (f"import: {note}" for note in image.notes)
    yield from (f"log: {line}" for line in machine.printk.lines() if "compact" in line)
