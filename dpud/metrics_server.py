# SPDX-License-Identifier: GPL-2.0-only
"""The port that metrics are served on: HTTP, with so many connections and no more.

Theory of operation
    A connection is a thread, and whoever reaches the port can open one. So there are at most MAX_CONNECTIONS. Where one
    comes too many, the oldest is ended: a scrape takes some milliseconds, so that is somebody who asks for nothing. If
    its thread does not end at once, the new one is turned away. Who says nothing for TIMEOUT_S is ended, too.

    Answers are made one after the other: many scrapers wait for each other, and not everybody else for the interpreter.
"""

import logging
import socket
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

MAX_CONNECTIONS = 32
TIMEOUT_S = 10.0
_ROOM_WAIT_S = 0.2

App = Callable[[dict[str, Any], Callable[..., Any]], Iterable[bytes]]

log = logging.getLogger("dpud")


class _Handler(WSGIRequestHandler):
    """One connection; nothing is logged of it."""

    timeout = TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:
        pass


class Server(ThreadingMixIn, WSGIServer):
    """Of one port."""

    daemon_threads = True

    def __init__(self, host: str, port: int, app: App) -> None:
        """Raises OSError."""
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        self.address_family = family
        self._room = threading.Semaphore(MAX_CONNECTIONS)
        self._guard = threading.Lock()
        self._connections: dict[Any, None] = {}  # by age
        super().__init__((str(address[0]), port), _Handler)
        self.set_app(_in_turns(app))

    def start(self) -> None:
        """Answer, on threads of its own."""
        threading.Thread(target=self.serve_forever, name="dpud-metrics", daemon=True).start()

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._has_room():
            self.shutdown_request(request)
            return
        with self._guard:
            self._connections[request] = None
        try:
            super().process_request(request, client_address)
        except RuntimeError:  # the system has no more threads
            self._forget(request)
            self.shutdown_request(request)

    def _has_room(self) -> bool:
        """For one connection more, which is counted then."""
        if self._room.acquire(blocking=False):
            return True
        with self._guard, suppress(OSError):
            next(iter(self._connections)).shutdown(socket.SHUT_RDWR)
        return self._room.acquire(timeout=_ROOM_WAIT_S)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._forget(request)

    def _forget(self, request: Any) -> None:
        with self._guard:
            del self._connections[request]
        self._room.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """That somebody went, or said nothing, is no error of ours; called where the exception is handled."""
        log.debug("metrics: a connection from %s failed", client_address, exc_info=True)


def _in_turns(app: App) -> App:
    guard = threading.Lock()

    def answer(environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        with guard:
            return app(environ, start)

    return answer
