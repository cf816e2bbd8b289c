# SPDX-License-Identifier: MIT
"""What a side that was killed finds in its journal when it comes back.

A destination whose pages outlive it (file_pages.py) goes on with what it had: thrown away, prepared, ours. One whose
memory died with it has nothing, and says so. A source that had promised its pages asks; one that had not keeps them.
"""

import errno
import logging
from collections.abc import Callable

import msgspec

from dpud.gpu.errors import GpuError
from dpud.gpu.migration.journal import Journal
from dpud.gpu.migration.pages import Manifest, Sink
from dpud.gpu.migration.receiver import Phase, Receiver, Session
from dpud.gpu.migration.remote_target import put_missing
from dpud.gpu.migration.state import Progress, State

log = logging.getLogger("dpud.gpu.migration")

_PHASES = {
    "prepared": Phase.PREPARED,
    "running": Phase.RUNNING,
    "got": Phase.RUNNING,
    "owner": Phase.OWNER,
    "done": Phase.OWNER,
}


def recover_receiver(receiver: Receiver, reopen: Callable[[Manifest], Sink] | None) -> None:
    """Take sessions of an earlier process up again, or throw them away; `reopen` finds pages that outlived it.

    Raises GpuError(EINVAL) for a journal that makes no sense.
    """
    try:
        _recover(receiver, reopen)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        why = f"{receiver.journal.path} makes no sense: {type(error).__name__} {error}"
        raise GpuError(errno.EINVAL, why) from error


def _recover(receiver: Receiver, reopen: Callable[[Manifest], Sink] | None) -> None:
    for id, record in receiver.journal.last().items():
        if record["step"] == "abandoned":
            continue
        first = receiver.journal.of(id, "receiving")[-1]
        manifest = msgspec.convert(first["manifest"], Manifest)
        try:
            sink = None if reopen is None else reopen(manifest)
        except OSError as error:
            log.error("migration %s: %s", id, error)
            sink = None
        phase = _PHASES.get(record["step"])
        if sink is None or phase is None:
            if sink is not None:
                sink.abandon()
            receiver.journal.append(id, "abandoned", why="its process was ended")
            continue
        receiver.sessions[id] = _session(receiver, id, manifest, sink, phase)


def _session(receiver: Receiver, id: str, manifest: Manifest, sink: Sink, phase: Phase) -> Session:
    progress = Progress(id, manifest.client, "here", manifest.nr_bytes)
    states = [State.SETUP, State.ACTIVE, State.DEVICE]
    if phase is Phase.RUNNING:
        states += [State.POSTCOPY_ACTIVE, State.POSTCOPY_PAUSED]
    if phase is Phase.OWNER:
        states.append(State.COMPLETED)
    for state in states:
        progress.to(state, receiver.clock.now_ns())
    session = Session(id, manifest, sink, progress, phase)
    receiver.history.append(progress)
    prepared = receiver.journal.of(id, "prepared")[-1]
    progress.digest = prepared["digest"]
    session.postcopy = prepared["missing"] is not None
    if session.postcopy and phase is not Phase.OWNER:
        for payload in prepared["missing"]:
            put_missing(bytes.fromhex(payload), manifest.areas, session.missing)
        for got in receiver.journal.of(id, "got"):
            for first, nr in got["runs"]:
                session.missing[got["area"]][first : first + nr] = False
    return session


def doubtful(journal: Journal) -> list[tuple[str, bool]]:
    """(id, whether it was post-copy) of what a source promised and never heard about again.

    Those that it had not promised yet are its own, and are entered as kept.
    """
    found = []
    for id, record in journal.last().items():
        if record["step"] == "begun":
            journal.append(id, "kept", why="its process was ended")
        elif record["step"] == "handed-over":
            found.append((id, bool(record.get("postcopy"))))
    return found
