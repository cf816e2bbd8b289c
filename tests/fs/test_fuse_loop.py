# SPDX-License-Identifier: GPL-2.0-only
"""What is answered without Python is what Python would answer: never a text from before a change, never more rights."""

import errno
import os
import random
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from machines import MM_CONFIGFS, NODES_SYSFS, VM, Lab
from other_side import OtherSide, served

from dpud.gpu.system import CLASS_PATH, CONFIG_PATH, GpuConfig, add_files, build
from dpud.owner import Owner
from fs import fuse_abi as abi
from fs import fuse_layout as layout
from fs.fuse_abi import Opcode
from fs.fuse_threads import Request
from fs.kernfs import Tree
from kernelsim.attr import Attr, File, Int, Kobject, Text

pytestmark = pytest.mark.slow  # a machine, and the loop's loading

KNOB = f"{VM}/extfrag_threshold"
NODE0 = f"{NODES_SYSFS}/node0"
NOBODY = 65534


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
    with served(Tree(lab.registry, owner.call, owner.look, request=owner.request, settles=True)) as other_side:
        yield other_side


def kept_files(lab: Lab) -> list[str]:
    return [path for path, _, attr in lab.registry.walk() if attr.kept and attr.readable]


def plain_knobs(lab: Lab) -> list[tuple[str, Int]]:
    """Numbers that are taken without the machine."""
    files = [(path, attr) for path, _, attr in lab.registry.walk() if attr.plain and path.startswith("/proc/sys/")]
    return [(path, attr.kind) for path, attr in files if isinstance(attr.kind, Int)]


def assert_fresh(side: OtherSide, lab: Lab, owner: Owner) -> None:
    for path in kept_files(lab):
        text = side.cat(path)
        fresh = owner.look(lab.registry.read, path)
        assert text == fresh, path
        assert side.cat(path) == fresh, f"{path}, from the table"


def changes(side: OtherSide, lab: Lab, owner: Owner, rng: random.Random) -> None:
    """One thing that changes some texts, done as a user, a kernel thread or the clock does it."""
    names = lab.names
    match rng.randrange(10):
        case 0 if len(names) < 3:
            side.mkdir(f"{MM_CONFIGFS}/p{rng.randrange(10**6)}")
        case 1 if names:
            side.rmdir(f"{MM_CONFIGFS}/{rng.choice(names)}")
        case 2 | 3 if names:
            side.echo(f"{rng.randrange(1, 8)}M", f"{MM_CONFIGFS}/{rng.choice(names)}/{rng.choice(('anon', 'file'))}")
        case 4 if names:
            side.echo(f"{rng.randrange(10, 90)} seed={rng.randrange(99)}", f"{MM_CONFIGFS}/{rng.choice(names)}/holes")
        case 5:
            side.echo("1", f"{NODES_SYSFS}/node{rng.randrange(2)}/{rng.choice(('compact', 'compact_dpu'))}")
        case 6:
            name, values = rng.choice((("extfrag_threshold", 1000), ("nr_hugepages", 4), ("min_free_kbytes", 2000)))
            side.echo(str(rng.randrange(values)), f"{VM}/{name}")
        case 7:
            knob, kind = rng.choice(plain_knobs(lab))
            side.echo(str(rng.randint(kind.lo, min(kind.hi, kind.lo + 5))), knob)
        case 8:
            side.echo(f"<{rng.randrange(8)}>line", "/dev/kmsg")
        case _:
            lab.machine.clock.advance(rng.randrange(10**9))  # type: ignore[attr-defined]
            if rng.randrange(2):
                owner.call(lab.machine.step, lab.machine.clock.now_ns())


def test_a_kept_text_is_what_would_be_made_now(side: OtherSide, lab: Lab, owner: Owner) -> None:
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    try:
        assert len(kept_files(lab)) > 60
        assert_fresh(side, lab, owner)
        for _ in range(40):
            try:
                changes(side, lab, owner, rng)
            except OSError as error:  # a knob may have been set to strict overcommit
                if error.errno != errno.ENOMEM:
                    raise
            assert_fresh(side, lab, owner)
    except BaseException:
        print(f"seed {seed}")
        raise


def is_quick(side: OtherSide, handle: int) -> bool:
    return bool(handle & layout.QUICK and side.session._quick.table[0]["files"]["is_quick"][handle ^ layout.QUICK])


def test_what_is_read_again_does_not_come_to_python(side: OtherSide, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the other tests would be about nothing."""
    text = side.cat(KNOB), side.cat(f"{NODE0}/vmstat")
    came: list[int] = []
    answer = side.session._one_request
    monkeypatch.setattr(side.session, "_one_request", lambda nr, reply: came.append(nr) or answer(nr, reply))
    nodeids = [lab.registry.nodes[path].ino for path in (KNOB, f"{NODE0}/vmstat")]
    monkeypatch.setattr(side, "lookup", lambda path: nodeids[path != KNOB])
    for _ in range(3):
        assert (side.cat(KNOB), side.cat(f"{NODE0}/vmstat")) == text
    assert not came


@pytest.fixture
def came(side: OtherSide, lab: Lab, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Requests that came to Python; looking up KNOB is none."""
    came: list[int] = []
    answer, ino = side.session._one_request, lab.registry.nodes[KNOB].ino
    side.echo("7", KNOB)  # so that it is known
    monkeypatch.setattr(side.session, "_one_request", lambda nr, reply: came.append(nr) or answer(nr, reply))
    monkeypatch.setattr(side, "lookup", lambda path: ino)
    return came


def test_numbers_are_taken_without_python(side: OtherSide, lab: Lab, owner: Owner, came: list[int]) -> None:
    for number in range(5):
        side.echo(f"{number}\n", KNOB)
    side.echo("8", KNOB)
    assert not came
    assert owner.look(lab.registry.read, KNOB) == b"8\n", "who looks at the machine finds the last one"
    side.echo("9", KNOB)
    assert side.cat(KNOB) == b"9\n", "who reads the file, too"
    assert len(came) == 1


def test_more_numbers_than_the_list_holds(side: OtherSide, lab: Lab, owner: Owner, came: list[int]) -> None:
    for number in range(layout.NR_STORES * 2 + 10):
        side.echo(str(number), KNOB)
    assert 0 < len(came) <= 2
    assert owner.look(lab.registry.read, KNOB) == b"%d\n" % (layout.NR_STORES * 2 + 9)


def test_who_reads_a_value_does_not_wait_for_a_turn(
    side: OtherSide, lab: Lab, owner: Owner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds until some value is set, be it by a turn or by a write."""
    assert side.cat(KNOB) == b"500\n"
    ino, begun, goes_on = lab.registry.nodes[KNOB].ino, threading.Event(), threading.Event()
    monkeypatch.setattr(side, "lookup", lambda path: ino)
    long_turn = threading.Thread(target=owner.call, args=(lambda: (begun.set(), goes_on.wait()),))
    long_turn.start()
    begun.wait()
    assert [side.cat(KNOB) for _ in range(2)] == [b"500\n"] * 2
    goes_on.set()
    long_turn.join()
    owner.call(setattr, lab.machine.compaction_sysctl, "extfrag_threshold", 7)
    assert [side.cat(KNOB) for _ in range(2)] == [b"7\n"] * 2
    side.echo("0x8", KNOB)
    assert [side.cat(KNOB) for _ in range(2)] == [b"8\n"] * 2


def test_numbers_that_set_others_are_taken_without_python(side: OtherSide, lab: Lab, owner: Owner) -> None:
    ratio, kbytes = f"{VM}/overcommit_ratio", f"{VM}/overcommit_kbytes"
    twin = Lab((32, 32))
    for path in (ratio, kbytes):
        side.echo("5", path)
        twin.registry.write(path, "5")
    for path, value in ((ratio, "7"), (kbytes, "8"), (kbytes, "9"), (ratio, "0"), (ratio, "3"), (kbytes, "4")):
        side.echo(value, path)
        twin.registry.write(path, value)
        for name in (ratio, kbytes):
            assert side.cat(name) == twin.registry.read(name), (path, value)
    handle = side.open(ratio, os.O_WRONLY)
    came, answer = [], side.session._one_request
    side.session._one_request = lambda nr, reply: came.append(nr) or answer(nr, reply)
    for value in range(20):
        side.write(handle, b"%d\n" % value)
    assert not came
    assert owner.look(lab.registry.read, ratio) == b"19\n"
    assert owner.look(lab.registry.read, kbytes) == b"0\n"


class Percent(Kobject):
    """A number, and a text that goes by it."""

    percent = Attr(Int(0, 100), 1, doc="A number.")
    shown = Attr(Text(), doc="The number.", kept=True, mode=0o444)

    @shown.show
    def _shown(self) -> str:
        return f"{self.percent} %"


def test_a_store_outdates_texts_that_may_go_by_it(side: OtherSide, lab: Lab) -> None:
    lab.registry.add("/proc/sys/toy", Percent())
    for number in (1, 5, 9):
        side.echo(str(number), "/proc/sys/toy/percent")
        assert [side.cat("/proc/sys/toy/shown") for _ in range(2)] == [b"%d %%\n" % number] * 2


def of_memory(lab: Lab) -> list[str]:
    return [path for path in kept_files(lab) if lab.registry.nodes[path].attr.shows_memory]  # type: ignore[union-attr]


def test_no_number_is_in_a_text_of_memory(lab: Lab) -> None:
    lab.spawn("p", anon="4M")
    paths = of_memory(lab)
    texts = [lab.registry.read(path) for path in paths]
    assert {"/proc/buddyinfo", "/proc/vmstat", "/proc/meminfo", "/proc/zoneinfo"} <= set(paths)
    for path, kobj, attr in list(lab.registry.walk()):
        if attr.plain and not attr.sets_others:  # those make such texts old as they are taken
            before = attr.__get__(kobj, type(kobj))
            for value in (attr.kind.lo, attr.kind.hi) if isinstance(attr.kind, Int) else (0, 1):
                attr.__set__(kobj, value)
                assert [lab.registry.read(each) for each in paths] == texts, path
            attr.__set__(kobj, before)


@pytest.fixture
def opcodes(side: OtherSide, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of requests that came to Python."""
    came: list[int] = []
    session, answer = side.session, side.session._one_request

    def one_request(nr: int, reply: memoryview) -> tuple[Request, int]:
        came.append(abi.IN_HEADER.unpack_from(session._buffer)[1])
        return answer(nr, reply)

    monkeypatch.setattr(session, "_one_request", one_request)
    return came


def test_readers_of_memory_do_not_wait_for_who_keeps_apart(
    side: OtherSide, lab: Lab, owner: Owner, opcodes: list[int]
) -> None:
    """A number, the log, a GPU's buffer, one of whose writes changes a number of its own that is shown as it is."""
    add_files(lab.registry, build(GpuConfig(device_bytes=8 << 20, host_bytes=8 << 20, tiers={"nvme": 1 << 20})))
    client = f"{CONFIG_PATH}/gpu0/clients/train"
    side.mkdir(client)
    side.mkdir(f"{client}/buffers/w")
    side.echo("1M", f"{client}/buffers/w/size")
    fail = f"{CLASS_PATH}/gpu0/fault/fail_bit"
    side.echo("5", KNOB)  # so that it is known
    side.echo("5", f"{fail}/times")
    side.echo("100", f"{fail}/probability")
    paths = ["/proc/buddyinfo", f"{NODE0}/vmstat"]
    texts = [side.cat(path) for path in paths]
    assert side.cat(f"{fail}/times") == b"5\n"
    for text, path in (("7", KNOB), ("<5>line", "/dev/kmsg"), ("x" * (160 << 10), f"{client}/buffers/w/data")):
        side.echo(text, path)
        opcodes.clear()
        assert [side.cat(path) for path in paths] == texts
        assert Opcode.READ not in opcodes
    assert int(side.cat(f"{fail}/times")) < 5
    assert_fresh(side, lab, owner)


def test_who_changes_memory_makes_the_texts_that_are_read(
    side: OtherSide, lab: Lab, owner: Owner, opcodes: list[int]
) -> None:
    path = "/proc/buddyinfo"
    texts = [side.cat(path)]
    side.mkdir(f"{MM_CONFIGFS}/p")
    for size in ("4M", "8M", "1M"):
        side.echo(size, f"{MM_CONFIGFS}/p/anon")
        opcodes.clear()
        texts.append(side.cat(path))
        assert Opcode.READ not in opcodes
        assert texts[-1] == owner.look(lab.registry.read, path)
    assert len(set(texts)) == len(texts)


def test_a_text_of_memory_holds_until_the_turn_is_over(side: OtherSide, lab: Lab, owner: Owner) -> None:
    """Nobody hears of the change before; who asks meanwhile need not wait."""
    path = "/proc/buddyinfo"
    before = side.cat(path)

    def change_and_read() -> bytes:
        lab.spawn("p", anon="8M")
        return side.cat(path)

    assert owner.call(change_and_read) == before
    assert side.cat(path) == owner.look(lab.registry.read, path) != before


def test_a_file_is_known_while_others_come_and_go(side: OtherSide, lab: Lab, opcodes: list[int]) -> None:
    side.cat(KNOB)
    opcodes.clear()
    for number in range(3):
        side.mkdir(f"{MM_CONFIGFS}/p{number}")
        handles = [side.open(KNOB), side.open(KNOB, os.O_WRONLY)]
        side.write(handles[1], b"7\n")
        side.rmdir(f"{MM_CONFIGFS}/p{number}")
        for handle in handles:
            side.release(handle)
    assert not {Opcode.OPEN, Opcode.WRITE, Opcode.RELEASE} & set(opcodes)


def outcome(write: Callable[[], int]) -> int | str:
    try:
        return write()
    except OSError as refused:
        return os.strerror(refused.errno or 0)


def test_what_is_taken_here_is_what_python_would_take(side: OtherSide, lab: Lab, owner: Owner) -> None:
    """Random bytes of the sort that numbers consist of, and the same written into another machine's file."""
    twin, seed = Lab((32, 32)), random.randrange(10**6)
    rng = random.Random(seed)
    for _ in range(1500):
        size = rng.choice((1, 2, 3, 4, 5, 9, 10, 11, 12))
        data = bytes(rng.choices(b"0123456789\n \t-+x\0", (*[3] * 10, 4, 1, 1, 1, 1, 1, 1), k=size))
        knob = rng.choice((KNOB, f"{VM}/max_map_count", f"{VM}/dpu_compact_enabled"))
        handle = side.open(knob, os.O_WRONLY | os.O_TRUNC)
        got = outcome(lambda handle=handle, data=data: side.write(handle, data))
        side.release(handle)
        assert got == outcome(lambda knob=knob, data=data: twin.registry.write(knob, data.decode())), (seed, data)
        if rng.randrange(2):
            assert owner.look(lab.registry.read, knob) == twin.registry.read(knob), (seed, data)


def test_what_may_not_be_written_is_not_taken_here_either(side: OtherSide, lab: Lab, owner: Owner) -> None:
    """sysctl asks at each write who it is; what a chmod or a wrong position forbids is noticed, too."""
    side.echo("7", KNOB)
    handle = side.open(KNOB, os.O_WRONLY)
    assert side.write(handle, b"8\n") == 2
    assert outcome(lambda: side.write(handle, b"9\n", uid=NOBODY)) == os.strerror(errno.EPERM)
    assert side.write(handle, b"9\n", offset=1) == 2, "beyond position 0 it is ignored"
    assert owner.look(lab.registry.read, KNOB) == b"8\n"


def test_each_open_file_reads_on_in_its_own_text(side: OtherSide) -> None:
    path = f"{NODE0}/vmstat"
    texts, parts, handles = [], [], []
    for number in range(4):
        side.echo(str(number * 4), f"{VM}/nr_hugepages")
        texts.append(side.cat(path))
        handles.append(side.open(path))
        parts.append(side.read(handles[-1], 100))
        assert is_quick(side, handles[-1])
    side.echo("0", f"{VM}/nr_hugepages")
    for offset in range(100, len(texts[0]) + 100, 100):
        parts = [part + side.read(handle, 100, offset) for part, handle in zip(parts, handles, strict=True)]
    assert parts == texts
    assert len(set(texts)) == 4
    assert side.read(handles[3]) == side.cat(path) != texts[3], "from the start it is made anew"


def test_a_sysctl_is_read_at_its_start_only(side: OtherSide) -> None:
    for _ in range(2):
        handle = side.open(KNOB)
        assert side.read(handle, 1) == b"5"
        assert side.read(handle, 10, 1) == b""
        side.release(handle)


def test_more_open_files_than_rows(side: OtherSide) -> None:
    table = side.session._quick.table[0]
    side.cat(KNOB)
    handles = [side.open(KNOB) for _ in range(layout.NR_FILES + 5)]
    assert len(set(handles)) == len(handles)
    assert {bool(handle & layout.QUICK) for handle in handles} == {True, False}
    assert {side.read(handle) for handle in handles} == {b"500\n"}
    for handle in handles:
        side.release(handle)
    slots = table["slots"]
    assert slots["nr_open"].sum() == slots["nr_readers"].sum() == 0
    assert table["texts"]["nr_users"].sum() == np.count_nonzero(slots["text"] >= 0)
    assert side.open(KNOB) & layout.QUICK


def test_rows_are_left_for_the_owner(side: OtherSide) -> None:
    """Whoever keeps files open, of others they do not take all rows; nor does that last."""
    side.cat(KNOB)
    held = [side.open(KNOB, uid=NOBODY) for _ in range(layout.NR_FILES)]
    assert sum(bool(handle & layout.QUICK) for handle in held) == layout.NR_FILES // 2
    for _ in range(2):
        handle = side.open(KNOB)
        assert handle & layout.QUICK
        assert side.read(handle) == b"500\n"
        side.release(handle)
    assert side.read(held[-1], uid=NOBODY) == b"500\n"
    for handle in held:
        side.release(handle)
    assert side.open(KNOB, uid=NOBODY) & layout.QUICK


def test_a_file_in_whose_slot_another_is_open(side: OtherSide, lab: Lab) -> None:
    """As if the second were the 1024th inode after the first."""
    other = f"{NODE0}/distance"
    side.cat(KNOB)
    handle = side.open(KNOB)
    lab.registry.nodes[other].ino = lab.registry.nodes[KNOB].ino + layout.NR_SLOTS
    for _ in range(2):
        assert side.cat(other) == b"10 20\n"
        assert side.read(handle) == b"500\n"
    side.release(handle)
    side.cat(other)
    assert side.open(other) & layout.QUICK


def test_rights_are_those_of_whoever_asks(side: OtherSide) -> None:
    secret = f"{NODE0}/compact"
    for _ in range(2):
        side.release(side.open(secret, os.O_WRONLY))
        for path, flags, uid in ((secret, os.O_RDONLY, 0), (KNOB, os.O_WRONLY, NOBODY), (secret, os.O_WRONLY, NOBODY)):
            with pytest.raises(PermissionError):
                side.open(path, flags, uid)
        side.release(side.open(KNOB, os.O_RDONLY, NOBODY))


def test_a_descriptor_in_other_hands(side: OtherSide) -> None:
    """sysctl asks at each read who it is; a root-only one must not be read by whoever was given it."""
    path = f"{VM}/stat_refresh"
    for _ in range(2):
        handle = side.open(path)
        side.read(handle)
        with pytest.raises(OSError, match="not permitted") as refused:
            side.read(handle, uid=NOBODY)
        assert refused.value.errno == errno.EPERM


def test_chmod_is_seen_at_once(side: OtherSide) -> None:
    path = f"{NODE0}/distance"
    for _ in range(2):
        side.release(side.open(path, uid=NOBODY))
        side.chmod(path, 0o400)
        with pytest.raises(PermissionError):
            side.open(path, uid=NOBODY)
        side.chmod(path, 0o444)


def test_a_removed_file_is_gone(side: OtherSide, lab: Lab) -> None:
    home = f"{MM_CONFIGFS}/p"
    side.mkdir(home)
    assert [side.cat(f"{home}/node") for _ in range(2)] == [b"0\n"] * 2
    handle, node = side.open(f"{home}/node"), lab.registry.nodes[f"{home}/node"]
    assert isinstance(node, File)
    assert node.attr.kept
    assert is_quick(side, handle)
    side.rmdir(home)
    with pytest.raises(FileNotFoundError):
        side.read(handle)
    side.release(handle)


def test_an_interrupt_of_a_request_that_does_not_wait_is_asked_for_again(side: OtherSide) -> None:
    """Its thread may have read it, and not have come to answer it yet."""
    with pytest.raises(BlockingIOError):
        side.request(Opcode.INTERRUPT, 0, abi.INTERRUPT_IN.pack(4711))


def test_what_appends_writes_on(side: OtherSide) -> None:
    """A sysctl ignores what comes after the first write of an open file; with O_APPEND it counts itself."""
    side.cat(KNOB)
    handle = side.open(KNOB, os.O_WRONLY | os.O_APPEND)
    assert [side.write(handle, data, 4) for data in (b"7\n", b"8\n")] == [2, 2]
    assert side.cat(KNOB) == b"7\n"


def test_readers_move_the_end_of_the_cache(side: OtherSide) -> None:
    """Each open of a file that hides its size, and of no other."""
    for nr in (1, 2, 3):
        side.cat("/proc/buddyinfo")
        side.cat(f"{NODE0}/distance")
        assert side.nr_stored == nr
