# SPDX-License-Identifier: MIT
"""Fault recovery as one part of a GpuMemory, and what it is told to do.

memory = GpuMemory(devices, swap=swap)
fault = FaultModule()
fault.attach(memory)
fault.checkpoints.create("train")
fault.inject("bit bits=2 client=train")
"""

import errno
import logging
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.address_space.pagetable import FRAME_SHIFT
from dpud.gpu.address_space.regions import Region
from dpud.gpu.address_space.space import Pages
from dpud.gpu.blob import PageCodec, PlainCodec
from dpud.gpu.errors import GpuError, HalfBack
from dpud.gpu.fault import injector
from dpud.gpu.fault.cells import Cells, Corrected
from dpud.gpu.fault.checkpoints import Checkpoints
from dpud.gpu.fault.copies import Copies
from dpud.gpu.fault.errorcount import ErrorCount, Rule
from dpud.gpu.fault.events import EventLog, Xid
from dpud.gpu.fault.failover import Failover
from dpud.gpu.fault.failpoints import FailPoints
from dpud.gpu.fault.features import CorrectedError
from dpud.gpu.fault.placing import Placing
from dpud.gpu.fault.predictor import Predictor
from dpud.gpu.fault.recovery import Recovery
from dpud.gpu.fault.rows import Limits, Rows
from dpud.gpu.fault.scrubber import Scrubber
from dpud.gpu.fault.secded import Positions
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.location import Frames, Location
from dpud.gpu.memory import GpuMemory

log = logging.getLogger("dpud.gpu.fault")

SUSPICIOUS_CELLS = 2
"""Rows with so many bad cells go out of use when their bank is predicted to fail."""


class FaultModule:
    """An Examiner. `codec` is for checkpoints, `folder` where they are (checkpoints.py)."""

    def __init__(self, memory: GpuMemory, codec: PageCodec | None = None, folder: Path | None = None) -> None:
        """Stand between the memories of a GpuMemory and who reads them."""
        self.memory = memory
        self.limits, self.rule = Limits(), Rule()
        self.acts_on_predictions = False
        """Whether rows go out of use because their bank is predicted to fail."""
        self.cells = [self._guard(location) for location in memory.locations]
        self.rows = [Rows(cells.nr_frames, self.limits) for cells in self.cells]
        self.counts = [ErrorCount(self.rule) for _ in self.cells]
        self.predictors = [Predictor(rule=self.rule) for _ in self.cells]
        self.events = EventLog(memory.clock)
        self.placing = Placing(memory, self.cells, self.rows, self.events)
        self.checkpoints = Checkpoints(memory, codec or PlainCodec(), folder)
        copies = Copies(memory, self.checkpoints)
        self.recovery = Recovery(memory, self.cells, self.rows, self.placing, copies, self.events, self.rule)
        self.failover = Failover(memory, self.placing, copies, self.events)
        self.injector = injector.Injector(memory, self.cells, self.rows, self.lose)
        self.fail_points = FailPoints(self.injector, memory.nr_devices)
        self.scrubber = Scrubber(memory, self.cells, self.placing, self.recovery)
        self._connect()

    def _guard(self, location: Location) -> Cells:
        device = location.hardware
        assert isinstance(device, SimulatedDevice), "faults are put into simulated cells"
        cells = device.ecc if isinstance(device.ecc, Cells) else Cells(device.memory, location.number)
        device.ecc = cells
        cells.on_corrected = self._corrected_at(location)
        return cells

    def _connect(self) -> None:
        self.recovery.roll_back = self.failover.roll_back = self.go_back
        self.recovery.drain = self.drain
        self.failover.unreadable = self.recovery.unreadable
        self.recovery.on_uncorrectable = self._uncorrectable
        self.recovery.on_loss = self._lost
        self.memory.residency.examiner = self
        self.memory.fault = self

    def detach(self) -> None:
        """Do nothing any more. Memories keep their ECC and what is broken: a read that cannot be corrected fails."""
        self.memory.residency.examiner = None
        self.memory.fault = None

    # What the path asks.

    def examine(self, region: Region, pages: Pages) -> int:
        if self.fail_points.armed:
            self.fail_points.called(region, pages)
        return self.recovery.examine(region, pages)

    def unreadable(self, region: Region, pages: Pages) -> Pages:
        return self.recovery.unreadable(region, pages)

    def are_fit(self, location: Location, firsts: Frames, order: int) -> bool:
        return self.recovery.are_fit(location, firsts, order)

    def screen(self, location: Location, firsts: Frames, order: int) -> None:
        self.recovery.screen(location, firsts, order)

    def forget(self, client: str) -> None:
        """A client is gone."""
        self.checkpoints.forget(client)

    # What ECC tells.

    def _corrected_at(self, location: Location) -> Corrected:
        def corrected(frame: int, words: NDArray[np.int64], bits: Positions) -> None:
            now_ns = self.memory.clock.now_ns()
            self.recovery.stats["corrected"] += len(words)
            if self.counts[location.number].add(frame, len(words), now_ns):
                self.recovery.due.add((location.number, frame))
            for word, bit in zip(words.tolist(), bits.tolist(), strict=True):
                self._predict(location.number, frame, word, bit, now_ns)

        return corrected

    def _predict(self, number: int, frame: int, word: int, bit: int, now_ns: int) -> None:
        rows, predictor = self.rows[number], self.predictors[number]
        bank = rows.bank(frame)
        error = CorrectedError(now_ns, frame // rows.nr_banks, word, bit)
        predictor.corrected(bank, error)
        if not self.acts_on_predictions or not predictor.learnt.is_alarmed(bank):
            return
        for row, nr_cells in predictor.rows(bank).items():
            if nr_cells >= SUSPICIOUS_CELLS:
                self.recovery.suspected.add((number, row * rows.nr_banks + bank))

    def _uncorrectable(self, location: Location, frame: int) -> None:
        bank = self.rows[location.number].bank(frame)
        self.predictors[location.number].uncorrectable(bank, self.memory.clock.now_ns())

    def _lost(self) -> None:
        self.checkpoints.interval.nr_failures += 1

    # What it is told.

    def inject(self, text: str) -> int:
        """Break something (injector.py) -> how many faults there are more. Raises GpuError: EINVAL, ENODEV."""
        return self.injector.inject(injector.parse(text, self.memory.space.names))

    def lose(self, location: Location) -> None:
        """A device falls off the bus, and is found to have."""
        location.hardware.lost = True
        self._lost()
        self.recovery.stats["failovers"] += 1
        self.failover.lose(location)

    def drain(self, location: Location) -> None:
        """Everything leaves a device. Raises GpuError: EINVAL for the host, ENODEV for one that is lost."""
        if location.number >= self.memory.nr_devices:
            raise GpuError(errno.EINVAL, "host memory cannot be emptied")
        if location.is_lost:
            raise GpuError(errno.ENODEV, f"{location.name} is lost")
        self.recovery.stats["failovers"] += 1
        self.failover.drain(location)

    def reset(self, location: Location) -> int:
        """Reset a device: a lost one is there again, remappings take effect -> frames that may be used again.

        Frames for which there was no spare row stay out of use.
        """
        cells, rows, frames = self.cells[location.number], self.rows[location.number], location.frames
        before = frames.nr_retired
        for row in list(rows.pending):
            rows.take_effect(row)
            cells.replace(row)
            if self.placing.is_retired(location, row):
                self.placing.revive(location, row)
        if location.is_lost:
            location.hardware.lost = False
            for frame in range(frames.nr_frames):
                if self.placing.is_retired(location, frame) and frame not in self.placing.retired[location.number]:
                    frames.unretire(frame)
        self.memory.accounting.tell()  # somebody may have waited for them
        return before - frames.nr_retired

    def is_held(self, client: str) -> bool:
        """Whether a migration is just handing the client over."""
        owner = self.memory.clients.get(client)
        return owner is not None and any(region.held for region in owner.regions)

    def roll_back(self, client: str) -> bool:
        """Bring a client back to its last checkpoint -> whether there was one that is whole.

        Not while it is held: what a migration has sent already would not fit to it any more. Raises HalfBack.
        """
        if self.is_held(client):
            return False
        try:
            done = self.checkpoints.roll_back(client)
        except HalfBack as error:
            self.recovery.stats["lost_pages"] += error.nr_lost
            self._say(client, str(error.strerror))
            raise
        if done is None:
            return False
        stats = self.recovery.stats
        stats["rollbacks"] += 1
        stats["rolled_back_pages"] += done.nr_pages
        stats["lost_work_ns"] += done.lost_ns
        text = f"back to checkpoint {done.sequence}: {done.nr_pages} pages, {done.lost_ns / 1e9:.3f} s of work lost"
        self._say(client, text)
        return True

    def go_back(self, client: str) -> bool:
        """The same for who has other things to do: that pages were lost on the way is an event."""
        try:
            return self.roll_back(client)
        except HalfBack as error:
            log.error("%s: %s", client, error.strerror)
            return True

    def _say(self, client: str, text: str) -> None:
        location = self.memory.locations[self.memory.clients[client].device]
        self.events.add(Xid.CONTAINED, location.name, text, client)

    def recovery_action(self, location: Location) -> str:
        """What ought to be done about a device, in NVML's words (nvmlDeviceGpuRecoveryAction_t)."""
        rows = self.rows[location.number]
        if location.is_lost or rows.pending:
            return "reset"
        return "drain" if rows.failed else "none"

    def address_of(self, frame: int) -> int:
        """Where a frame begins in its memory."""
        return frame << FRAME_SHIFT

    def stats(self) -> dict[str, int]:
        """Counters."""
        found = dict(self.recovery.stats)
        found["miscorrected"] = sum(cells.nr_miscorrected for cells in self.cells)
        found["refused_reads"] = sum(cells.nr_uncorrectable for cells in self.cells)
        found["suspect_frames"] = sum(int(np.count_nonzero(cells.is_suspect)) for cells in self.cells)
        found["retired_frames"] = sum(len(each) for each in self.placing.retired)
        found |= {f"injected_{kind}": nr for kind, nr in self.injector.nr_injected.items()}
        return found | {"scrubbed_bytes": self.scrubber.nr_bytes, "scrub_rounds": self.scrubber.nr_rounds}
