# SPDX-License-Identifier: GPL-2.0-only
"""`dpud bench`: measures, beside something real that does the same.

A benchmark is a module with `run() -> Report`; one of TAKES_FOLDERS has `run(folder) -> Report`, for each folder named
behind it. One that is several has `each() -> Iterator[Report]` instead. What it is compared with is measured in the
same run, in turns, and the reports say how busy the machine was and which CPUs could be used. A missed figure is
printed, it is not an error: a timing on somebody's laptop decides nothing.
"""

import signal
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

from dpud import namespace
from dpud.errors import UserError

BENCHMARKS: Mapping[str, str] = {
    "region": "region",
    "node": "node",
    "compaction": "compaction",
    "fuse": "fuse",
    "import": "startup",
    "pages": "micro",
    "tables": "tables",
    "breakeven": "breakeven",
    "engines": "engines",
    "fidelity": "fidelity",
    "replay": "replay",
    "terabyte": "terabyte",
    "gpu": "gpu",
    "storm": "storm",
    "hostile": "hostile",
    "service": "service",
    "soak": "soak",
    "journal": "journal",
    "kills": "kills",
    "fuzz": "fuzz",
}
"""Name on the command line -> module of this package."""

TAKES_FOLDERS = ("fidelity", "gpu")
"""Take words behind their name: folders, or one of the modules of GPU memory virtualization."""

ON_REQUEST = ("soak", "kills", "fuzz")
"""Only run when named: a test rather than a measurement, and long. They show their own progress."""

_OPTIONS = {"seed": ON_REQUEST, "ops": ("soak", "kills"), "inputs": ("fuzz",), "target": ("fuzz",)}
"""Of the command line, and who takes them."""

_WIDTH = 110  # where the terminal does not say


def run(
    names: str | Iterable[str] | None = None,
    write: Path | None = None,
    *,
    seed: int | None = None,
    ops: int | None = None,
    inputs: int | None = None,
    target: str | None = None,
    traces: Sequence[Path] = (),
) -> int:
    """Run the benchmarks named (all if none is), print their tables, and write them to `write` as Markdown.

    Behind a benchmark of TAKES_FOLDERS, words that name no benchmark are its folders. `seed`, `ops`, `inputs` and
    `target` are for those of ON_REQUEST that take them, `traces` are logs for gpu overcommit.
    Returns the exit code. Raises UserError.
    """
    usual = [name for name in BENCHMARKS if name not in ON_REQUEST]
    wanted = _parse([names] if isinstance(names, str) else list(names or usual))
    given = {"seed": seed, "ops": ops, "inputs": inputs, "target": target}
    options: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for key in options:
        if len(wanted) != 1 or wanted[0][0] not in _OPTIONS[key]:
            raise UserError(f"--{key} is for {' or '.join(_OPTIONS[key])} alone")
    if traces and wanted != [("gpu", "overcommit")]:
        raise UserError("--trace is for gpu overcommit alone")
    options |= {"traces": traces} if traces else {}
    signal.signal(signal.SIGTERM, _terminated)
    with suppress(namespace.NamespaceError):  # without one, mounts are only as private as their place
        namespace.enter()
    return _run(wanted, write, options)


def _parse(words: list[str]) -> list[tuple[str, ...]]:
    """What to run: (name,) or (name, folder)."""
    wanted: list[tuple[str, ...]] = []
    for word in words:
        if word in BENCHMARKS:
            wanted.append((word,))
        elif wanted and wanted[-1][0] in TAKES_FOLDERS:
            name = wanted[-1][0]
            if len(wanted[-1]) == 1:  # its first folder
                wanted.pop()
            wanted.append((name, word))
        else:
            raise UserError(f"no benchmark {word}: there are {', '.join(BENCHMARKS)}")
    return wanted


def _terminated(signum: int, _frame: object) -> None:
    raise SystemExit(128 + signum)


def _results(module: ModuleType, folders: Sequence[str], options: Mapping[str, Any]) -> Iterator[Any]:
    """What a benchmark finds; of several in one, each when it is done."""
    if hasattr(module, "each"):
        yield from module.each(*folders, **options)
    else:
        yield module.run(*folders, **options)


def _run(wanted: list[tuple[str, ...]], write: Path | None, options: Mapping[str, Any]) -> int:
    """After `enter()`, which wants a process with one thread: importing numpy starts some."""
    from rich.console import Console

    from dpud.bench import host, report

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    console.print(host.conditions())
    reports = []
    for name, *folders in wanted:
        before = host.load()
        results = _results(import_module(f"dpud.bench.{BENCHMARKS[name]}"), folders, options)
        while True:
            with console.status(f"{name} ...") if sys.stdout.isatty() and name not in ON_REQUEST else nullcontext():
                result: report.Report | None = next(results, None)
            if result is None:
                break
            result.notes.insert(0, f"before: {before}; after: {host.load()}")
            for part in (result, *result.parts):
                console.print(part.table(), *part.notes, "", sep="\n")
            reports.append(result)
    if write is not None:
        write.write_text(report.document(host.conditions(), reports))
    return 0
