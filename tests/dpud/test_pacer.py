# SPDX-License-Identifier: GPL-2.0-only
"""The pacer on a made-up clock: a sleep moves `now` on, so no real time passes."""

import threading
from collections.abc import Callable

from dpud.owner import Owner
from dpud.pacer import Pacer


class Machine:
    """Timers at given times; a step runs those that are due."""

    def __init__(self, *timers_ns: int) -> None:
        self.timers_ns, self.steps_ns = sorted(timers_ns), list[int]()

    def peek(self) -> int | None:
        return self.timers_ns[0] if self.timers_ns else None

    def step(self, now_ns: int) -> None:
        self.steps_ns.append(now_ns)
        self.timers_ns = [due for due in self.timers_ns if due > now_ns]


class Sleeper:
    def __init__(self) -> None:
        self.now_ns, self.slept = 0, list[float | None]()

    def __call__(self, seconds: float | None) -> None:
        self.slept.append(seconds)
        self.now_ns += round((seconds or 0) * 1e9)


def paced(machine: Machine) -> tuple[Pacer, Sleeper]:
    sleeper = Sleeper()
    return Pacer(machine, Owner(), now_ns=lambda: sleeper.now_ns, sleep=sleeper), sleeper


def test_pace_sleeps_until_each_timer_and_steps_there() -> None:
    machine = Machine(2_000_000_000, 5_000_000_000)
    pacer, sleeper = paced(machine)
    for _ in range(5):
        pacer.pace()
    assert machine.steps_ns == [2_000_000_000, 5_000_000_000]
    assert sleeper.slept == [2.0, 3.0, None]


def test_pace_steps_at_once_when_late() -> None:
    machine = Machine(10, 20)
    pacer, sleeper = paced(machine)
    sleeper.now_ns = 1000
    pacer.pace()
    assert machine.steps_ns == [1000]
    assert sleeper.slept == []


def run_live(machine: Machine, arm: Callable[[], None], stepped: threading.Event) -> Pacer:
    """A pacer on its own thread and the real event, on a clock that stands at 100 ns."""
    owner = Owner()
    pacer = Pacer(machine, owner, now_ns=lambda: 100)
    pacer.start()
    owner.call(arm)
    assert stepped.wait(10)
    return pacer


def test_a_request_that_arms_an_earlier_timer_wakes_the_pacer() -> None:
    stepped = threading.Event()

    class Watched(Machine):
        def step(self, now_ns: int) -> None:
            super().step(now_ns)
            stepped.set()

    machine = Watched(10**18)  # due in thirty years
    pacer = run_live(machine, lambda: machine.timers_ns.insert(0, 50), stepped)
    pacer.stop()
    assert machine.steps_ns == [100]
    assert machine.timers_ns == [10**18]
