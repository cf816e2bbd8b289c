# SPDX-License-Identifier: GPL-2.0-only
"""Slices of serving threads, as the running kernel tells of them: short while they wait, ordinary while they work."""

import platform
import re
import threading
import time
from pathlib import Path

import pytest
from other_side import served

from dpud.owner import Owner
from fs.kernfs import Tree
from fs.slices import SHORT_NS
from kernelsim.attr import Attr, Kobject, Registry, Text

pytestmark = [
    pytest.mark.host,
    pytest.mark.slow,  # the loop's loading
    pytest.mark.skipif(
        tuple(map(int, platform.release().split(".")[:2])) < (6, 12) or not Path("/proc/thread-self/sched").exists(),
        reason="this kernel has no slices of one's own, or tells nobody",
    ),
]


def slice_ns(thread: int) -> int:
    found = re.search(r"^se\.slice +: +(\d+)$", Path(f"/proc/self/task/{thread}/sched").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1])


class Slices(Kobject):
    own = Attr(Text(), doc="The slice of who makes this text.")

    @own.show
    def _own(self) -> str:
        return str(slice_ns(threading.get_native_id()))


def test_who_waits_is_before_who_works() -> None:
    ordinary = slice_ns(threading.get_native_id())
    assert ordinary > SHORT_NS
    registry, owner = Registry(), Owner()
    registry.add("/proc", Slices())
    before = set(threading.enumerate())
    with served(Tree(registry, owner.call, owner.look)) as side:
        assert [side.cat("/proc/own") for _ in range(6)] == [b"%d\n" % ordinary] * 6
        serving = [thread.native_id for thread in set(threading.enumerate()) - before]
        deadline = time.monotonic() + 10
        while (found := {slice_ns(thread) for thread in serving if thread}) != {SHORT_NS}:
            assert time.monotonic() < deadline, found
            time.sleep(0.001)
    assert slice_ns(threading.get_native_id()) == ordinary
