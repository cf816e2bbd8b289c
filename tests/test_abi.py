# SPDX-License-Identifier: GPL-2.0-only
"""The tree against facts that were typed in separately (abi/linux.toml), and every file's wiring."""

import errno
import tomllib
from pathlib import Path
from typing import Any

from machines import Lab
from wiring import errno_of, for_each, run_all, wiring_cases

CPUS = range(4)
PAGE_FAULTS = ("page_busy", "page_dirtied", "page_forked", "page_freed", "page_pinned")


def facts_of(table: str) -> dict[str, dict[str, Any]]:
    return {
        path.replace("{n}", str(nid)).replace("{page_fault}", fault).replace("{cpu}", str(cpu)): facts
        for path, facts in tomllib.loads((Path(__file__).parent / "abi" / table).read_text()).items()
        for nid in (0, 1)
        for fault in PAGE_FAULTS
        for cpu in CPUS
    }


def expanded_facts_of(table: str) -> dict[str, dict[str, Any]]:
    """The same for a table with lists of its own."""
    facts: dict[str, dict[str, Any]] = tomllib.loads((Path(__file__).parent / "abi" / table).read_text())
    lists = facts.pop("lists")
    for name, values in lists.items():
        facts = {path.replace(f"{{{name}}}", value): fact for path, fact in facts.items() for value in values}
    return facts


FACTS = facts_of("linux.toml") | expanded_facts_of("tracefs.toml")


def test_the_tree_has_these_files_and_no_others() -> None:
    modes = {path: oct(attr.mode) for path, _, attr in Lab((32, 32)).registry.walk()}
    assert modes == {path: oct(facts["mode"]) for path, facts in FACTS.items()}


def test_defaults() -> None:
    lab = Lab((32, 32))
    wanted = {path: facts["default"] + "\n" for path, facts in FACTS.items() if "default" in facts}
    assert {path: lab.read(path) for path in wanted} == wanted


def test_ranges() -> None:
    for_each([path for path, facts in FACTS.items() if "range" in facts], check_range)


def check_range(path: str) -> None:
    lab = Lab((32,))
    low, high = FACTS[path]["range"]
    for value in (low, high):
        lab.write(path, f"{value}\n")
        assert lab.read(path) == f"{value}\n"
    for value in (low - 1, high + 1, 2**31, 2**64):
        is_no_long = value == 2**64 and path.startswith("/sys/kernel/tracing/")  # kstrtoul()
        assert errno_of(lab.write, path, str(value)) == (errno.ERANGE if is_no_long else errno.EINVAL)
        assert lab.read(path) == f"{high}\n"


def test_wiring() -> None:
    run_all(wiring_cases(Lab((32, 32)).registry))


# What a kernel with CONFIG_CMA has beyond that.

CMA_FACTS = facts_of("cma.toml")


def test_cma_areas_bring_these_files() -> None:
    lab = Lab((32, 32), cma=4)
    found = {path: attr.mode for path, _, attr in lab.registry.walk() if path not in FACTS}
    assert {path: oct(mode) for path, mode in found.items()} == {p: oct(f["mode"]) for p, f in CMA_FACTS.items()}
    for path, facts in CMA_FACTS.items():
        if "default" in facts:
            assert lab.read(path) == facts["default"] + "\n"


def test_cma_wiring() -> None:
    run_all(case for case in wiring_cases(Lab((32,), cma=4).registry) if "/cma/" in case.path)


# What a process brings.

PROCESS_FACTS = {
    f"/proc/100/{name}": facts
    for name, facts in tomllib.loads((Path(__file__).parent / "abi" / "process.toml").read_text()).items()
}


def with_a_process() -> Lab:
    lab = Lab((32,))
    lab.spawn("a")
    return lab


def test_a_process_has_these_files() -> None:
    lab = with_a_process()
    found = {path: attr.mode for path, _, attr in lab.registry.walk() if path.startswith("/proc/100/")}
    assert {path: oct(mode) for path, mode in found.items()} == {p: oct(f["mode"]) for p, f in PROCESS_FACTS.items()}
    for path, facts in PROCESS_FACTS.items():
        if "default" in facts:
            assert lab.read(path) == facts["default"] + "\n"
        for value in facts.get("range", ()):
            lab.write(path, f"{value}\n")
            assert lab.read(path) == f"{value}\n"


def test_process_wiring() -> None:
    run_all(case for case in wiring_cases(with_a_process().registry) if case.path.startswith("/proc/100/"))
