# SPDX-License-Identifier: GPL-2.0-only
"""A small registry with one file of each sort, and a daemon that mounts it: `python toy.py MOUNTPOINT`."""

import errno
import logging
import os
import sys
import threading
from bisect import bisect_left
from collections.abc import Mapping
from functools import partial
from pathlib import Path

from kernelsim.attr import (
    Attr,
    Bool,
    Bytes,
    Choice,
    ConfigGroup,
    Int,
    Kobject,
    Operation,
    Registry,
    Size,
    Stream,
    Text,
    Trigger,
)
from kernelsim.stub import Stub

BIG_LINES = 40_000
DATA_BYTES = 300_000


class Vm(Kobject):
    threshold = Attr(Int(0, 1000), 500, doc="A plain ranged integer.")
    enabled = Attr(Bool(), 1, doc="A switch.")
    secret = Attr(Int(0, 9), 7, doc="Not for everybody.", mode=0o600)
    nr_pages = Attr(Int(0, 2**63 - 1), 0, doc="An unsigned long.")
    compact_memory = Attr(Int(1, 1), doc="Write-only.")

    def __init__(self) -> None:
        self.nr_compactions = 0

    @compact_memory.store
    def _compact_memory(self, _one: int) -> None:
        self.nr_compactions += 1


class Proc(Kobject):
    buddyinfo = Attr(Text(), doc="Another text at every rendering, all lines alike.")
    big = Attr(Text(), doc="Longer than one request.")
    pagetypeinfo = Attr(Text(), doc="For root.", mode=0o400)

    def __init__(self) -> None:
        self.nr_shown = 0

    @buddyinfo.show
    def _buddyinfo(self) -> str:
        self.nr_shown += 1
        return f"Node 0, zone   Normal {self.nr_shown:6}\n" * 100

    @big.show
    def _big(self) -> str:
        return "".join(f"{i:7}\n" for i in range(BIG_LINES))

    @pagetypeinfo.show
    def _pagetypeinfo(self) -> str:
        return "Page block order: 9\n"


class Node(Kobject):
    online = Attr(Text(), doc="Read-only.")
    compact = Attr(Trigger(), doc="Any write triggers.")
    scale = Attr(Int(1, 2**32 - 1), 4096, doc="A number in sysfs.")
    bias = Attr(Int(-5, 5), 0, doc="A signed number.")
    enabled = Attr(Choice("always", "madvise", "never"), "madvise", doc="One of three.")

    def __init__(self) -> None:
        self.triggers: list[str] = []

    @online.show
    def _online(self) -> str:
        return "0-1"

    @compact.store
    def _compact(self, text: str) -> Operation[None]:
        yield None
        self.triggers.append(text)


class Debug(Kobject):
    stats = Attr(Text(), doc="Read-only.")
    gate = Attr(Bool(), 1, doc="1 lets `slow` go on.")
    slow = Attr(Trigger(), doc="Returns when the gate is open.")
    stuck = Attr(Text(), doc="What is in the FIFO beside the mount, as soon as it is; it keeps the machine meanwhile.")
    broken = Attr(Int(), 0, doc="Its hook has a bug.")
    old = Stub("0\n", reason="nothing reads it")

    def __init__(self) -> None:
        self.opened = threading.Event()
        self.nr_waiting = 0

    @stats.show
    def _stats(self) -> str:
        return f"waiting {self.nr_waiting}\n"

    @gate.stored
    def _gate(self, _old: int, new: int) -> None:
        if new:
            self.opened.set()
        else:
            self.opened.clear()

    @slow.store
    def _slow(self, _text: str) -> Operation[None]:
        self.nr_waiting += 1
        try:
            while not self.gate:
                yield self.opened
        finally:
            self.nr_waiting -= 1

    @stuck.show
    def _stuck(self) -> str:
        return Path(sys.argv[1]).with_name("fifo").read_text()

    @broken.stored
    def _broken(self, _old: int, _new: int) -> None:
        raise ZeroDivisionError


class Buffers(ConfigGroup):
    def make_item(self, _name: str) -> Kobject:
        return Kobject()


class Item(Kobject):
    size = Attr(Size(0, 2**40), 0, doc="Bytes.")
    slow = Attr(Trigger(), doc="Takes until the gate is open.")
    data = Attr(Bytes(), doc="Bytes at offsets.")

    def __init__(self, opened: threading.Event) -> None:
        self.opened = opened
        self.bytes = bytearray(DATA_BYTES)
        self.buffers = Buffers()

    def children(self) -> Mapping[str, Kobject]:
        return {"buffers": self.buffers}

    @slow.store
    def _slow(self, _text: str) -> Operation[None]:
        while not self.opened.is_set():
            yield self.opened

    @data.read
    def _read_data(self, pos: int, size: int, _nonblock: bool) -> bytes:
        return bytes(self.bytes[pos : pos + size])

    @data.write_at
    def _write_data(self, pos: int, data: bytes) -> Operation[int]:
        if pos >= len(self.bytes):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        yield None
        nr = min(len(data), len(self.bytes) - pos)
        self.bytes[pos : pos + nr] = data[:nr]
        return nr

    @data.size
    def _data_size(self) -> int:
        return len(self.bytes)


class Group(ConfigGroup):
    def __init__(self, opened: threading.Event) -> None:
        self.opened = opened
        self.dropped: list[str] = []

    def make_item(self, name: str) -> Kobject:
        if name.startswith("bad"):
            raise OSError(errno.EINVAL, "bad name")
        return Item(self.opened)

    def drop_item(self, name: str, _kobj: Kobject) -> Operation[None]:
        yield None
        self.dropped.append(name)


class Dev(Kobject):
    kmsg = Attr(Stream(), doc="One record per read.")

    def __init__(self) -> None:
        self.ends: list[int] = []
        self.records: list[bytes] = []
        self.news = threading.Event()
        self._append(b"first")

    def _append(self, text: bytes) -> None:
        record = b"6,%d,0,-;%s\n" % (len(self.records), text)
        self.records.append(record)
        self.ends.append((self.ends[-1] if self.ends else 0) + len(record))
        self.news.set()
        self.news = threading.Event()

    @kmsg.read
    def _read(self, pos: int, size: int, nonblock: bool) -> Operation[bytes]:
        while pos >= self.ends[-1]:
            if nonblock:
                raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            yield self.news
        record = self.records[bisect_left(self.ends, pos + 1)]
        if len(record) > size:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return record

    @kmsg.write
    def _write(self, data: bytes) -> None:
        self._append(data.rstrip(b"\n"))

    @kmsg.size
    def _size(self) -> int:
        return self.ends[-1]


class Toy:
    """The registry and the objects in it."""

    def __init__(self) -> None:
        self.registry = Registry()
        self.vm, self.proc, self.node, self.debug, self.dev = Vm(), Proc(), Node(), Debug(), Dev()
        self.group = Group(self.debug.opened)
        for path, kobj in {
            "/proc/sys/vm": self.vm,
            "/proc": self.proc,
            "/sys/devices/system/node/node0": self.node,
            "/sys/kernel/debug/toy": self.debug,
            "/sys/kernel/config/toy": self.group,
            "/dev": self.dev,
        }.items():
            self.registry.add(path, kobj)
        self.registry.link("/sys/class/node/node0", "../../devices/system/node/node0")


def serve(mountpoint: str) -> None:
    from dpud.owner import Owner
    from fs import fuse_dev, fuse_ops
    from fs.kernfs import Tree

    if "--debug" in sys.argv:  # every request is listed on stderr
        logging.basicConfig(level=logging.DEBUG)
    server = fuse_dev if "--dev" in sys.argv else fuse_ops
    if "--debug" in sys.argv and server is fuse_ops:
        binding = fuse_ops.load_binding()
        binding.FUSE = partial(binding.FUSE, debug=True)
    registry, owner = Toy().registry, Owner()
    owner.changes = registry.changes
    tree = Tree(registry, owner.call, owner.look, settles=True)
    server.mount(tree, mountpoint, allow_other=True, on_ready=lambda: print("ready", flush=True))


if __name__ == "__main__":
    if "--fusepy" in sys.argv:
        sys.modules["mfusepy"] = None  # type: ignore[assignment]
    serve(sys.argv[1])
