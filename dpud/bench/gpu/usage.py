# SPDX-License-Identifier: GPL-2.0-only
"""Use of device memory over time: generated traces, and logs in the format of RMM's logging resource adaptor.

A trace is use [client, sample] in bytes and what was granted [client]. Generated ones are made of what is known of such
loads, not fitted to any: what clients ask for is 1.2 to 2.5 times their own peak (Google's clusters used 40 to 50 % of
what was asked for, Bashir et al., EuroSys 2021).

    diurnal   a day's wave, nearly in step among clients, with noise
    bursty    little most of the time; bursts of random height and length
    sawtooth  training: memory grows within an epoch, falls at its end; checkpoints on top
    mixed     some of each
    rmm log   a training loop's allocations and frees, written as such a log and read back

RMM's columns are Thread,Time,Action,Pointer,Size,Stream; Time is HH:MM:SS:us, in newer versions HH:MM:SS.us.
"""

import csv
import io
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpud.errors import UserError

NR_CLIENTS = 24
NR_SAMPLES = 4000
MIB = 1 << 20
DAY_SAMPLES = 1440
Use = NDArray[np.float64]


@dataclass(frozen=True)
class Trace:
    """use[client, sample], granted[client], in bytes."""

    use: Use
    granted: Use


def diurnal(rng: np.random.Generator, nr: int) -> Use:
    at = np.arange(NR_SAMPLES)
    phase = rng.normal(0, 0.4, (nr, 1))
    wave = 0.5 + 0.5 * np.sin(2 * np.pi * at / DAY_SAMPLES + phase)
    noise = rng.normal(0, 0.05, (nr, NR_SAMPLES))
    size = rng.lognormal(6, 0.5, (nr, 1)) * MIB
    return size * np.clip(0.25 + 0.65 * wave + noise, 0.05, None)


def bursty(rng: np.random.Generator, nr: int) -> Use:
    size = rng.lognormal(6, 0.5, nr) * MIB
    use = np.outer(size, np.full(NR_SAMPLES, 0.15))
    for client in range(nr):
        for start in np.flatnonzero(rng.random(NR_SAMPLES) < 1 / 80):
            length = 1 + int(rng.exponential(15))
            use[client, start : start + length] += size[client] * min(0.8, rng.lognormal(-1.5, 0.5))
    return np.minimum(use, size[:, None])


def sawtooth(rng: np.random.Generator, nr: int) -> Use:
    use = np.empty((nr, NR_SAMPLES))
    for client in range(nr):
        epoch = int(rng.integers(60, 240))
        at = (np.arange(NR_SAMPLES) + rng.integers(epoch)) % epoch
        ramp = 0.3 + 0.5 * at / epoch
        checkpoint = np.where(at >= epoch - 3, 0.2, 0.0)
        use[client] = rng.lognormal(6, 0.5) * MIB * (ramp + checkpoint + rng.normal(0, 0.01, NR_SAMPLES))
    return use


def mixed(rng: np.random.Generator, nr: int) -> Use:
    third = nr // 3
    return np.concatenate((diurnal(rng, third), bursty(rng, third), sawtooth(rng, nr - 2 * third)))


def rmm(rng: np.random.Generator, nr: int) -> Use:
    return np.array([use_of_rmm_log(rmm_log(rng), NR_SAMPLES) for _ in range(nr)])


FAMILIES: Mapping[str, Callable[[np.random.Generator, int], Use]] = {
    "diurnal": diurnal,
    "bursty": bursty,
    "sawtooth": sawtooth,
    "mixed": mixed,
    "rmm log": rmm,
}


def trace(family: str, seed: int) -> Trace:
    """Always the same for the same seed."""
    rng = np.random.default_rng([seed, list(FAMILIES).index(family)])
    use = FAMILIES[family](rng, NR_CLIENTS)
    return Trace(use, use.max(axis=1) * rng.uniform(1.2, 2.5, NR_CLIENTS))


# RMM logs.

_TIME = re.compile(r"(\d{1,6}):(\d{1,6}):(\d{1,6})[:.](\d{1,6})")
_MOST_BYTES = 1 << 50
_DAY = 24 * 3600 * 1_000_000
_HEAD = "Thread,Time,Action,Pointer,Size,Stream\n"


def use_of_rmm_log(text: str, nr_samples: int) -> Use:
    """Highest use in each of `nr_samples` equal parts of the log's time, in bytes. ValueError for what is no log."""
    changes = list(_changes(text))
    if not changes:
        raise ValueError("nothing is allocated in it")
    times, deltas = zip(*changes, strict=True)
    at, held = np.array(times), np.cumsum(deltas)
    span = max(1, at[-1] - at[0] + 1)
    sample = (at - at[0]) * nr_samples // span
    use = np.zeros(nr_samples)
    np.maximum.at(use, sample, held)
    last = np.zeros(nr_samples)
    last[sample] = held  # the last of each sample wins
    known = np.zeros(nr_samples, dtype=np.int64)
    known[sample] = sample
    before = np.maximum.accumulate(known)
    carried = np.concatenate(([0.0], last[before][:-1]))
    return np.maximum(use, carried)


def trace_of_logs(paths: Sequence[Path]) -> Trace:
    """One client for each log, granted the most that it ever used. Raises UserError for a file that is no RMM log."""
    use = np.array([_use_of_file(path) for path in paths])
    return Trace(use, use.max(axis=1))


def _use_of_file(path: Path) -> Use:
    try:
        return use_of_rmm_log(path.read_text(encoding="utf-8"), NR_SAMPLES)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"{path}: no log of RMM's: {error}") from error


def _changes(text: str) -> Iterator[tuple[int, int]]:
    """(microseconds, bytes more) of each action. ValueError for what is no log."""
    try:
        yield from _changes_of(csv.DictReader(io.StringIO(text)))
    except csv.Error as error:
        raise ValueError(str(error)) from error


def _changes_of(rows: "csv.DictReader[str]") -> Iterator[tuple[int, int]]:
    sizes: dict[str, int] = {}
    if missing := {"Time", "Action", "Pointer", "Size"} - set(rows.fieldnames or ()):
        raise ValueError(f"it has no column {', '.join(sorted(missing))}")
    now = days = 0
    for row in rows:
        action, pointer, size, time = (row[name] or "" for name in ("Action", "Pointer", "Size", "Time"))
        at = _microseconds(time)
        days += at + days * _DAY < now - _DAY // 2  # the log knows no dates
        now = max(now, at + days * _DAY)
        if action == "allocate":
            sizes[pointer] = int(size)
            if not 0 <= sizes[pointer] < _MOST_BYTES:
                raise ValueError(f"{size[:40]} bytes")
            yield now, sizes[pointer]
        elif action == "free" and pointer in sizes:
            yield now, -sizes.pop(pointer)


def _microseconds(text: str) -> int:
    match = _TIME.fullmatch(text)
    if match is None:
        raise ValueError(f"no time: {text!r}")
    hours, minutes, seconds = (int(match[index]) for index in (1, 2, 3))
    return ((hours * 60 + minutes) * 60 + seconds) * 1_000_000 + int(match[4].ljust(6, "0"))


def rmm_log(rng: np.random.Generator) -> str:
    """A training loop: weights that stay, activations that come and go with each step, a buffer for evaluation."""
    out = io.StringIO()
    out.write(_HEAD)
    clock, pointer = 0, 0x7F00_0000_0000

    def log(action: str, where: int, size: int) -> None:
        seconds, micros = divmod(clock, 1_000_000)
        time = f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}:{micros:06}"
        out.write(f"1,{time},{action},{where:#x},{size},0\n")

    log("allocate", pointer, int(rng.integers(100, 400)) * MIB)
    nr_layers, layer = int(rng.integers(4, 12)), int(rng.integers(5, 40)) * MIB
    for step in range(1200):
        held = []
        for _ in range(nr_layers):
            clock += int(rng.exponential(120_000))
            pointer += 1 << 32
            size = int(layer * rng.uniform(0.7, 1.3)) * (2 if step % 200 >= 190 else 1)
            log("allocate", pointer, size)
            held.append((pointer, size))
        for where, size in reversed(held):
            clock += int(rng.exponential(80_000))
            log("free", where, size)
    return out.getvalue()
