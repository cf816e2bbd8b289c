# SPDX-License-Identifier: GPL-2.0-only
"""A great many injected faults of all kinds, beside arrays that know what every byte ought to be."""

import errno
import logging
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import Progress

from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.check import violations
from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import GpuError
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.fault.recovery import Policy
from dpud.gpu.system import GpuConfig, build

MIB = 1 << 20
NR_FAULTS = 100_000
_POLICIES = (Policy.MIGRATE, Policy.REMAP, Policy.RETRY)
_PAGES = (2048, 4096, 65536)
_FLIPS = (1, 330, ""), (2, 16, ""), (3, 8, ""), (5, 8, ""), (1, 6, " stuck=1"), (2, 3, " stuck=0")
"""(bits, how many of such faults in a round, what else) of each memory."""
_SCRUB_EVERY, _CHECKPOINT_EVERY, _RESET_EVERY, _BANK_EVERY, _DEVICE_EVERY = 7, 3, 5, 10, 20
"""Rounds."""


@dataclass
class Buffer:
    client: str
    va: int
    region: Region
    true: NDArray[np.uint8]


@dataclass
class Outcome:
    """What came of it."""

    nr_faults: int = 0
    nr_pages_read: int = 0
    nr_silent: int = 0
    """Bytes that were read and were wrong."""
    nr_refused: int = 0
    """Reads, syncs and checkpoints that failed with EIO because of pages that are known to be lost."""
    nr_no_room: int = 0
    """Those that failed with ENOMEM: too much of a memory is retired."""
    nr_unexplained: int = 0
    """Failures for another reason."""
    violations: list[str] = field(default_factory=list)
    stats: Counter[str] = field(default_factory=Counter)


class Campaign:
    """Two devices of 2 MiB, four clients with buffers of all kinds and page sizes, twice what fits on a device."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.rng = np.random.default_rng(seed)
        config = GpuConfig(2, 2 * MIB, 8 * MIB, 4 * MIB, tiers={"nvme": 16 * MIB}, checkpoint_folder=folder)
        self.memory = build(config, ManualClock())
        fault = self.memory.fault
        assert isinstance(fault, FaultModule)
        self.fault = fault
        self.outcome = Outcome()
        self.buffers = [self._buffer(number) for number in range(8)]
        self._snapshots: dict[str, list[NDArray[np.uint8]]] = {}
        fault.failover.roll_back = self._roll_back

    def _buffer(self, number: int) -> Buffer:
        client, page = f"client{number // 2}", _PAGES[number % len(_PAGES)]
        kind = (RegionType.DEVICE, RegionType.MANAGED, RegionType.HOST)[number % 3]
        va = self.memory.allocate(client, MIB // 2, kind, page_size=page, device=number // 2 % 2)
        region = self.memory.space.regions.find(va)
        assert region is not None
        buffer = Buffer(client, va, region, np.zeros(MIB // 2, dtype=np.uint8))
        self._write(buffer, 0, MIB // 2)
        return buffer

    def run(self, nr_faults: int, progress: Callable[[int], object] = lambda _nr: None) -> Outcome:
        """`progress` is told how many faults there were."""
        number = 0
        while self.outcome.nr_faults < nr_faults:
            number += 1
            self.fault.recovery.policy = _POLICIES[number % len(_POLICIES)]
            self._break(number)
            for buffer in self.buffers:
                self._read(buffer)
            self._work(number)
            progress(self.outcome.nr_faults)
        self.outcome.violations = violations(self.memory)
        self.outcome.stats = Counter(self.fault.stats())
        return self.outcome

    def _break(self, number: int) -> None:
        """One round's faults; most of them flips, as in the field."""
        requests = [f"bit gpu={gpu} bits={bits} nr={nr}{stuck}" for gpu in (0, 1, 2) for bits, nr, stuck in _FLIPS]
        requests += [f"row gpu={number % 3}"]
        if number % _BANK_EVERY == 0:
            requests.append(f"bank gpu={number // _BANK_EVERY % 3}")
        if number % _DEVICE_EVERY == 0:
            requests.append("device gpu=0")
        for request in requests:
            self.outcome.nr_faults += self.fault.inject(request)

    def _read(self, buffer: Buffer) -> None:
        """All of a buffer; page by page where that fails."""
        if self._compare(buffer, 0, len(buffer.true)):
            return
        page = buffer.region.page_bytes
        for at in range(0, len(buffer.true), page):
            self._compare(buffer, at, page)

    def _compare(self, buffer: Buffer, at: int, nr_bytes: int) -> bool:
        try:
            data = self.memory.read(buffer.client, buffer.va + at, nr_bytes)
        except GpuError as error:
            if nr_bytes < len(buffer.true):
                self._judge(buffer, at // buffer.region.page_bytes, error)
            return False
        found = np.frombuffer(data, dtype=np.uint8)
        self.outcome.nr_silent += int(np.count_nonzero(found != buffer.true[at : at + nr_bytes]))
        self.outcome.nr_pages_read += nr_bytes // buffer.region.page_bytes
        return True

    def _judge(self, buffer: Buffer, page: int, error: GpuError) -> None:
        """Why a page could not be read."""
        lost = buffer.region.state[page] == PageState.CORRUPT
        self.outcome.nr_refused += error.errno == errno.EIO and bool(lost)
        self.outcome.nr_unexplained += error.errno == errno.EIO and not lost
        self.outcome.nr_no_room += error.errno == errno.ENOMEM
        self.outcome.nr_unexplained += error.errno not in (errno.EIO, errno.ENOMEM)

    def _work(self, number: int) -> None:
        """What clients and their keeper do between faults."""
        self._heal()
        for _ in range(4):
            buffer = self.buffers[int(self.rng.integers(len(self.buffers)))]
            at = int(self.rng.integers(len(buffer.true) - 5000))
            self._write(buffer, at, int(self.rng.integers(1, 5000)))
        self._sync(self.buffers[number % len(self.buffers)])
        if number % _SCRUB_EVERY == 0:
            self.fault.scrubber.scrub(self.fault.scrubber.total_bytes)
        if number % _CHECKPOINT_EVERY == 0:
            self._checkpoint(number // _CHECKPOINT_EVERY % 4)
        if number % _RESET_EVERY == 0:
            for location in self.memory.locations:
                self.fault.limits.per_bank += 8  # as if a new device had been put in
                self.fault.limits.in_all += 1024
                self.fault.reset(location)

    def _checkpoint(self, number: int) -> None:
        client = f"client{number}"
        try:
            self.fault.checkpoints.create(client)
        except GpuError:
            self.outcome.nr_refused += 1
            return
        self._snapshots[client] = [buffer.true.copy() for buffer in self._of(client)]

    def _roll_back(self, client: str) -> bool:
        """When a device is lost: what is true from now on is what was true then."""
        done = self.fault.go_back(client)
        for buffer, then in zip(self._of(client), self._snapshots.get(client, ()) if done else (), strict=False):
            buffer.true[:] = then
        return done

    def _of(self, client: str) -> list[Buffer]:
        return [buffer for buffer in self.buffers if buffer.client == client]

    def _sync(self, buffer: Buffer) -> None:
        try:
            self.memory.sync(buffer.client, buffer.va, len(buffer.true))
        except GpuError:
            self.outcome.nr_refused += 1

    def _heal(self) -> None:
        """Write lost pages anew, as a client would that was told."""
        for buffer in self.buffers:
            size = buffer.region.page_bytes
            for page in np.flatnonzero(buffer.region.state == PageState.CORRUPT).tolist():
                self._write(buffer, page * size, size)

    def _write(self, buffer: Buffer, at: int, nr_bytes: int) -> None:
        data = self.rng.bytes(nr_bytes)
        try:
            self.memory.write(buffer.client, buffer.va + at, data)
            nr_done = nr_bytes
        except GpuError as error:
            nr_done = error.nr_done
            self.outcome.nr_unexplained += error.errno not in (errno.EIO, errno.ENOMEM)
        buffer.true[at : at + nr_done] = np.frombuffer(data[:nr_done], dtype=np.uint8)


def run(nr_faults: int = NR_FAULTS, seed: int = 1) -> Outcome:
    """All of it, under a progress bar; what is logged for each fault is not shown."""
    log = logging.getLogger("dpud.gpu")
    before = log.level
    log.setLevel(logging.CRITICAL)
    try:
        with tempfile.TemporaryDirectory(prefix="dpud-bench-") as folder, Progress(console=Console(stderr=True)) as bar:
            task = bar.add_task("Injecting faults", total=nr_faults)
            return Campaign(seed, Path(folder)).run(nr_faults, lambda nr: bar.update(task, completed=nr))
    finally:
        log.setLevel(before)
