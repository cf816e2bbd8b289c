# SPDX-License-Identifier: GPL-2.0-only
"""Permissions against the kernel's and the processor's: the same mmap and mprotect calls in a real child process."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from effort import examples
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small import MIB, attempt, small_memory

from dpud.gpu.address_space.permissions import EXECUTE, READ, WRITE, Permission

NR_PAGES = 8
PAGE = 4096

CHILD = r"""
import ctypes, os, sys
libc = ctypes.CDLL(None, use_errno=True)
libc.mmap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
nr_pages, page = 8, 4096
for line in sys.stdin:
    ops = [tuple(map(int, op.split(","))) for op in line.split()]
    base = libc.mmap(None, nr_pages * page, 3, 0x22, -1, 0)
    ctypes.memset(base, 0xC3, nr_pages * page)  # `ret`, all over
    for first, end, bits in ops:
        assert libc.mprotect(base + first * page, (end - first) * page, bits) == 0, os.strerror(ctypes.get_errno())
    matrix = []
    for number in range(nr_pages):
        at = base + number * page
        for kind in "rwx":
            pid = os.fork()
            if pid == 0:
                if kind == "r":
                    ctypes.c_char.from_address(at).value
                elif kind == "w":
                    ctypes.memset(at, 0xC3, 1)
                else:
                    ctypes.CFUNCTYPE(None)(at)()
                os._exit(0)
            status = os.waitpid(pid, 0)[1]
            assert status == 0 or os.WTERMSIG(status) == 11, status
            matrix.append("1" if status == 0 else "0")
    libc.mprotect(base, nr_pages * page, 3)
    libc.munmap(ctypes.c_void_p(base), nr_pages * page)
    print("".join(matrix), flush=True)
"""


def has_protection_keys() -> bool:
    """Without them execute-only memory can be read, and nothing can be done about it."""
    return " ospke" in Path("/proc/cpuinfo").read_text()


RIGHTS = [Permission(bits) for bits in range(8) if bits != EXECUTE or has_protection_keys()]
"""PROT_READ is 1, PROT_WRITE 2 and PROT_EXEC 4."""
OPS = st.lists(st.tuples(st.integers(0, NR_PAGES - 1), st.integers(1, NR_PAGES), st.sampled_from(RIGHTS)), max_size=6)


@pytest.fixture(scope="module")
def child() -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield process


def prot(bits: Permission) -> int:
    return (1 if bits & READ else 0) | (2 if bits & WRITE else 0) | (4 if bits & EXECUTE else 0)


@pytest.mark.slow
@pytest.mark.host
@settings(max_examples=examples(40), deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ops=OPS)
def test_the_matrix_is_that_of_a_real_process(
    child: "subprocess.Popen[str]", ops: list[tuple[int, int, Permission]]
) -> None:
    memory = small_memory(MIB)
    va = memory.allocate("a", NR_PAGES * PAGE)
    spans = [(first, max(end, first + 1), bits) for first, end, bits in ops]
    for first, end, bits in spans:
        memory.protect("a", va + first * PAGE, (end - first) * PAGE, bits)
    ours = [
        "0" if attempt(memory.access, "a", va + number * PAGE, wanted) else "1"
        for number in range(NR_PAGES)
        for wanted in (READ, WRITE, EXECUTE)
    ]
    assert child.stdin is not None
    assert child.stdout is not None
    child.stdin.write(" ".join(f"{first},{end},{prot(bits)}" for first, end, bits in spans) + "\n")
    child.stdin.flush()
    assert "".join(ours) == child.stdout.readline().strip()
