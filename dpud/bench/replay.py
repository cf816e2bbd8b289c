# SPDX-License-Identifier: GPL-2.0-only
"""How fast a text trace is read, and read and replayed, against the demo's capture of a machine of 25 GiB."""

import random
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter

from dpud.bench.report import Figure, Report
from dpud.capture import DEMO, read_capture
from dpud.replay import Player, ReplayOptions
from dpud.trace_text import TraceReader

NR_EVENTS = 400_000
TARGET = 200_000
"""Events a second, read and replayed: about as fast as a busy machine makes them."""
_WEIGHTS = (739_418, 737, 568, 420)  # of these orders in a recording: files read and written, arrays allocated
_FIRST, _NR_NAMES = 0x100000, 0x40000


def trace(nr_events: int, seed: int = 0) -> Iterator[str]:
    """Lines of ftrace: single pages mostly, allocated and freed at random, at a load that stays."""
    rng = random.Random(seed)
    held: dict[int, int] = {}
    for number in range(nr_events):
        head = f"{'cc1-77':>24} [00{number >> 6 & 1}] ..... {number // 10**6}.{number % 10**6:06d}: "
        if len(held) > 40_000 or (held and rng.random() < 0.45):
            pfn = rng.choice(list(held)) if len(held) < 64 else next(iter(held))
            yield f"{head}mm_page_free: page=00000000{pfn:08x} pfn={pfn:#x} order={held.pop(pfn)}\n"
            continue
        (order,) = rng.choices((0, 1, 2, 8), _WEIGHTS)
        pfn = _FIRST + (rng.randrange(_NR_NAMES) & ~((1 << order) - 1))
        held[pfn] = order
        movable = rng.random() < 0.8
        flags = "GFP_HIGHUSER_MOVABLE|__GFP_ZERO|__GFP_COMP" if movable else "GFP_KERNEL_ACCOUNT|__GFP_ZERO|__GFP_COMP"
        yield (
            f"{head}mm_page_alloc: page=00000000{pfn:08x} pfn={pfn:#x} order={order} "
            f"migratetype={int(movable)} gfp_flags={flags}\n"
        )


def run() -> Report:
    report = Report(
        "replay",
        "a text trace of a real machine's page allocations",
        f"{NR_EVENTS:,} events of ftrace's text: read, and read and replayed on the demo's capture; second passes.",
    )
    with tempfile.TemporaryDirectory(prefix="dpud-bench-") as folder, ExitStack() as stack:
        path = Path(folder) / "trace"
        path.write_text("".join(trace(NR_EVENTS)))
        image = read_capture(DEMO)
        for _ in range(2):
            begin = perf_counter()
            nr_read = sum(map(len, TraceReader(path).batches()))
            read_s = perf_counter() - begin
            player = Player(image, ReplayOptions(path, DEMO), stack)
            begin = perf_counter()
            outcome = player.play(TraceReader(path), lambda _done: None)
            play_s = perf_counter() - begin
    report.figures = [
        Figure("events read", nr_read / read_s, "/s"),
        Figure("events read and replayed", outcome.notes.nr_events / play_s, "/s", TARGET, more=True),
    ]
    return report
