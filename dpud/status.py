# SPDX-License-Identifier: GPL-2.0-only
"""`dpud status`: a running daemon at a glance, read from its own files."""

from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from dpud.errors import UserError

_PAGE_SIZE = 4096
_SETTINGS = "dpu_compact_*"


def report(mountpoint: str) -> RenderableType:
    """Tables of free memory, the DPU's work and the settings. Raises UserError if a file is not there."""
    root = Path(mountpoint)
    try:
        return Group(
            free_table((root / "proc/buddyinfo").read_text()),
            _compaction(root / "sys/kernel/debug/dpu_compact/stats"),
            pairs_table("Settings (vm.*)", _settings(root / "proc/sys/vm")),
        )
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def _compaction(stats: Path) -> RenderableType:
    try:
        return pairs_table("DPU compaction", stats.read_text())
    except FileNotFoundError:
        return "DPU compaction: not in this kernel, or no debugfs\n"
    except PermissionError:
        return "DPU compaction: debugfs is for the user who runs the daemon\n"


def free_table(buddyinfo: str) -> Table:
    """One row a zone: free memory, and the share of it that lies in blocks large enough for a huge page."""
    table = Table("Zone", title="Free memory", title_justify="left")
    for heading in ("free MiB", "free blocks by order", "in 2 MiB blocks"):
        table.add_column(heading, justify="right")
    for line in buddyinfo.splitlines():
        label, _, counts = line.partition(" zone ")
        name, *words = counts.split()
        nr_free = [int(word) for word in words]
        pages = [count << order for order, count in enumerate(nr_free)]
        share = f"{100 * sum(pages[9:]) / sum(pages):.0f} %" if any(pages) else "-"
        blocks = " ".join(str(count) for count in nr_free)
        table.add_row(f"{label.rstrip(',')} {name}", f"{sum(pages) * _PAGE_SIZE >> 20}", blocks, share)
    return table


def pairs_table(title: str, text: str) -> Table:
    """A table of `name value` lines."""
    table = Table("Name", title=title, title_justify="left")
    table.add_column("Value", justify="right")
    for line in text.splitlines():
        name, _, value = line.partition(" ")
        table.add_row(name, value.strip())
    return table


def _settings(directory: Path) -> str:
    return "".join(f"{path.name} {path.read_text()}" for path in sorted(directory.glob(_SETTINGS)))
