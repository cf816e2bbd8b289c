# SPDX-License-Identifier: GPL-2.0-only
"""The command line from outside: exit codes, one-line errors, what it imports."""

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dpud
from dpud.status import free_table, pairs_table

ROOT = Path(__file__).parent.parent.parent


def command(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "dpud", *words], capture_output=True, text=True, timeout=60, cwd="/")


@pytest.mark.slow
def test_help_lists_every_command() -> None:
    done = command("--help")
    assert done.returncode == 0
    for name in (
        "run",
        "exec",
        "shell",
        "snapshot",
        "record",
        "replay",
        "status",
        "demo",
        "bench",
        "config",
        "scenarios",
        "reload",
        "top",
        "report",
    ):
        assert f" {name} " in done.stdout


@pytest.mark.slow
def test_help_does_not_wait_for_numba_or_numpy() -> None:
    script = "import sys; sys.argv[1:] = ['exec', '--help']; from dpud.cli import main\n"
    script += "try: main()\nfinally: print([name for name in ('numba', 'numpy', 'fuse') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (["foo"], "No such command 'foo'."),
        (["run", "--foo"], "No such option '--foo'."),
        (["exec"], "Missing argument"),
        (["run", "--config", "/nonexistent/x.toml"], "/nonexistent/x.toml: No such file or directory"),
        (["exec", "--config", "/nonexistent/x.toml", "true"], "/nonexistent/x.toml: No such file or"),
        (["exec", "--mount", "/nonexistent", "true"], "no dpud answers at /nonexistent: No such file"),
        (["run", "--scenario", "web"], "no scenario web: there are cma-camera, gpu-inference, "),
        (["exec", "--scenario", "/nonexistent/x.toml", "true"], "/nonexistent/x.toml: No such file or"),
        (["reload", "--mount", "/nonexistent"], "no dpud answers at /nonexistent: No such file"),
        (["service-mount", "/nonexistent"], "service-mount is for ExecStartPre= of a unit"),
        (["exec", "--mount", "/", "--scenario", "web-server", "true"], "--mount uses a daemon that is running"),
        (["exec", "--mount", "/", "--from", "host", "true"], "--mount uses a daemon that is running"),
        (["status", "--mount", "/tmp"], "no dpud answers at /tmp: No such file or directory"),
        (["snapshot", "/nonexistent/a/b"], "/nonexistent/a/b: "),
        (["record", "/nonexistent/a/b", "true"], "/nonexistent/a/b: "),
        (["record", "--seconds", "1", "/tmp/x", "--", "true"], "--seconds is for recording without CMD"),
        (["replay", "/nonexistent/a"], "/nonexistent/a: no such file or folder"),
        (["replay", "/etc/passwd"], "/etc/passwd: a trace alone: --from DIR must name a capture"),
        (["replay", "/etc/passwd", "--from", "/nonexistent"], "/nonexistent: no such folder"),
        (["replay", "/etc"], "/etc: has no trace.zst"),
        (["replay", "/etc", "--compact-at", "1"], "--compact-at and --proactiveness are for"),
    ],
)
@pytest.mark.slow
def test_a_mistake_is_one_line_and_exit_code_2(words: list[str], problem: str) -> None:
    done = command(*words)
    assert done.returncode == 2
    assert done.stderr.startswith(f"dpud: {problem}")
    assert done.stderr.count("\n") == 1
    assert not done.stdout.strip()


def test_version_is_the_project_s() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert dpud.__version__ == project["version"]


def test_free_table_counts_pages_and_large_blocks() -> None:
    """1 page, and 2 blocks of order 10 (2048 pages): 8 MiB and a little, nearly all in large blocks."""
    counts = [1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    table = free_table("Node 0, zone   Normal " + "".join(f"{count:6d} " for count in counts) + "\n")
    cells = [next(iter(column.cells)) for column in table.columns]
    assert cells == ["Node 0 Normal", "8", "1 0 0 0 0 0 0 0 0 0 2", "100 %"]


def test_free_table_of_a_full_zone() -> None:
    table = free_table("Node 1, zone      DMA" + "      0" * 11 + " \n")
    assert list(table.columns[3].cells) == ["-"]


def test_pairs_table_splits_at_the_first_space() -> None:
    table = pairs_table("t", "a 1\nb 2 3\n")
    assert [list(column.cells) for column in table.columns] == [["a", "b"], ["1", "2 3"]]
