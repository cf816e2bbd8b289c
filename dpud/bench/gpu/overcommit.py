# SPDX-License-Identifier: GPL-2.0-only
"""Peak prediction: how much of what was granted a policy gives to others, and how often that was too much.

At each sample a policy says how much all clients together will use within the next HORIZON_SAMPLES. Savings are what is
granted less that, as a share of what is granted; a violation is a sample at which more was used within the horizon. The
oracle knows the future: it says just what will be used.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TypeAlias

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from dpud.bench.gpu.usage import FAMILIES, NR_CLIENTS, NR_SAMPLES, Trace, trace, trace_of_logs
from dpud.bench.report import Figure, Line, Report
from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.overcommit import Admission
from dpud.gpu.overcommit.predictor import (
    BORG_SHARE,
    HISTORY,
    HORIZON_SAMPLES,
    POLICIES,
    SAMPLE_NS,
    WARM_UP_SAMPLES,
    WINDOW_SAMPLES,
    Margin,
    n_sigma,
    percentile,
)
from kernelsim.operation import complete

SEED = 5
NR_MOMENTS = NR_SAMPLES - WINDOW_SAMPLES - HORIZON_SAMPLES + 1
"""At which a prediction is made: there is a whole window before, and a whole horizon behind."""

SAVINGS_TARGET, VIOLATIONS_TARGET = 70.0, 1.0
STATIC_RATIOS = (1.5, 2.0)
Series: TypeAlias = NDArray[np.float64]
Predict: TypeAlias = Callable[[Trace], Series]
"""Trace -> what all clients together will use, at the end of each sample from WINDOW_SAMPLES on."""


def run(logs: Sequence[Path] = ()) -> Report:
    """On generated use, or on that of RMM logs. Raises UserError for a file that is none."""
    traces = {"RMM logs": trace_of_logs(logs)} if logs else {family: trace(family, SEED) for family in FAMILIES}
    use = f"{len(logs)} clients, each with the peak of its log granted" if logs else f"{NR_CLIENTS} clients"
    report = Report(
        "gpu overcommit",
        "memory promised to others, by prediction",
        f"{use}, {NR_SAMPLES} samples of {'logged' if logs else 'generated'} use; predictions hold for "
        f"{HORIZON_SAMPLES} samples. Savings in percent of what the oracle saves, violations in percent of samples.",
    )
    report.headings = ("Policy", *traces, "Verdict")
    report.figures = []
    for name, predict in policies():
        report.figures = [*report.figures, _row(name, [judge(each, predict(each)) for each in traces.values()])]
    report.notes.append("each cell: savings of the oracle's / violations; met where both targets are on every trace")
    ours = [judge(each, history(each)) for each in traces.values()]
    figures = Report(report.name, "the targets, and promises kept", "The worst trace.")
    figures.figures = [
        Figure("savings of the oracle's", min(saved for saved, _ in ours), "%", SAVINGS_TARGET, more=True),
        Figure("violations", max(missed for _, missed in ours), "%", VIOLATIONS_TARGET),
        Figure("grants beyond what can be honoured", sum(map(beyond, traces.values())), "grants", 0),
    ]
    report.parts = [figures]
    return report


def _row(name: str, results: list[tuple[float, float]]) -> Line:
    met = all(saved >= SAVINGS_TARGET and missed <= VIOLATIONS_TARGET for saved, missed in results)
    verdict = "met" if met else "missed"
    return Line((name, *(f"{saved:.0f} % / {missed:.2f} %" for saved, missed in results), verdict), verdict)


def policies() -> Iterator[tuple[str, Predict]]:
    for ratio in STATIC_RATIOS:
        yield f"static ratio {ratio}", partial(_constant, share=1 / ratio)
    yield "borg-default, 90 %", partial(_constant, share=BORG_SHARE)
    for sigmas in (2, 3, 4, 5):
        yield f"N-sigma, N = {sigmas}", partial(_n_sigma, sigmas=sigmas)
    for rank in (95, 97, 99):
        yield f"percentile, p{rank}", partial(_percentile, rank=rank)
    yield "max of 5-sigma and p99", lambda each: np.maximum(_n_sigma(each, 5), _percentile(each, 99))
    yield "ours: history", history
    yield "peak oracle", oracle


def judge(each: Trace, predicted: Series) -> tuple[float, float]:
    """(savings in percent of the oracle's, violations in percent)."""
    granted, truth = each.granted.sum(), oracle(each)
    could_save = (granted - truth).sum()
    saved = (granted - np.minimum(predicted, granted)).sum() / could_save if could_save else 1.0
    return 100 * float(saved), 100 * float((predicted < truth * (1 - 1e-9)).mean())


def oracle(each: Trace) -> Series:
    """The most that is used within the horizon after each sample, and at it."""
    total = each.use.sum(axis=0)
    future = sliding_window_view(total, HORIZON_SAMPLES + 1).max(axis=1)
    found: Series = future[WINDOW_SAMPLES - 1 :]
    return found


def _windows(series: Series) -> Series:
    """[..., moment, sample] of the windows that end at each moment."""
    moments: Series = sliding_window_view(series, WINDOW_SAMPLES, axis=-1)[..., :NR_MOMENTS, :]
    return moments


def _constant(each: Trace, share: float) -> Series:
    return np.full(NR_MOMENTS, each.granted.sum() * share)


def _n_sigma(each: Trace, sigmas: float) -> Series:
    """Of all clients' use together, as the paper has it."""
    return n_sigma(sigmas)(_windows(each.use.sum(axis=0)), each.granted.sum())


def _percentile(each: Trace, rank: float) -> Series:
    """The sum of each client's own."""
    each_client = zip(each.use, each.granted, strict=True)
    total: Series = np.sum([percentile(rank)(_windows(use), granted) for use, granted in each_client], axis=0)
    return total


def history(each: Trace) -> Series:
    """What Admission expects when it is told the same, all grants being old. See overcommit/growth.py."""
    total, granted, margin = each.use.sum(axis=0), each.granted.sum(), Margin()
    peaks = POLICIES[HISTORY](_windows(total), granted)
    out = np.empty(len(peaks))
    for moment, peak in enumerate(peaks.tolist()):
        out[moment] = min(granted, peak * (1 + margin.share))
        margin.learn(float(total[WINDOW_SAMPLES - 1 + moment]), out[moment])
    return out


class _Device:
    """Memory of a given size that holds what clients use; no stores behind it."""

    def __init__(self, nr_bytes: int) -> None:
        self.nr_bytes = nr_bytes
        self.nr_used = 0

    def free_bytes(self, _location: int) -> int:
        return max(0, self.nr_bytes - self.nr_used)

    def swap_bytes(self) -> int:
        return 0

    def pool_bytes(self, _nr_new_bytes: int = 0) -> int:
        return 0

    def broken_bytes(self) -> int:
        return 0


def beyond(each: Trace) -> int:
    """Grants of a whole Admission, replayed, that were more than was free at that moment.

    A device of 40 % of what the trace's clients were granted; each sample a newcomer asks for 2 % of it.
    """
    clock = ManualClock()
    device = _Device(int(each.granted.sum() * 0.4))
    admission = Admission(device.nr_bytes, clock)
    admission.connect(device)
    nr_beyond = 0
    ask = device.nr_bytes // 50
    nr_clients = len(each.use)
    for sample in range(WARM_UP_SAMPLES * 8):
        clock.advance(SAMPLE_NS)
        used = each.use[:, sample].astype(np.int64).tolist()
        device.nr_used = 0
        for name, account in admission.accounts.items():
            nr = min(account.nr_granted, used[int(name)])
            admission.usage(name, nr, nr, clock.now_ns())
            device.nr_used += nr
        admission.pump()
        free = device.free_bytes(0)
        try:
            nr_beyond += complete(admission.request(str(sample % nr_clients), ask)).nr_bytes > free
        except GpuError:
            continue
    return nr_beyond
