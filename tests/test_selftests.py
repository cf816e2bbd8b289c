# SPDX-License-Identifier: GPL-2.0-only
"""Each selftest under `dpud exec`: its exit code by kselftest's rules, and its TAP output."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent / "selftests"
SCRIPTS = sorted(FOLDER.glob("test_*.sh"))
PROGRAMS = sorted(FOLDER.glob("test_*.c"))
KSFT_PASS, KSFT_SKIP = 0, 4
TIMEOUT_S = 300


def test_there_are_selftests() -> None:
    assert SCRIPTS
    assert PROGRAMS


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


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the selftests in C, built with their own Makefile."""
    if shutil.which("gcc") is None or shutil.which("make") is None:
        pytest.skip("gcc and make are needed to build the selftests in C")
    output = tmp_path_factory.mktemp("selftests")
    make = ["make", "-C", str(FOLDER), f"OUTPUT={output}"]
    done = subprocess.run(make, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 0, done.stdout + done.stderr
    return output


def run_selftest(*command: str, options: tuple[str, ...] = ()) -> None:
    """Run a selftest on a machine of its own; by its exit code it may be skipped."""
    done = subprocess.run(
        [sys.executable, "-m", "dpud", "exec", *options, "--", *command],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    if done.returncode == KSFT_SKIP:
        pytest.skip(done.stdout.strip().splitlines()[-1])
    assert done.returncode == KSFT_PASS, done.stdout + done.stderr
    check_tap(done.stdout)


@pytest.mark.mount
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_selftest(script: Path) -> None:
    """A file of the same name that ends in .toml is the machine that the script asks for."""
    config = script.with_suffix(".toml")
    run_selftest("sh", str(script), options=("--config", str(config)) if config.exists() else ())


@pytest.mark.mount
@pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.name)
def test_selftest_in_c(built: Path, source: Path) -> None:
    run_selftest(str(built / source.stem))


@pytest.mark.slow
@pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.name)
def test_on_a_kernel_without_it_a_program_is_skipped(built: Path, source: Path) -> None:
    """The real kernel has no DPU compaction."""
    done = subprocess.run([built / source.stem], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == KSFT_SKIP
    assert re.fullmatch(r"TAP version 13\n1\.\.0 # SKIP .*\n", done.stdout)
