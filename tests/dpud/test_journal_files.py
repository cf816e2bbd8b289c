# SPDX-License-Identifier: GPL-2.0-only
"""A kept machine whose every file is read and written at random, with texts that mean something and texts that do not:
killed, it comes back as it was."""

import time
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pytest
from kept import CLIENTS, MM, alive, configured, echo, hash_of, killed, still

from dpud.daemon import Live
from dpud.fuzz.tree import Files

NR_INPUTS = 500
_PATIENCE_S = 0.4


class Kept(Files):
    """Its files. Who waits for long is interrupted."""

    def __init__(self, live: Live) -> None:
        assert live.gpu is not None
        ask = live.tree._request

        def ask_with_patience(*args: Any, interrupted: Callable[[], bool] = bool) -> Any:
            deadline = time.monotonic() + _PATIENCE_S
            return ask(*args, interrupted=lambda: time.monotonic() > deadline)

        live.tree._request = ask_with_patience
        super().__init__(live.machine.registry, live.tree, live.gpu)

    def tick(self, ns: int) -> None:
        time.sleep(min(ns / 1e9, 0.1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_it_comes_back_as_it_was(seed: int, tmp_path: Path) -> None:
    chance, outcomes = Random(seed), []
    with alive(configured(tmp_path / "a")) as live:
        for name in ("a", "b"):
            live.tree.mkdir(f"{MM}/{name}")
            echo(live, f"{MM}/{name}/anon", "2M")
            live.tree.mkdir(f"{CLIENTS}/{name}")
            live.tree.mkdir(f"{CLIENTS}/{name}/buffers/{name}")
            echo(live, f"{CLIENTS}/{name}/buffers/{name}/size", "1M")
        files = Kept(live)
        for _ in range(NR_INPUTS):
            outcomes.append(files.run(files.draw(chance)))
        before = killed(live, tmp_path / "a", tmp_path / "b")
    assert outcomes.count("ok") > NR_INPUTS // 5
    with still(configured(tmp_path / "b")) as again:
        assert hash_of(again) == before
