# SPDX-License-Identifier: GPL-2.0-only
"""`dpud warm`: compile every loop once, so that no user waits for the compiler.

`make install` runs it. A mark in numba's cache folder, whose name stands for the sources, says that it was done.
"""

import os
from pathlib import Path

import numpy as np
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from dpud.dpu.driver import DpuDriver
from dpud.gpu.address_space.regions import RegionType
from dpud.gpu.memory import HOST, GpuMemory
from dpud.gpu.system import GpuConfig, build
from fs import fuse_loop
from kernelsim import warm as kernels
from kernelsim.hostblocks import HostPageset
from kernelsim.hostimage import HostImage, HostTask, HostZone, build_host_image
from kernelsim.mmzone import MIGRATE_MOVABLE, MIGRATE_TYPES, NR_PAGE_ORDERS, pageblock_nr_pages
from kernelsim.page import PG_anon, PG_buddy, PG_head, PG_lru, PG_mmap, PG_slab, PG_table, PG_tail, PG_thp, PG_uptodate

_NR_BLOCKS = 16
_ANON = PG_lru | PG_anon | PG_mmap | PG_uptodate
_FILE = PG_lru | PG_mmap | PG_uptodate


def warm() -> None:
    """Run all of it, under a progress bar; nothing if these sources have been compiled before."""
    done = Path(os.environ["NUMBA_CACHE_DIR"]) / "warmed"
    if done.exists():
        return
    steps = [*kernels.steps(DpuDriver, small_image), ("file requests", fuse_loop.load), ("GPU memory", use_gpu_memory)]
    columns = SpinnerColumn(), TextColumn("Compiling (once): {task.description}"), BarColumn()
    with Progress(*columns, TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=len(steps))
        for what, step in steps:
            progress.update(task, description=what)
            step()
            progress.advance(task)
    done.touch()


def use_gpu_memory() -> None:
    """Pages of every size through the whole path, and back."""
    memory = build(GpuConfig(device_bytes=8 << 20, host_bytes=8 << 20, pool_bytes=32 << 20))
    data = bytes(range(256)) * 2048 + np.arange(1 << 17, dtype=np.float32).tobytes()
    for page_bytes in (2048, 4096, 65536, 2 << 20):
        va = memory.allocate("warm", 12 << 20, RegionType.MANAGED, page_size=page_bytes)
        for at in range(0, 12 << 20, len(data)):
            memory.write("warm", va + at, data)
        assert memory.read("warm", va, len(data), HOST) == data
        memory.translate_bulk(np.arange(va, va + (1 << 20), 4096))
        memory.free(va)
    _defragment(memory)


def _defragment(memory: GpuMemory) -> None:
    """A pass over a device that is in use in pieces."""
    vas = [memory.allocate("warm", 64 << 10) for _ in range(96)]
    for va in vas:
        memory.write("warm", va, bytes(64 << 10))
    for number, va in enumerate(vas):
        if number % 8:
            memory.free(va)
    assert memory.defrag is not None
    assert memory.defrag.run() > 0


def small_image() -> HostImage:
    """A made-up machine of 32 MiB that has some of everything that an import meets."""
    blocks = np.full((_NR_BLOCKS, pageblock_nr_pages), PG_buddy, dtype=np.uint64)
    blocks[1:9, ::2] = _ANON
    blocks[9, :100] = _FILE
    blocks[10, :100] = PG_slab
    blocks[10, 100:200] = PG_table
    blocks[11] = _ANON | PG_thp | PG_tail
    blocks[11, 0] = _ANON | PG_thp | PG_head
    kpageflags = blocks.reshape(-1)
    kpagecount = (kpageflags & PG_mmap != 0).astype(np.uint64)
    mapped = np.flatnonzero(kpagecount).astype(np.int64)[::2]  # whose the others are, the import makes up
    task = HostTask(1, "warm", ((1024, 1024 + len(mapped), 3),), 1024 + np.arange(len(mapped)), mapped)
    return build_host_image((_zone(len(kpageflags)),), kpageflags, kpagecount, mappings=(task,))


def _zone(nr_pages: int) -> HostZone:
    return HostZone(
        node=0,
        name="Normal",
        start_pfn=0,
        spanned=nr_pages,
        present=nr_pages,
        managed=nr_pages,
        min=32,
        low=40,
        high=48,
        promo=56,
        pagesets=(HostPageset(0, 8, 4, 16, 2),),
        nr_free=(0,) * NR_PAGE_ORDERS,
        nr_blocks=tuple(_NR_BLOCKS if kind == MIGRATE_MOVABLE else 0 for kind in range(MIGRATE_TYPES)),
        nr_free_by_type=((0,) * NR_PAGE_ORDERS,) * MIGRATE_TYPES,
    )
