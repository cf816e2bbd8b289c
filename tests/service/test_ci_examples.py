# SPDX-License-Identifier: GPL-2.0-only
"""The examples for others' CI: their steps that need no network or container are run here, the rest is checked."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from wiring import let_others_in

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples" / "ci"
ORDINARY_USER = [sys.executable, "-P", str(ROOT / "tests/ordinary_user.py"), "--fuse"]
TIMEOUT_S = 300

OTHERS = {
    "fails": ("echo TAP version 13; echo 1..1; echo not ok 1; exit 1", 1),
    "skips": ("echo '1..0 # SKIP no such kernel'; exit 4", 4),
    "is killed": ("echo 1..1; kill -KILL $$", 128 + 9),
}
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become an ordinary user")


def workflow() -> dict[str, object]:
    return yaml.safe_load((EXAMPLES / "github-actions.yml").read_text())


def steps() -> dict[str, str]:
    """Name -> script of each step of the workflow that is one."""
    (job,) = workflow()["jobs"].values()
    return {step["name"]: step["run"] for step in job["steps"] if "run" in step}


@pytest.fixture
def with_dpud(tmp_path: Path) -> dict[str, str]:
    """The environment of a step: dpud on the path, as pipx leaves it."""
    program = tmp_path / "bin" / "dpud"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -P -m dpud "$@"\n')
    program.chmod(0o755)
    let_others_in(program.parent)
    place = tmp_path / "place"
    place.mkdir()
    place.chmod(0o777)
    return os.environ | {"PATH": f"{program.parent}:{os.environ['PATH']}", "HOME": str(place), "PWD": str(place)}


def as_ordinary_user(command: list[str], env: dict[str, str], cwd: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*ORDINARY_USER, *command], capture_output=True, text=True, env=env, cwd=cwd, timeout=TIMEOUT_S
    )


@pytest.mark.mount
@pytest.mark.slow
@needs_root
def test_the_workflow_s_selftest_runs_as_an_ordinary_user(with_dpud: dict[str, str]) -> None:
    env = with_dpud | {"SELFTEST": str(EXAMPLES / "selftest.sh")}
    env |= {name: text for name, text in os.environ.items() if name == "XDG_CACHE_HOME"}
    script = steps()["Selftest"].replace('XDG_CACHE_HOME="$HOME/.cache" ', "")  # the loops are compiled already
    assert script != steps()["Selftest"]
    done = as_ordinary_user(["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script], env, env["PWD"])
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[:2] == ["TAP version 13", "1..3"]
    assert re.findall(r"^ok (\d)", done.stdout, re.MULTILINE) == ["1", "2", "3"]
    assert Path(env["PWD"], "selftest.tap").read_text() == done.stdout


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize("what", OTHERS)
def test_exit_codes_and_results_pass_through(what: str, with_dpud: dict[str, str], tmp_path: Path) -> None:
    """Of the container's entry point, which the workflow's step is, too."""
    text, code = OTHERS[what]
    own = tmp_path / "own.sh"
    own.write_text(text)
    (entry,) = re.findall(r"^ENTRYPOINT (.*)$", containerfile(), re.MULTILINE)
    small = tmp_path / "small.toml"
    small.write_text('[[machine.nodes]]\nmemory = "64M"\n[gpu]\ndevices = 0\n')
    program, exec_, *rest = json.loads(entry)
    command = [program, exec_, "--config", str(small), *rest, "sh", str(own)]
    done = subprocess.run(command, capture_output=True, text=True, env=with_dpud, timeout=TIMEOUT_S)
    direct = subprocess.run(["sh", str(own)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (code, direct.stdout), done.stderr


def containerfile() -> str:
    """With its continued lines joined."""
    return (EXAMPLES / "Containerfile").read_text().replace("\\\n", " ")


def test_the_container_file_is_one() -> None:
    lines = [line for line in containerfile().splitlines() if line and not line.startswith("#")]
    words = [line.split()[0] for line in lines]
    known = {"FROM", "RUN", "COPY", "USER", "ENV", "WORKDIR", "ENTRYPOINT", "CMD"}
    assert set(words) <= known
    assert words[0] == "FROM"
    assert ":" in lines[0].rsplit("/", 1)[1], "a tag"
    assert words.index("USER") < words.index("ENTRYPOINT"), "not as root"
    for line in lines:
        if line.startswith(("ENTRYPOINT", "CMD")):
            assert isinstance(json.loads(line.split(None, 1)[1]), list), "no shell in between, which would take signals"
        if line.startswith("RUN"):
            subprocess.run(["sh", "-n", "-c", line.removeprefix("RUN ")], check=True)
            assert "apt-get install" not in line or ("--yes" in line and "rm -rf /var/lib/apt/lists" in line)
        if line.startswith("COPY"):
            assert "dist/dpud-*.whl" in line  # what make-deb leaves: tests/service/test_packages.py


def test_the_workflow_is_one() -> None:
    (job,) = workflow()["jobs"].values()
    assert job["defaults"]["run"]["shell"] == "bash"
    assert job["timeout-minutes"] > 0
    for step in job["steps"]:
        assert ("uses" in step) != ("run" in step)
        if "uses" in step:
            assert re.fullmatch(r"actions/[\w-]+@v\d+", step["uses"])
    for script in steps().values():
        subprocess.run(["bash", "-n", "-c", script], check=True)
    assert (ROOT / workflow()["env"]["SELFTEST"]).is_file()
