# SPDX-License-Identifier: GPL-2.0-only
"""A machine that is kept: first it becomes what it was, from then on its turns are noted."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console

from dpud.checkpoint import emptied
from dpud.checkpoint_file import Head, Unusable
from dpud.checkpoint_keeper import Keeper
from dpud.dpu.driver import DpuDriver
from dpud.errors import UserError
from dpud.inject import Diverged
from dpud.journal import End
from dpud.journal_device import NotedDriver
from dpud.journal_replay import Replay
from dpud.journal_turns import Recorder
from dpud.owner import Owner
from dpud.state import GPU_CHECKPOINTS, State
from dpud.state_segments import Segment, checkpoint_at, put_aside
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
    assert state.whole is not None
    owner.turns = recorder = Recorder(state.journal(), state.outside, machine.tracing.looks_leave_records)
    recorder.nr_turns = state.nr_turns
    for request in performer.open_files():
        owner.request(performer.perform, request, ROOT)
    keeper = Keeper(state, state.whole, recorder)
    state.files.keeper = keeper
    keeper.start()
    try:
        yield
    finally:
        keeper.close()
        owner.call(_forget, owner, recorder)
        recorder.journal.close()


def _forget(owner: Owner, recorder: Recorder) -> None:
    """What happens from here on, while the daemon ends, did not happen: as if it had been killed now."""
    recorder.flush()
    owner.turns = None


def come_back(state: State, machine: Machine, owner: Owner, performer: Performer, driver: DpuDriver) -> None:
    """Be as it was: what is in the checkpoint, and all turns since. Raises UserError where that cannot be."""
    if state.end is None:
        return
    assert isinstance(driver, NotedDriver)
    if state.checkpoint is not None:
        _come_up(state, state.checkpoint)
    _replay(state, machine, owner, performer, driver)


def _come_up(state: State, head: Head) -> None:
    assert state.whole is not None
    path = checkpoint_at(state.directory, head.number)
    emptied(state.directory / GPU_CHECKPOINTS)
    try:
        with Console(stderr=True).status(f"Taking up {path.name}"):
            state.whole.come_up(path, head)
    except Unusable as error:
        if not state.recover:
            raise UserError(
                f"{path}: {error}: with --recover it is put aside, and what was before it is used"
            ) from None
        raise UserError(f"{path}: {error}: kept as {put_aside(path).name}; start again") from None


def _replay(state: State, machine: Machine, owner: Owner, performer: Performer, driver: NotedDriver) -> None:
    turns = Replay(owner, performer, machine.step, state.outside)
    driver.held = True
    logging.disable(logging.ERROR)  # it was said then
    try:
        with Console(stderr=True).status(f"Doing {state.nr_turns} turns again"):
            for segment in state.segments:
                for number, offset, turn in segment.turns():
                    try:
                        turns.run_one(turn)
                    except Diverged as error:
                        raise _cannot(state, segment, End(offset, number), str(error)) from error
    finally:
        logging.disable(logging.NOTSET)
    state.clock.go_on()
    driver.release()


def _cannot(state: State, segment: Segment, end: End, why: str) -> UserError:
    """What this process has by now is no machine any more, so it is for the next to go on."""
    if not state.recover:
        return UserError(f"{segment.path}: record {end.number}, at offset {end.offset}: {why}: see --recover")
    state.keep_good_part(segment, end, f"record {end.number}: {why}")
    return UserError("start again to go on from there")
