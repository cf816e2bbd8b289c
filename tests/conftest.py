# SPDX-License-Identifier: GPL-2.0-only
"""Loaded before every test module, and so before numba: `dpud` picks the folder of its compiled loops.

tests/ has folders of the packages' names, which pytest puts on the import path. The packages themselves are
imported here, from the repository, so that a folder of tests is never taken for one of them.
"""

import signal
import sys
from collections.abc import Generator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import hypothesis
import pytest
from effort import QUICK
from watchdog import Watchdog
from xdist.scheduler import LoadScopeScheduling  # type: ignore[import-untyped]

import dpud
import fs
import kernelsim
from dpud import startup

assert all(package.__file__ for package in (dpud, fs, kernelsim)), "a test folder stands for a package"

pytest.register_assert_rewrite("wiring")  # which has asserts and is not a test module

# No timing decides a test: the first call of a loop may have to compile it.
hypothesis.settings.register_profile("dpud", deadline=None)
# What lands is not up to a draw: `make test` tries the same examples every time, plain `pytest` others every time.
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.register_profile("quick", deadline=None, max_examples=QUICK)

# Who runs the tests with nohup, or behind `&` in a script, has signals ignored, and programs inherit that: a shell's
# `trap` would never hear of one that a test sends.
for signum, handler in ((signal.SIGHUP, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
    if signal.getsignal(signum) is signal.SIG_IGN:
        signal.signal(signum, handler)

# Plain `pytest` is run again and again: the tests' bytecode is kept, whatever is done with other code's.
sys.dont_write_bytecode = False


def pytest_configure(config: pytest.Config) -> None:
    # Tests made from examples have fewer of them in the inner loop, which is what is run without a choice (-m).
    if config.getoption("--hypothesis-profile") is None:
        is_inner_loop = config.getoption("-m") in config.getini("addopts")
        hypothesis.settings.load_profile("quick" if is_inner_loop else "dpud")
    config.pluginmanager.register(Watchdog())


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """The tests' imports, as the daemon does its own."""
    with startup.quick():
        return (yield)


class OneWorkerPerFile(LoadScopeScheduling):  # type: ignore[misc]
    """A file's tests stay together, for they share a daemon, and the files with tests that watch or change the host's
    own memory (marked `host`) come one after another. (xdist's own groups do nothing under pytest 9.2.)"""

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.split("::", 1)[0]
        return "host" if "pytest.mark.host" in (self.config.rootpath / file).read_text() else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: object) -> OneWorkerPerFile:
    return OneWorkerPerFile(config, log)
