# SPDX-License-Identifier: GPL-2.0-only
"""The digest at the switch: what it tells apart, and that it is not read out of all pages once the writer is held."""

import numpy as np
import pytest
from migrating import World
from small import KIB, MIB

from dpud.gpu.address_space.regions import Region
from dpud.gpu.hal.interface import Bytes
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.hashes import PageHashes
from dpud.gpu.migration.pages import Area, Mask, Pages, Sink, Source
from dpud.gpu.migration.state import State

AREAS = [Area(5 * 4096, 4096), Area(3 * 2048, 2048)]
RNG = np.random.default_rng(8)
NONE = np.zeros(5, dtype=np.bool_)


def pages_of(*rows: int) -> Pages:
    return np.array(rows, dtype=np.int64)


def noise(nr_pages: int) -> Bytes:
    return RNG.integers(0, 256, (nr_pages, 4096), dtype=np.uint8)


def test_the_order_and_number_of_looks_does_not_matter() -> None:
    rows = noise(5)
    at_once, bit_by_bit = PageHashes(AREAS), PageHashes(AREAS)
    at_once.put(0, np.arange(5), rows, NONE)
    bit_by_bit.put(0, pages_of(3, 1), noise(2), NONE[:2])
    for page in (4, 0, 3, 2, 1):
        bit_by_bit.put(0, pages_of(page), rows[[page]], NONE[:1])
    assert at_once.digest() == bit_by_bit.digest()


@pytest.mark.parametrize("change", ["a bit", "two pages", "lost", "another area"])
def test_what_differs_is_seen(change: str) -> None:
    rows = noise(5)
    here, there = PageHashes(AREAS), PageHashes(AREAS)
    here.put(0, np.arange(5), rows, NONE)
    other, lost = rows.copy(), NONE.copy()
    if change == "a bit":
        other[2, 4095] ^= 1
    elif change == "two pages":
        other[[1, 2]] = other[[2, 1]]
    elif change == "lost":
        lost[0] = True
    there.put(0, np.arange(5), other, lost)
    if change == "another area":
        there.put(1, pages_of(0), other[:1, :2048], NONE[:1])
    assert here.digest() != there.digest()


def test_zeros_are_what_nobody_has_sent_and_pages_may_be_left_out() -> None:
    empty, zeroed, other = PageHashes(AREAS), PageHashes(AREAS), PageHashes(AREAS)
    zeroed.put(0, np.arange(5), np.zeros((5, 4096), dtype=np.uint8), NONE)
    assert zeroed.digest() == empty.digest()
    other.put(0, pages_of(2), noise(1), NONE[:1])
    left_out = [np.array([page == 2 for page in range(5)]), np.zeros(3, dtype=np.bool_)]
    assert other.digest(left_out) == empty.digest(left_out)
    assert other.digest() != empty.digest()


def test_at_the_switch_only_what_the_last_round_left_is_read() -> None:
    """Of 75 pages, three are written to after the first round; both sides read these, and no others, after the stop."""
    world = World()
    world.fill()
    (region,) = world.a.memory.clients["c"].regions
    migration = world.start()
    world.a.migration.settings.strategy = Strategy.PRECOPY
    world.a.migration.settings.bandwidth_bytes_per_s = MIB
    read_here, read_there = list[int](), list[int]()
    count_reads(migration.source, region, read_here)
    counted: set[str] = set()
    late = iter([3, 20, 40])

    def meanwhile() -> None:
        for session in world.b.migration.receiver.sessions.values():
            if session.id not in counted:
                counted.add(session.id)
                count_reads(session.sink, region, read_there)
        if migration.progress.moved_pages >= 50 and not region.held and (page := next(late, None)) is not None:
            world.a.memory.write("c", region.va + page * 4 * KIB, b"late")

    assert world.run(migration, meanwhile).state is State.COMPLETED
    assert read_here
    assert set(read_there) == set(read_here) <= {3, 20, 40}


def count_reads(of: Source | Sink, region: Region, into: list[int]) -> None:
    """Enter pages that are read while the region is held."""
    read = of.read

    def counted(area: int, pages: Pages) -> tuple[Bytes, Mask]:
        if region.held:
            into.extend(pages.tolist())
        return read(area, pages)

    of.read = counted  # type: ignore[method-assign]
