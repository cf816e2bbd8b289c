# SPDX-License-Identifier: GPL-2.0-only
"""dynamic_debug/control: the command grammar of lib/dynamic_debug.c, sites found in real code, messages in the log."""

import errno
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from machines import NODES_SYSFS, Lab
from wiring import errno_of

import kernelsim
from kernelsim.dynamic_debug import DynamicDebug, Site, parse_flags, parse_query
from kernelsim.trace_hook import traced

CONTROL = "/sys/kernel/debug/dynamic_debug/control"


class Toy:
    """Code with sites."""

    def __init__(self, pr_debug: DynamicDebug) -> None:
        self.vm = self
        self.pr_debug = pr_debug

    @traced("toy_first")
    def first(self, number: int) -> None:
        self.vm.pr_debug("first %d\n", number)

    def second(self, number: int) -> None:
        for each in range(number):
            (lambda each=each: self.pr_debug("second\t0x%lx %s\n", each, "x"))()


class Log:
    def __init__(self) -> None:
        self.lines: list[str] = []
        self.debug = DynamicDebug(self.lines.append, lambda: 42)
        self.toy = Toy(self.debug)
        self.debug.add([self.toy, self.toy])

    def flags(self) -> list[str]:
        return [site.flags for site in self.debug.sites.values()]

    def run(self, command: str) -> list[str]:
        self.debug.command(command)
        return self.flags()


def line_of(text: str) -> int:
    lines = Path(__file__).read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if f'pr_debug("{text}' in line)


def test_sites_are_found_where_they_are() -> None:
    first, second = Log().debug.sites.values()
    assert (first.lineno, second.lineno) == (line_of("first"), line_of("second"))
    assert (first.function, second.function) == ("toy_first", "second")
    assert (
        second.line()
        == f'mm/test_dynamic_debug.c:{second.lineno} [test_dynamic_debug]second =_ "second\\t0x%lx %s\\n"\n'
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "flags"),
    [
        ("+p", ["p", "p"]),
        ("func toy_first +p", ["p", ""]),
        ("func toy_* =pflmts", ["pmfslt", ""]),
        ("file test_dynamic_debug.c +p", ["p", "p"]),
        ("file mm/test_dynamic_debug.c +p", ["p", "p"]),
        ("file dynamic_debug.c +p", ["", ""]),
        ("file *debug.c func second +f", ["", "f"]),
        ("file test_dynamic_debug.c:toy_first +p", ["p", ""]),
        ("module test_dynamic_debug +p", ["p", "p"]),
        ("module test_* format ^second +p", ["", "p"]),
        ('format "second\\t" +p', ["", "p"]),
        ("format 'rst %d' +p", ["p", ""]),
        ("format ^ond +p", ["", ""]),
        ("format nd +p", ["", "p"]),
        ("line 1- +p", ["p", "p"]),
        ("line -3 +p", ["", ""]),
        (f"line {line_of('first')} +p", ["p", ""]),
        (f"line {line_of('first') + 1}-{line_of('second')} +p", ["", "p"]),
        (f"file test_dynamic_debug.c:{line_of('second')} +p", ["", "p"]),
        ("class NAME +p", ["", ""]),
        ("func second +p; func toy_first +l", ["l", "p"]),
        ("func second +p\nfunc toy_first +l\n", ["l", "p"]),
        ("# a comment +p", ["", ""]),
        ("func second +p # a comment", ["", "p"]),
        (" ; \n", ["", ""]),
        ("func nothing +p", ["", ""]),
    ],
)
def test_commands(command: str, flags: list[str]) -> None:
    assert Log().run(command) == flags


@pytest.mark.parametrize(
    "command",
    [
        "func toy_first",
        "func +p",
        "p",
        "+x",
        "*p",
        "nothing second +p",
        "func second func toy_first +p",
        "file a.c:12 line 12 +p",
        "line 9-5 +p",
        "line x +p",
        "line - 3 +p",
        'format "open +p',
        "file a func b module c format d line 1 +p",
    ],
)
def test_wrong_commands_change_nothing(command: str) -> None:
    log = Log()
    assert errno_of(log.run, command) == errno.EINVAL
    assert log.flags() == ["", ""]


def test_the_others_of_a_write_are_run_all_the_same() -> None:
    log = Log()
    assert errno_of(log.run, "func second +p; nonsense; func toy_first +p") == errno.EINVAL
    assert log.flags() == ["p", "p"]


def test_too_long_a_write() -> None:
    assert errno_of(Log().run, "# " + 4096 * "x") == errno.E2BIG


def test_messages_and_their_prefix() -> None:
    log = Log()
    log.toy.first(1)
    for command, prefix in (
        ("=p", ""),
        ("=pt", "[42] "),
        ("=pm", "test_dynamic_debug: "),
        ("=pmfl", f"test_dynamic_debug:toy_first:{line_of('first')}: "),
        ("=pts", "[42] mm/test_dynamic_debug.c: "),
    ):
        log.run(command)
        log.toy.first(7)
        assert log.lines.pop() == f"{prefix}first 7"
    assert log.lines == []
    log.toy.second(2)
    assert [line.rpartition(": ")[2] for line in log.lines] == ["second\t0x0 x", "second\t0x1 x"]


flag_words = st.builds(lambda op, letters: op + letters, st.sampled_from("+-="), st.text("pmfslt_", max_size=4))


@pytest.mark.slow
@given(st.lists(flag_words, max_size=6))
def test_flags_are_a_set(words: list[str]) -> None:
    flags, model = "", set[str]()
    for word in words:
        flags = parse_flags(word)(flags)
        named = set(word[1:]) - {"_"}
        model = {"+": model | named, "-": model - named, "=": named}[word[0]]
        assert set(flags) == model
        assert [letter for letter in "pmfslt" if letter in model] == list(flags)


@given(st.integers(0, 50), st.integers(0, 50), st.integers(0, 50))
def test_line_ranges(low: int, high: int, lineno: int) -> None:
    site = Site("mm/a.c", lineno, "a", "f", "text")
    for text, wanted in ((f"{low}", lineno == low), (f"{low}-", lineno >= low), (f"-{high}", lineno <= high)):
        assert parse_query(["line", text]).matches(site) == wanted
    if low <= high:
        assert parse_query(["line", f"{low}-{high}"]).matches(site) == (low <= lineno <= high)


# The machine's own sites.


@pytest.mark.slow
def test_every_site_of_the_source_is_listed() -> None:
    """By another way than the module's: the text of the source."""
    in_source = set()
    for path in Path(kernelsim.__file__).parent.glob("*.py"):
        if path.name != "dynamic_debug.py":
            for number, line in enumerate(path.read_text().splitlines(), 1):
                if match := re.search(r'\.pr_debug\("(.*?)\\n"', line):
                    in_source.add((f"mm/{path.stem}.c:{number}", match[1]))
    listed = re.findall(r'^(mm/\S+:\d+) \[\w+\]\w+ =_ "(.*)\\n"$', Lab((32,), cma=4).read(CONTROL), flags=re.M)
    assert set(listed) == in_source
    assert len(in_source) >= 25


@pytest.mark.slow
def test_file_dpu_compact_c() -> None:
    lab = Lab((64,))
    lab.spawn("a", anon="24M", holes="50 seed=1")
    lab.write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
    quiet = lab.machine.printk.lines()
    assert not [line for line in quiet if "skip runs" in line]
    lab.write(CONTROL, "file dpu_compact.c +p\n")
    assert lab.read(CONTROL) == lab.read("/proc/dynamic_debug/control")
    on = re.findall(r"^(\S+):\d+ .* =(\w+) ", lab.read(CONTROL), flags=re.M)
    assert {flags for name, flags in on if name == "mm/dpu_compact.c"} == {"p"}
    assert {flags for name, flags in on if name != "mm/dpu_compact.c"} == {"_"}
    lab.set("a", holes="20 seed=2")
    lab.write(f"{NODES_SYSFS}/node0/compact_dpu", "1")
    added = lab.machine.printk.lines()[len(quiet) :]
    assert [line for line in added if re.fullmatch(r"region 0x[0-9a-f]+: \d+ skip runs among \d+ fragments", line)]
    assert errno_of(lab.write, CONTROL, "file dpu_compact.c") == errno.EINVAL
