# SPDX-License-Identifier: GPL-2.0-only
"""Declarations, their hooks, and the registry."""

import errno
import threading

import pytest
from wiring import errno_of

from kernelsim.attr import (
    Attr,
    Bool,
    Bytes,
    Choice,
    Dir,
    Int,
    Kobject,
    Operation,
    Registry,
    Stream,
    Text,
    Trigger,
    complete,
)
from kernelsim.stub import Stub


class Knobs(Kobject):
    plain = Attr(Int(0, 1000), 500, doc="plain", since="0.2")
    word = Attr(Choice("always", "never"), "never", doc="word")
    act = Attr(Trigger(), doc="act")
    table = Attr(Text(), doc="table")
    pool = Attr(Int(0, 100), doc="both hooks")
    watched = Attr(Bool(), 0, doc="tells about changes")
    per_node = Attr(Int(), 1, doc="name that Python cannot spell", name="hugepages-2048kB")
    secret = Attr(Int(), 1, doc="mode", mode=0o600)
    stub = Stub("0\n", reason="not here")
    log = Attr(Stream(), doc="records")

    def __init__(self) -> None:
        self.pages = 7
        self.acted: list[str] = []
        self.changes: list[tuple[int, int]] = []

    @act.store
    def _act(self, text: str) -> Operation[str]:
        yield None
        self.acted.append(text)
        return "ignored"

    @table.show
    def _table(self) -> str:
        return "a 1\nb 2"

    @pool.show
    def _pool_show(self) -> int:
        return self.pages

    @pool.store
    def _pool_store(self, pages: int) -> None:
        self.pages = min(pages, 50)

    @watched.stored
    def _watched(self, old: int, new: int) -> None:
        if len(self.changes) == 1:
            raise OSError(errno.EBUSY, "once is enough")
        self.changes.append((old, new))

    @log.read
    def _read(self, pos: int, size: int, nonblock: bool) -> bytes:
        return b"record\n"[pos : pos + size]

    @log.size
    def _size(self) -> int:
        return 7


@pytest.fixture
def knobs() -> Knobs:
    return Knobs()


@pytest.fixture
def registry(knobs: Knobs) -> Registry:
    registry = Registry()
    registry.add("/sys/knobs", knobs)
    return registry


def test_value_is_the_instances_own(knobs: Knobs) -> None:
    other = Knobs()
    knobs.plain = 3
    assert (knobs.plain, other.plain, Knobs.plain.default) == (3, 500, 500)


def test_mode_follows_from_what_exists() -> None:
    modes = {attr.name: attr.mode for attr in Knobs.attrs}
    assert modes == {
        "plain": 0o644,
        "word": 0o644,
        "act": 0o200,
        "table": 0o444,
        "pool": 0o644,
        "watched": 0o644,
        "hugepages-2048kB": 0o644,
        "secret": 0o600,
        "stub": 0o444,
        "log": 0o444,
    }


def test_text_of_each_sort_of_file(registry: Registry) -> None:
    assert registry.read("/sys/knobs/plain") == b"500\n"
    assert registry.read("/sys/knobs/word") == b"always [never]\n"
    assert registry.read("/sys/knobs/table") == b"a 1\nb 2\n"
    assert registry.read("/sys/knobs/pool") == b"7\n"
    assert registry.read("/sys/knobs/stub") == b"0\n"


def test_write_stores_a_valid_value(registry: Registry, knobs: Knobs) -> None:
    assert registry.write("/sys/knobs/plain", "12\n") == 3
    assert knobs.plain == 12
    assert errno_of(registry.write, "/sys/knobs/plain", "1001\n") == errno.EINVAL
    assert knobs.plain == 12


def test_store_hook_replaces_the_write(registry: Registry, knobs: Knobs) -> None:
    assert registry.write("/sys/knobs/pool", "99\n") == 3
    assert registry.read("/sys/knobs/pool") == b"50\n"
    assert registry.write("/sys/knobs/act", "go\n") == 3
    assert knobs.acted == ["go"]


def test_stored_hook_hears_of_the_change_and_can_take_it_back(registry: Registry, knobs: Knobs) -> None:
    registry.write("/sys/knobs/watched", "1")
    assert knobs.changes == [(0, 1)]
    assert errno_of(registry.write, "/sys/knobs/watched", "0") == errno.EBUSY
    assert knobs.watched == 1


def test_decorated_methods_stay_methods(knobs: Knobs) -> None:
    knobs._pool_store(20)
    assert knobs._pool_show() == 20


def test_operation_waits_for_what_it_yields() -> None:
    event = threading.Event()

    def operation() -> Operation[int]:
        yield None
        threading.Timer(0.01, event.set).start()
        yield event
        return 3

    assert complete(operation()) == 3
    assert event.is_set()


def test_subclass_inherits_and_overrides_files() -> None:
    class More(Knobs):
        plain = Attr(Int(0, 5), 5, doc="narrower")
        extra = Attr(Bool(), 1, doc="extra")

    names = [attr.name for attr in More.attrs]
    assert names[0] == "plain"
    assert names[-1] == "extra"
    assert len(names) == len(Knobs.attrs) + 1
    assert More().plain == 5


def bad(attr: Attr[object], name: str = "knob") -> type[Kobject]:
    return type("Bad", (Kobject,), {name: attr})


def unhooked_stream() -> Attr[bytes]:
    return Attr(Stream(), b"", doc="")


@pytest.mark.parametrize(
    "attr",
    [
        Attr(Int(), doc="neither default nor hook"),
        Attr(Int(0, 10), 11, doc="default outside the range"),
        Attr(Choice("a"), "b", doc="default is no choice"),
        Attr(Int(), 1, doc="", mode=0o10644),
        Attr(Int(), 1, doc="", mode=0),
        Attr(Int(), 1, doc="", name="a/b"),
        Attr(Int(), 1, doc="", name=".."),
        Stub("0", reason="", mode=0o644),
        unhooked_stream(),
    ],
    ids=lambda attr: attr.doc or attr.name or oct(attr.mode),
)
def test_bad_declarations_are_refused_when_added(attr: Attr[object]) -> None:
    registry = Registry()
    with pytest.raises(ValueError, match="attribute"):
        registry.add("/sys/x", bad(attr)())
    assert list(registry.nodes) == ["/"]


@pytest.mark.parametrize(("kind", "hook"), [(Bytes(), "_write"), (Stream(), "_write_at")])
def test_each_sort_of_stream_has_its_own_write_hook(kind: Stream, hook: str) -> None:
    attr = Attr(kind, doc="")
    setattr(attr, hook, print)
    with pytest.raises(ValueError, match="write_at"):
        Registry().add("/sys/x", bad(attr)())


def test_only_a_short_stored_hook_may_come_late() -> None:
    def long(_self: Kobject, _old: int, _new: int) -> Operation[None]:
        yield None

    for hook in (None, long):
        attr = Attr(Int(), 1, doc="", name="soon", late=True)
        if hook is not None:
            attr.stored(hook)
        with pytest.raises(ValueError, match="late is about"):
            attr.validate()
    attr.stored(lambda _self, _old, _new: None)
    attr.validate()
    assert attr.plain


def test_counters_are_instead_of_a_show_hook() -> None:
    attr = Attr(Int(), doc="", name="shown")
    attr.counters(lambda _self: None)  # type: ignore[arg-type, return-value]
    attr.show(lambda _self: 1)
    with pytest.raises(ValueError, match="counters are instead"):
        attr.validate()


def test_hooks_of_the_wrong_sort_are_refused() -> None:
    for hook in ("_read", "_stored"):
        attr = Attr(Int(), doc="")
        attr.store(lambda _self, _value: None)
        setattr(attr, hook, print)
        with pytest.raises(ValueError, match="hook"):
            Registry().add("/sys/x", bad(attr)())


class Leaf(Kobject):
    leaf = Attr(Int(), 1, doc="leaf")


class Parent(Kobject):
    own = Attr(Int(), 1, doc="own")

    def __init__(self) -> None:
        self.leaf = Leaf()

    def children(self) -> dict[str, Kobject]:
        return {"sub": self.leaf}


def test_several_kobjects_share_a_directory(registry: Registry, knobs: Knobs) -> None:
    leaf = Leaf()
    registry.add("/sys/knobs", leaf)
    assert registry.read("/sys/knobs/leaf") == b"1\n"
    registry.remove("/sys/knobs", knobs)
    assert [path for path, _kobj, _attr in registry.walk()] == ["/sys/knobs/leaf"]


def test_two_files_of_one_name_are_refused(registry: Registry) -> None:
    before = set(registry.nodes)
    for path, kobj in (
        ("/sys/knobs", Knobs()),
        ("/sys/knobs/plain", Leaf()),
        ("/sys", bad(Attr(Int(), 1, doc=""), "knobs")()),
    ):
        with pytest.raises(ValueError, match=r"one name|not a directory"):
            registry.add(path, kobj)
    assert set(registry.nodes) == before


@pytest.mark.parametrize("path", ["", "/", "sys", "/sys/", "/sys//x"])
def test_bad_paths_are_refused(path: str) -> None:
    with pytest.raises(ValueError, match="bad path"):
        Registry().add(path, Leaf())


def test_children_come_and_go_with_their_parent() -> None:
    registry, parent = Registry(), Parent()
    registry.add("/sys/parent", parent)
    assert registry.read("/sys/parent/sub/leaf") == b"1\n"
    registry.remove("/sys/parent", parent)
    assert list(registry.nodes) == ["/"]


def test_remove_leaves_what_others_need() -> None:
    registry, one, two = Registry(), Leaf(), Leaf()
    registry.add("/sys/a/one", one)
    registry.add("/sys/a/two", two)
    node = registry.nodes["/sys/a/one/leaf"]
    registry.remove("/sys/a/one", one)
    assert not node.alive
    assert "/sys/a/two/leaf" in registry.nodes
    with pytest.raises(KeyError):
        registry.remove("/sys/a/two", one)


def test_inode_numbers_are_never_used_again() -> None:
    registry, leaf, seen = Registry(), Leaf(), set()
    for _ in range(3):
        registry.add("/sys/x", leaf)
        seen |= {node.ino for path, node in registry.nodes.items() if path != "/"}
        registry.remove("/sys/x", leaf)
    assert len(seen) == 3 * len(["/sys", "/sys/x", "/sys/x/leaf"])


def test_links() -> None:
    registry = Registry()
    registry.link("/sys/class/x", "../devices/x")
    with pytest.raises(ValueError, match="taken"):
        registry.link("/sys/class/x", "elsewhere")
    registry.unlink("/sys/class/x")
    assert list(registry.nodes) == ["/"]
    with pytest.raises(KeyError):
        registry.unlink("/sys/class/x")


def test_walk_goes_directory_by_directory() -> None:
    registry = Registry()
    registry.add("/sys/b", Parent())
    registry.add("/sys/a", Leaf())
    assert [path for path, _kobj, _attr in registry.walk()] == [
        "/sys/b/own",
        "/sys/b/sub/leaf",
        "/sys/a/leaf",
    ]
    sub = registry.nodes["/sys/b/sub"]
    assert isinstance(sub, Dir)
    assert sub.is_default
