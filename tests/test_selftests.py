# SPDX-License-Identifier: GPL-2.0-only
"""Each shell selftest under `dpud exec`: its exit code by kselftest's rules, and its TAP output."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SELFTESTS = sorted((Path(__file__).parent / "selftests").glob("test_*.sh"))
KSFT_PASS, KSFT_SKIP = 0, 4
TIMEOUT_S = 300


def test_there_are_selftests() -> None:
    assert SELFTESTS


def check_tap(output: str) -> None:
    """TAP 13 as kselftest prints it: version, plan, and as many results as planned, in order, none failed."""
    lines = [line for line in output.splitlines() if not line.startswith("#")]
    assert lines[0] == "TAP version 13"
    plan = [line for line in lines if re.fullmatch(r"1\.\.\d+", line)]
    assert len(plan) == 1, output
    results = [re.fullmatch(r"(not ok|ok) (\d+)\b.*", line) for line in lines if line not in (lines[0], *plan)]
    assert all(results), output
    numbers = [int(result[2]) for result in results if result]
    assert numbers == list(range(1, int(plan[0][3:]) + 1)), output
    assert all(result[1] == "ok" for result in results if result), output


@pytest.mark.mount
@pytest.mark.parametrize("script", SELFTESTS, ids=lambda path: path.name)
def test_selftest(script: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dpud", "exec", "--", "sh", str(script)],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode == KSFT_SKIP:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == KSFT_PASS, done.stdout + done.stderr
    check_tap(done.stdout)
