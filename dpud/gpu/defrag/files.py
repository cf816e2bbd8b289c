# SPDX-License-Identifier: MIT
"""The directory `defrag`: how scattered free memory is, what is done about it, and who is in the way.

Tables have one record a line, locations named as everywhere: device0, device1, ..., host. Counters only grow.
"""

import errno
from collections.abc import Callable
from typing import Any

from dpud.gpu.address_space.frames import MAX_ORDER
from dpud.gpu.defrag.map import picture
from dpud.gpu.defrag.metrics import Fragmentation, extfrag_index, unusable_index
from dpud.gpu.defrag.module import DefragModule
from dpud.gpu.files import check_name, settle
from dpud.gpu.location import Location
from kernelsim.attr import Attr, Bool, Bytes, Int, Kobject, Operation, Text

_NS_PER_US = 1000
_PERCENT = 100
_THOUSAND = 1000
_DAY_S = 86_400
Read = Callable[[DefragModule, Location], str]


def _by_location(doc: str, read: Read) -> Attr[str]:
    """A file with a line for each location."""
    attr: Attr[str] = Attr(Text(), doc=doc)

    def show(files: Any) -> str:
        return "".join(
            f"{location.name} {read(files.defrag, location)}\n" for location in files.defrag.memory.locations
        )

    attr.show(show)
    return attr


def _metric(doc: str, read: Callable[[Fragmentation], str]) -> Attr[str]:
    return _by_location(doc, lambda defrag, location: read(defrag.fragmentation(location)))


def _index(doc: str, index: Callable[[list[int], int], int]) -> Attr[str]:
    """For each order, as debugfs's extfrag files print them."""

    def read(_defrag: DefragModule, location: Location) -> str:
        blocks = location.frames.free_blocks()
        return " ".join(_thousandths(index(blocks, order)) for order in range(MAX_ORDER + 1))

    return _by_location(doc, read)


def _thousandths(value: int) -> str:
    sign = "-" if value < 0 else ""
    return f"{sign}{abs(value) // _THOUSAND}.{abs(value) % _THOUSAND:03}"


def _number(kind: Int, doc: str, get: Callable[[Any], int], put: Callable[[Any, int], None]) -> Attr[int]:
    attr: Attr[int] = Attr(kind, doc=doc)

    def show(files: Any) -> int:
        return get(files.defrag)

    def store(files: Any, value: int) -> None:
        put(files.defrag, value)

    attr.show(show)
    attr.store(store)
    return attr


class DefragFiles(Kobject):
    """What concerns all memories."""

    threshold = _number(
        Int(0, _PERCENT),
        "Percent of a location's free memory that may be in blocks smaller than `order` before it is defragmented.",
        lambda defrag: round(defrag.threshold * _PERCENT),
        lambda defrag, percent: setattr(defrag, "threshold", percent / _PERCENT),
    )
    interval = _number(
        Int(0, _DAY_S),
        "Seconds between two looks; 0: never by itself.",
        lambda defrag: defrag.interval_s,
        lambda defrag, seconds: setattr(defrag, "interval_s", seconds),
    )
    order = _number(
        Int(1, MAX_ORDER),
        "Blocks that are made: 2 KiB << order.",
        lambda defrag: defrag.order,
        lambda defrag, order: setattr(defrag, "order", order),
    )
    cpu_percent = _number(
        Int(1, _PERCENT),
        "Of the time, how much the background may take.",
        lambda defrag: defrag.effort.cpu_percent,
        lambda defrag, percent: setattr(defrag.effort, "cpu_percent", percent),
    )
    pause_limit_us = _number(
        Int(1, 1_000_000),
        "How long at once. A page that takes longer by the device's profile stays; one page moves in any slice.",
        lambda defrag: defrag.effort.pause_limit_ns // _NS_PER_US,
        lambda defrag, us: setattr(defrag.effort, "pause_limit_ns", us * _NS_PER_US),
    )
    rearrange = Attr(Bool(), doc="Whether a pass also puts pages that are accessed together side by side.")
    run = Attr(Int(1, 1), doc="Write 1: make all blocks that can be made, now and without rests.")
    longest_pause_ns = Attr(Text(), doc="The longest that anything was held up at once.")
    longest_pause_cpu_ns = Attr(
        Text(), doc="The most CPU time in one pause. What pauses are longer than that, the machine gave to others."
    )
    unusable_index = _index(
        "Share of free memory that is in blocks too small, for each order, as debugfs's extfrag has it.", unusable_index
    )
    extfrag_index = _index(
        "For each order: near 0 an allocation fails for lack of memory, near 1 for fragmentation; -1: it does not.",
        extfrag_index,
    )
    scattered = _metric("1 - largest hole / free memory.", lambda found: f"{found.scattered:.3f}")
    slack_bytes = _metric(
        "Free bytes in blocks of 2 MiB that have a page in them.", lambda found: f"{found.slack_bytes}"
    )
    largest_hole_bytes = _metric("The longest run of free memory.", lambda found: f"{found.largest_hole_bytes}")
    mean_run = _by_location(
        "Pages that are accessed together: how many lie side by side.",
        lambda defrag, location: f"{defrag.locality.mean_run(location):.2f}",
    )
    map = Attr(
        Bytes(),
        doc="Each location: bytes a character, then memory in tenths in use; `.` nothing, `P` pinned, `X` retired.",
        mode=0o444,
    )
    stat = Attr(Text(), doc="Passes, blocks made, pages and bytes moved, bytes gained in blocks: name and count.")
    cost = Attr(Text(), doc="Bytes moved for each byte of a block gained.")
    pins = Attr(
        Text(), doc="Address, pages, client, owner, reason; write `ADDRESS BYTES OWNER REASON` to pin.", mode=0o644
    )
    unpin = Attr(Text(), doc="Write an owner: its pins are gone.")
    last_failure = Attr(Text(), doc="Why there was no memory, the last time: largest hole, who is in the way, moves.")

    def __init__(self, defrag: DefragModule) -> None:
        self.defrag = defrag
        self._drawn = b""  # the map as it was when a reader began: it is read in pieces, and changes

    @map.size
    def _map_size(self) -> int:
        memory = self.defrag.memory
        lines = (f"{location.name} {picture(location, self.defrag.pins)}\n" for location in memory.locations)
        self._drawn = "".join(lines).encode()
        return len(self._drawn)

    @map.read
    def _map(self, pos: int, size: int, _nonblock: bool) -> bytes:
        if pos == 0:
            self._map_size()
        return self._drawn[pos : pos + size]

    @rearrange.show
    def _rearrange_show(self) -> int:
        return int(self.defrag.rearranges)

    @rearrange.store
    def _rearrange_store(self, value: int) -> None:
        self.defrag.rearranges = bool(value)

    @run.store
    def _run(self, _one: int) -> Operation[None]:
        yield from self.defrag.running(rests=False)
        yield from settle(self.defrag.memory)

    @longest_pause_ns.show
    def _longest(self) -> str:
        return str(self.defrag.effort.longest_ns)

    @longest_pause_cpu_ns.show
    def _longest_cpu(self) -> str:
        return str(self.defrag.effort.longest_cpu_ns)

    @stat.show
    def _stat(self) -> str:
        effort = self.defrag.effort
        counts = dict(self.defrag.relocator.stats)
        counts |= {
            "slices": effort.nr_slices,
            "slices_over_limit": effort.nr_over_limit,
            "total_ns": effort.total_ns,
            "pins": len(self.defrag.pins),
        }
        return "".join(f"{name} {nr}\n" for name, nr in counts.items())

    @cost.show
    def _cost(self) -> str:
        return f"{self.defrag.cost:.3f}"

    @pins.show
    def _pins(self) -> str:
        return "".join(f"{pin}\n" for pin in self.defrag.pins)

    @pins.store
    def _pin(self, text: str) -> None:
        words = text.split(maxsplit=3)
        try:
            va, nr_bytes = int(words[0], 0), int(words[1], 0)
            owner = words[2]
        except (ValueError, IndexError):
            raise OSError(errno.EINVAL, "ADDRESS BYTES OWNER REASON") from None
        check_name(owner)
        self.defrag.memory.pin(va, nr_bytes, owner, words[3].strip() if len(words) > 3 else "")

    @unpin.store
    def _unpin(self, text: str) -> None:
        gone = [pin for pin in self.defrag.pins if pin.owner == text.strip()]
        if not gone:
            raise OSError(errno.EINVAL, f"{text.strip()!r} has no pins")
        for pin in gone:
            self.defrag.pins.remove(pin)

    @last_failure.show
    def _last_failure(self) -> str:
        if not self.defrag.failures:
            return ""
        ns, text = self.defrag.failures[-1]
        return f"{ns} {text}"
