# SPDX-License-Identifier: GPL-2.0-only
"""Predictions, and that what is said of their worth is counted right."""

import numpy as np
import pytest
from small import MIB, DictSwap, small_memory

from dpud.gpu.fault import predictor as predictors
from dpud.gpu.fault.features import DAY_NS, HOUR_NS, NAMES, BankHistory, CorrectedError
from dpud.gpu.fault.learning import fit, learn
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.fault.predictor import HORIZON_NS, Predictor, Scoreboard
from dpud.gpu.fault.streams import StreamError, generate


def test_hits_false_alarms_and_misses() -> None:
    board = Scoreboard()
    assert board.alarm(1, 0)
    assert not board.alarm(1, 5)
    board.failed(1, 100)
    board.failed(2, 100)
    board.alarm(3, 200)
    board.alarm(4, 300)
    assert (board.precision, board.recall, board.median_lead_ns) == (1.0, 0.5, 100)
    board.failed(4, 300 + HORIZON_NS)
    board.failed(3, 201 + HORIZON_NS)  # too late
    assert (board.nr_alarms, board.nr_hits, board.nr_false, board.nr_misses) == (3, 2, 1, 2)
    assert board.precision == pytest.approx(2 / 3)
    assert board.recall == pytest.approx(2 / 4)


def test_features_of_a_history_that_is_easy_to_count() -> None:
    history = BankHistory()
    errors = [(0, 5, 1, 1), (5 * DAY_NS, 5, 1, 2), (5 * DAY_NS + 2, 9, 1, 2), (6 * DAY_NS - 1, 500, 3, 3)]
    for error in errors:
        history.add(CorrectedError(*error))
    one, hour, day, rows, cells, of_row, near, words = np.expm1(history.features(6 * DAY_NS)).round().tolist()
    assert (hour, day, rows, cells, of_row, near, words) == (1, 2, 3, 3, 1, 1, 0)  # the first is too old
    assert one == round(np.expm1(1))
    assert len(NAMES) == 8
    assert history.rows() == {5: 1, 9: 1, 500: 1}


def test_the_fit_finds_the_weights_that_made_the_labels() -> None:
    rng = np.random.default_rng(1)
    features = np.column_stack([np.ones(20_000), rng.normal(size=(20_000, 2))])
    weights = np.array([-1.0, 2.0, -0.5])
    labels = rng.random(20_000) < 1 / (1 + np.exp(-features @ weights))
    assert fit(features, labels.astype(float)) == pytest.approx(weights, abs=0.1)


@pytest.mark.slow
def test_the_weights_are_those_that_the_command_makes() -> None:
    assert learn() == pytest.approx(predictors.WEIGHTS, abs=0.002)


def play(errors: list[StreamError]) -> Predictor:
    predictor = Predictor()
    for error in errors:
        if error.is_corrected:
            predictor.corrected(error.bank, CorrectedError(error.time_ns, error.row, error.word, error.bit))
        else:
            predictor.uncorrectable(error.bank, error.time_ns)
    for board in (predictor.learnt, predictor.by_rule):
        board.expire(1 << 62)
    return predictor


@pytest.mark.slow
def test_learnt_beats_the_rule_on_histories_it_has_not_seen() -> None:
    predictor = play(generate(77, 150, 60))
    learnt, rule = predictor.learnt, predictor.by_rule
    assert learnt.nr_hits + learnt.nr_misses == rule.nr_hits + rule.nr_misses > 15
    assert learnt.precision > rule.precision + 0.3
    assert learnt.recall > rule.recall + 0.3
    assert learnt.median_lead_ns > HOUR_NS
    assert len(predictor.decisions) == learnt.nr_alarms
    assert all(0.5 <= decision.probability <= 1 for decision in predictor.decisions)


@pytest.mark.slow
def test_the_generated_histories_have_all_kinds_in_order_of_time() -> None:
    errors = generate(1, 300, 60)
    assert errors == sorted(errors)
    assert errors == generate(1, 300, 60)
    signs: dict[int, int] = {}
    sudden = 0
    for error in errors:
        sudden += not error.is_corrected and error.bank not in signs
        signs[error.bank] = signs.get(error.bank, 0) + error.is_corrected
    assert sudden > 5
    assert max(signs.values()) > 300


@pytest.mark.slow
def test_an_alarm_takes_the_bad_rows_of_its_bank_out_of_use() -> None:
    memory = small_memory(4 * MIB, swap=DictSwap(MIB))
    fault = FaultModule(memory)
    fault.acts_on_predictions = True
    va = memory.allocate("a", 2 * MIB)
    data = np.random.default_rng(1).bytes(2 * MIB)
    memory.write("a", va, data)
    first = int(np.flatnonzero(memory.locations[0].frames.owner >= 0)[0])
    assert first % 128 == 0
    for bit in range(4):
        for row in range(5):  # of bank 0, side by side
            fault.inject(f"bit address={(first + row * 128) * 2048 + 64 * bit} bit={bit}")
            assert memory.read("a", va, 2 * MIB) == data
            memory.clock.sleep_until(memory.clock.now_ns() + HOUR_NS)
    assert fault.predictors[0].learnt.nr_alarms == 1
    assert memory.read("a", va, 2 * MIB) == data
    assert memory.locations[0].frames.nr_retired >= 1
    assert all(memory.locations[0].frames.owner[frame] < 0 for frame in fault.placing.retired[0])
    (decision,) = fault.predictors[0].decisions
    assert (decision.bank, decision.precision, decision.recall) == (0, 1.0, 1.0)
