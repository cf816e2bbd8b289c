# SPDX-License-Identifier: GPL-2.0-only
"""What is fuzzed: targets, and the worlds that they open."""

import errno
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Protocol

from dpud.fuzz.mutate import Mutator

Place = tuple[str, int]
"""File and line."""


class World(Protocol):
    """Takes inputs, one after the other."""

    def draw(self, chance: Random) -> bytes:
        """The next input."""
        ...

    def run(self, data: bytes) -> str:
        """How it ended: `ok`, or the name of what refused it. Any exception is a crash."""
        ...

    def check(self) -> Iterator[None]:
        """Raises AssertionError where an invariant is violated. What it does between two yields has to be quick."""
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Target:
    """One thing that takes input. `open` is given a seed."""

    name: str
    about: str
    open: Callable[[int], World]
    life: int = 0
    """So many inputs to one world, which depend on each other; 0: each stands alone."""
    share: int = 1
    """Of the inputs of a run."""
    modules: Sequence[str] = field(default=())
    """Whose code atheris looks at; none: it is not used."""


class Parser:
    """The World of a function of bytes. `refusals` are the errors that it documents."""

    def __init__(
        self,
        parse: Callable[[bytes], object],
        refusals: type[Exception] | tuple[type[Exception], ...],
        mutator: Mutator,
    ) -> None:
        self.parse, self.refusals, self.mutator = parse, refusals, mutator
        self._known: set[tuple[str, Place]] = set()

    def draw(self, chance: Random) -> bytes:
        return self.mutator.draw(chance)

    def run(self, data: bytes) -> str:
        try:
            self.parse(data)
        except self.refusals as refusal:
            name = name_of(refusal)
            self._keep(name, place_of(refusal), data)
            return name
        self._keep("ok", ("", 0), data)
        return "ok"

    def _keep(self, name: str, place: Place, data: bytes) -> None:
        """An input that ends in a new way is worth being mutated further."""
        if (name, place) not in self._known:
            self._known.add((name, place))
            self.mutator.keep(data)

    def check(self) -> Iterator[None]:
        yield from ()

    def close(self) -> None:
        pass


def name_of(refusal: Exception) -> str:
    """`EINVAL`, or the class of an error without a number."""
    if isinstance(refusal, OSError) and refusal.errno:
        return errno.errorcode.get(refusal.errno, str(refusal.errno))
    return type(refusal).__name__


def place_of(problem: BaseException) -> Place:
    """Where it was raised."""
    frame = problem.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return (frame.tb_frame.f_code.co_filename, frame.tb_lineno) if frame is not None else ("", 0)


def kind_of(problem: BaseException) -> str:
    """By which two crashes are held to be the same: `KeyError in dpud/config.py parse_size`, innermost of our code."""
    ours = [frame for frame in traceback.extract_tb(problem.__traceback__) if _is_ours(frame.filename)]
    if not ours:
        return type(problem).__name__
    parts = ours[-1].filename.split("/")
    return f"{type(problem).__name__} in {'/'.join(parts[-2:])} {ours[-1].name}"


def _is_ours(filename: str) -> bool:
    return any(f"/{package}/" in filename for package in ("kernelsim", "fs", "dpud")) and "/dpud/fuzz/" not in filename
