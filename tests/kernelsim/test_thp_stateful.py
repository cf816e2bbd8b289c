# SPDX-License-Identifier: GPL-2.0-only
"""Huge pages under anything, in any order: every invariant holds and every process reads back what it wrote."""

import errno

import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule
from machines import Lab, settle


class HugePages(RuleBasedStateMachine):
    """Two processes with huge pages and their children, compacted by both paths."""

    def __init__(self) -> None:
        super().__init__()
        self.lab = Lab((32,), nr_ranks=1, patience=0)
        self.lab.sysctl(dpu_compact_min_fragments=4)
        self.at_boot = self.lab.mem.zones["free_pages"].tolist()
        for name in "ab":
            self.lab.spawn(name, thp="1", anon="4M")

    def tried(self, name: str, attr: str, text: str) -> None:
        try:
            self.lab.set(name, **{attr: text})
        except OSError as error:
            if error.errno not in (errno.ENOMEM, errno.EEXIST):
                raise

    names = st.sampled_from("abcd")

    @rule(name=names, thp=st.sampled_from("01"), size=st.sampled_from(["0", "2M", "5M", "9M"]))
    def allocate(self, name: str, thp: str, size: str) -> None:
        if name in self.lab.names:
            self.tried(name, "thp", thp)
            self.tried(name, "anon", size)

    @rule(name=names, child=names)
    def fork(self, name: str, child: str) -> None:
        if name in self.lab.names:
            self.tried(name, "fork", child)

    @rule(name=names, text=st.sampled_from(["1 seed=1", "20 seed=2", "100"]))
    def touch(self, name: str, text: str) -> None:
        if name in self.lab.names:
            self.tried(name, "touch", text)

    @rule(name=names, text=st.sampled_from(["1 seed=3", "50 runs seed=4", "50 seed=5", "100"]))
    def holes(self, name: str, text: str) -> None:
        if name in self.lab.names:
            self.tried(name, "holes", text)

    @rule(name=names, text=st.sampled_from(["0", "1 seed=6"]))
    def pin(self, name: str, text: str) -> None:
        if name in self.lab.names:
            self.tried(name, "pin", text)

    @rule(name=names, text=st.sampled_from(["0", "37", "100"]))
    def mlock(self, name: str, text: str) -> None:
        if name in self.lab.names:
            self.tried(name, "mlock", text)

    @rule(enabled=st.integers(0, 1), order=st.sampled_from([9, 10, 12, 18]))
    def compact(self, enabled: int, order: int) -> None:
        self.lab.sysctl(dpu_compact_enabled=enabled, dpu_compact_region_order=order)
        self.lab.compact()

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


class TestHugePages(HugePages.TestCase):
    settings = settings(max_examples=examples(15), stateful_step_count=15, deadline=None)


@pytest.mark.slow
class TestHugePagesAtLength(HugePages.TestCase):
    settings = settings(max_examples=examples(80), stateful_step_count=50, deadline=None)
