# SPDX-License-Identifier: GPL-2.0-only
"""`dpud bench gpu fault`, shortened: its parts find what they are for."""

from pathlib import Path

import pytest

from dpud.bench.gpu import fault, fault_campaign, fault_interval, poison
from dpud.bench.gpu.fault_interval import INTERVALS, failures, play
from dpud.gpu.fault import secded
from dpud.gpu.fault.streams import generate


@pytest.mark.slow
def test_all_of_72_and_all_of_2556() -> None:
    singles, doubles, speed = (row.cells() for row in fault.ecc([0x123456789ABCDEF0]))
    assert singles[1:] == ("72 of 72", "72 (target)", "1.00", "met")
    assert doubles[1:] == ("2556 of 2556", "2556 (target)", "1.00", "met")
    assert float(speed[1].split()[0].replace(",", "")) > 0


@pytest.mark.slow
def test_a_weaker_code_would_be_found(monkeypatch: pytest.MonkeyPatch) -> None:
    positions = secded._POSITIONS.copy()
    positions[positions == 17] = secded.UNCORRECTABLE
    positions[3] = 5
    monkeypatch.setattr(secded, "_POSITIONS", positions)
    verdicts = [figure.verdict for figure in fault.ecc([1])]
    assert verdicts[:2] == ["missed", "missed"]


@pytest.mark.slow
def test_a_campaign_has_no_silent_corruption() -> None:
    outcome = fault_campaign.run(6000, seed=5)
    assert (outcome.nr_silent, outcome.nr_unexplained, outcome.violations) == (0, 0, [])
    assert outcome.nr_faults >= 6000
    stats = outcome.stats
    assert stats["corrected"] > 300
    assert stats["repaired_from_store"] > 20
    assert stats["lost_pages"] > 20  # there was something to be silent about
    assert stats["miscorrected"] > 20


def test_a_campaign_finds_what_is_silent(tmp_path: Path) -> None:
    """Damage behind ECC's back."""
    campaign = fault_campaign.Campaign(3, tmp_path)
    campaign.memory.locations[0].hardware.memory[:] ^= 1  # type: ignore[attr-defined]
    campaign._read(campaign.buffers[0])
    assert campaign.outcome.nr_silent > 0


@pytest.mark.slow
def test_daly_s_interval_wastes_less_than_one_that_is_far_off(tmp_path: Path) -> None:
    gaps = failures()[:6]
    wastes = {
        name: play(INTERVALS[name], gaps, tmp_path / name.replace(" ", ""))
        for name in ("Daly, M known", "fixed, ten times", "fixed, a fifth of that")
    }
    best = wastes.pop("Daly, M known")
    assert all(best.total < waste.total for waste in wastes.values())
    assert best.nr_rollbacks >= 4
    assert fault_interval.MTBF_NS > best.interval_ns > best.cost_ns


@pytest.mark.slow
def test_scores_of_always_and_never() -> None:
    boards = fault.play(generate(9, 40, 40))
    assert boards["always"].recall >= boards["learnt"].recall
    assert (boards["never"].nr_alarms, boards["never"].recall) == (0, 0)
    assert boards["never"].nr_misses == boards["always"].nr_hits + boards["always"].nr_misses


@pytest.mark.host
def test_a_poisoned_page_of_a_real_process(tmp_path: Path) -> None:
    """The kernel kills who reads it; the next process has every byte back from the checkpoint."""
    try:
        outcome = poison.crash_and_restore(tmp_path)
    except poison.NotSupported as error:
        pytest.skip(str(error))
    assert outcome == (True, True)


@pytest.mark.slow
def test_a_campaign_follows_a_client_back(tmp_path: Path) -> None:
    """What is true after a lost device is what was true at the checkpoint."""
    campaign = fault_campaign.Campaign(3, tmp_path)
    campaign._checkpoint(0)
    buffer = next(each for each in campaign.buffers if each.region.home[0] == 0 and each.client == "client0")
    campaign._write(buffer, 0, 10_000)
    campaign.fault.inject("device gpu=0")
    campaign._read(buffer)
    assert campaign.fault.stats()["rollbacks"] == 1
    assert campaign.outcome.nr_pages_read > 0
    assert campaign.outcome.nr_silent == 0
