# SPDX-License-Identifier: GPL-2.0-only
"""A test that hangs fails, and says where; without this, whoever runs all of them would be told of a time limit.

When a test takes too long, what each program that it started is doing goes into its report, and these are aborted: a
call into a mount whose daemon hangs cannot be interrupted, but ends with the daemon. Then the test fails. A little
earlier, pytest's own `faulthandler_timeout` says where the test itself is.
"""

import os
import signal
import threading
from collections.abc import Generator, Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

LIMIT_S = 1200

# A program in Python that is aborted says where each of its threads was.
os.environ["PYTHONFAULTHANDLER"] = "1"


class Watchdog:
    """Over the tests of this process, one at a time."""

    def __init__(self, limit_s: float = LIMIT_S) -> None:
        self._limit_s = limit_s
        self._seen: list[str] = []

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self) -> Generator[None, object, object]:
        timer = threading.Timer(self._limit_s, self._bark)
        timer.daemon = True
        before = signal.signal(signal.SIGALRM, self._fail)
        timer.start()
        try:
            return (yield)
        finally:
            timer.cancel()
            signal.signal(signal.SIGALRM, before)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, pytest.TestReport, pytest.TestReport]:
        report = yield
        if self._seen:
            report.sections.append(("programs that it had started", "\n".join(self._seen)))
            self._seen = []
        return report

    def _bark(self) -> None:
        """In a thread of its own."""
        started = psutil.Process().children(recursive=True)
        self._seen = [line for process in started for line in _doing(process.pid)]
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGALRM)
        for process in started:
            with suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGABRT)

    def _fail(self, _signum: int, _frame: object) -> None:
        pytest.fail(f"it has hung for {self._limit_s} s")


def _doing(pid: int) -> Iterator[str]:
    """A line for the process, and one for each of its threads."""
    try:
        yield f"{pid} {Path(f'/proc/{pid}/cmdline').read_bytes().replace(bytes(1), b' ').decode(errors='replace')}"
        for task in sorted(Path(f"/proc/{pid}/task").iterdir()):
            words = (task / "stat").read_text().rpartition(")")[2].split()
            yield f"  {task.name} {words[0]} {(task / 'wchan').read_text()}: {(task / 'syscall').read_text().strip()}"
    except OSError as error:
        yield f"  {error}"
