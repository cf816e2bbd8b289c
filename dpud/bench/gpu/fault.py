# SPDX-License-Identifier: GPL-2.0-only
"""Fault recovery: ECC exhaustively, a campaign of faults, lost work by the interval of checkpoints, predictors, and a
page of a real process that the kernel has poisoned.
"""

import tempfile
from collections.abc import Iterator, Sequence
from itertools import combinations
from pathlib import Path
from time import process_time_ns

import numpy as np

from dpud.bench.gpu import fault_campaign, fault_interval
from dpud.bench.gpu.poison import NotSupported, crash_and_restore
from dpud.bench.report import Figure, Line, Report, Row
from dpud.gpu.fault import secded
from dpud.gpu.fault.features import HOUR_NS, CorrectedError
from dpud.gpu.fault.predictor import Predictor, Scoreboard
from dpud.gpu.fault.streams import StreamError, generate

WORDS = (0, 2**64 - 1, 0x0123456789ABCDEF, 0xDEADBEEFCAFEF00D)
STREAM_SEED, STREAM_BANKS, STREAM_DAYS = 7, 600, 90.0
_WITHIN = 1.25
"""Of the least waste: a run of a few dozen failures differs from its expectation by about that."""


def run() -> Report:
    report = Report(
        "gpu fault",
        "errors found and corrected",
        f"SECDED(72,64): each of 72 bits, and each pair of them, of {len(WORDS)} words. The campaign: faults of all "
        "kinds on small memories in use, beside arrays that know every byte (bench/gpu/fault_campaign.py).",
        figures=[*ecc(WORDS), *campaign_figures(fault_campaign.run()), *real_figures()],
    )
    report.notes.append(
        "faults of the campaign are most of them single flips; the rest double and worse, rows, banks, devices"
    )
    report.parts += [interval_report(fault_interval.run()), prediction_report()]
    return report


def ecc(words: Sequence[int]) -> Iterator[Row]:
    singles, doubles = [(bit,) for bit in range(72)], list(combinations(range(72), 2))
    corrected = min(_corrected(word, singles) for word in words)
    detected = min(_detected(word, doubles) for word in words)
    yield _all_of("single flips corrected", corrected, len(singles))
    yield _all_of("double flips detected", detected, len(doubles))
    yield Figure("check bits made", _speed(), "MB/s of CPU time")


def _all_of(what: str, nr: int, total: int) -> Line:
    verdict = "met" if nr == total else "missed"
    return Line((what, f"{nr} of {total}", f"{total} (target)", f"{nr / total:.2f}", verdict), verdict)


def flipped(word: int, flips: Sequence[tuple[int, ...]]) -> tuple[secded.Words, secded.Checks]:
    """A word once for each of `flips`, with these bits of its 72 flipped."""
    words = np.full(len(flips), word, dtype=np.uint64)
    checks = secded.encode(words)
    for at, bits in enumerate(flips):
        for bit in bits:
            if bit < secded.WORD_BITS:
                words[at] ^= np.uint64(1 << bit)
            else:
                checks[at] ^= np.uint8(1 << (bit - secded.WORD_BITS))
    return words, checks


def _corrected(word: int, flips: Sequence[tuple[int, ...]]) -> int:
    words, checks = flipped(word, flips)
    secded.correct(words, checks, secded.positions(words, checks))
    good = secded.encode(np.array([word], dtype=np.uint64))[0]
    return int(np.count_nonzero((words == word) & (checks == good)))


def _detected(word: int, flips: Sequence[tuple[int, ...]]) -> int:
    return int(np.count_nonzero(secded.positions(*flipped(word, flips)) == secded.UNCORRECTABLE))


def _speed() -> float:
    words = np.random.default_rng(1).integers(0, 2**64, 1 << 20, dtype=np.uint64)
    begin = process_time_ns()
    secded.encode(words)
    return words.nbytes * 1000 / (process_time_ns() - begin)


# The campaign.


def campaign_figures(outcome: fault_campaign.Outcome) -> Iterator[Figure]:
    stats = outcome.stats
    repaired = sum(stats[name] for name in ("repaired_from_store", "repaired_from_copy", "repaired_from_checkpoint"))
    yield Figure("faults injected", outcome.nr_faults, "faults")
    yield Figure("pages read and compared", outcome.nr_pages_read, "pages")
    yield Figure("bytes that were wrong and not said to be", outcome.nr_silent, "bytes", 0, "none")
    yield Figure("failures that nothing explains", outcome.nr_unexplained, "failures", 0, "none")
    yield Figure("invariants violated at the end", len(outcome.violations), "", 0, "none")
    yield Figure("words corrected", stats["corrected"], "words")
    yield Figure("pages that ECC could not correct", stats["uncorrectable"], "pages")
    yield Figure("of them made good from a copy", repaired, "pages")
    yield Figure("lost, and said to be", stats["lost_pages"], "pages")
    yield Figure("sectors that SECDED alone would have got wrong", stats["miscorrected"], "sectors")


def real_figures() -> Iterator[Line]:
    """A real process, where the kernel can poison its pages."""
    what = "real process: UFFDIO_POISON, SIGBUS, restored"
    try:
        with tempfile.TemporaryDirectory(prefix="dpud-bench-") as folder:
            killed, restored = crash_and_restore(Path(folder))
    except NotSupported as error:
        yield Line((what, str(error), "", "", ""))
        return
    ours = f"{'SIGBUS' if killed else 'no signal'}, {'every byte' if restored else 'other bytes'}"
    yield Line((what, ours, "SIGBUS, every byte (target)", "", "met" if killed and restored else "missed"))


# How often.


def interval_report(found: dict[str, fault_interval.Waste]) -> Report:
    least = min(waste.total for waste in found.values())
    return Report(
        "gpu fault",
        "work lost, by the interval of checkpoints",
        f"{fault_interval._NR_FAILURES} losses of the device, {fault_interval.MTBF_NS / 1e6:g} ms of device time apart "
        "on average, the same for all; a client writes a page every 20 us. Lost: from checkpoint to failure.",
        headings=("Interval", "ms", "Lost", "Spent on checkpoints", "Together", "Of the least", "Verdict"),
        figures=[_waste_line(name, waste, least) for name, waste in found.items()],
        notes=[f"target: both of Daly's intervals within {_WITHIN:g} times the least of this table"],
    )


def _waste_line(name: str, waste: fault_interval.Waste, least: float) -> Line:
    ratio = waste.total / least
    verdict = ("met" if ratio <= _WITHIN else "missed") if name.startswith("Daly") else ""
    shares = (f"{100 * share:.2f} %" for share in (waste.lost, waste.spent, waste.total))
    return Line((name, f"{waste.interval_ns / 1e6:.3f}", *shares, f"{ratio:.2f}", verdict), verdict)


# Predictors.


def prediction_report() -> Report:
    boards = play(generate(STREAM_SEED, STREAM_BANKS, STREAM_DAYS))
    learnt, rule = boards["learnt"], boards["50 in 24 h"]
    better = learnt.precision > rule.precision and learnt.recall > rule.recall
    verdicts = {"learnt": "met" if better else "missed"}
    return Report(
        "gpu fault",
        "predicting uncorrectable errors of banks",
        f"Generated histories of {STREAM_BANKS} banks over {STREAM_DAYS:g} days (fault/streams.py), not those "
        "that the weights were learnt from. An alarm holds for a week. 50 in 24 h: rasdaemon's rule; always: an "
        "alarm at the first corrected error; never: none.",
        headings=("Predictor", "Alarms", "Hits", "False", "Misses", "Precision", "Recall", "Median lead", "Verdict"),
        figures=[_board_line(name, board, verdicts.get(name, "")) for name, board in boards.items()],
        notes=["how errors come about in the histories is made up, and uncalibrated: real memory may be kinder or not"],
    )


def play(errors: Sequence[StreamError]) -> dict[str, Scoreboard]:
    """What becomes of everybody's alarms."""
    predictor, always, never = Predictor(), Scoreboard(), Scoreboard()
    for error in errors:
        if error.is_corrected:
            predictor.corrected(error.bank, CorrectedError(error.time_ns, error.row, error.word, error.bit))
            always.alarm(error.bank, error.time_ns)
            continue
        predictor.uncorrectable(error.bank, error.time_ns)
        for board in (always, never):
            board.failed(error.bank, error.time_ns)
    boards = {"learnt": predictor.learnt, "50 in 24 h": predictor.by_rule, "always": always, "never": never}
    for board in boards.values():
        board.expire(1 << 62)
    return boards


def _board_line(name: str, board: Scoreboard, verdict: str) -> Line:
    counts = board.nr_alarms, board.nr_hits, board.nr_false, board.nr_misses
    precision = f"{board.precision:.2f}" if board.nr_alarms else "-"
    lead = f"{board.median_lead_ns / HOUR_NS:.0f} h" if board.nr_hits else "-"
    return Line((name, *map(str, counts), precision, f"{board.recall:.2f}", lead, verdict), verdict)
