# SPDX-License-Identifier: MIT
"""What is done about errors, page by page, before their bytes are used.

Theory of operation
    The data path asks `examine` before it reads pages, at a moment when it has not yet looked where they are. Suspect
    frames are read with ECC's eyes: what can be corrected is left to the read itself. What cannot is an event (XID 48),
    and the page is made good from a copy elsewhere, if there is one (copies.py). How is the policy's choice:

    retry               into the same frame, three times at most. Cells that are broken stay in use (with all others,
                        frames that may have errors are tested before a page gets them).
    remap               the row is replaced by a spare at once (as DDR4's soft post-package repair does), into the same
                        frame; without a spare, as with migrate.
    migrate             into another frame. The old one is retired, its row remapped at the next reset. NVIDIA's driver
                        does this (dynamic page offlining).
    failover            the same; then everything else leaves the device too, and so do its clients.
    checkpoint-restore  the same; and where there is no copy, the client goes back to its last checkpoint.

    Without a copy the bytes are lost: the page is CORRUPT and whoever reads it gets EIO (XID 94; 95 if several clients
    may). With failover, too, a client that has a checkpoint goes back to it.

    Frames with too many corrected errors (errorcount.py) are emptied and retired here as well, and by the scrubber.
"""

import errno
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from enum import StrEnum

import numpy as np

from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.address_space.space import Pages
from dpud.gpu.errors import GpuError, UncorrectableError
from dpud.gpu.fault.cells import Cells
from dpud.gpu.fault.copies import Copies
from dpud.gpu.fault.errorcount import Action, Rule
from dpud.gpu.fault.events import EventLog, Xid
from dpud.gpu.fault.placing import Placing
from dpud.gpu.fault.rows import Cause, Rows
from dpud.gpu.hal.interface import Bytes
from dpud.gpu.location import Frames, Location
from dpud.gpu.memory import GpuMemory

NR_RETRIES = 3
log = logging.getLogger("dpud.gpu.fault")


class Policy(StrEnum):
    RETRY = "retry"
    REMAP = "remap"
    MIGRATE = "migrate"
    FAILOVER = "failover"
    RESTORE = "checkpoint-restore"


STATS = (
    "corrected",
    "uncorrectable",
    "repaired_from_copy",
    "repaired_from_store",
    "repaired_from_checkpoint",
    "retried",
    "remapped",
    "moved",
    "offlined",
    "lost_pages",
    "rollbacks",
    "rolled_back_pages",
    "lost_work_ns",
    "failovers",
)


class Recovery:
    """An Examiner of a GpuMemory."""

    def __init__(
        self,
        memory: GpuMemory,
        cells: Sequence[Cells],
        rows: Sequence[Rows],
        placing: Placing,
        copies: Copies,
        events: EventLog,
        rule: Rule,
    ) -> None:
        self.memory = memory
        self.policy = Policy.MIGRATE
        self.stats: Counter[str] = Counter(dict.fromkeys(STATS, 0))
        self.roll_back: Callable[[str], bool] = lambda _client: False
        """Bring a client back to its last checkpoint -> whether there is one."""
        self.drain: Callable[[Location], None] = lambda _location: None
        self.on_uncorrectable: Callable[[Location, int], None] = lambda _location, _frame: None
        self.on_loss: Callable[[], None] = lambda: None
        """Bytes were lost that no copy has."""
        self.due: set[tuple[int, int]] = set()
        """(location, frame) of frames that had too many corrected errors."""
        self.suspected: set[tuple[int, int]] = set()
        """The same of frames that are predicted to fail."""
        self._cells, self._rows, self._placing, self._copies = cells, rows, placing, copies
        self._events, self._rule = events, rule
        self._lines = [each.lines for each in cells]
        self._at_work = False

    # Looking.

    @property
    def _all_quiet(self) -> bool:
        """Every access asks, so it must be quick: no properties."""
        return not (any(self._lines) or self.due or self.suspected)

    def examine(self, region: Region, pages: Pages) -> int:
        """Make pages readable -> how many are elsewhere now, or CORRUPT. What recovery itself does is not examined."""
        if self._at_work or self._all_quiet:
            return 0
        self._at_work = True
        try:
            nr = self.offline_due()
            for page in self._suspects(region, pages):
                nr += self._examine(region, page)
            return nr
        finally:
            self._at_work = False

    def unreadable(self, region: Region, pages: Pages) -> Pages:
        """Those of some resident pages whose bytes ECC would not let through."""
        if not any(self._lines):
            return pages[:0]
        bad = [
            page
            for page in self._suspects(region, pages)
            if self._bad_frames(self._cells[int(region.home[page])], region, int(region.frame[page]))
        ]
        return np.array(bad, dtype=np.int64)

    def are_fit(self, location: Location, firsts: Frames, order: int) -> bool:
        """Whether blocks may be given to pages as they are."""
        return self.policy is Policy.RETRY or self._placing.are_fit(location, firsts, order)

    def screen(self, location: Location, firsts: Frames, order: int) -> None:
        """Take what is broken of free blocks out of use, and write the rest anew."""
        self._placing.screen(location, firsts, order)

    def _suspects(self, region: Region, pages: Pages) -> list[int]:
        """Those that have a frame, at home or elsewhere, that may have errors."""
        resident = pages[region.state[pages] == PageState.RESIDENT]
        found: set[int] = {page for page in resident.tolist() if page in region.replicas} if region.replicas else set()
        for cells in self._cells:
            here = resident[region.home[resident] == cells.number]
            if len(here) and not cells.is_quiet:
                frames = region.frame[here][:, None] + np.arange(1 << region.order)
                found.update(here[cells.is_suspect[frames].any(axis=1)].tolist())
        return sorted(found)

    @staticmethod
    def _bad_frames(cells: Cells, region: Region, first: int) -> list[int]:
        frames = Placing.frames_of(region, first)
        return [frame for frame in frames if cells.is_suspect[frame] and cells.bad_sectors(frame).any()]

    def _examine(self, region: Region, page: int) -> int:
        if region.state[page] != PageState.RESIDENT:
            return 1  # it had to make room for another one that was made good
        nr = self._examine_copies(region, page)
        cells = self._cells[int(region.home[page])]
        if bad := self._bad_frames(cells, region, int(region.frame[page])):
            self._make_good(region, page, bad)
            nr += 1
        return nr

    def _examine_copies(self, region: Region, page: int) -> int:
        """A copy elsewhere that is bad is dropped: there is the page itself."""
        nr = 0
        for number, first in list(region.replicas.get(page, {}).items()):
            location = self.memory.locations[number]
            if bad := self._bad_frames(self._cells[number], region, first):
                self._events.add(Xid.DBE, location.name, f"in a copy at frame {bad[0]:#x}", region.client)
                self.stats["uncorrectable"] += 1
                location.policy.remove(region.first_key + page)
                self.memory.residency.drop_copy(region, page, location)
                for frame in bad:
                    self._placing.retire(location, frame, Cause.UNCORRECTABLE)
                nr += 1
        return nr

    # Making good.

    def _make_good(self, region: Region, page: int, bad: list[int]) -> None:
        location = self.memory.locations[int(region.home[page])]
        self.stats["uncorrectable"] += 1
        va = region.va + (page << region.page_shift)
        self._events.add(Xid.DBE, location.name, f"frame {bad[0]:#x}, page {va:#x}", region.client)
        for frame in bad:
            self._cells[location.number].count_miscorrected(frame)
        self.on_uncorrectable(location, bad[0])
        found = self._copies.find(region, page)
        if found is None:
            self._give_up(region, page, bad)
        else:
            where, row = found
            kind = "checkpoint" if where == "checkpoint" else "store" if where in ("pool", "swap") else "copy"
            self.stats[f"repaired_from_{kind}"] += 1
            log.info("page %#x is made good from %s", va, where)
            {Policy.RETRY: self._retry, Policy.REMAP: self._remap}.get(self.policy, self._move)(region, page, bad, row)
        if self.policy is Policy.FAILOVER and not location.is_host and not location.is_lost:
            self.drain(location)

    def _retry(self, region: Region, page: int, bad: list[int], row: Bytes) -> None:
        cells, first = self._cells[int(region.home[page])], int(region.frame[page])
        for _ in range(NR_RETRIES):
            self.stats["retried"] += 1
            self._placing.rewrite(region, page, row)
            if not self._bad_frames(cells, region, first):
                return
        self.on_loss()
        self._placing.lose(region, page)  # and the frames are free again, as bad as they are
        self._say_lost(region, page)

    def _remap(self, region: Region, page: int, bad: list[int], row: Bytes) -> None:
        location = self.memory.locations[int(region.home[page])]
        rows = self._rows[location.number]
        for frame in bad:
            if not rows.reserve(frame, Cause.UNCORRECTABLE):
                self._events.add(
                    Xid.REMAP_FAILURE, location.name, f"row {frame:#x}: bank {rows.bank(frame)} has no spare"
                )
                self._move(region, page, bad, row)
                return
            rows.take_effect(frame)
            self._cells[location.number].replace(frame)
            self.stats["remapped"] += 1
            self._events.add(Xid.REMAP, location.name, f"row {frame:#x} of bank {rows.bank(frame)} is remapped")
        self._placing.rewrite(region, page, row)

    def _move(self, region: Region, page: int, bad: list[int], row: Bytes) -> None:
        """Into another frame of the same location, else into the stores, else into another location's, or node's."""
        broken, home = dict.fromkeys(bad, Cause.UNCORRECTABLE), int(region.home[page])
        self.stats["moved"] += 1
        if self._moved(region, page, self.memory.locations[home], row, broken):
            return
        try:
            self._placing.put_away(region, page, row, broken)
            return
        except GpuError as error:
            log.warning("page of %s: %s", region.client, error)
        hosts = self.memory.locations[self.memory.nr_devices :]
        others = {RegionType.MANAGED: self.memory.locations, RegionType.HOST: hosts}.get(region.type, ())
        if not any(self._moved(region, page, to, row, broken) for to in others if to.number != home):
            self._give_up(region, page, bad)

    def _moved(self, region: Region, page: int, to: Location, row: Bytes, broken: dict[int, Cause]) -> bool:
        try:
            self._placing.move(region, page, to, row, broken)
        except GpuError as error:
            if error.errno not in (errno.ENOMEM, errno.ENODEV):
                raise
            return False
        return True

    def _give_up(self, region: Region, page: int, bad: list[int]) -> None:
        """No copy, or nowhere to put it."""
        self.on_loss()
        self._placing.lose(region, page, dict.fromkeys(bad, Cause.UNCORRECTABLE))
        if self.policy in (Policy.RESTORE, Policy.FAILOVER) and self.roll_back(region.client):
            return
        self._say_lost(region, page)

    def _say_lost(self, region: Region, page: int) -> None:
        self.stats["lost_pages"] += 1
        shared = len(region.permissions) > 1
        text = f"page {region.va + (page << region.page_shift):#x} is lost"
        where = self.memory.locations[int(region.home[page])].name
        self._events.add(Xid.UNCONTAINED if shared else Xid.CONTAINED, where, text, region.client)

    # Too many corrected errors.

    @property
    def is_quiet(self) -> bool:
        """No frame waits for `offline_due`."""
        return not self.due and not self.suspected

    def offline_due(self) -> int:
        """Empty and retire frames that had, or will have, too many errors -> pages that are elsewhere now."""
        due, self.due = self.due, set()
        nr = sum(self._offline(self.memory.locations[number], frame) for number, frame in sorted(due))
        suspected, self.suspected = self.suspected, set()
        for number, frame in sorted(suspected):
            location = self.memory.locations[number]
            if not self._placing.is_retired(location, frame) and not location.is_lost:
                nr += self.take_offline(location, frame)
        return nr

    def _offline(self, location: Location, frame: int) -> int:
        if self._placing.is_retired(location, frame) or location.is_lost:
            return 0
        text = f"{self._rule.threshold} corrected errors of page {frame:#x}"
        self._events.add(Xid.HIGH_SBE_RATE, location.name, text)
        if self._rule.action is Action.ACCOUNT:
            return 0
        return self.take_offline(location, frame)

    def take_offline(self, location: Location, frame: int) -> int:
        """A frame out of use, as the rule's action says -> pages that are elsewhere now."""
        if self._placing.is_free(location, frame):
            self._placing.retire(location, frame, Cause.CORRECTABLE)
            return 0
        region, page = self.memory.space.regions.page_of(int(location.frames.owner[frame]))
        if region.home[page] != location.number:  # a copy: there is the page itself
            location.policy.remove(region.first_key + page)
            self.memory.residency.drop_copy(region, page, location)
            self._placing.retire(location, frame, Cause.CORRECTABLE)
            return 1
        return self._empty(region, page, location, frame)

    def _empty(self, region: Region, page: int, location: Location, frame: int) -> int:
        broken = {frame: Cause.CORRECTABLE}
        if self._rule.action is not Action.HARD:
            try:
                row = location.load_pages(region.frame[[page]], region.page_bytes)[0]
            except UncorrectableError:
                return 0  # whoever reads the page next has it made good
            if self._moved(region, page, location, row, broken):
                self.stats["offlined"] += 1
                return 1
            if self._rule.action is Action.SOFT:
                log.warning("page %#x of %s stays, there is no room", frame, location.name)
                return 0
        found = self._copies.find(region, page)
        if found is None:
            self._give_up(region, page, [frame])
        elif not self._moved(region, page, location, found[1], broken):
            self._placing.put_away(region, page, found[1], broken)
        self.stats["offlined"] += 1
        return 1
