# SPDX-License-Identifier: GPL-2.0-only
"""Small machines with a state directory, in this process and without a mount: through their Tree, as FUSE would."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

from dpud import state, state_kobject
from dpud.checkpoint_keeper import Keeper
from dpud.config import Config, parse
from dpud.daemon import Live, RunOptions, assembled, devices, running
from dpud.journal_turns import Recorder
from dpud.state_hash import state_hash
from dpud.state_kobject import StateFiles
from fs.kernfs import ROOT, Cred
from kernelsim.attr import File
from kernelsim.digest import Digest

MM = "/sys/kernel/config/kernelsim/mm"
VM = "/proc/sys/vm"
CLIENTS = "/sys/kernel/config/gpu_memvirt/gpu0/clients"
TEXT = """
[machine]
cpus = 2
[[machine.nodes]]
memory = "32M"
[[machine.nodes]]
memory = "32M"
[gpu]
memory = "8M"
host_memory = "8M"
pool = "4M"
swap_nvme = "4M"
swap_ssd = "4M"
swap_hdd = "0"
"""


def configured(directory: Path, more: str = "", checkpoint_bytes: str = "0") -> Config:
    """The small machine, kept in `directory`; without checkpoints that nobody asks for."""
    state_table = f'[state]\ndirectory = "{directory}"\nsync = "none"\ncheckpoint_bytes = "{checkpoint_bytes}"\n'
    return parse(f"{TEXT}\n{more}\n{state_table}")


@contextmanager
def alive(config: Config, recover: bool = False) -> Iterator[Live]:
    """The daemon but for its mount."""
    with (
        state.opened(config, recover) as kept,
        devices(config, kept) as driver,
        running(assembled(RunOptions(config, recover=recover), driver, kept), kept) as live,
    ):
        yield live


@contextmanager
def still(config: Config) -> Iterator[Live]:
    """The machine as its journal brings it back, before time passes again."""
    with state.opened(config) as kept, devices(config, kept) as driver:
        yield assembled(RunOptions(config), driver, kept)


class Hash(str):
    """Of a state, and all that went into it, for where two differ (conftest.py)."""

    trail: list[tuple[str, bytes | int]]


def hash_now(live: Live) -> Hash:
    """For whoever holds the machine."""
    trail: list[tuple[str, bytes | int]] = []
    put, apart, nr_apart = Digest._put, Digest._apart, [0]

    def noted(digest: Digest, tag: str, data: bytes = b"") -> None:
        if not nr_apart[0]:
            trail.append((tag, data if len(data) < 1000 else hash(data)))
        put(digest, tag, data)

    def an_element(digest: Digest, element: object) -> str:
        """Of a set, whose order says nothing."""
        nr_apart[0] += 1
        found = apart(digest, element)
        nr_apart[0] -= 1
        return found

    with patch.object(Digest, "_put", noted), patch.object(Digest, "_apart", an_element):
        found = Hash(state_hash(live.machine, live.gpu))
    found.trail = trail
    return found


def hash_of(live: Live) -> Hash:
    """Between two turns."""
    found: Hash = live.owner.call(hash_now, live)
    return found


def nr_records(live: Live) -> int:
    """In the journal so far."""
    assert isinstance(live.owner.turns, Recorder)
    return live.owner.turns.journal.nr_records


def keeper_of(live: Live) -> Keeper:
    """Who makes its checkpoints."""
    file = live.machine.registry.nodes[f"{state_kobject.PATH}/checkpoint"]
    assert isinstance(file, File)
    assert isinstance(file.kobj, StateFiles)
    assert file.kobj.keeper is not None
    return file.kobj.keeper


def killed(live: Live, before: Path, after: Path) -> Hash:
    """What would be there were the daemon killed now: its directory copied -> the hash that it has now."""

    def stop() -> Hash:
        assert isinstance(live.owner.turns, Recorder)
        live.owner.turns.flush()
        shutil.copytree(before, after)
        return hash_now(live)

    found: Hash = live.owner.call(stop)
    return found


def echo(live: Live, path: str, text: str, cred: Cred = ROOT) -> int:
    """What a shell's `echo text > path` does."""
    file = live.tree.open(path, os.O_WRONLY | os.O_TRUNC, cred)
    file.truncate(cred)
    try:
        return file.write(f"{text}\n".encode(), 0, cred)
    finally:
        file.release()


def cat(live: Live, path: str) -> str:
    file = live.tree.open(path, os.O_RDONLY)
    text, pos = b"", 0
    while piece := file.read(1 << 16, pos):
        text += piece
        pos += len(piece)
    return text.decode(errors="replace")
