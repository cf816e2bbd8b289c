# SPDX-License-Identifier: GPL-2.0-only
"""Texts that are numbers of the machine are made without Python, and are what Python would make: of one moment."""

import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from machines import NODES_SYSFS, VM, Lab
from mounted import until
from other_side import OtherSide, served

from dpud.owner import Owner
from fs import fuse_abi as abi
from fs import fuse_layout as layout
from fs.fuse_abi import Opcode
from fs.kernfs import Tree
from kernelsim.attr import Attr, Kobject, Text
from kernelsim.seq_counters import CounterFile, CounterText, Number, Words

pytestmark = pytest.mark.slow  # a machine, and the loop's loading

NODE0 = f"{NODES_SYSFS}/node0"
COUNTED = ("/proc/buddyinfo", "/proc/vmstat", "/proc/zoneinfo", f"{NODE0}/vmstat", f"{NODE0}/numastat")


@pytest.fixture
def lab() -> Lab:
    return Lab((32, 32))


@pytest.fixture
def owner(lab: Lab) -> Owner:
    owner = Owner()
    owner.changes = lab.registry.changes
    return owner


@pytest.fixture
def side(lab: Lab, owner: Owner) -> Iterator[OtherSide]:
    with served(Tree(lab.registry, owner.call, owner.look, settles=True)) as other_side:
        yield other_side


def test_texts_of_counters_are_made_without_python(
    side: OtherSide, lab: Lab, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After whatever changes, and they are what Python makes."""
    before = [side.cat(path) for path in COUNTED]
    inos = {path: lab.registry.nodes[path].ino for path in COUNTED}
    came: list[int] = []
    answer = side.session._one_request
    monkeypatch.setattr(side.session, "_one_request", lambda nr, reply: came.append(nr) or answer(nr, reply))
    monkeypatch.setattr(side, "lookup", inos.__getitem__)
    for nr in (1, 3, 2):
        owner.call(lab.registry.write, f"{VM}/nr_hugepages", str(nr))
        owner.call(lab.machine.vm.events["pgfault"].__iadd__, nr)
        for path in COUNTED:
            texts = [side.cat(path) for _ in range(2)]
            assert texts == [owner.look(lab.registry.read, path)] * 2, path
    assert not came
    assert all(side.cat(path) != text for path, text in zip(COUNTED, before, strict=True))


class Pair(Kobject):
    """Two counters that differ only while somebody has the machine."""

    pair = Attr(Text(), doc="Both.", mode=0o444)

    def __init__(self) -> None:
        self.words = np.zeros(2, dtype=np.int64)
        self._now = CounterFile(self._describe)

    @pair.counters
    def _pair(self) -> CounterText:
        return self._now.now()

    def _describe(self) -> CounterText:
        words = Words(self.words)
        return CounterText("%d %d\n", [Number([(words.at(row, 0), 1)]) for row in range(2)], (), (words,))

    def change(self, wait: Callable[[], object] = lambda: None) -> None:
        self.words[0] += 1
        wait()
        self.words[1] += 1


PAIR = "/proc/pair"


@pytest.fixture
def pair(side: OtherSide, lab: Lab) -> Pair:
    pair = Pair()
    lab.registry.add("/proc", pair)
    assert [side.cat(PAIR) for _ in range(2)] == [b"0 0\n"] * 2
    return pair


def test_nobody_sees_the_machine_in_the_middle_of_a_turn(side: OtherSide, owner: Owner, pair: Pair) -> None:
    """Who reads meanwhile waits for its end."""
    handle, half, goes_on = side.open(PAIR), threading.Event(), threading.Event()

    def wait() -> None:
        half.set()
        goes_on.wait()

    changer = threading.Thread(target=owner.call, args=(pair.change, wait))
    changer.start()
    half.wait()
    asked = side.send(Opcode.READ, side._of[handle], abi.READ_IN.pack(handle, 0, 100, 0, 0, 0))
    until(lambda: len(owner._lock._queue) == 1)
    goes_on.set()
    changer.join()
    assert side.answer(asked) == b"1 1\n"


def test_each_text_is_of_one_moment(side: OtherSide, owner: Owner, pair: Pair) -> None:
    """Turns begin and end all the time, also in the middle of the making of a text."""
    over = threading.Event()

    def change() -> None:
        while not over.is_set():
            owner.call(pair.change)

    changer = threading.Thread(target=change)
    changer.start()
    try:
        handle = side.open(PAIR)
        texts = [side.read(handle) for _ in range(3000)]
    finally:
        over.set()
        changer.join()
    numbers = [tuple(map(int, text.split())) for text in texts]
    assert all(first == second for first, second in numbers)
    assert numbers == sorted(numbers)
    assert len(set(numbers)) > 10, "they did change"


def test_a_text_made_here_is_read_on_by_python(side: OtherSide, owner: Owner, pair: Pair) -> None:
    """As who polls an open file is answered by it from then on."""
    owner.call(pair.change)
    handle = side.open(PAIR)
    assert side.read(handle, 1) == b"1"
    owner.call(pair.change)
    side.request(Opcode.POLL, side._of[handle], abi.POLL_IN.pack(handle, 0, 0, 0))
    assert not side.session._quick.table[0]["files"]["is_quick"][handle ^ layout.QUICK]
    assert (side.read(handle, 10, 1), side.read(handle)) == (b" 1\n", b"2 2\n")


def test_texts_made_here_are_given_back(side: OtherSide, owner: Owner, pair: Pair) -> None:
    texts = side.session._quick.table[0]["texts"]
    handles = []
    for nr in range(1, 20):
        owner.call(pair.change)
        handles.append(side.open(PAIR))
        assert side.read(handles[-1]) == b"%d %d\n" % (nr, nr)
    assert texts["is_own"].sum() == 19
    for handle in handles:
        side.release(handle)
    assert texts["is_own"].sum() == 1
    assert not texts["is_own"][texts["nr_users"] == 0].any()


def test_a_form_that_does_not_hold_is_not_used(side: OtherSide, lab: Lab, owner: Owner) -> None:
    """Which zones have pages is a matter of form."""
    for path in ("/proc/buddyinfo", "/proc/zoneinfo"):
        side.cat(path)
    present = int(lab.machine.mem.zones["present"][1])
    for now in (0, present, 0):
        owner.call(lab.machine.mem.zones["present"].__setitem__, 1, now)
        for path in ("/proc/buddyinfo", "/proc/zoneinfo"):
            assert [side.cat(path) for _ in range(2)] == [owner.look(lab.registry.read, path)] * 2
    assert not side.session._quick._old_forms
