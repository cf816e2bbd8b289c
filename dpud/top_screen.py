# SPDX-License-Identifier: GPL-2.0-only
"""One screen of `dpud top` as lines of text, cut to a width and a height.

The map gets the lines that nothing else needs. A character of it stands for the same number of pageblocks everywhere; a
zone begins on a line of its own.
"""

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from rich.text import Text

from dpud.pageblocks import FREE, KERNEL, LOCKED, MOVABLE, Sweep, cells
from dpud.status_gpu import Gpu, binary
from dpud.top_state import View

SHADES = " ░▒▓█"
NO_MEMORY, UNREAD = "·", "?"
KEYS = "c compact (DPU)  t traditional  p pause  tab/arrows node  q quit"
LEGEND = (("green", "movable"), ("yellow", "some fixed"), ("red", "mostly fixed"), ("magenta", "locked"))
_LABEL = 14
_BAR = 16
_WIDE = 140
_NO_MAP = "No map: /proc/kpageflags is for the user who runs the daemon"


def screen(view: View, width: int, height: int) -> list[Text]:
    """At most `height` lines of `width` columns."""
    assert view.now is not None
    memory, gpu = [*orders(view), *rates(view)], [line for each in view.now.gpus for line in gpu_lines(each)]
    lower = _beside(memory, gpu, width) if width >= _WIDE else [*memory, *gpu]
    room = height - len(lower) - 2
    if room < 4 and len(lower) > len(memory):  # a small screen: the map goes before the last clients
        lower = lower[: max(height - 2 - 4, len(memory))]
        room = height - len(lower) - 2
    picture = heat_map(view, width, room) if room > 0 else []
    lines = [header(view), *picture, *lower][: height - 1]
    lines += [Text()] * (height - 1 - len(lines))
    return [_cut(line, width) for line in [*lines, footer(view)]]


def plain(view: View, width: int, coloured: bool) -> list[Text]:
    """Everything once, at as many lines as it takes."""
    assert view.now is not None
    gpu = [line for each in view.now.gpus for line in gpu_lines(each)]
    return [header(view), *heat_map(view, width, 16, coloured), *orders(view), *rates(view), *gpu]


def header(view: View) -> Text:
    assert view.now is not None
    engine = view.now.engine or "none"
    nodes = " ".join(f"[{node}]" if node == view.node else str(node) for node in view.nodes)
    text = Text(f"dpud top  {view.files.root}  node {nodes}  engine {engine}", style="bold")
    return text.append("  PAUSED" if view.paused else "", style="bold red")


def footer(view: View) -> Text:
    return Text(view.message or KEYS, style="reverse")


def heat_map(view: View, width: int, height: int, coloured: bool = True) -> list[Text]:
    """The pageblocks of the node's zones, with a legend; of `height` lines at most."""
    if not view.maps:
        return [Text(_NO_MAP, style="italic")][:height]
    per_row, rows = max(width - _LABEL, 1), max(height - 1, len(view.maps))
    per_cell = blocks_per_cell([len(sweep.pages) for sweep in view.maps.values()], per_row, rows)
    lines = [line for name, sweep in view.maps.items() for line in _zone_rows(name, sweep, per_cell, per_row)]
    return [*lines, _legend(per_cell, coloured)][:height]


def blocks_per_cell(nr_blocks: list[int], per_row: int, rows: int) -> int:
    """The fewest with which zones of so many blocks fit into so many rows (each zone takes one at least)."""
    per_cell = 1
    while sum(-(-nr // (per_cell * per_row)) for nr in nr_blocks) > max(rows, len(nr_blocks)):
        per_cell += 1
    return per_cell


def _legend(per_cell: int, coloured: bool) -> Text:
    text = Text(f"{SHADES[1]} to {SHADES[-1]} used, {per_cell * 2} MiB each  ", style="italic")
    for colour, what in LEGEND if coloured else ():
        text.append(f"█ {what}  ", style=colour)
    return text


def _zone_rows(name: str, sweep: Sweep, per_cell: int, per_row: int) -> Iterator[Text]:
    nr_cells = -(-len(sweep.pages) // per_cell)
    shares = cells(sweep.pages, per_cell)
    unread = np.array([(sweep.pages[at : at + per_cell] < 0).any() for at in range(0, len(sweep.pages), per_cell)])
    for at in range(0, nr_cells, per_row):
        start_mib = (sweep.first_block + at * per_cell) * 2
        row = Text(f"{name if at == 0 else '':7}{address(start_mib):>6} ", no_wrap=True)
        for share, unknown in zip(shares[at : at + per_row], unread[at : at + per_row], strict=True):
            row.append(*((UNREAD, "bright_black") if unknown else cell(share)))
        yield row


def address(mib: int) -> str:
    return f"{mib}M" if mib < 1024 else f"{mib / 1024:.1f}G"


def cell(share: NDArray[np.float64]) -> tuple[str, str]:
    """(character, colour) of pages that are so much of each kind; nan is no memory."""
    if np.isnan(share[FREE]):
        return NO_MEMORY, "bright_black"
    used = 1 - share[FREE]
    if used <= 0:
        return SHADES[0], ""
    nearest = int(used * (len(SHADES) - 1) + 0.5)
    return SHADES[max(nearest, 1)], _colour(share[KERNEL] / used, share[LOCKED] / used, share[MOVABLE] / used)


def _colour(kernel: float, locked: float, movable: float) -> str:
    if locked >= max(kernel, movable):
        return "magenta"
    return "red" if kernel >= 0.5 else "yellow" if kernel > 0 else "green"


def orders(view: View) -> list[Text]:
    """Free blocks by order, a line for each zone of the node."""
    assert view.now is not None
    zones = [zone for zone in view.now.zones if zone.node == view.node]
    nr_orders = max((len(zone.nr_free) for zone in zones), default=0)
    lines = [Text(f"{'free':7}{'':>7}" + "".join(f"{order:>5}" for order in range(nr_orders)) + "  order", "bold")]
    for zone in zones:
        numbers = "".join(f"{short(count):>5}" for count in zone.nr_free)
        lines.append(Text(f"{zone.name:7}{address(zone.free_pages >> 8):>6} {numbers}"))
    return lines


def short(number: float) -> str:
    """Four characters at most, below 10^13."""
    for unit in ("", "k", "M", "G"):
        if number < (10_000 if not unit else 999.5):
            return f"{number:.0f}{unit}"
        number /= 1000
    return f"{number:.0f}T"


def rates(view: View) -> list[Text]:
    """What compaction does, in pages a second: as it went here, and as modelled for the engine."""
    assert view.now is not None
    stats = view.now.stats
    if not stats:
        return [Text("Compaction: debugfs is not there, or for the user who runs the daemon", style="italic")]
    moved, migrated = stats["pages_moved"], view.now.vmstat.get("pgmigrate_success", 0)
    now = view.per_s("pgmigrate_success")
    modelled, wall = (moved / ns * 1e9 if ns else 0.0 for ns in (stats["modelled_ns"], stats["wall_ns"]))
    failed = stats["failures"] + stats["fallbacks"]
    return [
        Text(f"compaction  {migrated:,} pages migrated, {moved:,} by an engine; now {now:,.0f}/s; failed {failed}"),
        Text(
            f"  pages/s   {short(modelled)} modelled, {short(wall)} measured here; pinned {stats['skipped_pinned']:,}"
        ),
    ]


def gpu_lines(gpu: Gpu) -> list[Text]:
    """Tiers as bars, then a line for each client."""
    lines = []
    for number, tier in enumerate(gpu.tiers):
        label = f"{gpu.name if number == 0 else '':6}{tier.name:11}"
        share = tier.used_bytes / tier.size_bytes if tier.size_bytes else 0.0
        line = Text(label).append_text(_bar(share)) if tier.size_bytes else Text(label + " " * (_BAR + 2))
        lines.append(
            line.append(f" {binary(tier.used_bytes)} of {binary(tier.size_bytes) if tier.size_bytes else 'any'}")
        )
    for client in gpu.clients:
        granted = binary(client.granted_bytes)
        sizes = f"{binary(client.used_bytes)} used, {binary(client.resident_bytes)} resident"
        lines.append(Text(f"      {client.name[:10]:11}priority {client.priority}: {sizes}, {granted} granted"))
    return lines


def _bar(share: float) -> Text:
    full = round(min(max(share, 0.0), 1.0) * _BAR)
    colour = "green" if share < 0.75 else "yellow" if share < 0.95 else "red"
    return Text("[").append("█" * full, style=colour).append("░" * (_BAR - full), style="bright_black").append("]")


def _beside(left: list[Text], right: list[Text], width: int) -> list[Text]:
    half = width // 2
    lines = []
    for number in range(max(len(left), len(right))):
        line = _cut(left[number], half) if number < len(left) else Text()
        line.pad_right(half - line.cell_len)
        lines.append(line.append_text(right[number]) if number < len(right) else line)
    return lines


def _cut(line: Text, width: int) -> Text:
    line = line.copy()
    line.no_wrap = True
    line.truncate(width, overflow="ellipsis")
    return line
