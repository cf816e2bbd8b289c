# SPDX-License-Identifier: GPL-2.0-only
"""Which program a host means by the name of a DPU binary: no DPU instruction can run here, so a binary is Python.

In this order, `load("build/checksum_dpu")` takes
  - the program that was registered under that name: `register("build/checksum_dpu", Checksum)`, or as a decorator
  - `dpu_compact`, which comes with dpud
  - a file of that name that holds Python source with one `Program` in it (tasklet.py), so that the host's code stays as
    it is. An ELF file is ELF_INVALID_FILE, no file ELF_NO_SUCH_FILE.
"""

import runpy
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar, overload

from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.program import DPU_COMPACT
from dpud.dpu.rank import DpuProgram
from dpud.dpu.tasklet import Binary, Program

_P = TypeVar("_P", bound=type[Program])
_ELF_MAGIC = b"\x7fELF"
_registered: dict[str, DpuProgram] = {DPU_COMPACT.name: DPU_COMPACT}


@overload
def register(name: str, program: _P) -> _P: ...
@overload
def register(name: str) -> Callable[[_P], _P]: ...
def register(name: str, program: _P | None = None) -> _P | Callable[[_P], _P]:
    """Make `load(name)` mean that program; one registered before under the name is forgotten."""

    def decorate(program: _P) -> _P:
        _registered[name] = Binary(program)
        return program

    return decorate if program is None else decorate(program)


def find_program(name: str) -> DpuProgram:
    """The program behind a name; DpuError(ELF_NO_SUCH_FILE, ELF_INVALID_FILE), with a note that says why."""
    if name in _registered:
        return _registered[name]
    path = Path(name)
    try:
        head = path.read_bytes()[: len(_ELF_MAGIC)]
    except OSError as problem:
        raise _refused(DpuErr.ELF_NO_SUCH_FILE, f"{name}: {problem.strerror}, nor was it registered") from None
    if head == _ELF_MAGIC:
        raise _refused(DpuErr.ELF_INVALID_FILE, f"{name}: DPU instructions cannot run here, only Python programs")
    return _from_source(path)


def _from_source(path: Path) -> DpuProgram:
    try:
        found = runpy.run_path(str(path), run_name="dpu_program")
    except (SyntaxError, ValueError) as problem:
        raise _refused(DpuErr.ELF_INVALID_FILE, f"{path}: {problem}") from None
    programs = [
        value
        for value in found.values()
        if isinstance(value, type) and issubclass(value, Program) and value.__module__ == "dpu_program"
    ]
    if len(programs) != 1:
        raise _refused(DpuErr.ELF_INVALID_FILE, f"{path}: holds {len(programs)} programs instead of one")
    return Binary(programs[0])


def _refused(code: DpuErr, why: str) -> DpuError:
    error = DpuError(code)
    error.add_note(why)
    return error
