# SPDX-License-Identifier: GPL-2.0-only
"""What is allocated and freed, in what order: a random mix, and logs in the format of RMM's logging_resource_adaptor.

A log is CSV with the columns Thread,Time,Action,Pointer,Size,Stream; actions are allocate and free, and others, which
are passed over. The logs made here are of programs that do not exist, with sizes and lifetimes as a training loop and
an inference server have them; DPUD_RMM_LOG=FILE reads a real one.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

KIB, MIB = 1 << 10, 1 << 20
HEADER = ("Thread", "Time", "Action", "Pointer", "Size", "Stream")
_ALIGNMENT = 256


@dataclass(frozen=True)
class Event:
    """`nr_bytes` are allocated as `name`, or that is freed."""

    is_alloc: bool
    name: int
    nr_bytes: int


def random_mix(
    seed: int, nr_events: int = 20_000, capacity: int = 256 * MIB, largest: int = 4 * MIB, fill: float = 0.85
) -> list[Event]:
    """Sizes log-uniform from 256 bytes; allocates below `fill`, else frees any block."""
    rng, live, used, found = np.random.default_rng(seed), list[Event](), 0, list[Event]()
    for number in range(nr_events):
        if used < fill * capacity or not live:
            size = int(np.exp(rng.uniform(np.log(256), np.log(largest))))
            live.append(Event(True, number, size))
            found.append(live[-1])
            used += size
        else:
            at = int(rng.integers(len(live)))
            live[at], live[-1] = live[-1], live[at]
            gone = live.pop()
            found.append(Event(False, gone.name, gone.nr_bytes))
            used -= gone.nr_bytes
    return found


def read_log(text: Iterable[str]) -> list[Event]:
    """A log's events. ValueError where a column is missing or a number is none."""
    rows = csv.DictReader(text)
    if not set(HEADER[2:5]) <= set(rows.fieldnames or ()):
        raise ValueError(f"no RMM log: its columns are {rows.fieldnames}")
    live: dict[int, Event] = {}
    found = []
    for number, row in enumerate(rows):
        pointer, size = int(row["Pointer"], 0), int(row["Size"])
        if row["Action"] == "allocate" and size:
            live[pointer] = Event(True, number, size)
            found.append(live[pointer])
        elif row["Action"] == "free" and pointer in live:
            found.append(Event(False, (gone := live.pop(pointer)).name, gone.nr_bytes))
    return found


def write_log(events: Iterable[Event]) -> str:
    """The inverse; pointers are made up, and used again as a real allocator would."""
    out = io.StringIO()
    rows = csv.writer(out, lineterminator="\n")
    rows.writerow(HEADER)
    free, pointers, nr = list[int](), dict[int, int](), 0
    for number, event in enumerate(events):
        if event.is_alloc:
            nr += not free
            pointers[event.name] = free.pop() if free else 0x7F0000000000 + nr * 0x1000000
        pointer = pointers[event.name] if event.is_alloc else pointers.pop(event.name)
        if not event.is_alloc:
            free.append(pointer)
        action = "allocate" if event.is_alloc else "free"
        time = f"00:00:{number // 1000:02}:{number % 1000:03}000"
        rows.writerow((1, time, action, hex(pointer), event.nr_bytes, "0x0"))
    return out.getvalue()


def peak_bytes(events: Iterable[Event]) -> int:
    """The most that is live at once, in whole units of 256 bytes."""
    live = peak = 0
    for event in events:
        size = -(-event.nr_bytes // _ALIGNMENT) * _ALIGNMENT
        live += size if event.is_alloc else -size
        peak = max(peak, live)
    return peak


def training(seed: int, nr_steps: int = 40, nr_layers: int = 24) -> Iterator[Event]:
    """Weights and optimizer states made layer by layer at the first step, between activations; any length of batch."""
    rng, number = np.random.default_rng(seed), 0
    weights = (np.exp(rng.uniform(np.log(64 * KIB), np.log(4 * MIB), nr_layers)) // 512 * 512).astype(int).tolist()
    for step in range(nr_steps):
        length = int(rng.integers(64, 1024))
        active: list[Event] = []
        for layer, size in enumerate(weights):
            for kept in (size, 2 * size) if step == 0 else (size,) if step == 5 and layer % 3 == 0 else ():
                yield Event(True, number := number + 1, kept)
            for _ in range(int(rng.integers(1, 4))):
                active.append(Event(True, number := number + 1, 512 * length * int(rng.integers(1, 5))))
                yield active[-1]
            workspace = Event(True, number := number + 1, int(rng.integers(1, 64)) * 64 * KIB)
            yield workspace
            yield Event(False, workspace.name, workspace.nr_bytes)
        for event in reversed(active):
            yield Event(False, event.name, event.nr_bytes)


def serving(seed: int, nr_requests: int = 4000, at_once: int = 64) -> Iterator[Event]:
    """Caches of requests that grow by being copied into ones twice as large, and end at any time."""
    rng, number = np.random.default_rng(seed), 0
    live: list[Event] = []
    for _ in range(nr_requests):
        if len(live) >= at_once or (live and rng.random() < 0.3):
            gone = live.pop(int(rng.integers(len(live))))
            yield Event(False, gone.name, gone.nr_bytes)
        elif live and rng.random() < 0.5:
            at = int(rng.integers(len(live)))
            if live[at].nr_bytes < 8 * MIB:
                old, live[at] = live[at], Event(True, number := number + 1, 2 * live[at].nr_bytes)
                yield live[at]
                yield Event(False, old.name, old.nr_bytes)
        else:
            live.append(Event(True, number := number + 1, int(rng.integers(1, 512)) * KIB))
            yield live[-1]
