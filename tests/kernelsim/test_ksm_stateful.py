# SPDX-License-Identifier: GPL-2.0-only
"""Pages that are merged under anything, in any order: every invariant holds, every process reads back what it wrote.

`verify` compares memory with what each process wrote, whatever page tables, trees and records say of it.
"""

import errno

import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from machines import Lab, settle
from wiring import errno_of

KSM = "/sys/kernel/mm/ksm"


class Merging(RuleBasedStateMachine):
    """Processes with many pages that are the same, small nodes and few pages a KSM page may stand for."""

    def __init__(self) -> None:
        super().__init__()
        self.lab = Lab((32, 32), nr_ranks=1, patience=0)
        self.lab.sysctl(dpu_compact_min_fragments=4)
        self.lab.write(f"{KSM}/pages_to_scan", "1000000")
        self.lab.write(f"{KSM}/max_page_sharing", "5")
        self.at_boot = self.lab.mem.zones["free_pages"].tolist()
        for name in "ab":
            self.lab.spawn(name, mergeable="1", anon="1M", same="60 kinds=9")
        self.lab.write(f"{KSM}/run", "1")
        self.scan(2)

    def tried(self, name: str, attr: str, text: str) -> None:
        if name not in self.lab.names:
            return
        try:
            self.lab.set(name, **{attr: text})
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EEXIST):
                raise

    names = st.sampled_from("abcd")

    @rule(passes=st.integers(1, 3))
    def scan(self, passes: int) -> None:
        for _ in range(passes):
            self.lab.machine.clock.advance(10**9)
            self.lab.machine.step(self.lab.machine.clock.now_ns())

    @rule(run=st.sampled_from("012"), smart=st.sampled_from("01"))
    def switch(self, run: str, smart: str) -> None:
        self.lab.write(f"{KSM}/run", run)
        self.lab.write(f"{KSM}/smart_scan", smart)

    @rule(across=st.sampled_from("01"))
    def across_nodes(self, across: str) -> None:
        error = errno_of(self.lab.write, f"{KSM}/merge_across_nodes", across)
        assert error in (0, errno.EBUSY)

    @rule(name=names, mergeable=st.sampled_from("01"))
    def madvise(self, name: str, mergeable: str) -> None:
        self.tried(name, "mergeable", mergeable)

    @rule(name=names, thp=st.sampled_from("01"), node=st.sampled_from("01"), size=st.sampled_from(["0", "1M", "5M"]))
    def allocate(self, name: str, thp: str, node: str, size: str) -> None:
        self.tried(name, "node", node)
        self.tried(name, "thp", thp)
        self.tried(name, "anon", size)

    @rule(name=names, text=st.sampled_from(["5 kinds=2", "60 kinds=9 seed=1", "100 kinds=40 seed=2"]))
    def same(self, name: str, text: str) -> None:
        self.tried(name, "same", text)

    @rule(name=names, child=names)
    def fork(self, name: str, child: str) -> None:
        self.tried(name, "fork", child)

    @rule(name=names, text=st.sampled_from(["1 seed=1", "20 seed=2", "100"]))
    def touch(self, name: str, text: str) -> None:
        self.tried(name, "touch", text)

    @rule(name=names, text=st.sampled_from(["50 runs seed=4", "50 seed=5", "100"]))
    def holes(self, name: str, text: str) -> None:
        self.tried(name, "holes", text)

    @rule(name=names, text=st.sampled_from(["0", "3 seed=6"]))
    def pin(self, name: str, text: str) -> None:
        self.tried(name, "pin", text)

    @rule(name=names, text=st.sampled_from(["0", "37", "100"]))
    def mlock(self, name: str, text: str) -> None:
        self.tried(name, "mlock", text)

    @rule(enabled=st.integers(0, 1), order=st.sampled_from([9, 10, 12]), nid=st.integers(0, 1))
    def compact(self, enabled: int, order: int, nid: int) -> None:
        self.lab.sysctl(dpu_compact_enabled=enabled, dpu_compact_region_order=order)
        self.lab.compact(nid)

    @rule()
    def compact_memory(self) -> None:
        self.lab.write("/proc/sys/vm/compact_memory", "1")

    @rule(name=names)
    def exit(self, name: str) -> None:
        if name in self.lab.names:
            settle([self.lab.end(name)])

    @invariant()
    def sound(self) -> None:
        self.lab.assert_at_rest()

    def teardown(self) -> None:
        settle([self.lab.end(name) for name in sorted(self.lab.machine.processes)])
        self.lab.assert_at_rest()
        assert self.lab.mem.zones["free_pages"].tolist() == self.at_boot
        assert self.lab.machine.ksm.stable.nodes == {}


class TestMerging(Merging.TestCase):
    settings = settings(max_examples=examples(8), stateful_step_count=15, deadline=None)


@pytest.mark.slow
class TestMergingAtLength(Merging.TestCase):
    settings = settings(max_examples=examples(80), stateful_step_count=50, deadline=None)
