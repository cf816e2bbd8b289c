# SPDX-License-Identifier: MIT
"""GPU memory virtualization: one data path with real bytes.

    allocate -> admission -> region            (address_space/, overcommit/)
    access   -> permission -> translation -> fault -> bytes   (address_space/, memory.py)
    pressure -> victims -> compressed pool -> swap tiers      (residency.py, compression/, swap/)

`hal/` is the hardware below, `memory.py` the path, `facade.py` the C names of the original description. Nothing here
needs the daemon: a program builds a `GpuMemory` and uses it. The daemon shows the same objects as files.
"""
