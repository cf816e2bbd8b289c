# SPDX-License-Identifier: GPL-2.0-only
"""Every command in README.md and docs/ works, and prints what the page shows."""

import sys
from pathlib import Path

import pytest
from transcript import Step, matches, outputs, session

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGES = [page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md"))) if "```console" in page.read_text()]
EXEC = [sys.executable, "-P", "-m", "dpud", "exec", "--"]


def differences(steps: list[Step], shell: list[str], folder: Path) -> str:
    wrong = [
        f"# {step.command}\n--- shown\n{step.shown}--- printed\n{printed}"
        for step, printed in zip(steps, outputs(steps, shell, folder), strict=True)
        if not matches(step.shown, printed)
    ]
    return "\n".join(wrong)


@pytest.mark.mount
@pytest.mark.slow
@pytest.mark.parametrize("host", [False, True], ids=["exec", "host"])
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_s_session(page: Path, host: bool, tmp_path: Path) -> None:
    if steps := session(page, host=host):
        problems = differences(steps, [] if host else EXEC, tmp_path)
        assert not problems, problems


def test_the_tutorial_is_a_session() -> None:
    assert len(session(DOCS / "tutorial.md", host=False)) > 30


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("", "", True),
        ("", "x\n", False),
        ("a\n", "a\n", True),
        ("a\n", "a\nb\n", False),
        ("a ... c\n", "a b c\n", True),
        ("a...\n", "a\nb\n", False),
        ("...\nc\n", "a\nb\nc\n", True),
        ("...\nc\n", "a\nb\n", False),
        ("a  \nb\n"[:1] + "\nb\n", "a  \nb\n", True),
    ],
)
def test_matching(shown: str, printed: str, same: bool) -> None:
    assert matches(shown, printed) is same


def test_commands_and_their_output_are_taken_apart(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```console\n# echo a \\\n> b\na b\n# true\n```\n\n```console host\n# exit 3\n```\n")
    assert session(page, host=False) == [Step("echo a \\\nb", "a b\n"), Step("true", "")]
    assert outputs(session(page, host=False), [], tmp_path) == ["a b\n", ""]
    with pytest.raises(AssertionError, match="ended early"):
        outputs(session(page, host=True), [], tmp_path)
