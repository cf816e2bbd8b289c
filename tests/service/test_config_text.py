# SPDX-License-Identifier: GPL-2.0-only
"""`dpud config`: what it prints reads back to the same, and says of each key what it is."""

import subprocess
import sys
import tomllib
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpud import config, config_text, scenario
from dpud.config import Config, Source, combine, parse
from dpud.config_keys import keys

SIZES = st.integers(16, 2048).map(lambda count: count * (2 << 20))
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\r\0"), max_size=20)
NODES = st.builds(lambda size: {"memory": size}, SIZES)


def a_file() -> st.SearchStrategy[dict[str, object]]:
    """What a user may write, as tables."""
    values = TEXTS | st.integers(-(2**63), 2**63 - 1) | st.booleans()
    step = {
        "about": TEXTS,
        "directory": TEXTS.map(lambda text: "/" + text),
        "write": st.dictionaries(TEXTS, values, max_size=3),
        "fill": st.dictionaries(TEXTS, st.integers(0, 2**40), max_size=2),
        "may_fail": st.booleans(),
    }
    tables = {
        "machine": st.fixed_dictionaries(
            {"cpus": st.integers(1, 64), "nodes": st.lists(NODES, min_size=1, max_size=3)}
        ),
        "memory": st.fixed_dictionaries({"bytes": st.sampled_from(["full", "stamp", "none"])}),
        "mount": st.fixed_dictionaries({"path": TEXTS, "allow_other": st.booleans()}),
        "log": st.fixed_dictionaries({"level": st.sampled_from(config.LEVELS)}),
        "sysctl": st.dictionaries(TEXTS, values, max_size=3),
        "files": st.dictionaries(TEXTS.map(lambda text: "/" + text), values, max_size=3),
        "workload": st.lists(st.fixed_dictionaries({}, optional=step), max_size=3),
    }
    return st.fixed_dictionaries({}, optional=tables)


def made_of(tables: dict[str, object]) -> Config:
    return msgspec.convert(tables, Config, dec_hook=config._decode)


@given(a_file(), st.booleans())
@pytest.mark.slow
def test_what_is_printed_reads_back_to_the_same(tables: dict[str, object], comments: bool) -> None:
    wanted = made_of(tables)
    assert parse(config_text.toml(wanted, comments)) == wanted


@pytest.mark.parametrize("name", scenario.names())
def test_scenarios_read_back(name: str) -> None:
    wanted = scenario.load(None, name)
    assert parse(config_text.toml(wanted)) == wanted
    assert wanted.scenario.about
    assert wanted.workload


def test_every_key_is_printed_and_explained() -> None:
    """Of a file that has at least one of each table; an independent parser finds the keys."""
    text = config_text.toml(parse("[[workload]]\n[[machine.nodes]]\n"), comments=True)
    found = tomllib.loads(text)
    lines = text.splitlines()
    for struct, table in (
        (config.Machine, found["machine"]),
        (config.Node, found["machine"]["nodes"][0]),
        (config.Gpu, found["gpu"]),
        (config.Dpu, found["dpu"]),
        (config.Mount, found["mount"]),
        (config.Step, found["workload"][0]),
    ):
        for key in (key for key in keys(struct) if not key.table):
            assert key.name in table or f"# {key.name} =" in lines, key.name
            at = next(number for number, line in enumerate(lines) if line.lstrip("# ").startswith(f"{key.name} ="))
            assert lines[at - 1].startswith("# "), key.name


def test_a_later_file_goes_over_an_earlier_one_key_by_key() -> None:
    below = Source("below", '[gpu]\nmemory = "64M"\npool = "0"\n[sysctl]\nvm.a = 1\nvm.b = 2\n[[machine.nodes]]\n')
    above = Source("above", '[gpu]\nmemory = "128M"\n[sysctl]\n"vm.b" = 3\n')
    both = combine([below, above])
    assert (str(both.gpu.memory), int(both.gpu.pool)) == ("128M", 0)
    assert both.sysctl == {"vm.a": 1, "vm.b": 3}
    assert len(both.machine.nodes) == 1
    placed = config.with_place("sysctl.vm.b: it is refused: why", (below, above))
    assert placed == "above:4: sysctl.vm.b: it is refused: why"
    assert config.with_place("sysctl.vm.a: no", (below, above)).startswith("below:5: ")
    assert config.with_place("/run/dpud: something is mounted there", (below, above))[0] == "/"


def test_what_only_together_is_impossible_is_refused() -> None:
    below = Source("below", '[kconfig]\nCONFIG_NUMA = "n"\n[[machine.nodes]]\n')
    above = Source("above", "[[machine.nodes]]\n[[machine.nodes]]\n")
    with pytest.raises(config.ConfigError, match=r"^above: kconfig.CONFIG_NUMA: is needed for 2 nodes"):
        combine([below, above])


@pytest.mark.slow
def test_the_command_prints_it(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    own.write_text("[machine]\ncpus = 3\n")
    command = [sys.executable, "-P", "-m", "dpud", "config", "--config", str(own), "--scenario", "cma-camera"]
    out = subprocess.run([*command, "--comments"], capture_output=True, text=True, check=True).stdout
    shown = parse(out)
    assert (shown.machine.cpus, str(shown.machine.nodes[0].cma)) == (3, "128M")
    assert "# CPUs, shared out over the nodes. (number; 1..4096)" in out
