# SPDX-License-Identifier: GPL-2.0-only
"""Event filters: what a 6.18 kernel said to each of these texts, and random expressions against Python's own rules."""

import contextlib
import errno
import fnmatch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernelsim.task import Task
from kernelsim.trace_events import mm_compaction_begin, mm_compaction_finished
from kernelsim.trace_filter import FilterError, compile_filter

NR_CPUS = 2  # of the machine on which the texts below were tried
BASH = Task(42, lambda: "bash", cpu=1)


def passes(source: str, *values: object) -> bool:
    """mm_compaction_begin has zone_start, migrate_pfn, free_pfn, zone_end, sync."""
    return compile_filter(mm_compaction_begin, source, NR_CPUS)((*values, 0, 0, 0, 0)[:5], BASH)


@pytest.mark.parametrize(
    "source",
    [
        "zone_start > 5",
        "zone_start == 1 &&",
        "zone_start == 1 && sync == 0 || migrate_pfn & 0x10",
        "!(zone_start == 1)",
        'comm == "bash"',
        'comm ~ "ba*"',
        "common_pid != 0",
        "sync == 1",
        'COMM == "x"',
        "cpu == 1",
        "CPU == 0",
        "zone_start == 010",
        "zone_start>=1&&sync!=1",
        "!zone_start == 1",
        "!!(sync == 1)",
        "zone_start== 1",
        "common_cpu == 0",
        "CPU&CPUS{0-1}",
        "CPU & CPUS{ 0 , 1 }",
        "CPU & CPUS{0-1:1/2}",
        "CPU & CPUS{0-N}&&sync==0",
        "CPU & CPUS{all}",
        "CPU & CPUS{,0,}",
        "zone_start == CPUS{0-1}",
    ],
)
def test_taken_by_a_kernel(source: str) -> None:
    compile_filter(mm_compaction_begin, source, NR_CPUS)


# Captured from events/compaction/mm_compaction_begin/filter of a 6.18 kernel: what was written, the error of the write,
# and what the file read then.
REFUSED = [
    ("zone_start >", errno.EINVAL, "            ^\nparse_error: Invalid value (did you forget quotes)?"),
    ("zone_start", errno.EINVAL, "          ^\nparse_error: Invalid operator"),
    ("nofield == 1", errno.EINVAL, "        ^\nparse_error: Field not found"),
    ("zone_start == abc", errno.EINVAL, "               ^\nparse_error: Invalid value (did you forget quotes)?"),
    ('zone_start == "abc"', errno.EINVAL, "               ^\nparse_error: Expecting numeric field"),
    ("(zone_start == 1", errno.ENOENT, "^\nparse_error: Too many '('"),
    ("zone_start == 1)", errno.EPERM, "               ^\nparse_error: Too few '('"),
    ("&& zone_start == 1", errno.EPERM, "Error: (0)"),
    ("zone_start=1", errno.EINVAL, "           ^\nparse_error: Invalid operator"),
    ("zone_start = 1", errno.EINVAL, "            ^\nparse_error: Invalid operator"),
    ("zone_start ~ 1", errno.EINVAL, "              ^\nparse_error: Illegal operation for field type"),
    ("comm == bash", errno.EINVAL, "         ^\nparse_error: Invalid value (did you forget quotes)?"),
    ("comm ~ ba*", errno.EINVAL, "        ^\nparse_error: Invalid value (did you forget quotes)?"),
    ('comm > "a"', errno.EINVAL, "        ^\nparse_error: Illegal operation for field type"),
    ("zone_start == -1", errno.EINVAL, "               ^\nparse_error: Illegal integer value"),
    ("zone_start == 0x", errno.EINVAL, "               ^\nparse_error: Illegal integer value"),
    ("zone_start == 0b1", errno.EINVAL, "               ^\nparse_error: Illegal integer value"),
    ('comm == "a', errno.ESRCH, "        ^\nparse_error: Missing matching quote"),
    (
        "zone_start == 1 & sync == 1",
        errno.EPERM,
        "                ^\nparse_error: Too many terms in predicate expression",
    ),
    ("zone_start == 1 || || sync == 1", errno.EPERM, "Error: (0)"),
    ("", errno.EINVAL, "Error: (0)"),
    ("1", errno.EINVAL, " ^\nparse_error: Field not found"),
    ("zone_start == 99999999999999999999", errno.EINVAL, "               ^\nparse_error: Illegal integer value"),
    ("zone_start == 1 1", errno.EPERM, "                ^\nparse_error: Too many terms in predicate expression"),
    ("zone_start <> 1", errno.EINVAL, "             ^\nparse_error: Invalid value (did you forget quotes)?"),
    ("()", errno.EINVAL, "Error: (0)"),
    ("zone_start == 1 && (sync == 1", errno.ENOENT, "                   ^\nparse_error: Too many '('"),
    ("sync == 1abc", errno.EINVAL, "         ^\nparse_error: Illegal integer value"),
    ("CPU & CPUS{}", errno.EINVAL, "            ^\nparse_error: Invalid cpulist"),
    ("CPU & CPUS{a}", errno.EINVAL, "             ^\nparse_error: Invalid cpulist"),
    ("CPU & CPUS{0,2-3}", errno.EINVAL, "                 ^\nparse_error: Invalid cpulist"),
    ("CPU & CPUS{1-0}", errno.EINVAL, "               ^\nparse_error: Invalid cpulist"),
    ("CPU > CPUS{0}", errno.EINVAL, "       ^\nparse_error: Illegal operation for field type"),
    ("comm == CPUS{0}", errno.EINVAL, "         ^\nparse_error: Illegal operation for field type"),
    ("CPU & CPUS{0", errno.EINVAL, "            ^\nparse_error: Missing '}'"),
    ("CPU & CPUS 0", errno.EINVAL, "            ^\nparse_error: Missing '{'"),
    ("CPU & CPUS{0}x", errno.EPERM, "             ^\nparse_error: Too many terms in predicate expression"),
    ("CPU & cpus{0}", errno.EINVAL, "       ^\nparse_error: Invalid value (did you forget quotes)?"),
    (
        "zone_start <= 1 ; sync == 1",
        errno.EPERM,
        "                ^\nparse_error: Too many terms in predicate expression",
    ),
]


@pytest.mark.slow
@pytest.mark.parametrize(("source", "code", "text"), REFUSED)
def test_refused_as_a_kernel_does(source: str, code: int, text: str) -> None:
    with pytest.raises(FilterError) as refused:
        compile_filter(mm_compaction_begin, source, NR_CPUS)
    assert refused.value.errno == code
    assert refused.value.text == f"{source}\n{text}\n\n"


def test_and_binds_closer_than_or() -> None:
    source = "zone_start == 1 || migrate_pfn == 1 && free_pfn == 1"
    assert passes(source, 1, 0, 0)
    assert not passes(source, 0, 1, 0)
    assert passes(source, 0, 1, 1)


def test_who_hit_it() -> None:
    assert passes('comm == "bash" && cpu == 1 && common_pid == 42')
    assert passes('comm ~ "b*h" && comm != "sh"')
    assert not passes('comm ~ "b*x"')


def test_sets_of_cpus() -> None:
    assert [passes(f"CPU & CPUS{{{cpus}}}") for cpus in ("0", "1", "0-1", "N")] == [False, True, True, True]
    assert [passes(f"CPU == CPUS{{{cpus}}}") for cpus in ("0", "1", "0-1")] == [False, True, False]
    assert [passes(f"CPU != CPUS{{{cpus}}}") for cpus in ("0", "1", "0-1")] == [True, False, True]
    assert [passes("zone_start & CPUS{0-1}", number) for number in (0, 1, 2)] == [True, True, False]


def test_a_number_may_be_negative_where_the_field_is_signed() -> None:
    predicate = compile_filter(mm_compaction_finished, "order == -1", NR_CPUS)
    assert predicate((0, 0, -1, 4), BASH)
    assert not predicate((0, 0, 9, 4), BASH)


# Random expressions: a tree is written as a filter and, for Python's own parser, as an expression.

NAMES = ("zone_start", "migrate_pfn", "free_pfn")
OPS = ("==", "!=", "<", "<=", ">", ">=", "&")
terms = st.builds(
    lambda name, op, value: (f"{name} {op} {value}", f"bool({name} {op} {value})"),
    st.sampled_from(NAMES),
    st.sampled_from(OPS),
    st.integers(0, 3),
)
globs = st.builds(
    lambda pattern: (f'comm ~ "{pattern}"', f"matches({pattern!r})"), st.text(alphabet="ab*?sh", min_size=1, max_size=4)
)
expressions = st.recursive(
    terms | globs,
    lambda inner: (
        st.builds(lambda a, b: (f"({a[0]}) && ({b[0]})", f"(({a[1]}) and ({b[1]}))"), inner, inner)
        | st.builds(lambda a, b: (f"({a[0]}) || ({b[0]})", f"(({a[1]}) or ({b[1]}))"), inner, inner)
        | st.builds(lambda a: (f"!({a[0]})", f"(not ({a[1]}))"), inner)
    ),
    max_leaves=8,
)


@given(expressions, st.tuples(*[st.integers(0, 4)] * 3))
@pytest.mark.slow
def test_random_expressions(texts: tuple[str, str], values: tuple[int, int, int]) -> None:
    ours, python = texts
    known = dict(zip(NAMES, values, strict=True)) | {"matches": lambda p: fnmatch.fnmatchcase("bash", p), "bool": bool}
    assert passes(ours, *values) == eval(python, {"__builtins__": {}}, known)


@given(st.text(alphabet="zone_start sync&|!()=<>\"'~10", max_size=24))
def test_anything_is_a_filter_or_refused(source: str) -> None:
    with contextlib.suppress(FilterError):
        assert passes(source, 1, 2, 3) in (True, False)
