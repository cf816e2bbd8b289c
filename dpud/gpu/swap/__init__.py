# SPDX-License-Identifier: MIT
"""Swap: pages that neither the devices nor the compressed pool have room for, on tiers of memory, flash and disk.

tier.py       kinds of tiers: a file, a profile (profile.py), a budget (budget.py), a map of free blocks (blockmap.py)
slots.py      how a page lies in a tier's file (blockfile.py), so that a torn or damaged one is known as such
space.py      SwapSpace: which page is on which tier
policy.py     which page leaves a device's memory first
prefetch.py   which pages come in besides the one that was missing; accuracy.py counts how well that works,
              and gate.py stops it where it does not
thrash.py     which pages come and go too fast
shadow.py     how far all that is from the optimum (belady.py)
files.py      the directory `swap`
"""

from dpud.gpu.swap.space import SwapSpace as SwapSpace
from dpud.gpu.swap.tier import Tier as Tier
from dpud.gpu.swap.tier import new_tier as new_tier
