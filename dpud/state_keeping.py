# SPDX-License-Identifier: GPL-2.0-only
"""A machine that is kept: first it becomes what it was, from then on its turns are noted."""

import logging
import shutil
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
from dpud.state_segments import Segment, aside_of, checkpoint_at, put_aside
from dpud.state_stores import KeptStores, Store
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
    stores = state.stores
    recorder = Recorder(state.journal(), state.outside, machine.tracing.looks_leave_records, stores)
    owner.turns, recorder.nr_turns = recorder, state.nr_turns
    owner.call(_set_pending, state, owner, performer)
    recorder.take_stores()
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
        stores.close()


def _set_pending(state: State, owner: Owner, performer: Performer) -> None:
    """Set and note what the daemon before had taken, and had no time to. Raises UserError where some of it is lost."""
    stores, changes = state.stores, owner.changes
    assert owner.turns is not None
    if pending := _pending(state, stores, changes.nr_settled):
        owner.turns.begin_stores()
        try:
            done = [(performer.path_of(store.nodeid), store.value) for store in pending]
            for path, value in done:
                performer.settle(path, value)
        except OSError as error:
            raise UserError(f"{stores.path}: {error.filename}: it is no file of this machine that takes one") from error
        changes.go_on_from(changes.nr_settled + len(done))
        owner.turns.end_stores(done, changes.nr_settled)
    stores.begin()


def _pending(state: State, stores: KeptStores, number: int) -> list[Store]:
    pending = stores.pending(number)
    if pending.problem and not state.recover:
        raise UserError(
            f"{stores.path}: {pending.problem}. What was acknowledged is lost: start with --recover to go on without"
        )
    if pending.problem:
        aside = shutil.copyfile(stores.path, aside_of(stores.path))
        state.tell(f"{stores.path}: {pending.problem}: kept as {aside.name}")
    return pending.stores


def _forget(owner: Owner, recorder: Recorder) -> None:
    """What happens from here on, while the daemon ends, did not happen: as if it had been killed now."""
    recorder.flush()
    recorder.close()
    owner.turns = None


def come_back(state: State, machine: Machine, owner: Owner, performer: Performer, driver: DpuDriver) -> None:
    """Be as it was: what is in the checkpoint, and all turns since. Raises UserError where that cannot be."""
    if state.end is None:
        return
    assert isinstance(driver, NotedDriver)
    if state.checkpoint is not None:
        _come_up(state, state.checkpoint)
    owner.changes.go_on_from(state.segments[0].head.nr_stores)
    _replay(state, machine, owner, performer, driver)


def _come_up(state: State, head: Head) -> None:
    assert state.whole is not None
    path = checkpoint_at(state.directory, head.number)
    folder = emptied(state.directory / GPU_CHECKPOINTS)
    try:
        with Console(stderr=True).status(f"Taking up {path.name}"):
            state.whole.come_up(path, head, folder)
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
