# SPDX-License-Identifier: MIT
"""One checkpoint being made: pages are copied in rounds while the client goes on, the last of them at one moment."""

from collections.abc import Iterator, Sequence

import numpy as np

from dpud.gpu.address_space.regions import PageState
from dpud.gpu.address_space.space import Pages
from dpud.gpu.blob import PageCodec
from dpud.gpu.fault.chain import KeptRegion
from dpud.gpu.fault.checkpoint_file import Writer
from dpud.gpu.fault.pages import load
from dpud.gpu.memory import GpuMemory

NR_ROUNDS = 4
_SLICE_BYTES = 4 << 20
_BATCH_BYTES = 1 << 20


class Creation:
    """Of one client's regions, into one file."""

    def __init__(self, memory: GpuMemory, codec: PageCodec, writer: Writer, kept: Sequence[KeptRegion]) -> None:
        self.writer, self.kept = writer, kept
        self.is_stale = False
        """The client went back to its last checkpoint: this one would be of nothing that was."""
        self._memory, self._codec = memory, codec
        self._places: list[dict[int, int]] = [{} for _ in kept]

    def rounds(self) -> Iterator[int]:
        """Copy, with a yield wherever others may run, of how many bytes come next; what is changed meanwhile is left
        for `rest`, before which there is a last yield."""
        for _ in range(NR_ROUNDS):
            if sum(len(each.log) << each.region.page_shift for each in self.kept) <= _SLICE_BYTES:
                break
            for index, each in enumerate(self.kept):
                left = len(each.log)
                while left > 0:
                    nr = min(left, max(1, _SLICE_BYTES >> each.region.page_shift))
                    yield _written_bytes(each, nr)
                    pages = each.log.take(nr)
                    left -= len(pages) or left
                    self._copy(index, pages)
        yield sum(_written_bytes(each) for each in self.kept)

    def rest(self) -> None:
        """Copy what is left: this is the moment that the checkpoint is of."""
        for index, each in enumerate(self.kept):
            self._copy(index, each.log.take())

    def _copy(self, index: int, pages: Pages) -> None:
        each = self.kept[index]
        region = each.region
        each.taken.update(pages.tolist())
        written = pages[region.state[pages] != PageState.UNTOUCHED]
        if self._memory.space.regions.find(region.va) is not region:
            return  # it was freed meanwhile
        per_batch = max(1, _BATCH_BYTES >> region.page_shift)
        for start in range(0, len(written), per_batch):
            batch = written[start : start + per_batch]
            rows = load(self._memory, region, batch)
            blobs = self._codec.encode([row.data for row in rows], region.client)
            for page, blob in zip(batch.tolist(), blobs, strict=True):
                self._places[index][page] = self.writer.add(index, page, blob)

    def finish(self) -> int:
        """The file is whole, and what the regions' pages are from now on is in it -> its digest. Raises OSError."""
        digest = self.writer.finish()
        for each, places in zip(self.kept, self._places, strict=True):
            each.places.update({page: (self.writer.path, at) for page, at in places.items()})
            each.taken.clear()
        return digest

    def abandon(self) -> None:
        """As if nothing had been copied."""
        self.writer.abandon()
        for each in self.kept:
            for page in each.taken:
                each.log.mark(page, 1)
            each.taken.clear()

    def by_key(self) -> dict[int, KeptRegion]:
        return {each.region.first_key: each for each in self.kept}

    @property
    def nr_pages(self) -> int:
        return sum(map(len, self._places))


def _written_bytes(each: KeptRegion, limit: int | None = None) -> int:
    """Of the first pages that changed, those that have bytes."""
    written = each.region.state[each.log.peek(limit)] != PageState.UNTOUCHED
    return int(np.count_nonzero(written)) << each.region.page_shift
