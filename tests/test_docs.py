# SPDX-License-Identifier: GPL-2.0-only
"""What README.md and docs/ say is so."""

import re
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from machines import Lab

from dpud import config
from dpud.bench import fuzz
from dpud.dpu.faults import FaultKind
from dpud.dpu.profile import profile_names
from dpud.gpu.address_space.advice import Advice
from dpud.gpu.address_space.faultlog import SERVED
from dpud.gpu.compression.codec import names
from dpud.gpu.configfs import Buffer
from dpud.gpu.defrag.files import DefragFiles
from dpud.gpu.migration import MigrationFiles
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.qos.files import ClientBandwidth
from dpud.gpu.qos.policy import POLICIES
from dpud.gpu.swap import prefetch
from dpud.gpu.swap.files import TierFiles
from kernelsim.dpu_compact_inject import KINDS
from kernelsim.machine import Machine, MachineConfig, NodeConfig

ROOT = Path(__file__).parent.parent
README, GUIDE = ROOT / "README.md", ROOT / "docs" / "guide.md"


def block(page: Path, language: str) -> str:
    """The one code block of that language."""
    (text,) = re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    return str(text)


def first_column(page: Path, heading: str) -> list[str]:
    """Names in the first column of the table whose head begins so, those in one cell apart."""
    _, _, rest = page.read_text().partition(f"\n| {heading} |")
    rows = rest.partition("\n\n")[0].splitlines()[2:]
    return [name for row in rows for name in re.findall(r"`([^`]+)`", row.split("|")[1])]


@pytest.mark.parametrize("page", [README, *sorted((ROOT / "docs").glob("*.md"))], ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert "://" in target or (page.parent / target).exists(), target


def test_the_guide_s_configuration_is_the_default() -> None:
    shown = config.parse(block(GUIDE, "toml"))
    default = config.Config()
    assert [node.memory for node in shown.machine.nodes] == [node.memory for node in default.machine.nodes]
    assert [list(node.distance) for node in shown.machine.nodes] == [[10, 20], [20, 10]]
    assert (shown.machine.cpus, shown.machine.debug_vm) == (default.machine.cpus, default.machine.debug_vm)
    assert shown.memory.bytes == "full"
    assert shown.dpu == default.dpu
    assert shown.gpu == default.gpu


def test_the_guide_s_configuration_leaves_no_key_out() -> None:
    text = block(GUIDE, "toml")
    for table in (
        config.Machine,
        config.Node,
        config.Memory,
        config.Dpu,
        config.Gpu,
        config.Mount,
        config.State,
        config.Log,
        config.Metrics,
        config.Step,
    ):
        for key in set(table.__struct_fields__) - {"nodes"}:
            assert re.search(rf"^{key} = ", text, re.MULTILINE), key


def test_the_guide_knows_every_profile() -> None:
    assert sorted(first_column(GUIDE, "profile")) == profile_names()


def test_the_guide_knows_every_fault() -> None:
    kinds = [name for name in first_column(GUIDE, "KIND") if "/" not in name]
    assert sorted(kinds) == sorted([*(kind.value for kind in FaultKind), *KINDS])


def test_the_guide_knows_every_statistic() -> None:
    machine = Machine(MachineConfig(nodes=(NodeConfig(32 << 20, 1),), bytes="stamp"))
    lines = machine.registry.read("/sys/kernel/debug/dpu_compact/stats").decode().splitlines()
    names = [re.sub("^(skipped|failed)_.*", r"\1_*", line.split()[0]) for line in lines]
    assert sorted(first_column(GUIDE, "name")) == sorted(set(names))


def test_the_guide_knows_every_buffer_file_advice_and_fault() -> None:
    assert sorted(first_column(GUIDE, "buffer file")) == sorted(attr.name for attr in Buffer.attrs)
    assert sorted(name.split()[0] for name in first_column(GUIDE, "advice")) == sorted(each.value for each in Advice)
    assert sorted(first_column(GUIDE, "fault")) == sorted(SERVED)


def test_the_guide_knows_every_file_of_a_tier_and_every_prefetcher() -> None:
    _, _, rest = GUIDE.read_text().partition("| tier's file")
    rows = [line.split("|")[1] for line in rest.partition("\n\n")[0].splitlines()[2:]]
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(attr.name for attr in TierFiles.attrs)
    assert ["none", *first_column(GUIDE, "prefetch")] == list(prefetch.names())


def test_the_guide_s_swap_program_runs() -> None:
    """The indented lines from the import of ManualClock on."""
    _, _, rest = GUIDE.read_text().partition("    from dpud.gpu.clock import")
    program = "from dpud.gpu.clock import" + rest.partition("\n\n")[0].replace("\n    ", "\n")
    names: dict[str, Any] = {}
    exec(compile(program, "guide.md", "exec"), names)
    assert names["swap"].policy == "s3-fifo"
    assert sorted(tier.name for tier in names["swap"].space.tiers) == ["hdd", "nvme"]


def test_the_guide_knows_every_promise_of_a_client_and_every_policy() -> None:
    promises = {attr.name for attr in ClientBandwidth.attrs}
    section = GUIDE.read_text().split("## Bandwidth of GPU clients\n")[1].split("\n## ")[0]
    tables = "\n".join(line.split("|")[1] for line in section.splitlines() if line.startswith("| `"))
    assert set(re.findall(r"`([^`]+)`", tables)) == promises | set(POLICIES)


@pytest.mark.mount
@pytest.mark.slow
def test_the_guide_s_commands_merge_pages() -> None:
    commands = re.search(r"comes from `same`:\n\n((?:    .*\n)+)", GUIDE.read_text())
    assert commands is not None
    script = "set -e\n" + textwrap.dedent(commands[1]) + "cat pages_shared pages_volatile\n"
    command = [sys.executable, "-m", "dpud", "exec", "--", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.search(r"pages_shared:(\d+)\npages_sharing:(\d+)\n.*\nok\nok\n0\n0\n$", done.stdout)
    assert found is not None, done.stdout
    assert 50 <= int(found[1]) <= 100, "of which each stands for 256 at most"
    assert int(found[1]) + int(found[2]) == pytest.approx(0.8 * 8192, rel=0.05)


@pytest.mark.mount
@pytest.mark.slow
def test_the_guide_s_bandwidth_commands_do_what_they_say() -> None:
    text = GUIDE.read_text().split("## Bandwidth of GPU clients\n")[1]
    commands = re.search(r"only counted\.\n\n((?:    .*\n)+)", text)
    assert commands is not None
    script = "set -e\n" + textwrap.dedent(commands[1]) + "cat train/qos_* 2>/dev/null || true\n"
    command = [sys.executable, "-m", "dpud", "exec", "--", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "\nok\n" in done.stdout
    assert done.stdout.endswith(f"{500 << 20}\n2\n{200 << 20}\n100\n")


@pytest.mark.slow
def test_the_guide_s_bandwidth_program_runs(capsys: pytest.CaptureFixture[str]) -> None:
    text = GUIDE.read_text().split("## Bandwidth of GPU clients\n")[1]
    program = re.search(r"waiting takes none:\n\n((?:    .*\n)+)", text)
    assert program is not None
    exec(compile(textwrap.dedent(program[1]), "guide.md", "exec"), {})
    assert float(capsys.readouterr().out) == pytest.approx(1e9 * ((64 << 20) - 10_000_000) / 500_000_000, rel=0.02)


def section(heading: str) -> str:
    return GUIDE.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]


def test_the_guide_knows_every_file_of_defrag() -> None:
    rows = re.findall(r"^\| (`.*?) \|", section("GPU memory in one piece"), re.MULTILINE)
    assert sorted(re.findall(r"`(\w+)`", " ".join(rows))) == sorted(attr.name for attr in DefragFiles.attrs)


@pytest.mark.mount
@pytest.mark.slow
def test_the_guide_s_defrag_commands_do_what_they_say() -> None:
    commands = re.search(r"all memories:\n\n((?:    .*\n)+)", section("GPU memory in one piece"))
    assert commands is not None
    script = "set -e\n" + textwrap.dedent(commands[1])
    command = [sys.executable, "-m", "dpud", "exec", "--", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passes 1\n" in done.stdout
    assert re.search(r"^device0 \d+ \.+$", done.stdout, re.MULTILINE)


def test_the_guide_s_suballocator_runs(capsys: pytest.CaptureFixture[str]) -> None:
    program = re.search(r"without a copy:\n\n((?:    .*\n)+)", section("GPU memory in one piece"))
    assert program is not None
    exec(compile(textwrap.dedent(program[1]), "guide.md", "exec"), {})
    assert int(capsys.readouterr().out.split()[1]) > 0


def test_the_guide_s_gpu_program_runs() -> None:
    """The indented lines from the import of GpuMemory on."""
    _, _, rest = GUIDE.read_text().partition("    from dpud.gpu.memory import")
    program = "from dpud.gpu.memory import" + rest.partition("\n\n")[0].replace("\n    ", "\n")
    exec(compile(program, "guide.md", "exec"), {})


def test_the_guide_s_migration_program_runs() -> None:
    """The indented lines of its section that begin with an import."""
    _, _, section = GUIDE.read_text().partition("## Memory that moves while it is used")
    _, _, rest = section.partition("    from dpud.gpu.memory import")
    program = "from dpud.gpu.memory import" + rest.partition("\n\n")[0].replace("\n    ", "\n")
    exec(compile(program, "guide.md", "exec"), {})


def test_the_guide_knows_every_file_and_strategy_of_migration() -> None:
    _, _, section = GUIDE.read_text().partition("## Memory that moves while it is used")
    section = section.partition("\n## ")[0]
    missing = [attr.name for attr in MigrationFiles.attrs if not re.search(rf"\b{attr.name}\b", section)]
    assert missing == []
    assert all(f"`{each.value}`" in section for each in Strategy)


@pytest.mark.slow
def test_the_guide_s_fuzz_command_runs() -> None:
    (line,) = re.findall(r"^    dpud bench fuzz (.*)$", GUIDE.read_text(), re.MULTILINE)
    words = line.split()
    options = dict(zip(words[::2], words[1::2], strict=True))
    report = fuzz.run(int(options["--seed"]), int(options["--inputs"]), options["--target"])
    assert report.figures[0].cells()[:2] == ("units", "2,000")


def test_the_guide_knows_every_codec() -> None:
    assert sorted(first_column(GUIDE, "codec")) == sorted(names())


@pytest.mark.slow
def test_the_readme_s_program_runs() -> None:
    done = subprocess.run([sys.executable, "-c", block(README, "python")], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0].startswith("Node 0, zone      DMA")
    assert done.stdout.split()[-2:] == ["ok", "[]"]


def test_the_guide_s_vm_sysctls_are_those_that_are_there() -> None:
    """Every one in the first table, none of the second, and no other that Linux has."""
    lab = Lab((32,))
    there = {path.removeprefix("/proc/sys/vm/") for path in lab.registry.nodes if path.startswith("/proc/sys/vm/")}
    honoured, absent = set(first_column(GUIDE, "sysctl")), set(first_column(GUIDE, "sysctl that is absent"))
    assert honoured - there == {"percpu_pagelist_high_fraction"}  # of imported machines
    assert {name for name in there - honoured if not name.startswith("dpu_compact_")} == set()
    assert absent & there == set()


@pytest.mark.host
def test_the_guide_names_every_vm_sysctl_of_the_running_kernel() -> None:
    named = {*first_column(GUIDE, "sysctl"), *first_column(GUIDE, "sysctl that is absent")}
    assert {path.name for path in Path("/proc/sys/vm").iterdir()} - named == set()
