# SPDX-License-Identifier: GPL-2.0-only
"""The generated tests, on the toy registry, and a check that they catch faults."""

import pytest
from toy import Toy
from wiring import Case, wiring_cases

from kernelsim.attr import Attr, Flavour, Int, Kobject, Operation, Registry

TOY = Toy()


@pytest.mark.parametrize("case", [c for c in wiring_cases(TOY.registry) if "broken" not in c.path], ids=str)
def test_toy(case: Case) -> None:
    case.run()


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
