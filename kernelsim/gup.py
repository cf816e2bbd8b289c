# SPDX-License-Identifier: GPL-2.0-only
"""Pinning user pages for long-term DMA (mm/gup.c, FOLL_PIN): a reference of GUP_PIN_BIAS each, so that who may be
pinned can be told from the refcount alone. The reference is on the folio: one pinned page keeps all of it in place.
"""

import errno

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit
from kernelsim.lruvec import put_page
from kernelsim.mmzone import Blocks, Nodes, Zones
from kernelsim.page import GUP_PIN_BIAS, Pages, compound_head
from kernelsim.pgtable import _PAGE_MIGRATION, PageTables, leaf_pfn, walk_leaf
from kernelsim.rmap import Vmas

EAGAIN = errno.EAGAIN
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
