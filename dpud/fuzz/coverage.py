# SPDX-License-Identifier: GPL-2.0-only
"""Inputs chosen by what code they reach: atheris, which puts libFuzzer behind Python functions.

The functions of a target's modules are instrumented in place, in this process only; it is a child that ends with its
batch. Half of the mutations are libFuzzer's, half ours. atheris comes with the `dev` extra, where there is a wheel.
"""

import importlib
import inspect
import logging
import os
import time
from collections.abc import Iterator
from importlib.util import find_spec
from random import Random
from types import FunctionType, ModuleType
from typing import Any, NoReturn

from dpud.fuzz.child import Child
from dpud.fuzz.live import Life, watched
from dpud.fuzz.mutate import MAX_BYTES
from dpud.fuzz.target import Parser

_LONG_BYTES = 4096
"""An input may be so long, or twice as long as a seed."""


def is_there() -> bool:
    return find_spec("atheris") is not None


def explore(child: Child) -> NoReturn:
    """As live.live, in a child; libFuzzer never returns, so the process ends here."""
    import atheris

    target = child.target
    for module in target.modules:
        for function in functions_of(importlib.import_module(module)):
            atheris.instrument_func(function)
    begin_ns = time.process_time_ns()
    life = Life(target, child.seed)
    assert isinstance(life.world, Parser), "a pure function"
    mutator = life.world.mutator
    logging.getLogger().addHandler(life.logged)

    def one(data: bytes) -> None:
        child.box.put(life.batch.nr_inputs, data)
        if life.give(data) is None and life.batch.nr_inputs < child.nr:
            return
        batch = life.end()
        batch.cpu_ns = time.process_time_ns() - begin_ns
        child.finish(batch)
        os._exit(0)

    def mutate(data: bytes, max_size: int, chance_seed: int) -> bytes:
        if chance_seed & 1:
            return bytes(atheris.Mutate(data, max_size))
        return mutator.mutated(data, Random(chance_seed))[:max_size]

    os.mkdir("seeds")
    for number, data in enumerate(mutator.pool):
        with open(f"seeds/{number}", "wb") as file:
            file.write(data)
    longest = min(MAX_BYTES, max(_LONG_BYTES, *(2 * len(data) for data in mutator.pool)))
    options = [f"-seed={child.seed % (1 << 31) + 1}", f"-max_len={longest}", "-timeout=600", "-rss_limit_mb=0"]
    with watched(lambda: life.nr_steps):
        atheris.Setup(["dpud", *options, "-verbosity=0", "-print_final_stats=0", "seeds"], one, custom_mutator=mutate)
        atheris.Fuzz()
    os._exit(1)


def functions_of(module: ModuleType) -> Iterator[Any]:
    """Those that a module defines, and the methods of its classes."""
    for found in vars(module).values():
        if isinstance(found, FunctionType) and found.__module__ == module.__name__:
            yield found
        elif inspect.isclass(found) and found.__module__ == module.__name__:
            yield from (each for each in vars(found).values() if isinstance(each, FunctionType))
