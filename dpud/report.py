# SPDX-License-Identifier: GPL-2.0-only
"""`dpud report OUT.html`: one machine, before and after a compaction by the DPU, as a page that needs nothing else.

All of it comes from the files of a daemon: of one that runs (`of_mount`), or of one started for the report, in a
namespace of its own (`of_own`). The engines are compared on memory of their own, in this process, since a compaction
cannot be done twice on the same memory.
"""

import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from dpud import status_files as state
from dpud.errors import UserError
from dpud.pageblocks import PAGES_PER_BLOCK, Sweep
from dpud.status_gpu import Gpu, gpus

OWN_MACHINE = Path(__file__).with_name("report.toml")
COMPARED = "200M"
"""How much memory of a 1 GiB machine the engines are compared on; half of it is freed at random."""


@dataclass(frozen=True)
class Moment:
    """Memory at one moment. `maps`: zone -> int32[pageblock, kind] of pageblocks.py; None if that may not be read."""

    zones: list[state.Zone]
    unusable: dict[tuple[int, str], tuple[float, ...]] | None
    maps: dict[tuple[int, str], NDArray[np.int32]] | None


@dataclass(frozen=True)
class EngineRow:
    """What compacting the same memory takes by one engine's model; `host`: what it took here."""

    name: str
    pages_moved: int
    total_ns: int
    region_p50_ns: int
    region_max_ns: int
    unavailable_p50_ns: int

    @property
    def source(self) -> str:
        return "measured" if self.name == "host" else "modelled"


@dataclass(frozen=True)
class Facts:
    """All that the page says."""

    what: str
    at: datetime
    before: Moment | None
    after: Moment
    took_s: float | None
    engine: str | None
    stats: dict[str, int]
    histograms: list[state.Bucket]
    engines: list[EngineRow]
    gpus: list[Gpu]


def of_mount(out: Path, mountpoint: str, compact: bool) -> None:
    """Report on a running daemon; only with `compact` is anything written to it. Raises UserError."""
    _write(out, gather(mountpoint, f"the daemon at {mountpoint}", compact))


def of_own(out: Path, run_options: list[str]) -> int:
    """Report on a machine started for it -> exit code: 2 if it did not start (it has said why). Raises UserError."""
    from dpud import namespace
    from dpud.exec import own_daemon

    out = out.absolute()
    what = " ".join(["dpud run", *run_options]) if run_options else "a machine of 512 MiB, half of a process freed"
    namespace.enter()
    with own_daemon(run_options or ["--config", str(OWN_MACHINE)]) as mountpoint:
        if mountpoint is None:
            return 2
        _write(out, gather(mountpoint, what, compact=True))
    return 0


def gather(mountpoint: str, what: str, compact: bool) -> Facts:
    """Look, compact all nodes with the DPU if asked to, look again, compare engines. Raises UserError."""
    files = state.MountFiles(mountpoint)
    with Console(stderr=True).status("Reading memory") as status:
        try:
            before = moment(files) if compact else None
            status.update("Compacting")
            took_s = _compact(files) if compact else None
            after = moment(files)
            status.update("Comparing engines")
            return Facts(
                what,
                datetime.now().astimezone(),
                before,
                after,
                took_s,
                state.engine(files),
                state.pairs(files, f"{state.DPU}/stats"),
                state.histograms(files),
                list(compare_engines()),
                gpus(files),
            )
        except OSError as error:
            raise UserError(f"cannot use {error.filename}: {error.strerror}") from error


def moment(files: state.MountFiles) -> Moment:
    """Read it. Raises OSError."""
    try:
        maps = {(span.node, span.name): _map(files, span) for span in state.spans(files)}
    except PermissionError:
        maps = None
    return Moment(state.zones(files), state.unusable_index(files), maps)


def _map(files: state.MountFiles, span: state.Span) -> NDArray[np.int32]:
    first, end = span.start_pfn // PAGES_PER_BLOCK, -(-(span.start_pfn + span.spanned) // PAGES_PER_BLOCK)
    sweep = Sweep(files.root / "proc/kpageflags", first, end)
    sweep.read_all()
    return sweep.pages


def _compact(files: state.MountFiles) -> float:
    """-> seconds that the writes took. Raises OSError."""
    begin_s = time.monotonic()
    for name in files.names(state.NODES):
        path = files.root / state.NODES.lstrip("/") / name / "compact_dpu"
        if path.exists():
            path.write_text("1")
    return time.monotonic() - begin_s


def compare_engines(filled: str = COMPARED) -> Iterator[EngineRow]:
    """Each on the same fragmented memory, in this process."""
    from dpud.bench.engines import compacted
    from dpud.dpu.driver import DpuDriver
    from kernelsim.dpu_hw import ENGINES

    for engine in ENGINES:
        driver = DpuDriver()
        try:
            dpu = compacted(engine, driver, filled).dpu
        finally:
            driver.close()
        taken = dpu.accounts.batches.engines[engine]
        _, region_p50, _, _, region_max = taken.latency["modelled"].cells()
        _, away_p50, *_ = taken.unavailable["modelled"].cells()
        nr_moved = dpu.stats.pages_moved + dpu.stats.cpu_pages_moved
        yield EngineRow(engine, nr_moved, dpu.accounts.modelled_ns, region_p50, region_max, away_p50)


def _write(out: Path, facts: Facts) -> None:
    from dpud.report_html import page

    try:
        out.write_text(page(facts), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{out}: {error.strerror}") from error
    print(f"dpud: wrote {out} ({out.stat().st_size >> 10} KiB)", file=sys.stderr)
