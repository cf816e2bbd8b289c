# SPDX-License-Identifier: GPL-2.0-only
"""`dpud status`: a running daemon at a glance, read from its own files."""

from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table

from dpud import status_files as state
from dpud.errors import UserError
from dpud.status_gpu import Gpu, binary, gpus

_PAGE_SIZE = 4096
_SETTINGS = "dpu_compact_*"


def report(mountpoint: str) -> RenderableType:
    """Tables of free memory, the DPU's work, GPUs and the settings. Raises UserError if a file is not there."""
    root = Path(mountpoint)
    try:
        return Group(
            free_table((root / "proc/buddyinfo").read_text()),
            _compaction(root / "sys/kernel/debug/dpu_compact/stats"),
            *(gpu_table(gpu) for gpu in gpus(state.MountFiles(mountpoint))),
            *_kept(root / "sys/kernel/dpud_state"),
            pairs_table("Settings (vm.*)", _settings(root / "proc/sys/vm")),
        )
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error


def as_data(mountpoint: str) -> dict[str, Any]:
    """The same for programs: docs/status.schema.json describes it. Raises UserError if a file is not there."""
    files = state.MountFiles(mountpoint)
    try:
        unusable = state.unusable_index(files)
        zones = state.zones(files)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from error
    return {
        "version": 1,
        "mount": str(files.root),
        "zones": [_zone_data(zone, unusable) for zone in zones],
        "engine": state.engine(files),
        "dpu_compact": state.pairs(files, f"{state.DPU}/stats") or None,
        "gpus": [_gpu_data(gpu) for gpu in gpus(files)],
        "kept": state.pairs(files, "/sys/kernel/dpud_state/stats") or None,
        "settings": {
            name: int(text) for name, text in map(str.split, _settings(files.root / "proc/sys/vm").splitlines())
        },
    }


def _zone_data(zone: state.Zone, unusable: dict[tuple[int, str], tuple[float, ...]] | None) -> dict[str, Any]:
    return {
        "node": zone.node,
        "zone": zone.name,
        "free_bytes": zone.free_pages * _PAGE_SIZE,
        "free_blocks": list(zone.nr_free),
        "unusable_index": None if unusable is None else list(unusable[zone.node, zone.name]),
    }


def _gpu_data(gpu: Gpu) -> dict[str, Any]:
    return {
        "name": gpu.name,
        "tiers": [
            {"tier": tier.name, "used_bytes": tier.used_bytes, "size_bytes": tier.size_bytes or None}
            for tier in gpu.tiers
        ],
        "clients": [
            {
                "name": client.name,
                "priority": client.priority,
                "granted_bytes": client.granted_bytes,
                "used_bytes": client.used_bytes,
                "resident_bytes": client.resident_bytes,
            }
            for client in gpu.clients
        ],
    }


def gpu_table(gpu: Gpu) -> Table:
    """Where a GPU's pages are, and whose they are."""
    table = Table(gpu.name, title=f"GPU memory: {gpu.name}", title_justify="left")
    for heading in ("used", "of", "granted"):
        table.add_column(heading, justify="right")
    for tier in gpu.tiers:
        table.add_row(tier.name, binary(tier.used_bytes), binary(tier.size_bytes) if tier.size_bytes else "-", "")
    for client in gpu.clients:
        resident = binary(client.resident_bytes)
        table.add_row(
            f"client {client.name}", binary(client.used_bytes), f"{resident} resident", binary(client.granted_bytes)
        )
    return table


def _kept(directory: Path) -> list[RenderableType]:
    """Journal and checkpoints of a machine that is kept; what is wrong with the next one, if anything is."""
    try:
        table = pairs_table("State directory", (directory / "stats").read_text())
        problem = (directory / "problem").read_text()
    except FileNotFoundError:
        return []
    return [table, f"Checkpoint: {problem}"] if problem else [table]


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
