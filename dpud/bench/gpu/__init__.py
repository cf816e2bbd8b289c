# SPDX-License-Identifier: GPL-2.0-only
"""`dpud bench gpu [NAME]`: the modules of GPU memory virtualization, each beside something real that does the same."""

from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path

from dpud.bench.report import Report
from dpud.errors import UserError

BENCHMARKS: Mapping[str, str] = {
    "address_space": "address_space",
    "compression": "compression",
    "defrag": "defrag",
    "fault": "fault",
    "migration": "migration",
    "numa": "numa",
    "overcommit": "overcommit",
    "qos": "qos",
    "swap": "swap",
}
"""Name on the command line -> module of this package, which has `run() -> Report`."""


def each(*names: str, traces: Sequence[Path] = ()) -> Iterator[Report]:
    """The benchmarks named, or all, each when it is done; `traces` are for overcommit.

    One that fails does not keep the others from their turn: its error is raised when they are done. Raises UserError
    for a name that is none.
    """
    for name in names:
        if name not in BENCHMARKS:
            raise UserError(f"no benchmark gpu {name}: there are {', '.join(BENCHMARKS)}")
    if traces:
        yield overcommit_of(traces)
        return
    failed: list[Exception] = []
    for name in names or BENCHMARKS:
        try:
            yield import_module(f"dpud.bench.gpu.{BENCHMARKS[name]}").run()
        except Exception as error:
            error.add_note(f"in the benchmark gpu {name}")
            failed.append(error)
    if failed:
        raise failed[0]


def overcommit_of(traces: Sequence[Path]) -> Report:
    """Peak prediction on a user's own logs."""
    report: Report = import_module("dpud.bench.gpu.overcommit").run(traces)
    return report
