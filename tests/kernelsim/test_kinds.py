# SPDX-License-Identifier: GPL-2.0-only
"""Parsers of written text, against tables taken from a running 6.18 kernel (kernel-abi.md 1.1-1.3)."""

import errno

import pytest
from hypothesis import given
from hypothesis import strategies as st
from wiring import errno_of

from kernelsim.kinds import Bool, Choice, Flavour, Int, Kind, Size, Text, Trigger

SYSCTL_TAKEN = [  # vm.extfrag_threshold, 0..1000: bytes written, value, write(2) returns
    (b"7", 7, 1),
    (b"7\n", 7, 2),
    (b"  7  \n", 7, 6),
    (b"\t7\t\n", 7, 4),
    (b"7\n\n", 7, 3),
    (b"\n7", 7, 2),
    (b"0x10", 16, 4),
    (b"0X10", 16, 4),
    (b"010", 8, 3),
    (b"-0", 0, 2),
    (b"7 8", 7, 2),
    (b"7 abc", 7, 2),
    (b" " * 4094 + b"7", 7, 4095),
    (b"7" + b" " * 5000, 7, 5001),
    (b"00000000000000000007", 7, 20),
    (b"1000\n", 1000, 5),
]
SYSCTL_REFUSED = [
    b" ", b"\n", b"abc", b"-", b"--7", b"- 7", b"7-", b"0x", b"0b1", b"1.5", b"1e1", b"7abc", b"7,8", b"08",
    b"+7", b"7\r\n", b"7\0", b"7\0x", b"\v7\f", b" " * 4095 + b"7", b"000000000000000000007", b"-1", b"1001",
    b"2147483648", b"18446744073709551617", b"99999999999999999999",
]  # fmt: skip


@pytest.mark.parametrize(("data", "value", "nr_taken"), SYSCTL_TAKEN)
def test_sysctl_takes(data: bytes, value: int, nr_taken: int) -> None:
    assert Int(0, 1000).parse(data, Flavour.SYSCTL) == (value, nr_taken)


@pytest.mark.parametrize("data", SYSCTL_REFUSED)
def test_sysctl_refuses(data: bytes) -> None:
    assert refusal(Int(0, 1000), data, Flavour.SYSCTL) == errno.EINVAL


def test_sysctl_unsigned_long_takes_no_minus_sign() -> None:
    pages = Int(0, 2**63 - 1)
    assert pages.parse(b"5000000000\n", Flavour.SYSCTL) == (5_000_000_000, 11)
    assert refusal(pages, b"-0", Flavour.SYSCTL) == errno.EINVAL


@pytest.mark.parametrize(
    ("data", "sysfs", "debugfs"),
    [
        (b"7", 7, 7),
        (b"7\n", 7, 7),
        (b"+7\n", 7, 7),
        (b"010", 10, 8),
        (b"0x10", None, 16),
        (b"08", 8, None),
        (b"7\0junk", 7, 7),
        (b"7\n\n", None, None),
        (b" 7", None, None),
        (b"7 ", None, None),
        (b"-7", None, None),
        (b"-0", None, None),
        (b"", None, None),
        (b"\n", None, None),
        (b"Y", None, None),
        (b"99999999999999999999999", None, None),
    ],
)
def test_kstrto(data: bytes, sysfs: int | None, debugfs: int | None) -> None:
    for flavour, value in ((Flavour.SYSFS, sysfs), (Flavour.DEBUGFS, debugfs)):
        if value is None:
            assert refusal(Int(0, 1000), data, flavour) == errno.EINVAL
        else:
            assert Int(0, 1000).parse(data, flavour) == (value, len(data))


def test_signed_ranges_take_a_minus_sign_everywhere() -> None:
    for flavour in Flavour:
        assert Int(-5, 5).parse(b"-5\n", flavour)[0] == -5
        assert refusal(Int(-5, 5), b"-6\n", flavour) == errno.EINVAL


@pytest.mark.parametrize(
    ("data", "value"),
    [
        (b"4096", 4096),
        (b"64K\n", 65536),
        (b"3m", 3 << 20),
        (b"4G", 4 << 30),
        (b"0x10k", 16384),
        (b"1T", 1 << 40),
    ],
)
def test_size_has_suffixes(data: bytes, value: int) -> None:
    assert Size().parse(data, Flavour.CONFIGFS) == (value, len(data))


@pytest.mark.parametrize("data", [b"K", b"1 K", b"1KB", b"-1", b"1.5G", b"", b"4 G", b"9E", b"0b1"])
def test_size_refuses(data: bytes) -> None:
    assert refusal(Size(), data, Flavour.CONFIGFS) == errno.EINVAL


def test_choice_shows_brackets_and_takes_the_bare_word() -> None:
    choice = Choice("always", "madvise", "never")
    assert choice.format("madvise") == "always [madvise] never\n"
    assert choice.parse(b"never\n", Flavour.SYSFS) == ("never", 6)
    for data in (b"[never]", b"neve", b"never ", b"never\n\n", b"NEVER", b""):
        assert refusal(choice, data, Flavour.SYSFS) == errno.EINVAL


def test_text_loses_one_newline_and_ends_at_nul() -> None:
    assert Text().parse(b"func x +p\n\n", Flavour.DEBUGFS) == ("func x +p\n", 11)
    assert Text().parse(b"a\0b", Flavour.SYSFS) == ("a", 3)


@pytest.mark.parametrize("data", [b"1", b"0\n", b"x" * 5000, b"\0", b"\xff\xfe"])
def test_trigger_takes_anything(data: bytes) -> None:
    assert Trigger().parse(data, Flavour.SYSFS)[1] == len(data)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [Int(0, 1000), Int(-5, 5), Int(1, 2**63), Bool(), Size(), Choice("a", "b"), Text()])
@pytest.mark.parametrize("flavour", Flavour)
def test_samples_are_what_they_say(kind: Kind[object], flavour: Flavour) -> None:
    for text in kind.legal():
        assert kind.parse(text.encode(), flavour)[1] == len(text)
    for text in kind.illegal():
        assert refusal(kind, text.encode(), flavour) == errno.EINVAL, text


def test_empty_ranges_and_choices_are_refused() -> None:
    for make in (lambda: Int(1, 0), Choice, lambda: Choice("a", "a")):
        with pytest.raises(ValueError):  # noqa: PT011
            make()


@pytest.mark.parametrize(
    ("path", "flavour"),
    [
        ("/proc/sys/vm/swappiness", Flavour.SYSCTL),
        ("/proc/sysrq-trigger", Flavour.PROC),
        ("/proc/1/maps", Flavour.PROC),
        ("/sys/kernel/mm", Flavour.SYSFS),
        ("/sys/kernel/debug", Flavour.DEBUGFS),
        ("/sys/kernel/debugger", Flavour.SYSFS),
        ("/sys/kernel/config/x/y", Flavour.CONFIGFS),
        ("/dev/kmsg", Flavour.DEV),
        ("/", Flavour.DEV),
    ],
)
def test_flavour_follows_from_the_path(path: str, flavour: Flavour) -> None:
    assert Flavour.of(path) is flavour


TEXTS = st.text(" \t\n\v\r\0+-0178xXabKG,.", max_size=26).map(str.encode) | st.binary(max_size=30)


@pytest.mark.slow
@given(TEXTS)
def test_sysctl_grammar_is_the_kernels(data: bytes) -> None:
    """The regular expression against the kernel's steps, one after the other."""
    expected = sysctl_by_steps(data, 0, 1000)
    if expected is None:
        assert refusal(Int(0, 1000), data, Flavour.SYSCTL) == errno.EINVAL
    else:
        assert Int(0, 1000).parse(data, Flavour.SYSCTL) == expected


@given(
    TEXTS,
    st.sampled_from([Int(0, 1000), Int(-3, 3), Size(), Choice("a", "b"), Bool()]),
    st.sampled_from(Flavour),
)
def test_parsers_give_a_value_in_range_or_einval(data: bytes, kind: Kind[object], flavour: Flavour) -> None:
    number = refusal(kind, data, flavour)
    assert number in (0, errno.EINVAL)
    if not number:
        value, nr_taken = kind.parse(data, flavour)
        kind.check(value)
        assert 0 < nr_taken <= len(data)


def sysctl_by_steps(data: bytes, lo: int, hi: int) -> tuple[int, int] | None:
    """proc_dointvec_minmax as kernel-abi.md 1.1 tells it, steps (b) to (h)."""
    space = b"\t\n\v\f\r \xa0"
    window = data[:4095]
    rest = window.lstrip(space)
    number = rest[1:] if rest[:1] == b"-" else rest
    digits, allowed, base = number, b"0123456789", 10
    if number[:2].lower() == b"0x" and number[2:3] and number[2:3] in b"0123456789abcdefABCDEF":
        digits, allowed, base = number[2:], b"0123456789abcdefABCDEF", 16
    elif number[:1] == b"0":
        allowed, base = b"01234567", 8
    after = digits.lstrip(allowed)
    spelled = digits[: len(digits) - len(after)]
    nr_number_bytes = len(rest) - len(after)
    if not spelled or nr_number_bytes > 20 or (after and after[:1] not in (b" ", b"\t", b"\n")):
        return None
    value = int(spelled, base) * (-1 if rest[:1] == b"-" else 1)
    if not lo <= value <= hi:
        return None
    return value, len(data) - len(after.lstrip(space))


def refusal(kind: Kind[object], data: bytes, flavour: Flavour) -> int:
    return errno_of(kind.parse, data, flavour)
