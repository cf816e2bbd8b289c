# SPDX-License-Identifier: GPL-2.0-only
"""Pinning user pages for long-term DMA (mm/gup.c, FOLL_PIN): a reference of GUP_PIN_BIAS each, so that who may be
pinned can be told from the refcount alone.
"""

import errno

import numpy as np
from numpy.typing import NDArray

from kernelsim.jit import njit
from kernelsim.memory import put_page
from kernelsim.mmzone import Blocks, Nodes, Zones
from kernelsim.page import GUP_PIN_BIAS, Pages
from kernelsim.pgtable import _PAGE_MIGRATION, PageTables, pte_pfn, walk_pte
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
        ptep = walk_pte(pt, vmas[vma].root, vpn)
        if ptep < 0 or pt[ptep] == _ZERO:
            continue
        if pt[ptep] & _PAGE_MIGRATION:
            return -EAGAIN
        pinned[nr] = pte_pfn(pt[ptep])
        nr += 1
    for i in range(nr):
        pages[pinned[i]].refcount += GUP_PIN_BIAS
    return nr


@njit
def unpin_pages(pages: Pages, zones: Zones, blocks: Blocks, nodes: Nodes, pinned: NDArray[np.int64]) -> None:
    for pfn in pinned:
        pages[pfn].refcount -= GUP_PIN_BIAS
        put_page(pages, zones, blocks, nodes, pfn)
