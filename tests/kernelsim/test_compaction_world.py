# SPDX-License-Identifier: GPL-2.0-only
"""Both compactions, with everything else, in any order: nothing is ever lost.

The world of test_interleaving.py, and in it every caller of the traditional compaction: by hand, direct at every
order, priority and with several GFP masks, kcompactd, proactive. Its runs are cut into slices of a few rounds each,
take turns with other requests and may be interrupted between any two.
"""

import numpy as np
import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from test_interleaving import KINDS, MAX_RUNNING, NAMES, SETTINGS, Requests, World

from kernelsim import compaction
from kernelsim.attr import Operation
from kernelsim.page_alloc import free_pages

GFP_KERNEL, GFP_NOFS, GFP_NOIO = 0xCC0, 0xC40, 0xC00
UNMOVABLE, MOVABLE, RECLAIMABLE = range(3)
BUDDY = 1 << 10

NODES = ((32,), (32, 34))
ORDERS = (1, 3, 5, 7, 8, 9, 9, 9, 10, 10)
GFPS = (GFP_KERNEL, GFP_KERNEL, GFP_KERNEL, GFP_NOFS, GFP_NOIO)


class CompactingWorld(World):
    """And requests that are met by traditional compaction."""

    def __init__(
        self,
        nodes: tuple[int, ...],
        nr_ranks: int | None,
        patience: int | None,
        slice_pages: int,
        words: str,
        fragmented: bool,
    ) -> None:
        """`fragmented`: few large blocks are left to begin with."""
        super().__init__(nodes, nr_ranks, patience, slice_pages, words)
        self.patch.set(compaction, "SLICE_PAGES", slice_pages * 16)
        self.captured: dict[int, int] = {}
        if fragmented:
            self.lab.set("a", anon="0")
            for node, name in zip(range(len(nodes)), "bc", strict=False):
                self.lab.spawn(name, node=str(node), anon="30M", holes="50 seed=8")
            assert self.lab.mem.zones["nr_free"][:, 9:].sum() < 4

    def sound(self) -> None:
        super().sound()
        self.nothing_is_lost()

    def nothing_is_lost(self) -> None:
        """A page that is in use by nobody is free, on the lists or held by a compaction."""
        pages = self.lab.mem.pages[: self.lab.mem.nr_pages]
        idle = (pages["flags"] == 0) & (pages["refcount"] == 0)
        for head in np.flatnonzero(pages["flags"] & np.uint32(BUDDY)).tolist():
            idle[head : head + (1 << int(pages["order"][head]))] = False
        for pfn, order in [*self.captured.items(), *self.lab.machine.direct_blocks.blocks()]:
            assert pages["refcount"][pfn] == 1
            idle[pfn : pfn + (1 << order)] = False
        assert not idle.any(), np.flatnonzero(idle)

    def by_hand(self, nid: int | None) -> None:
        if nid is None:
            self.begin(self.lab.start("/proc/sys/vm/compact_memory", "1"))
        else:
            path = f"/sys/devices/system/node/node{nid % self.lab.mem.nr_nodes}/compact"
            self.begin(self.lab.start(path, "now"))

    def direct(self, nid: int, order: int, gfp: int, prio: int, kind: int) -> None:
        self.begin(self._allocation(nid % self.lab.mem.nr_nodes, order, gfp, prio, kind))

    def _allocation(self, nid: int, order: int, gfp: int, prio: int, kind: int) -> Operation[None]:
        """A request that keeps what it captured for a turn."""
        mem, lab = self.lab.mem, self.lab
        zonelist = mem.zonelist[nid].tolist()
        highest = int(mem.zones["type"][zonelist[0]])
        run = lab.machine.compaction.try_to_compact_pages(gfp, order, prio, zonelist, highest, kind)
        result, pfn = yield from run
        assert 0 <= result <= 8
        if pfn >= 0:
            assert result == 8
            assert pfn % (1 << order) == 0
            self.captured[pfn] = order
            try:
                yield None
            finally:
                del self.captured[pfn]
                free_pages(mem.pages, mem.zones, mem.blocks, pfn, order)

    def daemon(self, nid: int, order: int | None) -> None:
        """kcompactd: for an order, or on its own initiative."""
        nid %= self.lab.mem.nr_nodes
        daemon = self.lab.machine.compaction
        if order is None:
            self.begin(daemon.proactive_compact_node(nid))
        else:
            zone = self.lab.mem.zones_of(nid)[-1]
            self.begin(daemon.compact_zone_for_kcompactd(zone, order, int(self.lab.mem.zones["type"][zone])))

    def knobs(self, unevictable: int, defrag_mode: int, threshold: int, proactiveness: int) -> None:
        self.lab.sysctl(
            compact_unevictable_allowed=unevictable,
            defrag_mode=defrag_mode,
            extfrag_threshold=threshold,
            compaction_proactiveness=proactiveness,
        )

    def kswapd_sleeps(self) -> None:
        for nid in range(self.lab.mem.nr_nodes):
            self.lab.machine.compaction.reset_isolation_suitable(nid)


class Compactions(Requests):
    """The world under hypothesis."""

    world: CompactingWorld | None = None

    @initialize(
        nodes=st.sampled_from(NODES),
        nr_ranks=st.sampled_from([1, None]),
        patience=st.sampled_from([0, 2, 9]),
        slice_pages=st.sampled_from([16, 100, 700]),
        words=st.sampled_from(["stamp", "full"]),
        fragmented=st.booleans(),
    )
    def boot(
        self,
        nodes: tuple[int, ...],
        nr_ranks: int | None,
        patience: int,
        slice_pages: int,
        words: str = "stamp",
        fragmented: bool = False,
    ) -> None:
        self.world = CompactingWorld(nodes, nr_ranks, patience, slice_pages, words, fragmented)

    @rule(nid=st.sampled_from([None, 0, 1]))
    def by_hand(self, nid: int | None) -> None:
        self.world.by_hand(nid)

    @rule(
        nid=st.integers(0, 1),
        order=st.sampled_from(ORDERS),
        gfp=st.sampled_from(GFPS),
        prio=st.integers(0, 2),
        kind=st.sampled_from([UNMOVABLE, MOVABLE, RECLAIMABLE]),
    )
    def direct(self, nid: int, order: int, gfp: int, prio: int, kind: int) -> None:
        self.world.direct(nid, order, gfp, prio, kind)

    @rule(nid=st.integers(0, 1), order=st.sampled_from([None, 3, 9, 10]))
    def daemon(self, nid: int, order: int | None) -> None:
        self.world.daemon(nid, order)

    @rule(
        unevictable=st.integers(0, 1),
        defrag_mode=st.integers(0, 1),
        threshold=st.sampled_from([0, 500, 1000]),
        proactiveness=st.sampled_from([0, 20, 100]),
    )
    def knobs(self, unevictable: int, defrag_mode: int, threshold: int, proactiveness: int) -> None:
        self.world.knobs(unevictable, defrag_mode, threshold, proactiveness)

    @rule()
    def every_large_block_is_taken(self) -> None:
        self.world.write("/proc/sys/vm/nr_hugepages", "100")

    @rule()
    def kswapd_sleeps(self) -> None:
        self.world.kswapd_sleeps()


class TestCompactions(Compactions.TestCase):
    settings = settings(max_examples=examples(8), stateful_step_count=25, deadline=None)


@pytest.mark.slow
class TestCompactionsAtLength(Compactions.TestCase):
    settings = settings(max_examples=examples(60), stateful_step_count=60, deadline=None)


def soak(seed: int, nr_steps: int) -> CompactingWorld:
    """A world left to chance, with a fragmented machine that compacts most of the time."""
    rng = np.random.default_rng(seed)

    def pick(choices: tuple[object, ...]) -> object:
        return choices[int(rng.integers(len(choices)))]

    words = pick(("stamp", "full"))
    world = CompactingWorld(pick(NODES), pick((1, None)), pick((0, 3, 20)), pick((16, 100, 700)), words, seed % 4 > 0)
    blows = (
        (0.13, lambda: world.change(pick(NAMES), *pick(SETTINGS))),
        (0.04, lambda: world.compact(int(rng.integers(2)))),
        (0.04, lambda: world.by_hand(pick((None, 0, 1)))),
        (
            0.10,
            lambda: world.direct(
                int(rng.integers(2)),
                pick(ORDERS),
                pick(GFPS),
                int(rng.integers(3)),
                pick((UNMOVABLE, MOVABLE, RECLAIMABLE)),
            ),
        ),
        (0.04, lambda: world.daemon(int(rng.integers(2)), pick((None, 3, 9, 10)))),
        (0.02, lambda: world.knobs(pick((0, 1)), pick((0, 1)), pick((0, 500)), pick((0, 100)))),
        (0.01, world.kswapd_sleeps),
        (0.02, lambda: world.look(pick(NAMES))),
        (0.01, lambda: world.leave(pick(NAMES))),
        (0.02, lambda: world.interrupt(int(rng.integers(MAX_RUNNING)))),
        (0.01, lambda: world.lab.arm(pick(KINDS), pick((0, 3, 60)))),
        (0.03, lambda: world.write("/proc/sys/vm/nr_hugepages", pick(("0", "3", "100")))),
        (0.53, lambda: world.turns(int(rng.integers(MAX_RUNNING)), int(rng.integers(1, 8)))),
    )
    weights = [weight for weight, _ in blows]
    try:
        for which in rng.choice(len(blows), nr_steps, p=weights):
            blows[which][1]()
            world.sound()
        world.end()
    finally:
        world.patch.undo()
    return world


@pytest.mark.parametrize("seed", range(1))
@pytest.mark.slow
def test_soak(seed: int) -> None:
    world = soak(seed, 150)
    assert world.lab.vmstat()["pgmigrate_success"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(100, 112))
def test_soak_at_length(seed: int) -> None:
    soak(seed, 800)
