# SPDX-License-Identifier: MIT
"""A heap in device memory whose blocks move while they are used: handles, as in RMM or PyTorch's allocator.

    heap = Suballocator(memory, "train", 64 << 20)
    block = heap.alloc(5000)
    heap.write(block, 0, b"weights")
    heap.read(block, 0, 7)
    with heap.pinned(block, "kernel 3", "runs") as va: ...

Who needs an address pins the block for as long. All else goes through the handle, also while the block is on its way:
its first bytes are at the new place already and the rest is where it was (where it moves up over itself, the other way
round), so an access is split there and no write is lost.

An allocation that finds no hole has one made, at once and in slices; one that has to wait for nobody yields between
them (`allocation`). It fails only if less is free than it needs, or pins are in the way, and then says which.
"""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.defrag.effort import Effort
from dpud.gpu.defrag.heap import Block, Heap, rounded
from dpud.gpu.defrag.metrics import scattered
from dpud.gpu.defrag.moving import RegionMover
from dpud.gpu.defrag.plan import Move, plan
from dpud.gpu.errors import GpuError
from kernelsim.operation import Operation, complete

if TYPE_CHECKING:
    from dpud.gpu.memory import GpuMemory

_MAX_PLANS = 16
"""Others may take what a plan counted on; then another is made, so often."""
_STAGING_BYTES = 64 << 10


class Suballocator:
    """One heap. `effort`: whose pauses it counts; its own where none is passed."""

    def __init__(
        self,
        memory: "GpuMemory",
        client: str,
        nr_bytes: int,
        *,
        page_size: int = 4096,
        effort: Effort | None = None,
        device: int | None = None,
    ) -> None:
        """Raises GpuError: EINVAL, ENOMEM."""
        self.memory, self.client = memory, client
        self.effort = effort or Effort()
        start = -(-nr_bytes // page_size) * page_size
        staging = max(_STAGING_BYTES, page_size)
        self.va = memory.allocate(client, start + staging, RegionType.DEVICE, page_size=page_size, device=device)
        region = memory.space.regions.find(self.va)
        assert region is not None
        self.region = region
        self.heap = Heap(nr_bytes, page_size)
        self.mover = RegionMover(memory, region, (start, staging), self.effort)
        self.nr_plans = self.nr_moves = 0
        self.last_failure = ""

    def close(self) -> None:
        self.memory.free(self.va, self.client)

    # Taking and giving.

    def alloc(self, nr_bytes: int) -> Block:
        """Raises GpuError: EINVAL, ENOMEM with the reason."""
        return complete(self.allocation(nr_bytes))

    def allocation(self, nr_bytes: int) -> Operation[Block]:
        """`alloc` as an operation."""
        for _ in range(_MAX_PLANS):
            block = self.heap.alloc(nr_bytes)
            if block is not None:
                return block
            if not (yield from self.making_hole(rounded(nr_bytes))):
                break
        self.last_failure = self._explain(rounded(nr_bytes))
        raise GpuError(errno.ENOMEM, self.last_failure)

    def free(self, block: Block) -> None:
        """Raises GpuError: EINVAL for one that is free, EBUSY for one that is pinned."""
        if block.pins:
            raise GpuError(errno.EBUSY, f"pinned by {block.pins[0][0]}")
        self.heap.free(block)

    def _explain(self, size: int) -> str:
        heap = self.heap
        text = f"wanted {size}, free {heap.free_bytes}, largest hole {heap.largest_hole}"
        if heap.free_bytes < size:
            return f"{text}; no move helps, too little is free"
        pinned = {id(block): block for block in heap if block.pins}
        who = ", ".join(f"{b.size} at {b.start:#x} (pinned by {b.pins[0][0]}: {b.pins[0][1]})" for b in pinned.values())
        found = plan(heap, size)
        moves = f"fewest moves: {len(found.moves)} blocks, {found.nr_bytes} bytes" if found else "no move helps"
        return f"{text}, in the way: {who or 'nobody'}; {moves}"

    # Bytes.

    def read(self, block: Block, offset: int, nr_bytes: int) -> bytes:
        """Raises GpuError: EFAULT outside of the block, else as GpuMemory.read."""
        self._check(block, offset, nr_bytes)
        return b"".join(
            self.memory.read(self.client, self.va + start, nr) for start, _, nr in _places(block, offset, nr_bytes)
        )

    def write(self, block: Block, offset: int, data: bytes) -> None:
        """Raises as `read`, and as GpuMemory.write."""
        self._check(block, offset, len(data))
        for start, done, nr in _places(block, offset, len(data)):
            self.memory.write(self.client, self.va + start, data[done : done + nr])

    @staticmethod
    def _check(block: Block, offset: int, nr_bytes: int) -> None:
        if not block.is_live or offset < 0 or nr_bytes < 0 or offset + nr_bytes > block.nr_bytes:
            raise GpuError(errno.EFAULT, f"{nr_bytes} bytes at {offset} of a block of {block.nr_bytes}")

    def pin(self, block: Block, owner: str, reason: str = "") -> int:
        """Its address, which stays until `unpin`. A block that is on its way arrives first."""
        self._check(block, 0, block.nr_bytes)
        while block.target is not None:
            self._move_slice(block)
        block.pins.append((owner, reason))
        return self.va + block.start

    def unpin(self, block: Block, owner: str) -> None:
        """Raises GpuError(EINVAL) for who did not pin it."""
        pin = next((each for each in block.pins if each[0] == owner), None)
        if pin is None:
            raise GpuError(errno.EINVAL, f"{owner} has no pin")
        block.pins.remove(pin)

    @contextmanager
    def pinned(self, block: Block, owner: str, reason: str = "") -> Iterator[int]:
        """Its address, within the `with`."""
        va = self.pin(block, owner, reason)
        try:
            yield va
        finally:
            self.unpin(block, owner)

    # Moving.

    @property
    def scattered(self) -> float:
        """1 - largest hole / free."""
        return scattered(self.heap.holes)

    def making_hole(self, size: int) -> Operation[bool]:
        """Move what is cheapest to move, in slices -> whether all of it was done."""
        found = plan(self.heap, size)
        if found is None:
            return False
        self.nr_plans += 1
        for move in found.moves:
            if not (yield from self._moving(move)):
                return True  # somebody is where it was to go: plan anew
        return True

    def defragment(self, threshold: float = 0.0) -> Operation[int]:
        """Make holes until 1 - largest/free is at most `threshold`, as far as pins let it -> plans carried out."""
        before = self.nr_plans
        while self.scattered > threshold and self.nr_plans - before < _MAX_PLANS:
            wanted = int(self.heap.free_bytes * (1 - threshold))
            if not (yield from self.making_hole(max(wanted, self.heap.largest_hole + 1))):
                break
        return self.nr_plans - before

    def _moving(self, move: Move) -> Operation[bool]:
        block = move.block
        if not block.is_live:
            return True
        if not block.is_movable or not self.mover.slice_bytes or not self.heap.begin_move(block, move.target):
            return False
        self.nr_moves += 1
        while block.is_live and block.target is not None:
            self._move_slice(block)
            yield None
        return True

    def _move_slice(self, block: Block) -> None:
        """The next piece of a block that is on its way; it has arrived when there is none."""
        assert block.target is not None
        done, left = block.nr_moved, block.size - block.nr_moved
        if left:
            block.nr_moved += self._remapped(block, left) or self._copied(block, left)
        else:
            self.heap.end_move(block)
        assert block.nr_moved > done or block.target is None, "no progress"

    def _remapped(self, block: Block, left: int) -> int:
        """Whole pages that are in step at both places -> bytes; 0 where there are none."""
        assert block.target is not None
        page, at, to = self.region.page_bytes, block.start + block.nr_moved, block.target + block.nr_moved
        if at % page or to % page or block.target > block.start:
            return 0
        nr_pages = min(left, abs(at - to), self.mover.slice_bytes) // page
        return nr_pages * page if nr_pages and self.mover.remap(at // page, to // page, nr_pages) else 0

    def _copied(self, block: Block, left: int) -> int:
        assert block.target is not None
        distance = abs(block.target - block.start)
        nr = min(left, self.mover.slice_bytes)
        if distance < nr:
            nr = min(nr, self.mover.staging[1])
        head = -(block.start + block.nr_moved) % self.region.page_bytes
        if head and (block.start - block.target) % self.region.page_bytes == 0:
            nr = min(nr, head)  # what follows can be remapped
        at = block.nr_moved if not _moves_up(block) else block.size - block.nr_moved - nr
        self.mover.copy(block.start + at, block.target + at, nr)
        return nr


def _moves_up(block: Block) -> bool:
    """Over its own place, so that its end goes first."""
    return block.target is not None and block.start < block.target < block.start + block.size


def _places(block: Block, offset: int, nr_bytes: int) -> Iterator[tuple[int, int, int]]:
    """(byte of the heap, bytes before, bytes) of a range of a block, cut where what has moved ends."""
    if block.target is None or not nr_bytes:
        yield block.start + offset, 0, nr_bytes
        return
    up = _moves_up(block)
    cut = block.size - block.nr_moved if up else block.nr_moved
    lower, upper = (block.start, block.target) if up else (block.target, block.start)
    low = max(0, min(nr_bytes, cut - offset))
    if low:
        yield lower + offset, 0, low
    if low < nr_bytes:
        yield upper + offset + low, low, nr_bytes - low
