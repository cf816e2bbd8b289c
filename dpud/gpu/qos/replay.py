# SPDX-License-Identifier: MIT
"""Does a decision log again: the same inputs, at the same times, have to give the same grants.

from dpud.gpu.qos.replay import replay
print(replay(open("/sys/class/gpu_memvirt/gpu0/qos/decisions").read()))
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from urllib.parse import unquote

from dpud.gpu.qos.decisions import scheduler_of
from dpud.gpu.qos.flow import Request
from dpud.gpu.qos.scheduler import Scheduler
from dpud.gpu.traffic import Cause


@dataclass
class Replay:
    """What came of it."""

    nr_records: int = 0
    nr_grants: int = 0
    """That were the same."""
    difference: str = ""
    """The first decision that was another one."""

    def __str__(self) -> str:
        return self.difference or f"{self.nr_grants} decisions of {self.nr_records} records: the same"


def replay(text: str) -> Replay:
    """A whole log. Raises ValueError for a text that is none."""
    done, player = Replay(), _Player()
    for number, line in enumerate(text.splitlines(), 1):
        try:
            player.play(line)
        except _Different as found:
            done.difference = f"line {number}: {found}"
            return done
        except _NO_RECORD as error:
            raise ValueError(f"line {number} is no record: {line[:80]!r}") from error
        done.nr_records += 1
        done.nr_grants += line.startswith("grant ")
    return done


_NO_RECORD = (KeyError, TypeError, IndexError, AttributeError, ArithmeticError, RecursionError, ValueError)
"""What comes of doing again what was never done."""


class _Different(Exception):
    pass


class _Player:
    """Applies records to a scheduler that the first one, a state, gives."""

    def __init__(self) -> None:
        self.scheduler = Scheduler()
        self._requests: dict[int, Request] = {}
        self._has_state = False

    def play(self, line: str) -> None:
        word, *fields = line.split(" ", 2 if line.startswith("state ") else -1)
        if not self._has_state and word != "state":
            raise ValueError("a log begins with a state")
        records: dict[str, Callable[..., None]] = {
            "state": self._state,
            "total": self._total,
            "policy": self._policy,
            "level": self._level,
            "client": self._client,
            "gone": self._gone,
            "submit": self._submit,
            "cancel": self._cancel,
            "owe": self._owe,
            "tick": self._tick,
            "grant": self._grant,
        }
        records[word](*fields)

    def _state(self, _now: str, state: str) -> None:
        self.scheduler, self._has_state = scheduler_of(json.loads(state)), True
        self._requests = {request.number: request for request in self.scheduler.waiting()}

    def _total(self, now: str, rate: str, burst: str) -> None:
        self.scheduler.set_total(int(rate), int(burst), int(now))

    def _policy(self, now: str, name: str) -> None:
        self.scheduler.set_policy(name, int(now))

    def _level(self, now: str, number: str, rate: str, burst: str, target_ns: str) -> None:
        self.scheduler.set_level(int(number), int(rate), int(burst), int(target_ns), int(now))

    def _client(self, now: str, name: str, *values: str) -> None:
        keys = ("reservation", "limit", "burst", "share", "level")
        self.scheduler.set_client(unquote(name), int(now), **dict(zip(keys, map(int, values), strict=True)))

    def _gone(self, now: str, name: str) -> None:
        self.scheduler.forget(unquote(name), int(now))

    def _submit(self, now: str, client: str, level: str, cause: str, nr_bytes: str) -> None:
        request = self.scheduler.submit(unquote(client), Cause(cause), int(nr_bytes), int(now), int(level))
        self._requests[request.number] = request

    def _cancel(self, now: str, number: str) -> None:
        self.scheduler.cancel(self._requests.pop(int(number)), int(now))

    def _owe(self, now: str, client: str, cause: str, nr_bytes: str) -> None:
        self.scheduler.owe(unquote(client), Cause(cause), int(nr_bytes), int(now))

    def _tick(self, now: str) -> None:
        self.scheduler.tick(int(now))

    def _grant(self, now: str, number: str, phase: str) -> None:
        before = self.scheduler.counts["by_constraint"]
        request = self.scheduler.grant(int(now))
        letter = "W" if self.scheduler.counts["by_constraint"] == before else "R"
        again = "nothing" if request is None else f"{request.number} {letter}"
        if again != f"{number} {phase}":
            raise _Different(f"at {now} ns request {number} {phase} was granted, now {again}")
        self._requests.pop(int(number), None)
