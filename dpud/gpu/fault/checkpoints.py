# SPDX-License-Identifier: MIT
"""Checkpoints of clients: made while they run, and how a client goes back to one.

Theory of operation
    A checkpoint is all bytes of a client at one moment. Its pages are copied in rounds, as a live migration does: first
    all that changed since the last checkpoint (a full one: all there are), then what was written to meanwhile, and,
    when little is left or after some rounds, the rest without letting anybody in between. That is the moment. Pages in
    the stores are read there and stay there.

    An increment has the pages that changed since the checkpoint before it. Of that chain the module knows for each page
    which file has it, so that a page that was not written to since then can be made good from there (copies.py), and
    going back means to write only those that were.

    A checkpoint that fails half way leaves nothing: its pages count as changed again. Going back that fails half way,
    for want of room, leaves no bytes of two times: pages that are not as they were then are lost (EIO), and count as
    changed, so that going back again, when there is room, makes them good.

Differs from cuda-checkpoint: the client's program is not in it, only its memory. Regions that a client got after its
checkpoint read as zeros when it goes back; those that it freed are not given back to it.
"""

import errno
import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dpud.gpu.address_space.regions import PageState, Region, RegionType
from dpud.gpu.address_space.space import Pages
from dpud.gpu.blob import PageCodec
from dpud.gpu.client import Client
from dpud.gpu.dirty import DirtyLog
from dpud.gpu.errors import CorruptPage, GpuError, HalfBack
from dpud.gpu.fault import archive, checkpoint_file
from dpud.gpu.fault.chain import Chain, KeptRegion, Record
from dpud.gpu.fault.checkpoint_file import Label, RegionLabel, Writer, read_blob
from dpud.gpu.fault.creation import Creation
from dpud.gpu.fault.interval import Interval
from dpud.gpu.fault.pages import put
from dpud.gpu.files import settle
from dpud.gpu.hal.interface import Bytes
from dpud.gpu.memory import GpuMemory
from dpud.gpu.performance import performance
from dpud.gpu.traffic import Cause
from kernelsim.operation import Operation, complete

MAX_INCREMENTS = 16
"""After so many the next one is full: a chain is as good as its worst file."""
NR_CHAINS_KEPT = 2
_BATCH_PAGES = 256

log = logging.getLogger("dpud.gpu.fault")


@dataclass(frozen=True)
class RolledBack:
    """What going back cost."""

    sequence: int
    nr_pages: int
    lost_ns: int
    """Time of work since that checkpoint."""


class Checkpoints:
    """`folder`: where the files are; a temporary one that goes with the program if None."""

    def __init__(self, memory: GpuMemory, codec: PageCodec, folder: Path | None = None) -> None:
        self.memory = memory
        self.interval = Interval(memory.clock.now_ns())
        self.records: dict[str, list[Record]] = {}
        """By client, those that are there, oldest first."""
        self.max_increments = MAX_INCREMENTS
        self.automatic = False
        """Whether somebody is to make checkpoints that are `due`."""
        self._codec = codec
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None
        self._chains: dict[str, Chain] = {}
        self._creations: dict[str, Creation] = {}

    @property
    def folder(self) -> Path:
        """Raises OSError where none can be made."""
        if self._folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="dpud-checkpoints-")
            self._folder = Path(self._temporary.name)
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def last(self, client: str) -> Record | None:
        """What the client would go back to."""
        chain = self._chains.get(client)
        return chain.record if chain else None

    def due(self) -> list[str]:
        """Clients whose last checkpoint is older than the interval; one that has memory and none is due at once."""
        if not self.automatic:
            return []
        now_ns = self.memory.clock.now_ns()
        interval_ns = self.interval.best_ns(now_ns, self.memory.nr_devices)
        ends = {name: self._chains[name].record.time_ns for name in self._chains}
        return [
            client.name
            for client in self.memory.clients.values()
            if client.regions and (client.name not in ends or ends[client.name] + interval_ns <= now_ns)
        ]

    # Making one.

    def create(self, client: str, full: bool = False) -> Record:
        """An increment where there is one to add to, unless `full`. Raises GpuError: ENOENT, EBUSY, EIO; OSError."""
        return complete(self.creation(client, full))

    def creation(self, client: str, full: bool = False) -> Operation[Record]:
        """`create` as an operation, which yields while the client may go on."""
        owner = self.memory.clients.get(client)
        if owner is None:
            raise GpuError(errno.ENOENT, f"no client {client}")
        if client in self._creations:
            raise GpuError(errno.EBUSY, f"a checkpoint of {client} is being made")
        chain = self._chains.get(client)
        if chain is not None and (full or chain.nr_increments >= self.max_increments):
            chain = None
        begin_ns = self.memory.clock.now_ns()
        creation = self._begin(owner, chain)
        self._creations[client] = creation
        try:
            for nr_bytes in creation.rounds():
                yield from self.memory.residency.traffic.admission(client, nr_bytes, Cause.CHECKPOINT)
                yield from settle(self.memory)
                yield None
                self._check(owner, creation)
            creation.rest()
            self._check(owner, creation)  # who reads a page may find it broken, and go back
            digest = creation.finish()
        except BaseException:
            creation.abandon()
            for each in creation.kept:
                if chain is None or each.region.first_key not in chain.kept:
                    each.release()
            raise
        finally:
            del self._creations[client]
        return self._finished(client, creation, digest, chain, begin_ns)

    def _check(self, owner: Client, creation: Creation) -> None:
        if creation.is_stale:
            raise GpuError(errno.EAGAIN, f"{owner.name} went back to an earlier checkpoint meanwhile")
        if self.memory.clients.get(owner.name) is not owner:
            raise GpuError(errno.ENOENT, f"{owner.name} ended meanwhile")

    def _begin(self, owner: Client, chain: Chain | None) -> Creation:
        old = chain.kept if chain else {}
        kept = [old.get(region.first_key) or KeptRegion(region, DirtyLog(region.nr_pages)) for region in owner.regions]
        for each in kept:
            each.watch()
        sequence = archive.last_sequence(self.folder, owner.name) + 1
        parent = chain.record if chain else None
        label = Label(
            owner.name,
            sequence,
            parent.label.sequence if parent else 0,
            parent.digest if parent else 0,
            self.memory.clock.now_ns(),
            tuple(map(_label_of, owner.regions)),
        )
        return Creation(
            self.memory, self._codec, Writer(archive.path_of(self.folder, owner.name, sequence), label), kept
        )

    def _finished(self, client: str, creation: Creation, digest: int, chain: Chain | None, begin_ns: int) -> Record:
        end_ns = self.memory.clock.now_ns()
        writer = creation.writer
        record = Record(
            writer.label, writer.path, creation.nr_pages, writer.nr_bytes, end_ns - begin_ns, end_ns, digest
        )
        self.interval.measured(record.cost_ns)
        self._replace(client, Chain(record, chain.nr_increments + 1 if chain else 0, creation.by_key()))
        records = self.records.setdefault(client, [])
        records.append(record)
        for old in archive.superfluous(records, NR_CHAINS_KEPT):
            records.remove(old)
            old.path.unlink(missing_ok=True)
        performance(log, f"checkpoint {client}", writer.nr_bytes, begin_ns, end_ns)
        return record

    def _replace(self, client: str, chain: Chain | None) -> None:
        """Another chain counts from now on; what only the old one watched is watched no more."""
        old = self._chains.pop(client, None)
        still = set() if chain is None else {id(each) for each in chain.kept.values()}
        for each in old.kept.values() if old else ():
            if id(each) not in still:
                each.release()
        if chain is not None:
            self._chains[client] = chain

    # Using one.

    def page(self, region: Region, page: int) -> Bytes | None:
        """A page's bytes, if it was not written to since the last checkpoint, and that can be read."""
        chain = self._chains.get(region.client)
        each = chain.kept.get(region.first_key) if chain else None
        return self._bytes_of(each, page) if each and each.is_current(page) else None

    def _bytes_of(self, each: KeptRegion, page: int) -> Bytes | None:
        """As they are in the chain; None where a file is damaged."""
        row: Bytes = np.zeros(each.region.page_bytes, dtype=np.uint8)
        if page not in each.places:
            return row
        path, at = each.places[page]
        try:
            self._codec.decode([read_blob(path, at)], [row.data])
        except (OSError, CorruptPage) as error:
            log.error("checkpoint %s, page %d: %s", path.name, page, error)
            return None
        return row

    def roll_back(self, client: str) -> RolledBack | None:
        """All bytes of a client as they were at its last checkpoint; None where there is none that is whole.

        Raises HalfBack(ENOMEM) where there is no room for all of them.
        """
        chain, owner = self._chains.get(client), self.memory.clients.get(client)
        if chain is None or owner is None or not self._is_whole(chain):
            return None
        if client in self._creations:
            self._creations[client].is_stale = True
        known = [each for region in owner.regions if (each := chain.kept.get(region.first_key))]
        nr_pages = sum(self._blank(region) for region in owner.regions if region.first_key not in chain.kept)
        nr_pages += self._write(chain.record, [(each, each.changed()) for each in known])
        for each in known:
            each.log.take()
            each.taken.clear()
        return RolledBack(chain.record.label.sequence, nr_pages, self.memory.clock.now_ns() - chain.record.time_ns)

    @staticmethod
    def _is_whole(chain: Chain) -> bool:
        try:
            for path in {path for each in chain.kept.values() for path, _ in each.places.values()}:
                checkpoint_file.read(path)
        except (OSError, CorruptPage) as error:
            log.error("no way back to checkpoint %d: %s", chain.record.label.sequence, error)
            return False
        return True

    def _blank(self, region: Region) -> int:
        """A region that the checkpoint does not know -> pages that were not zeros."""
        touched = np.flatnonzero(region.state != PageState.UNTOUCHED)
        self.memory.residency.discard(region, touched)
        return len(touched)

    def _write(self, record: Record, wanted: Sequence[tuple[KeptRegion, Pages]]) -> int:
        """Pages of regions as they are in the chain -> how many.

        Pages for which that fails are lost, for beside the others their bytes would be of another time. Raises
        HalfBack: ENOMEM, EIO.
        """
        failures, nr_lost = [], 0
        for each, pages in wanted:
            for start in range(0, len(pages), _BATCH_PAGES):
                batch = pages[start : start + _BATCH_PAGES]
                if self._try_write(each, batch) is None:
                    continue
                for page in batch[:, None]:  # where there is no room for all, there is for some
                    if error := self._try_write(each, page):
                        failures.append(error)
                        nr_lost += 1
                        self._lose(each.region, page)
        if failures:
            first = failures[0]
            raise HalfBack(first.errno or errno.EIO, record.label.sequence, nr_lost, str(first.strerror)) from first
        return sum(len(pages) for _, pages in wanted)

    def _try_write(self, each: KeptRegion, pages: Pages) -> GpuError | None:
        """What went wrong: any of the pages may have been written or not."""
        had = np.array([page in each.places for page in pages.tolist()], dtype=np.bool_)
        blank, full = pages[~had], pages[had]
        self.memory.residency.discard(each.region, blank[each.region.state[blank] != PageState.UNTOUCHED])
        rows = [row for page in full.tolist() if (row := self._bytes_of(each, page)) is not None]
        if len(rows) < len(full):
            return GpuError(errno.EIO, "a checkpoint was damaged while it was read")
        try:
            if rows:
                put(self.memory, each.region, full, np.stack(rows))
        except GpuError as error:
            return error
        return None

    def _lose(self, region: Region, pages: Pages) -> None:
        """EIO until they are written anew, as a whole."""
        self.memory.residency.discard(region, pages)
        region.state[pages] = PageState.CORRUPT
        self.memory.residency.events["corrupt"] += len(pages)

    def forget(self, client: str) -> None:
        """A client is gone; its files stay."""
        self._replace(client, None)

    def restore(self, client: str, sequence: int | None = None) -> Record:
        """Memory of a client from its files: the last whole checkpoint or an earlier one, whatever program made them.

        Regions are those of the client that are like the ones in the label, in order; where there is none, one is made.
        Raises GpuError: ENOENT; EBUSY; EIO where the files are damaged; ENOMEM, and nothing has changed; HalfBack
        where there is room for the regions, but not for all of their pages.
        """
        if client in self._creations:
            raise GpuError(errno.EBUSY, f"a checkpoint of {client} is being made")
        files = archive.read_chain(self.folder, client, sequence)
        path, last = files[-1]
        places = archive.merged(files)
        kept = [
            KeptRegion(region, DirtyLog(region.nr_pages), places.get(label.key, {}))
            for label, region in zip(last.label.regions, self._regions_for(client, last.label), strict=True)
        ]
        record = Record(last.label, path, len(last.places), path.stat().st_size, 0, last.label.time_ns, last.digest)
        for each in kept:
            each.watch()
        self._replace(client, Chain(record, len(files) - 1, {each.region.first_key: each for each in kept}))
        self._write(record, [(each, np.arange(each.region.nr_pages)) for each in kept])
        for each in kept:
            each.log.take()
        return record

    def _regions_for(self, client: str, label: Label) -> list[Region]:
        """The client's own that are alike, each once; new ones for the rest."""
        left = list(self.memory.client(client).regions)
        found, made = [], list[Region]()
        for wanted in label.regions:
            region = next((each for each in left if _is_like(each, wanted)), None)
            if region is not None:
                left.remove(region)
            else:
                made.append(region := self._allocated(client, wanted, made))
            found.append(region)
        return found

    def _allocated(self, client: str, label: RegionLabel, made: Sequence[Region]) -> Region:
        """Where that fails, those that were made before are freed."""
        kind, size = RegionType(label.type), label.page_bytes
        try:
            va = self.memory.allocate(client, label.nr_bytes, kind, page_size=size, priority=label.priority)
        except GpuError:
            for each in made:
                self.memory.free(each.va)
            raise
        region = self.memory.space.regions.find(va)
        assert region is not None
        return region


def _label_of(region: Region) -> RegionLabel:
    return RegionLabel(
        region.first_key, region.nr_bytes, region.page_bytes, region.type.value, region.device, region.priority
    )


def _is_like(region: Region, label: RegionLabel) -> bool:
    return (region.nr_bytes, region.page_bytes, region.type.value) == (label.nr_bytes, label.page_bytes, label.type)
