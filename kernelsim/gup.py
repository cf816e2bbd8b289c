# SPDX-License-Identifier: GPL-2.0-only
"""Pinning user pages for long-term DMA (mm/gup.c, FOLL_PIN | FOLL_LONGTERM): a reference of GUP_PIN_BIAS each, so that
who may be pinned can be told from the refcount alone. The reference is on the folio: one pinned page keeps all of it in
place.

What must stay movable is not pinned for long. A folio in a CMA area, in a pageblock that is being isolated, or in zone
Movable is first moved elsewhere, to where unmovable pages may be (check_and_migrate_movable_pages()), and then it is
all tried again. If one of them cannot move, because somebody else holds it, the pin fails with ENOMEM.
"""

import errno

import numpy as np
from numpy.typing import NDArray

from kernelsim import contig_move
from kernelsim.jit import njit
from kernelsim.lruvec import put_page
from kernelsim.mm_types import LongOp, Vm
from kernelsim.mmzone import MIGRATE_CMA, MIGRATE_ISOLATE, ZONE_MOVABLE, Blocks, Nodes, Zones, pageblock_order
from kernelsim.operation import Operation
from kernelsim.page import GUP_PIN_BIAS, Pages, compound_head
from kernelsim.pgtable import _PAGE_MIGRATION, _PAGE_PRESENT, PageTables, leaf_pfn, walk_leaf
from kernelsim.rmap import Vmas

EAGAIN = errno.EAGAIN
LONGTERM_SLICE_PAGES = 2048
_ZERO = np.uint64(0)


@njit
def pin_pages(
    vmas: Vmas, pt: PageTables, pages: Pages, vma: int, vpns: NDArray[np.int64], pinned: NDArray[np.int64]
) -> int:
    """Pin the present pages among `vpns` for long-term DMA (pin_user_pages); their pfns go to `pinned`.

    Returns how many, or -EAGAIN if one of them is being moved (then none is pinned).
    """
    nr = 0
    for vpn in vpns:
        at = walk_leaf(pt, vmas[vma].root, vpn)
        if at < 0 or pt[at] == _ZERO:
            continue
        if pt[at] & _PAGE_MIGRATION:
            return -EAGAIN
        pinned[nr] = leaf_pfn(pt[at], vpn)
        nr += 1
    for i in range(nr):
        pages[compound_head(pages, pinned[i])].refcount += GUP_PIN_BIAS
    return nr


@njit
def unpin_pages(pages: Pages, zones: Zones, blocks: Blocks, nodes: Nodes, pinned: NDArray[np.int64]) -> None:
    for pfn in pinned:
        head = compound_head(pages, pfn)
        pages[head].refcount -= GUP_PIN_BIAS
        put_page(pages, zones, blocks, nodes, head)


@njit
def folio_is_longterm_pinnable(pages: Pages, zones: Zones, blocks: Blocks, head: int) -> bool:
    migratetype = blocks[head >> pageblock_order]
    if migratetype in (MIGRATE_CMA, MIGRATE_ISOLATE):
        return False
    return bool(zones[pages[head].zone].type != ZONE_MOVABLE)


@njit
def collect_longterm_unpinnable_folios(
    vmas: Vmas,
    pt: PageTables,
    pages: Pages,
    zones: Zones,
    blocks: Blocks,
    vma: int,
    vpns: NDArray[np.int64],
    heads: NDArray[np.int64],
) -> int:
    """The present folios among `vpns`, ascending, that may not be pinned where they are, each once; how many."""
    nr = 0
    before = -1
    for vpn in vpns:
        at = walk_leaf(pt, vmas[vma].root, vpn)
        if at < 0 or pt[at] & _PAGE_PRESENT == _ZERO:
            continue
        head = compound_head(pages, leaf_pfn(pt[at], vpn))
        if head != before and not folio_is_longterm_pinnable(pages, zones, blocks, head):
            heads[nr] = head
            nr += 1
        before = head
    return nr


def migrate_longterm_unpinnable_folios(vm: Vm, vma: int, vpns: NDArray[np.int64], comm: str) -> Operation[bool]:
    """Move what may not be pinned where it is; True if there was anything: look again.

    OSError(ENOMEM): something cannot move, or there is no room.
    """
    mem = vm.mem
    found = np.empty(len(vpns), dtype=np.int64)
    nr = collect_longterm_unpinnable_folios(vm.vmas, vm.pt, mem.pages, mem.zones, mem.blocks, vma, vpns, found)
    for nid in np.unique(mem.zones["node"][mem.pages["zone"][found[:nr]]]).tolist():
        heads = found[:nr][mem.zones["node"][mem.pages["zone"][found[:nr]]] == nid]
        yield from _migrate(vm, heads[:LONGTERM_SLICE_PAGES], nid, comm)
    return nr > 0


def _migrate(vm: Vm, heads: NDArray[np.int64], nid: int, comm: str) -> LongOp:
    """Move folios of one node, all in one slice; what finds no room is left for the next call."""
    mem = vm.mem
    moves = np.empty(len(heads), dtype=contig_move.move_dtype)
    nr, nr_failed, error = contig_move.isolate_listed(
        mem.pages, mem.zones, mem.blocks, mem.nodes, mem.zonelist[nid], vm.vmas, vm.avcs, vm.pt, vm.tlbs, vm.events,
        vm.touched(), heads, moves,
    )  # fmt: skip
    contig_move.copy_moves(vm.memory, moves, 0, nr)
    contig_move.commit_moves(
        mem.pages, mem.zones, mem.blocks, mem.nodes, vm.vmas, vm.avcs, vm.pt, vm.events, vm.i_pages, moves, 0, nr, nr
    )
    if nr_failed:
        raise OSError(errno.ENOMEM, "a page that may not be pinned where it is cannot move")
    if error and vm.in_flight:
        yield vm.in_flight[0]
    elif error and not (yield from vm.page_alloc.make_room(nid, comm)):
        raise OSError(errno.ENOMEM, "no room for a page that may not be pinned where it is")
    else:
        yield None
