# SPDX-License-Identifier: GPL-2.0-only
"""Preparing a host: what is written where, and on a real one that its per-CPU lists are short afterwards."""

import os
from pathlib import Path

import pytest

from dpud import prepare
from dpud.proctext import parse_pagesets

ZONEINFO = "Node 0, zone   Normal\n  pagesets\n    cpu: 0\n              count:    {}\n              high:     9\n"
ZONEINFO += "              batch:    1\n"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "fraction").write_text("8\n")
    (tmp_path / "zoneinfo").write_text(ZONEINFO.format(5000))
    monkeypatch.setattr(prepare, "HIGH_FRACTION", tmp_path / "fraction")
    monkeypatch.setattr(prepare, "ZONEINFO", tmp_path / "zoneinfo")
    monkeypatch.setattr(os, "sync", lambda: (tmp_path / "synced").touch())
    return tmp_path


def test_the_limit_is_at_its_lowest_meanwhile_and_comes_back(host: Path) -> None:
    with prepare.short_lists():
        assert int((host / "fraction").read_text()) == 2**31 - 1  # the most that the sysctl takes
    assert (host / "fraction").read_text() == "8\n"
    with pytest.raises(KeyError), prepare.short_lists():
        raise KeyError
    assert (host / "fraction").read_text() == "8\n"


def test_pages_are_freed_on_each_cpu_until_its_lists_are_short(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    left = [9000]
    cpus: list[set[int]] = []

    def churn() -> None:
        cpus.append(os.sched_getaffinity(0))
        left[0] = max(left[0] - 4000, 100)
        (host / "zoneinfo").write_text(ZONEINFO.format(left[0]))

    (host / "zoneinfo").write_text(ZONEINFO.format(left[0]))
    monkeypatch.setattr(prepare, "_churn", churn)
    before = os.sched_getaffinity(0)
    prepare.prepare(sorted(before)[:2])
    assert (host / "synced").exists()
    assert os.sched_getaffinity(0) == before
    assert prepare.nr_listed() == 100
    assert len(cpus) == 2 + len(sorted(before)[:2])  # down to 5000, 1000, 100; then nothing is left for the next CPU
    assert all(len(cpu) == 1 for cpu in cpus)


@pytest.mark.host
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_this_hosts_lists_are_short_when_it_is_prepared() -> None:
    fraction = prepare.HIGH_FRACTION.read_text()
    with prepare.short_lists():
        prepare.prepare(os.sched_getaffinity(0))
        zones = parse_pagesets(Path("/proc/zoneinfo").read_text())
    assert prepare.HIGH_FRACTION.read_text() == fraction
    limits = [pageset.high_max for (_, zone), sets in zones.items() for pageset in sets if zone == "Normal"]
    assert all(limit < 1000 for limit in limits)
