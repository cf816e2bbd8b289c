# SPDX-License-Identifier: GPL-2.0-only
"""Loops come from numba's cache without its compiler, which is there as soon as something has to be compiled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LOOPS = """
import math
import numpy as np
from kernelsim.jit import njit, njit_alloc

@njit
def total(values):
    found = 0.0
    for value in values:
        found += math.sin(value) ** 2 + math.cos(value) ** 2
    return round(found)

@njit_alloc
def doubled(values):
    return np.concatenate((values, values))[::-1]

@njit
def ratio(a, b):
    return a // b

@njit
def never_called(values):
    return values.sum()
"""

PROGRAM = """
import gc, os, sys
import numpy as np
from dpud import startup
with startup.quick():
    import loops
called = loops.total, loops.doubled, loops.ratio
print(loops.total(np.arange(1000.0)), float(loops.doubled(np.arange(5.0))[0]))
try:
    loops.ratio(1, 0)
except ZeroDivisionError:
    print("as Python divides")
print([sum(loop.stats.cache_hits.values()) for loop in called])
print("compiler" if "numba.np.arraymath" in sys.modules else "no compiler", gc.isenabled())
print(*sorted(name.split("-")[0] for name in os.listdir(called[0].stats.cache_path) if name.endswith(".nbi")))
"""


def run(folder: Path) -> list[str]:
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(folder)!r})\n{PROGRAM}"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_the_compiler_is_for_what_is_not_in_the_cache(tmp_path: Path) -> None:
    (tmp_path / "loops.py").write_text(LOOPS)
    results = ["1000 4.0", "as Python divides"]
    kept = "loops.doubled loops.ratio loops.total"
    assert run(tmp_path) == [*results, "[0, 0, 0]", "compiler True", kept]
    assert run(tmp_path) == [*results, "[1, 1, 1]", "no compiler True", kept]
    (tmp_path / "loops.py").write_text(LOOPS + "\n# another source\n")
    assert run(tmp_path) == [*results, "[0, 0, 0]", "compiler True", kept]


def test_all_can_look_for_their_files_before_nothing_may_be_written_any_more(tmp_path: Path) -> None:
    (tmp_path / "loops.py").write_text(LOOPS)
    program = """
import os
from dpud import startup
from dpud.fuzz.sandbox import confine
with startup.quick():
    import loops
startup.find_stored()
os.mkdir("inside")
confine("inside")
print(loops.never_called.stats.cache_path.startswith(os.environ["NUMBA_CACHE_DIR"]))
"""
    (tmp_path / "program.py").write_text(f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n{program}")
    environment = os.environ | {
        "NUMBA_CACHE_DIR": str(tmp_path / "cache"),
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    done = subprocess.run(
        [sys.executable, "program.py"], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")
