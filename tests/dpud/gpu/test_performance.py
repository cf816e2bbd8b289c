# SPDX-License-Identifier: GPL-2.0-only
"""The log as the description has it: a level from the environment, lines to grep for `Performance`."""

import os
import re
import subprocess
import sys

import pytest

PROGRAM = """
from dpud.gpu import facade
facade.init_swap_system(1 << 20, 4096, 0.8)
pointer = facade.allocate_gpu_memory(2 << 20)
facade.write_memory(pointer, bytes(range(256)) * 8192)
facade.read_memory(pointer, 2 << 20)
"""


def logged(level: str | None) -> list[str]:
    env = {name: value for name, value in os.environ.items() if name != "MEMORY_VIRT_LOG_LEVEL"}
    env |= {} if level is None else {"MEMORY_VIRT_LOG_LEVEL": level}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout) == (0, "")
    return done.stderr.splitlines()


@pytest.mark.slow
def test_performance_lines_are_logged_where_asked_for() -> None:
    lines = logged("INFO")
    pattern = r".* INFO dpud\\.gpu\\.\w+: Performance (evict|bring in) device0: \d+ bytes in \d+ us, \d+ MB/s".replace(
        "\\\\", "\\"
    )
    found = [re.fullmatch(pattern, line) for line in lines]
    assert {match[1] for match in found if match} == {"evict", "bring in"}
    assert logged(None) == logged("nonsense") == logged("WARNING") == []
