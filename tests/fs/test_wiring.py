# SPDX-License-Identifier: GPL-2.0-only
"""The generated tests, on the toy registry, and a check that they catch faults."""

import traceback

import pytest
from toy import Toy
from wiring import run_all, wiring_cases

from kernelsim.attr import Attr, Flavour, Int, Kobject, Operation, Registry


def test_toy() -> None:
    run_all(case for case in wiring_cases(Toy().registry) if "broken" not in case.path)


class _Deaf(Attr[int]):
    """Takes no value."""

    def __set__(self, kobj: Kobject, value: int) -> None:
        pass


class _Careless(Int):
    """Takes any value."""

    def check(self, value: int) -> None:
        pass


class _Partial(Attr[int]):
    """Stores before it looks."""

    def write_text(self, kobj: Kobject, data: bytes, flavour: Flavour) -> Operation[int]:
        self.__set__(kobj, 9)
        return (yield from super().write_text(kobj, data, flavour))


@pytest.mark.parametrize(
    ("attr", "what"),
    [
        (_Deaf(Int(0, 9), 5, doc=""), "takes"),
        (Attr(_Careless(0, 9), 5, doc=""), "refuses"),
        (_Partial(Int(0, 9), 5, doc=""), "refuses"),
    ],
    ids=["deaf", "careless", "partial"],
)
def test_a_fault_is_caught(attr: Attr[int], what: str) -> None:
    registry = Registry()
    registry.add("/sys/x", type("Faulty", (Kobject,), {"knob": attr})())
    caught = 0
    for case in wiring_cases(registry):
        if case.what.startswith(what):
            try:
                case.run()
            except (AssertionError, pytest.fail.Exception):
                caught += 1
    assert caught


def test_a_failure_names_all_that_failed() -> None:
    class Mixed(Kobject):
        deaf = _Deaf(Int(0, 9), 5, doc="")
        good = Attr(Int(0, 9), 5, doc="")
        careless = Attr(_Careless(0, 9), 5, doc="")

    registry = Registry()
    registry.add("/sys/x", Mixed())
    with pytest.raises(ExceptionGroup) as failure:
        run_all(wiring_cases(registry))
    text = "".join(traceback.format_exception(failure.value))
    assert "/sys/x/deaf-takes" in text
    assert "/sys/x/careless-refuses" in text
    assert "/sys/x/good" not in text


def test_a_check_of_nothing_fails() -> None:
    with pytest.raises(AssertionError, match="nothing"):
        run_all([])
