# SPDX-License-Identifier: GPL-2.0-only
"""The memory of a real process that goes on writing, to another real process, by userfaultfd and PAGEMAP_SCAN."""

import socket
import threading
import time
from collections.abc import Callable

import numpy as np
import pytest

from dpud.bench.gpu.lent import PAGE, digest_of, end, filled, kernel_can, spawn, writer
from dpud.gpu.migration.agents import ProcessReceiver, send_process
from dpud.gpu.migration.channel import Channel, SocketChannel
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.engine import Settings
from dpud.gpu.migration.process_pages import Lent, ProcessSink, ProcessSource
from dpud.gpu.migration.state import Progress, State
from kernelsim.operation import Operation

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not kernel_can(), reason="this kernel has no WP_ASYNC, or we may not use it"),
]

NR_BYTES = 8 << 20


def migrate(settings: Settings, nr_bytes: int = NR_BYTES, target_bytes: int = NR_BYTES, **rate: float) -> "Outcome":
    """A writer to one that is filled."""
    rate = {"pages_per_s": 500.0} | rate
    from_pid, from_sock = spawn(writer(nr_bytes, **rate))
    to_pid, to_sock = spawn(filled(target_bytes))
    try:
        here, there = Lent.take(from_sock), Lent.take(to_sock)
        ours, theirs = socket.socketpair()

        def connect() -> Operation[Channel]:
            yield None
            return SocketChannel(ours)

        receiving = ProcessReceiver(ProcessSink(there, to_sock))
        thread = in_thread(lambda: receiving.serve(SocketChannel(theirs)))
        progress = send_process(here, connect, settings)
        thread.join(20)
        assert not thread.is_alive()
        found = to_sock.recv(64) if progress.state is State.COMPLETED else b""
        return Outcome(progress, found, digest_of(here), receiving, state_of(here.pid))
    finally:
        end(from_pid, to_pid)


def in_thread(run: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


class Outcome:
    def __init__(
        self, progress: Progress, found: bytes, expected: bytes, receiving: ProcessReceiver, source_state: str
    ) -> None:
        self.progress, self.found, self.expected, self.receiving = progress, found, expected, receiving
        self.source_state = source_state


def state_of(pid: int) -> str:
    with open(f"/proc/{pid}/stat") as file:
        return file.read().rpartition(") ")[2][0]


@pytest.mark.parametrize(
    "strategy", [Strategy.AUTO, Strategy.PRECOPY, Strategy.POSTCOPY, Strategy.HYBRID, Strategy.STOP_AND_COPY]
)
def test_every_byte_arrives_and_the_source_has_stopped(strategy: Strategy) -> None:
    outcome = migrate(Settings(strategy, downtime_limit_ns=50_000_000))
    assert outcome.progress.state is State.COMPLETED, outcome.progress.why
    assert outcome.found == outcome.expected
    assert outcome.source_state == "T"


def test_post_copy_faults_are_real_and_served_first() -> None:
    """The process that is filled touches the last page first, the source sends the first page first."""
    outcome = migrate(Settings(Strategy.POSTCOPY, bandwidth_bytes_per_s=20 << 20))
    assert outcome.found == outcome.expected
    assert outcome.progress.postcopy_requests > 10
    (session,) = outcome.receiving.receiver.sessions.values()
    assert session.waits.nr > 10


def test_another_size_is_refused_and_the_writer_goes_on() -> None:
    outcome = migrate(Settings(Strategy.PRECOPY), target_bytes=NR_BYTES // 2)
    assert outcome.progress.state is State.FAILED
    assert "has lent" in outcome.progress.why
    assert outcome.source_state != "T"


def test_the_kernel_says_which_pages_were_written_to() -> None:
    """Against the memory itself, before and after."""
    pid, sock = spawn(writer(NR_BYTES, 300.0))
    try:
        source = ProcessSource(Lent.take(sock))
        source.start()
        every = np.arange(NR_BYTES // PAGE)
        source.freeze()
        assert len(source.take(0)) == len(every)
        before, _ = source.read(0, every)
        source.thaw()
        time.sleep(0.2)
        source.freeze()
        after, _ = source.read(0, every)
        changed = np.flatnonzero((before != after).any(axis=1))
        assert len(changed) > 5
        assert set(changed.tolist()) <= set(source.take(0).tolist())
        assert len(source.take(0)) == 0
        source.close()
    finally:
        end(pid)


def test_throttling_holds_a_process_up() -> None:
    pid, sock = spawn(writer(NR_BYTES, 1e9))
    try:
        source = ProcessSource(Lent.take(sock))
        source.start()
        source.take(0)
        source.throttle(90, 0.0)
        stopped = 0
        for _ in range(5):
            in_it = in_thread(lambda: source.read(0, np.arange(4)))
            deadline = time.monotonic() + 0.008
            while time.monotonic() < deadline and in_it.is_alive():
                stopped += state_of(pid) == "T"
            in_it.join()
        assert stopped > 5
        assert state_of(pid) != "T"
        source.close()
    finally:
        end(pid)
