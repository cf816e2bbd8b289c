# SPDX-License-Identifier: GPL-2.0-only
"""The shape of the code: who may import whom, how long a function or a file may grow, licence lines."""

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from wiring import for_each

ROOT = Path(__file__).parent.parent
PACKAGES = ("kernelsim", "fs", "dpud")
MAX_FUNCTION_LINES = 60
MAX_FILE_LINES = 500

CORE_MAY_IMPORT = """
    __future__ abc bisect collections collections.abc contextlib dataclasses enum errno functools hashlib heapq
    itertools math operator re struct typing zlib
    dis fnmatch llvmlite numba numba.core numba.extending numpy numpy.typing types
"""
MAY_IMPORT = {
    "kernelsim/attr.py": tuple(
        f"kernelsim.{name}" for name in ("attr_check", "attr_hooks", "attr_node", "kinds", "operation", "wait")
    ),
    "kernelsim/attr_check.py": ("kernelsim.attr", "kernelsim.kinds"),
    "kernelsim/attr_hooks.py": ("kernelsim.attr", "kernelsim.attr_node", "kernelsim.wait"),
    "kernelsim/attr_node.py": ("kernelsim.attr", "kernelsim.kinds"),
    "kernelsim/kinds.py": (),
    "kernelsim/operation.py": ("kernelsim.wait",),
    "kernelsim/wait.py": (),
    "kernelsim": ("kernelsim",),
    "fs": (
        "fs",
        *(f"kernelsim.{name}" for name in ("attr", "kinds", "operation", "jit", "raw_memory", "seq_counters")),
    ),
    "dpud/gpu": (
        "dpud.gpu",
        "dpud.errors",
        *(f"kernelsim.{name}" for name in ("attr", "fault_inject", "kinds", "operation", "wait", "jit")),
    ),
    "dpud": ("dpud", "fs", "kernelsim"),
}
"""Of our own modules, by file or package; the first that fits counts."""


def sources(*folders: str) -> list[Path]:
    return sorted(path.relative_to(ROOT) for folder in folders for path in (ROOT / folder).rglob("*.py"))


@cache
def text_of(path: Path) -> str:
    return (ROOT / path).read_text()


@cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(text_of(path))


def imports(path: Path) -> Iterator[str]:
    """Dotted name of everything that a module imports, anywhere in it."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            assert node.module is not None
            own = node.module in PACKAGES  # `from kernelsim import page` imports kernelsim.page
            yield from (f"{node.module}.{alias.name}" for alias in node.names) if own else (node.module,)


def is_ours(module: str) -> bool:
    return module.split(".")[0] in PACKAGES


def test_there_is_something_to_look_at() -> None:
    assert len(sources(*PACKAGES)) > 10
    assert set(imports(Path("dpud/owner.py"))) >= {"errno", "threading", "collections.abc"}


@pytest.mark.slow
def test_import_direction() -> None:
    for_each(sources(*PACKAGES), check_imports)


def check_imports(path: Path) -> None:
    allowed = next(rule for part, rule in MAY_IMPORT.items() if path.is_relative_to(part))
    wrong = {
        module
        for module in imports(path)
        if is_ours(module) and not any(module == name or module.startswith(f"{name}.") for name in allowed)
    }
    assert not wrong


def test_the_core_is_pure() -> None:
    foreign = {(str(path), module) for path in sources("kernelsim") for module in imports(path) if not is_ours(module)}
    assert {module for _, module in foreign} >= {"numpy", "errno"}
    assert [(path, module) for path, module in foreign if module not in CORE_MAY_IMPORT.split()] == []


@pytest.mark.slow
def test_one_module_imports_the_fuse_library() -> None:
    """And none outside fs/ does."""
    likely = [path for path in sources(*PACKAGES) if re.search(r"^\s*(import|from)\s+m?fuse", text_of(path), re.M)]
    users = [str(path) for path in likely if {"fuse", "mfusepy"} & set(imports(path))]
    assert users == ["fs/fuse_ops.py"]


@pytest.mark.slow
def test_no_parallel_loops() -> None:
    """numba's own thread pool is not safe under our threads."""
    pattern = re.compile(r"parallel\s*=\s*True|\bprange\s*\(")
    likely = [path for path in sources(*PACKAGES) if pattern.search(text_of(path))]
    assert not [path for path in likely if pattern.search(code_of(path))]


def code_of(path: Path) -> str:
    """A module without its docstrings and comments."""
    return ast.unparse(without_docstrings(ast.parse(text_of(path))))


def without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [item for item in body if not is_text(item)] or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)


@pytest.mark.slow
def test_spdx_line_comes_first() -> None:
    for_each(sources(*PACKAGES, "tests"), check_licence)


def check_licence(path: Path) -> None:
    licence = "MIT" if path.is_relative_to("dpud/gpu") else "GPL-2.0-only"
    first = text_of(path).split("\n", 2)
    line = first[1] if first[0].startswith("#!") else first[0]
    assert line == f"# SPDX-License-Identifier: {licence}"


@pytest.mark.slow
def test_files_and_functions_stay_readable() -> None:
    for_each(sources(*PACKAGES, "tests"), check_lengths)


def check_lengths(path: Path) -> None:
    assert text_of(path).count("\n") <= MAX_FILE_LINES
    long = {
        node.name: length
        for node in ast.walk(tree_of(path))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (length := (node.end_lineno or 0) - node.lineno + 1) > MAX_FUNCTION_LINES
    }
    assert not long
