# SPDX-License-Identifier: GPL-2.0-only
"""The port of the metrics, with who opens it and asks for nothing."""

import socket
import threading
import urllib.request
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from dpud.metrics_server import MAX_CONNECTIONS, Server

TIMEOUT_S = 20


def hello(_environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
    start("200 OK", [("Content-Type", "text/plain")])
    return [b"hello"]


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server("127.0.0.1", 0, hello)
    server.start()
    yield server
    server.shutdown()
    server.server_close()


def ask(server: Server) -> bytes:
    with urllib.request.urlopen(f"http://127.0.0.1:{server.server_port}/metrics", timeout=TIMEOUT_S) as answer:
        return bytes(answer.read())


def silent(server: Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.server_port), timeout=TIMEOUT_S)


@pytest.mark.slow
def test_who_says_nothing_keeps_nobody_out(server: Server) -> None:
    before = threading.active_count()
    with ExitStack() as stack:
        held = [stack.enter_context(silent(server)) for _ in range(MAX_CONNECTIONS + 8)]
        assert [ask(server) for _ in range(3)] == [b"hello"] * 3
        assert threading.active_count() - before <= MAX_CONNECTIONS
        assert held[0].recv(1) == b"", "the oldest had to go"
        held[-1].sendall(b"GET /metrics HTTP/1.0\r\n\r\n")
        assert held[-1].makefile("rb").read().endswith(b"hello"), "the others are as they were"


@pytest.mark.slow
def test_answers_are_made_one_after_the_other() -> None:
    is_at_work, together = threading.Lock(), list[bool]()

    def count(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        together.append(not is_at_work.acquire(blocking=False))
        threading.Event().wait(0.01)
        is_at_work.release()
        return hello(environ, start)

    server = Server("127.0.0.1", 0, count)
    server.start()
    askers = [threading.Thread(target=ask, args=(server,)) for _ in range(8)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join()
    server.shutdown()
    server.server_close()
    assert together == [False] * 8
