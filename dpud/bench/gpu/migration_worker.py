# SPDX-License-Identifier: GPL-2.0-only
"""One end of a measured migration, as a process of its own: `python -m dpud.bench.gpu.migration_worker ROLE ...`.

target ADDRESS BYTES                      fills a process over one connection; prints a JSON line
source ADDRESS BYTES PAGES_PER_S STRATEGY LIMIT_MS   a writer, and its agent; prints a JSON line
"""

import json
import sys
import time

from dpud.bench.gpu.lent import digest_of, end, filled, spawn, writer
from dpud.gpu.migration.agents import ProcessReceiver, send_process
from dpud.gpu.migration.channel import Channel, Connecting, Listening
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.engine import Settings
from dpud.gpu.migration.process_pages import Lent, ProcessSink
from kernelsim.operation import Operation

HOT_SHARE = 0.1
"""Of its memory, what the writer writes to."""
_WARM_UP_S = 0.2


def target(address: str, nr_bytes: int) -> None:
    """Listen, take one, say what the process found in its memory."""
    pid, sock = spawn(filled(nr_bytes))
    try:
        receiving = ProcessReceiver(ProcessSink(Lent.take(sock), sock))
        listening = Listening(address)
        print(json.dumps({"listening": address}), flush=True)
        while (channel := listening.accept()) is None:
            listening.wait(1.0)
        session = receiving.serve(channel)
        listening.close()
        waits = session.waits if session is not None else None
        found = {
            "sha256": sock.recv(64).hex() if session is not None else "",
            "nr_waits": waits.nr if waits else 0,
            "wait_p50_ns": waits.quantile(0.5) if waits else 0,
            "wait_p99_ns": waits.quantile(0.99) if waits else 0,
        }
        print(json.dumps(found), flush=True)
    finally:
        end(pid)


def source(address: str, nr_bytes: int, pages_per_s: float, strategy: str, limit_ms: int) -> None:
    """A live writer goes there."""

    def connect() -> Operation[Channel]:
        connecting = Connecting(address)
        yield connecting
        return connecting.channel()

    pid, sock = spawn(writer(nr_bytes, pages_per_s, HOT_SHARE))
    try:
        lent = Lent.take(sock)
        time.sleep(_WARM_UP_S)
        settings = Settings(Strategy(strategy), downtime_limit_ns=limit_ms * 1_000_000)
        progress = send_process(lent, connect, settings)
        found = {
            "state": progress.state,
            "why": progress.why,
            "total_ns": progress.end_ns - progress.begin_ns,
            "downtime_ns": progress.downtime_ns,
            "moved_bytes": progress.moved_bytes,
            "rounds": progress.rounds,
            "strategy": progress.strategy,
            "sha256": digest_of(lent).hex(),
        }
        print(json.dumps(found), flush=True)
    finally:
        end(pid)


if __name__ == "__main__":
    role, where, size, *rest = sys.argv[1:]
    if role == "target":
        target(where, int(size))
    else:
        source(where, int(size), float(rest[0]), rest[1], int(rest[2]))
