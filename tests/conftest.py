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
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

import dpud
import fs
import kernelsim

assert all(package.__file__ for package in (dpud, fs, kernelsim)), "a test folder stands for a package"

# No timing decides a test: the first call of a loop may have to compile it.
hypothesis.settings.register_profile("dpud", deadline=None)
# What lands is not up to a draw: `make test` tries the same examples every time, plain `pytest` others every time.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("dpud")


class OneWorkerPerFile(LoadScopeScheduling):  # type: ignore[misc]
    """A file's tests stay together, for they share a daemon, and the files with tests that watch or change the host's
    own memory (marked `host`) come one after another. (xdist's own groups do nothing under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return "host" if "pytest.mark.host" in (self.config.rootpath / file).read_text() else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneWorkerPerFile:
    return OneWorkerPerFile(config, log)
