# SPDX-License-Identifier: GPL-2.0-only
"""Loaded before every test module, and so before numba: `dpud` picks the folder of its compiled loops.

tests/ has folders of the packages' names, which pytest puts on the import path. The packages themselves are
imported here, from the repository, so that a folder of tests is never taken for one of them.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import hypothesis
import pytest

import dpud
import fs
import kernelsim

assert all(package.__file__ for package in (dpud, fs, kernelsim)), "a test folder stands for a package"

# No timing decides a test: the first call of a loop may have to compile it.
hypothesis.settings.register_profile("dpud", deadline=None)
hypothesis.settings.load_profile("dpud")


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in its own
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With pytest-xdist: a file's tests stay together, for they share a daemon, and those that watch or change the
    host's own memory (marked `host`) come one after another."""
    hosts = {item.path for item in items if item.get_closest_marker("host")}
    for item in items:
        item.add_marker(pytest.mark.xdist_group("host" if item.path in hosts else str(item.path)))
