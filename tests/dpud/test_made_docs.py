# SPDX-License-Identifier: GPL-2.0-only
"""What `make docs` makes is up to date and works: manual pages under man and mandoc, completions in real shells."""

import json
import os
import pty
import re
import select
import shutil
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from dpud import config, docs

ROOT = Path(__file__).parents[2]
MAN, COMPLETIONS = ROOT / "docs" / "man", ROOT / "completions"


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    return docs.files()


@pytest.mark.slow
def test_everything_that_is_made_is_up_to_date(made: dict[str, str]) -> None:
    stale = [name for name, text in made.items() if not (ROOT / name).is_file() or (ROOT / name).read_text() != text]
    assert stale == [], "run: make docs"
    assert docs.left_over(made) == []


# Manual pages.


def pages() -> list[Path]:
    return sorted(MAN.iterdir())


def rendered(page: Path) -> str:
    """As a terminal of 200 columns shows it."""
    environment = {**os.environ, "MANWIDTH": "200", "LC_ALL": "C.UTF-8", "MAN_KEEP_FORMATTING": ""}
    done = subprocess.run(["man", "--warnings", "-l", str(page)], capture_output=True, text=True, env=environment)
    assert done.stderr == ""
    return re.sub(".\b", "", done.stdout)


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed; `make test` does it")


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_mandoc_has_nothing_to_say(page: Path) -> None:
    need("mandoc")
    done = subprocess.run(["mandoc", "-T", "lint", "-W", "warning", str(page)], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")


@pytest.mark.slow
@pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)
def test_man_shows_it(page: Path) -> None:
    need("man")
    text = rendered(page)
    name, section = page.name.split(".")
    assert text.startswith(f"{name.upper()}({section})")
    for heading in ("NAME", "DESCRIPTION", "SEE ALSO"):
        assert f"\n{heading}\n" in text
    assert re.search(rf"^ +{name} [-‐−] \S", text, re.MULTILINE)  # noqa: RUF001 # what whatis(1) reads


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "words"),
    [
        ("dpud-proc.5", ("/proc/sys/vm", "dpu_compact_min_fragments", "1..1024; default: 32", "mode 0200")),
        ("dpud-sysfs.5", ("/sys/devices/system/node/node*", "compact_dpu")),
        ("dpud-debugfs.5", ("/sys/kernel/debug/dpu_compact", "last_failures")),
        ("dpud-configfs.5", ("/sys/kernel/config/kernelsim/mm/NAME", "mlock")),
        ("dpud-config.5", ("[[machine.nodes]]", "dpus_per_rank", "1..64; default: 64", '"full" or "stamp" or "none"')),
        ("dpud.1", ("dpud replay [OPTIONS] DIR|TRACE", "--compact-at SECONDS", "EXIT STATUS")),
    ],
)
def test_facts_are_on_the_pages(page: str, words: tuple[str, ...]) -> None:
    need("man")
    text = " ".join(rendered(MAN / page).replace("‐", "-").replace("−", "-").split())  # noqa: RUF001
    for word in words:
        assert word in text


def test_every_key_of_the_configuration_is_described() -> None:
    text = (MAN / "dpud-config.5").read_text()
    tags = re.findall(r"^\.TP\n\\fB(.*)\\fR$", text, re.MULTILINE)
    tables = (config.Machine, config.Node, config.Memory, config.Dpu, config.Gpu, config.Mount, config.Log, config.Step)
    for struct in tables:
        for key in struct.__struct_fields__:
            assert key in tags
            entry = text.partition(f".TP\n\\fB{key}\\fR\n")[2]
            assert entry.split("\n")[0].strip() not in ("", ".TP", ".br"), key


def test_the_page_s_example_is_a_configuration() -> None:
    example = (MAN / "dpud-config.5").read_text().partition(".nf\n")[2].partition("\n.fi")[0]
    assert "machine" in tomllib.loads(example.replace("\\-", "-").replace("\\&", ""))


# Completions.

ASK_BASH = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$((${#COMP_WORDS[@]} - 1))
_dpud
printf '%s\\n' "${COMPREPLY[@]}"
"""

CASES = [
    (["dpud", "re"], {"record", "reload", "replay", "report"}),
    (["dpud", "--ver"], {"--version"}),
    (["dpud", "run", "--m"], {"--mount"}),
    (["dpud", "replay", "--t"], {"--traditional"}),
    (["dpud", "demo", "c"], {"capture", "compression"}),
    (["dpud", "demo", "de"], {"defrag"}),
    (["dpud", "bench", "t"], {"tables", "terabyte"}),
    (["dpud", "bench", "tables", "reg"], {"region"}),
    (["dpud", "snapshot", "--fragment", "r"], {"random", "runs"}),
    (["dpud", "run", "--from", "h"], {"host", "hostdir"}),
    (["dpud", "replay", "m"], {"my trace.txt", "mydir"}),
    (["dpud", "run", "--scenario", "gpu"], {"gpu-inference"}),
    (["dpud", "run", "--scenario", "my"], {"my trace.txt", "mydir"}),
    (["dpud", "run", "--config", "my"], {"my trace.txt", "mydir"}),
    (["dpud", "record", "my"], {"mydir"}),
    (["dpud", "exec", "--", "mandoc_like_comm"], {"mandoc_like_command"}),
    (["dpud", "bench", "--seed", ""], set()),
]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder to complete names in, with a command of its own in bin."""
    (tmp_path / "mydir").mkdir()
    (tmp_path / "hostdir").mkdir()
    (tmp_path / "my trace.txt").touch()
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "mandoc_like_command").write_text("#!/bin/sh\n")
    (tmp_path / "bin" / "mandoc_like_command").chmod(0o755)
    return tmp_path


def with_bin(place: Path) -> dict[str, str]:
    return {**os.environ, "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "TERM": "dumb"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "offered"), CASES, ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_bash_completes(place: Path, words: list[str], offered: set[str]) -> None:
    done = subprocess.run(
        ["bash", "--norc", "-c", ASK_BASH, "ask", str(COMPLETIONS / "dpud.bash"), *words],
        capture_output=True, text=True, cwd=place, env=with_bin(place),
    )  # fmt: skip
    assert done.stderr == ""
    assert set(filter(None, done.stdout.split("\n"))) == offered


@pytest.mark.slow
def test_every_command_and_option_is_in_both(made: dict[str, str]) -> None:
    """`--help` of the program itself says what there is."""
    script = (
        "import json; from dpud.cli import cli; print(json.dumps({name: [word for param in command.params for word in"
    )
    script += " param.opts if word[0] == '-' and not param.hidden] for name, command in cli.commands.items() if not"
    script += " command.hidden}))"
    there = json.loads(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT).stdout)
    assert len(there) > 8
    for text in (made["completions/dpud.bash"], made["completions/_dpud"]):
        for name, options in there.items():
            part = re.search(rf"^ +{name}\)\n(.*?)^ +;;\n", text, re.MULTILINE | re.DOTALL)
            assert part, name
            for option in options:
                assert option in part[1], (name, option)


ZSH = """
fpath=({folder} $fpath)
autoload -U compinit
compinit -u -D
PROMPT= RPS1= PS2=
zstyle ':completion:*' list-colors ''
setopt no_always_last_prompt
unsetopt beep
LISTMAX=1000
echo re''ady
"""


class Zsh:
    """An interactive zsh on a terminal."""

    def __init__(self, place: Path) -> None:
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            os.chdir(place)
            os.execvpe("zsh", ["zsh", "-f", "-i"], with_bin(place))
        self.type(ZSH.format(folder=COMPLETIONS))
        self.wait_for("ready")

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: str, seconds: float = 60) -> str:
        """What it printed until it printed this."""
        seen = ""
        deadline = time.monotonic() + seconds
        while text not in seen:
            left = deadline - time.monotonic()
            assert left > 0, f"no {text!r} in {seen!r}"
            if select.select([self.fd], [], [], left)[0]:
                seen += os.read(self.fd, 4096).decode(errors="replace")
        return seen

    def completed(self, line: str) -> str:
        """The line after Tab, by what echo says of it."""
        self.type(f"{line}\t\001printf '<%s>' \005; echo -n e''nd\n")
        seen = self.wait_for("end")
        return re.findall(r"<dpud>(?:<[^<>]*>)*", seen)[-1]

    def close(self) -> None:
        os.close(self.fd)
        os.waitpid(self.pid, 0)


@pytest.mark.slow
def test_zsh_completes(place: Path) -> None:
    need("zsh")
    zsh = Zsh(place)
    try:
        for line, words in (
            ("dpud rec", "<dpud><record>"),
            ("dpud repl", "<dpud><replay>"),
            ("dpud --ver", "<dpud><--version>"),
            ("dpud run --mou", "<dpud><run><--mount>"),
            ("dpud demo cap", "<dpud><demo><capture>"),
            ("dpud bench terab", "<dpud><bench><terabyte>"),
            ("dpud bench tables reg", "<dpud><bench><tables><region>"),
            ("dpud snapshot --fragment ran", "<dpud><snapshot><--fragment><random>"),
            ("dpud run --from hostd", "<dpud><run><--from><hostdir>"),
            ("dpud replay my\\ tr", "<dpud><replay><my trace.txt>"),
            ("dpud exec -- mandoc_like_comm", "<dpud><exec><--><mandoc_like_command>"),
        ):
            assert zsh.completed(line) == words
    finally:
        zsh.close()
