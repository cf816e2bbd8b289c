# SPDX-License-Identifier: GPL-2.0-only
"""What KSM merged, and what ksmd was about to do, are part of a machine that is kept."""

from pathlib import Path

import pytest
from kept import MM, alive, cat, configured, echo, hash_of, keeper_of, killed, still

pytestmark = pytest.mark.slow

KSM = "/sys/kernel/mm/ksm"
COUNTS = ("pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "full_scans", "pages_scanned")


def test_merged_pages_come_back_and_are_merged_further(tmp_path: Path) -> None:
    with alive(configured(tmp_path / "a")) as live:
        for name in "ab":
            live.tree.mkdir(f"{MM}/{name}")
            for file, text in (("mergeable", "1"), ("anon", "1M"), ("same", "60 kinds=9")):
                echo(live, f"{MM}/{name}/{file}", text)
        echo(live, f"{KSM}/run", "1")
        while int(cat(live, f"{KSM}/pages_sharing")) < 100:
            live.owner.call(lambda: None)
        keeper_of(live).make()
        echo(live, f"{MM}/a/fork", "c")
        echo(live, f"{MM}/b/touch", "30")
        echo(live, f"{KSM}/run", "0")
        live.pacer.stop()
        counts = {name: cat(live, f"{KSM}/{name}") for name in COUNTS}
        before = killed(live, tmp_path / "a", tmp_path / "b")
    with still(configured(tmp_path / "b")) as live:
        assert hash_of(live) == before
        assert {name: cat(live, f"{KSM}/{name}") for name in COUNTS} == counts
        echo(live, f"{KSM}/run", "2")
        assert {cat(live, f"{KSM}/{name}").strip() for name in COUNTS[:5]} == {"0"}
        assert {cat(live, f"{MM}/{name}/verify").strip() for name in "abc"} == {"ok"}
        assert live.owner.call(live.machine.check) == []
