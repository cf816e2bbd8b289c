# SPDX-License-Identifier: GPL-2.0-only
"""A machine that is kept: first its turns are done again, from then on they are noted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from dpud.dpu.driver import DpuDriver
from dpud.errors import UserError
from dpud.inject import Diverged
from dpud.journal import End
from dpud.journal_device import NotedDriver
from dpud.journal_replay import Replay
from dpud.journal_turns import Recorder
from dpud.owner import Owner
from dpud.state import State
from fs.performer import Performer
from fs.requests import ROOT
from kernelsim.machine import Machine


@contextmanager
def noted(state: State | None, machine: Machine, owner: Owner, performer: Performer) -> Iterator[None]:
    """Every turn goes into the journal, from the machine as it is now until the end.

    Who was waiting when the daemon was killed is gone: their requests are interrupted and their files closed.
    """
    if state is None:
        yield
        return
    journal = state.journal()
    owner.turns = recorder = Recorder(journal, state.outside, machine.tracing.looks_leave_records)
    for request in performer.open_files():
        owner.request(performer.perform, request, ROOT)
    try:
        yield
    finally:
        owner.call(_forget, owner, recorder)
        journal.close()


def _forget(owner: Owner, recorder: Recorder) -> None:
    """What happens from here on, while the daemon ends, did not happen: as if it had been killed now."""
    recorder.flush()
    owner.turns = None


def replay(state: State, machine: Machine, owner: Owner, performer: Performer, driver: DpuDriver) -> None:
    """Do the journal's turns again, all that there are. Raises UserError where one cannot be."""
    if state.end is None:
        return
    assert isinstance(driver, NotedDriver)
    turns = Replay(owner, performer, machine.step, state.outside)
    driver.held = True
    logging.disable(logging.ERROR)  # it was said then
    try:
        with Console(stderr=True).status(f"Doing {state.end.number} turns again"):
            for number, offset, turn in state.turns():
                try:
                    turns.run_one(turn)
                except Diverged as error:
                    raise _cannot(state, End(offset, number), str(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    state.clock.go_on()
    driver.release()


def _cannot(state: State, end: End, why: str) -> UserError:
    """What this process has by now is no machine any more, so it is for the next to go on."""
    if not state.recover:
        return UserError(f"{state.path}: record {end.number}, at offset {end.offset}: {why}: see --recover")
    state.put_aside(end, f"record {end.number}: {why}")
    return UserError("start again to go on from there")
