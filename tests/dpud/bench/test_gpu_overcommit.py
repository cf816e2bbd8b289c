# SPDX-License-Identifier: GPL-2.0-only
"""Logs of RMM's logging resource adaptor, a user's own: what is read in them, and what the benchmark makes of it."""

from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner

from dpud.bench.gpu.overcommit import run
from dpud.bench.gpu.usage import MIB, rmm_log, trace_of_logs, use_of_rmm_log
from dpud.cli import cli
from dpud.errors import UserError

HEAD = "Thread,Time,Action,Pointer,Size,Stream\n"


def test_use_is_what_is_allocated_and_not_freed() -> None:
    """One sample a second; older versions of RMM write the fraction behind a colon, newer behind a dot."""
    log = HEAD + (
        "7,10:00:00:000000,allocate,0xa,100,0\n"
        "7,10:00:01:500000,allocate,0xb,50,0\n"
        "7,10:00:01.900000,free,0xa,100,0\n"
        "8,10:00:02.100000,allocate failure,0x0,999,0\n"
        "8,10:00:04.999999,free,0xb,50,0\n"
        "8,10:00:04.999999,free,0xc,1,0\n"
    )
    assert use_of_rmm_log(log, 5).tolist() == [100, 150, 50, 50, 50]


def test_a_log_goes_on_after_midnight() -> None:
    log = HEAD + "1,23:59:59:000000,allocate,0xa,8,0\n1,00:00:01:000000,allocate,0xb,8,0\n"
    assert use_of_rmm_log(log, 2).tolist() == [8, 16]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "no column Action, Pointer, Size, Time"),
        ("Thread,Time,Action\n", "no column Pointer, Size"),
        (HEAD, "nothing is allocated"),
        (HEAD + "1,noon,allocate,0xa,8,0\n", "no time: 'noon'"),
        (HEAD + "1,10:00:00:000000,allocate,0xa,much,0\n", "invalid literal"),
        (HEAD + "1,10:00:00:000000,allocate\n", "invalid literal"),
    ],
)
def test_what_is_no_log_is_refused(tmp_path: Path, text: str, why: str) -> None:
    path = tmp_path / "log.csv"
    path.write_text(text)
    with pytest.raises(UserError, match="log.csv: no log of RMM's: .*" + why):
        trace_of_logs([path])


@pytest.mark.slow
def test_the_benchmark_reads_a_users_logs(tmp_path: Path) -> None:
    paths = [tmp_path / f"{number}.csv" for number in range(3)]
    for number, path in enumerate(paths):
        path.write_text(rmm_log(np.random.default_rng(number)))
    report = run(paths)
    assert report.headings == ("Policy", "RMM logs", "Verdict")
    assert "3 clients" in report.how
    assert trace_of_logs(paths).granted.min() > 100 * MIB


def test_traces_are_for_overcommit_alone(tmp_path: Path) -> None:
    path = tmp_path / "log.csv"
    path.write_text(HEAD)
    result = CliRunner().invoke(cli, ["bench", "gpu", "swap", "--trace", str(path)])
    assert result.exit_code != 0
    assert "--trace is for gpu overcommit alone" in str(result.exception) + result.output
