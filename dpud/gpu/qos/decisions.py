# SPDX-License-Identifier: MIT
"""The decision log: every input of the scheduler and every grant, so that each can be explained, and done again.

One record a line: a word, a time in ns, and what belongs to it.

    state NS JSON                                          all that decisions depend on, before the next line
    total NS RATE BURST
    policy NS NAME
    level NS NUMBER RATE BURST TARGET_NS
    client NS NAME RESERVATION LIMIT BURST SHARE LEVEL
    gone NS NAME
    submit NS CLIENT LEVEL CAUSE BYTES                     requests are numbered in this order
    cancel NS NUMBER
    owe NS CLIENT CAUSE BYTES                              moved without asking
    tick NS                                                latency targets were looked at
    grant NS NUMBER R|W                                    a decision: by constraint (reservation) or by weight

Characters of names that would be ambiguous are written as in URLs (%20). The log is bounded: when half of it is full,
a new half begins with a `state` line, and the older half goes.
"""

import json
from dataclasses import asdict
from typing import Any
from urllib.parse import quote

from dpud.gpu.qos.bucket import Bucket
from dpud.gpu.qos.flow import NR_LEVELS, Flow, Request
from dpud.gpu.qos.guard import Guard, Period
from dpud.gpu.qos.levels import Level
from dpud.gpu.qos.policy import POLICIES
from dpud.gpu.qos.scheduler import Scheduler
from dpud.gpu.traffic import Cause

HALF_LINES = 8192


class DecisionLog:
    """A ring of two halves, each of which begins with a state."""

    def __init__(self, half_lines: int = HALF_LINES) -> None:
        self.nr_records = 0
        self._half_lines = half_lines
        self._older: list[str] = []
        self._newer: list[str] = []

    def add(self, scheduler: Scheduler, *fields: object) -> None:
        """Called before an input is applied, and after a grant."""
        is_input = fields[0] != "grant"
        if not (is_input or self._newer):
            return  # of a request from before the log was cleared
        if is_input and (not self._newer or len(self._newer) >= self._half_lines):
            self._older = self._newer
            state = json.dumps(state_of(scheduler), separators=(",", ":"))
            self._newer = [f"state {fields[1]} {state}"]
        self._newer.append(" ".join(map(_word, fields)))
        self.nr_records += 1

    def clear(self) -> None:
        """The next record begins with a state."""
        self._older, self._newer = [], []

    def text(self) -> str:
        return "".join(f"{line}\n" for line in (*self._older, *self._newer))


def _word(field: object) -> str:
    return quote(field, safe="") if isinstance(field, str) else str(field)


def state_of(scheduler: Scheduler) -> dict[str, Any]:
    """What decisions depend on."""
    flows = [asdict(flow) | {"queue": [_row(each) for each in flow.queue]} for flow in scheduler.flows.values()]
    return {
        "total": asdict(scheduler.total),
        "policy": scheduler.policy.name,
        "levels": [asdict(level) for level in scheduler.levels],
        "flows": flows,
        "virtual": scheduler.virtual,
        "next_number": scheduler.next_number,
        "ticked_ns": scheduler.ticked_ns,
    }


def _row(request: Request) -> list[object]:
    return [request.number, request.cause.value, request.nr_bytes, request.level, request.submit_ns]


def scheduler_of(state: dict[str, Any]) -> Scheduler:
    """The scheduler that `state_of` was asked of. Raises KeyError, TypeError, ValueError for what is none."""
    scheduler = Scheduler()
    scheduler.total, scheduler.policy = Bucket(**state["total"]), POLICIES[state["policy"]]
    scheduler.levels = [_level(each) for each in state["levels"]]
    scheduler.virtual, scheduler.next_number = state["virtual"], state["next_number"]
    scheduler.ticked_ns = state["ticked_ns"]
    for each in state["flows"]:
        flow = Flow(**each | {"bucket": Bucket(**each["bucket"]), "queue": [], "nr_waiting": [0] * NR_LEVELS})
        for number, cause, nr_bytes, level, submit_ns in each["queue"]:
            flow.push(Request(number, flow.name, Cause(cause), nr_bytes, level, submit_ns))
        scheduler.adopt(flow)
    return scheduler


def _level(each: dict[str, Any]) -> Level:
    guard = Guard(**each["guard"] | {"cap": Bucket(**each["guard"]["cap"])})
    parts = {"bucket": Bucket(**each["bucket"]), "guard": guard, "period": Period(**each["period"])}
    return Level(**each | parts)
