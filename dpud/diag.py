# SPDX-License-Identifier: GPL-2.0-only
"""`dpud diag`: the DPUs of a running daemon, in the manner of the SDK's dpu-diag: ranks, who has them, what failed.

Read from the daemon's own files. What dpu-diag asks a DIMM's controller for (firmware, power) is not there to ask.
"""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from dpud.errors import UserError

_MIB = 1 << 20


def report(mountpoint: str) -> RenderableType:
    """Tables of the ranks and of the faults. Raises UserError if the files are not there."""
    root = Path(mountpoint)
    try:
        return Group(_ranks(root / "sys/class/dpu_rank"), _failures(root / "sys/kernel/debug/dpu_compact"))
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _ranks(directory: Path) -> RenderableType:
    ranks = sorted(directory.glob("dpu_rank*"), key=lambda path: int(path.name.removeprefix("dpu_rank")))
    if not ranks:
        return "No DPU rank\n"
    table = Table("Rank", title=f"{len(ranks)} DPU rank{'s' * (len(ranks) > 1)}", title_justify="left")
    for heading in ("chip", "DPUs", "MRAM MiB", "MHz", "owned", "users"):
        table.add_column(heading, justify="right")
    for rank in ranks:
        value = {path.name: int(path.read_text()) for path in rank.iterdir()}
        table.add_row(
            rank.name,
            str(value["dpu_chip_id"]),
            f"{value['nb_ci']} x {value['nb_dpus_per_ci']}",
            str(value["mram_size"] // _MIB),
            str(value["fck_frequency"] // value["clock_division"]),
            "yes" if value["is_owned"] else "no",
            str(value["usage_count"]),
        )
    return table


def _failures(debugfs: Path) -> RenderableType:
    try:
        stats = dict(line.split() for line in (debugfs / "stats").read_text().splitlines())
        last = (debugfs / "last_failures").read_text().splitlines()
        armed = [path for path in sorted(debugfs.glob("fail_*")) if _armed(path)]
    except PermissionError:
        return "Faults: debugfs is for the user who runs the daemon\n"
    table = Table("Batches", "", title="Faults", title_justify="left")
    table.add_row("done", stats["regions"])
    for name, value in stats.items():
        if name.startswith("failed_"):
            table.add_row(name.replace("_", " "), value)
    for point in armed:
        table.add_row(f"{point.name} is armed", f"{(point / 'injected').read_text().strip()} injected")
    return Group(table, "\n".join(["Last failures", *(f"  {line}" for line in last)]))


def _armed(point: Path) -> bool:
    def number(name: str) -> int:
        return int((point / name).read_text())

    return number("nth") > 0 or (number("probability") > 0 and number("times") != 0)
