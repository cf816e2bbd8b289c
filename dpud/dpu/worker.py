# SPDX-License-Identifier: GPL-2.0-only
"""The thread behind a rank: it runs the rank's asynchronous jobs, in order (nrJobsPerRank, dpu.md 1.2)."""

import threading
from collections import deque
from collections.abc import Callable

NR_JOBS_PER_RANK = 16


class Worker:
    """Runs jobs one after the other on a daemon thread, which the first job starts.

    At most `nr_jobs` of them wait; who puts one more waits for a place. Jobs deal with their own errors.
    """

    def __init__(self, name: str, nr_jobs: int = NR_JOBS_PER_RANK) -> None:
        self._name = name
        self._nr_jobs = nr_jobs
        self._thread: threading.Thread | None = None
        self._changed = threading.Condition()
        self._jobs: deque[Callable[[], object]] = deque()
        self._busy = False
        self._closing = False

    @property
    def started(self) -> bool:
        """Is there a thread?"""
        return self._thread is not None

    @property
    def idle(self) -> bool:
        """Is no job queued or running?"""
        return not self._jobs and not self._busy

    def put(self, job: Callable[[], object]) -> None:
        """Queue a job; a job that queues another does not wait for a place."""
        with self._changed:
            if self._thread is not threading.current_thread():
                self._changed.wait_for(lambda: len(self._jobs) < self._nr_jobs)
            self._jobs.append(job)
            self._changed.notify_all()
            if self._thread is None:
                self._start()

    def _start(self) -> None:
        self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._jobs or self._closing)
                if not self._jobs:
                    return
                job = self._jobs.popleft()
                self._busy = True
                self._changed.notify_all()
            job()

    def drain(self) -> None:
        """Wait until no job is queued or running; at once if called by a job."""
        if self._thread is not threading.current_thread():
            with self._changed:
                self._changed.wait_for(lambda: not self._jobs and not self._busy)

    def close(self) -> None:
        """Let the queued jobs end, then join the thread; a later job starts a new one."""
        while self._thread is not None:
            with self._changed:
                self._closing = True
                self._changed.notify_all()
            self._thread.join()
            with self._changed:
                self._thread, self._closing = None, False
                if self._jobs:  # put there as the thread was leaving
                    self._start()
