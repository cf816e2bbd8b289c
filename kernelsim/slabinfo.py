# SPDX-License-Identifier: GPL-2.0-only
"""/proc/slabinfo (mm/slab_common.c): the objects of the emulated kernel that Linux keeps in slab caches.

There are as many as the emulation has in use. Difference from Linux: these objects are rows of tables that stand beside
the emulated memory, so their slabs are counted as Linux would lay them out but take no emulated pages, and meminfo's
Slab, which counts pages of the emulated memory, does not have them.
"""

from collections.abc import Iterator

import numpy as np

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.mm_types import Vm
from kernelsim.page import PAGE_SIZE

_HEAD = (
    "slabinfo - version: 2.1\n"
    "# name            <active_objs> <num_objs> <objsize> <objperslab> <pagesperslab>"
    " : tunables <limit> <batchcount> <sharedfactor>"
    " : slabdata <active_slabs> <num_slabs> <sharedavail>\n"
)


class Slabinfo(Kobject):
    """Caches by the kernel's names."""

    slabinfo = Attr(Text(), mode=0o400, doc="Kernel objects in use, by cache; they take no emulated memory.")

    def __init__(self, vm: Vm) -> None:
        self.vm = vm

    @slabinfo.show
    def _slabinfo(self) -> str:
        return _HEAD + "".join(_line(*cache) for cache in self._caches())

    def _caches(self) -> Iterator[tuple[str, int, int]]:
        """(name, objects in use, bytes of one)."""
        yield "mm_struct", len(self.vm.mms_in_use), self.vm.mms.itemsize
        yield "vm_area_struct", int(np.count_nonzero(self.vm.vmas["mm"])), self.vm.vmas.itemsize


def _line(name: str, in_use: int, size: int) -> str:
    per_slab = PAGE_SIZE // size
    nr_slabs = -(-in_use // per_slab)
    return (
        f"{name:<17s} {in_use:6d} {nr_slabs * per_slab:6d} {size:6d} {per_slab:4d} {1:4d}"
        f" : tunables {0:4d} {0:4d} {0:4d} : slabdata {nr_slabs:6d} {nr_slabs:6d} {0:6d}\n"
    )
