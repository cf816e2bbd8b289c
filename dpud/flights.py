# SPDX-License-Identifier: GPL-2.0-only
"""Operations that are under way, and whether the machine is at rest: nothing is, but what can be begun again.

A generator cannot be written down. A machine whose state is written down must have none in which something is half
done. Two kinds may be under way all the same:

    what runs in the background as long as there is a daemon, where it waits for its next round: at the one yield of
    its own loop, to which a new one comes too;
    who only reads and waits for something to come. It is put off: ended where it is, as by a signal, and begun again by
    its own thread when it wakes up. Its reader sees nothing of that (as with the kernel's freezer and ERESTARTSYS).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

from fs import requests
from fs.requests import Request
from kernelsim.attr import Operation, Waitable

_READS = (requests.READ, requests.READ_STREAM)
Position = tuple[tuple[str, int], ...]
"""Name and instruction, from the outside in."""


@dataclass
class Flight:
    """One operation. `what` it was asked as; None in the background."""

    operation: Operation[Any]
    what: Any = None
    waits_for: Waitable | None = None
    lasts: bool = False
    """It runs in the background as long as there is a daemon."""

    @property
    def can_be_put_off(self) -> bool:
        return isinstance(self.what, Request) and self.what.verb in _READS and self.waits_for is not None

    @property
    def is_at_rest(self) -> bool:
        return self.lasts and self.waits_for is not None and len(position(self.operation)) == 1

    def __str__(self) -> str:
        if isinstance(self.what, Request):
            return f"{self.what.verb} {self.what.path}"
        return str(getattr(self.operation, "__name__", "an operation"))


def position(operation: Operation[Any]) -> Position:
    """Where a waiting operation stands, in all that it waits in."""
    return tuple(_frames(operation))


def _frames(operation: Any) -> Iterator[tuple[str, int]]:
    while isinstance(operation, GeneratorType) and operation.gi_frame is not None:
        yield operation.gi_code.co_qualname, operation.gi_frame.f_lasti
        operation = operation.gi_yieldfrom


class Flights:
    """Those of one owner, by number. For whoever holds the machine."""

    def __init__(self) -> None:
        self.by_number: dict[int, Flight] = {}
        self.put_off: set[int] = set()
        """Numbers of those that were ended and whose threads will begin them again."""

    def begin(self, number: int, operation: Operation[Any], what: Any = None, waits_for: Any = None) -> Flight:
        flight = self.by_number[number] = Flight(operation, what, waits_for)
        return flight

    def went_on(self, number: int, waits_for: Waitable | None) -> None:
        """It had a slice more."""
        flight = self.by_number.get(number)
        if flight is not None:
            flight.waits_for = waits_for

    def last(self) -> None:
        """What is under way now lasts."""
        for flight in self.by_number.values():
            flight.lasts = True

    def lasting(self) -> dict[int, Position]:
        """Where each of those stands that last."""
        return {number: position(flight.operation) for number, flight in self.by_number.items() if flight.lasts}

    def end(self, number: int) -> None:
        self.by_number.pop(number, None)

    def in_the_way(self) -> Flight | None:
        """Somebody who keeps the machine from being at rest."""
        return next((f for f in self.by_number.values() if not (f.can_be_put_off or f.is_at_rest)), None)

    def readers(self) -> list[int]:
        """Numbers of those that can be put off."""
        return [number for number, flight in self.by_number.items() if flight.can_be_put_off]
