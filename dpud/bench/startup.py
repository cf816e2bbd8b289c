# SPDX-License-Identifier: GPL-2.0-only
"""From starting `dpud run --from DIR` to its files being there, with the demo's capture: 25 GiB of a real machine."""

import subprocess
import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter

from dpud.bench import host
from dpud.bench.report import Figure, Report
from dpud.capture import DEMO

NR_STARTS = 5
TARGET_S = 3.0


def _start(*run_options: str) -> Callable[[], float]:
    def start() -> float:
        begin = perf_counter()
        with host.daemon(*run_options):
            return perf_counter() - begin

    return start


def _interpreter(code: str) -> Callable[[], float]:
    def interpret() -> float:
        begin = perf_counter()
        subprocess.run([sys.executable, "-P", "-c", code], check=True)
        return perf_counter() - begin

    return interpret


def _median_s(measure: Callable[[], float]) -> float:
    """Of NR_STARTS, after one that fills the caches."""
    measure()
    return median(measure() for _ in range(NR_STARTS))


def run() -> Report:
    report = Report(
        "import",
        "start of a daemon on an imported machine of 25 GiB",
        f"From exec to the first answer through the mount, compiled loops cached; medians of {NR_STARTS} starts.",
    )
    report.figures = [
        Figure("dpud run --from the demo's capture", _median_s(_start("--from", str(DEMO))), "s", TARGET_S),
        Figure("dpud run, the default machine", _median_s(_start()), "s"),
        Figure("Python and imports alone", _median_s(_interpreter("import dpud.daemon")), "s"),
        Figure("numba's import alone", _median_s(_interpreter("import numba")), "s"),
    ]
    return report
