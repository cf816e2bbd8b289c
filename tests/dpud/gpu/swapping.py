# SPDX-License-Identifier: GPL-2.0-only
"""Small swap spaces on real files."""

from pathlib import Path

import numpy as np

from dpud.gpu.blob import RAW, Blob, checksum
from dpud.gpu.clock import Clock, ManualClock
from dpud.gpu.swap import SwapSpace, new_tier

BLOCK = 4096


def blob_of(seed: int, nr_bytes: int = BLOCK) -> Blob:
    """A page of noise."""
    data = np.random.default_rng(seed).bytes(nr_bytes)
    return Blob(data, RAW, nr_bytes, checksum(data))


def items(first_key: int, nr: int, nr_bytes: int = BLOCK) -> list[tuple[int, Blob]]:
    return [(key, blob_of(key, nr_bytes)) for key in range(first_key, first_key + nr)]


def small_space(*sizes: tuple[str, int], clock: Clock | None = None, folder: Path | None = None) -> SwapSpace:
    """Tiers of so many blocks for pages, fastest first; those that are files have names in `folder`, if it is given."""
    clock = clock or ManualClock()
    tiers = [
        new_tier(name, (1 + nr_blocks) * BLOCK, clock, path=folder / name if folder else None)
        for name, nr_blocks in sizes
    ]
    return SwapSpace(tiers, clock)
