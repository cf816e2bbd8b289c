# SPDX-License-Identifier: GPL-2.0-only
"""Which line of a TOML file a mistake is in: the parsers name the key, or a place, but not both."""

import re
from collections.abc import Iterator

_HEADER = re.compile(r"\s*\[(\[?)([^\]]+)\]")
_ASSIGNMENT = re.compile(r"""\s*((?:[\w-]+|"[^"]*"|'[^']*')(?:\s*\.\s*(?:[\w-]+|"[^"]*"|'[^']*'))*)\s*=""")
_WORD = re.compile(r"""[\w-]+|"[^"]*"|'[^']*'""")


def key_and_problem(message: str) -> tuple[str, str]:
    """("machine.seed", "Expected int, got str") from msgspec's text, or from ours ("machine.nodes: ...")."""
    problem, _, path = message.partition(" - at `$")
    key = path.rstrip("`").lstrip(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", problem):
        return f"{key}.{unknown[1]}".lstrip("."), "unknown key"
    if not key:
        key, _, problem = message.partition(": ")
    if ours := re.match(r"([a-z_]+) = ", problem):  # a check of a whole table that blames one of its keys
        return f"{key}.{ours[1]}", problem
    return key, problem.replace("`", "")


def without_place(message: str, text: str) -> tuple[int, str]:
    """(line, problem) from tomllib's "Invalid value (at line 3, column 5)" or "... (at end of document)"."""
    problem, _, place = message.partition(" (at ")
    found = re.match(r"line (\d+)", place)
    return int(found[1]) if found else max(1, len(text.splitlines())), problem


def line_of(text: str, key: str) -> int | None:
    """The line that sets `key` ("machine.nodes[1].memory"), else the first of the narrowest table around it, or of what
    is in it; None if no line has to do with it.
    """
    return place_of(text, key)[1]


def place_of(text: str, key: str) -> tuple[int, int | None]:
    """(how many steps of the key that line has, the line)"""
    wanted, best, line = _steps(key), 0, None
    for number, found in _keys(text):
        common = 0
        while common < min(len(found), len(wanted)) and found[common] == wanted[common]:
            common += 1
        if common > best and common in (len(found), len(wanted)):
            best, line = common, number
    return best, line


def _steps(key: str) -> list[str]:
    """machine.nodes[1].memory -> machine, nodes, 1, memory. Names with dots of their own, paths too, fall apart."""
    return [step for step in re.split(r"[.\[\]]+", key) if step]


def _keys(text: str) -> Iterator[tuple[int, list[str]]]:
    """(line, path) of each table and assignment; the path has the number of an element of an array of tables."""
    here: list[str] = []
    nth: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
        if header := _HEADER.match(line):
            here, name = _path(header[2]), header[2].strip()
            if header[1]:
                nth[name] = nth.get(name, -1) + 1
                here = [*here, str(nth[name])]
            elif (above := ".".join(here[:-1])) in nth:  # [workload.write] belongs to the last [[workload]]
                here = [*here[:-1], str(nth[above]), here[-1]]
            yield number, here
        elif assignment := _ASSIGNMENT.match(line):
            yield number, here + _path(assignment[1])


def _path(dotted: str) -> list[str]:
    return [step for word in _WORD.findall(dotted) for step in _steps(word.strip("\"'"))]
