# SPDX-License-Identifier: MIT
"""The directory `fault`: what went wrong, what is done about it, and faults on purpose.

Tables have one record a line. Counters only grow. Locations are named as everywhere: device0, device1, ..., host.
"""

import errno
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from dpud.gpu.errors import GpuError
from dpud.gpu.fault.errorcount import Action
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.fault.predictor import Scoreboard
from dpud.gpu.fault.recovery import Policy
from dpud.gpu.files import settle
from dpud.gpu.location import Location
from kernelsim.attr import Attr, Bool, Bytes, Choice, Int, Kobject, Operation, Size, Text, Trigger

_NS = 1_000_000_000
_AUTO = "auto"
_SLICE_BYTES = 4 << 20


def _value(doc: str, read: Callable[[Any], Any]) -> Attr[str]:
    """A file that shows one value, or a table."""
    attr: Attr[str] = Attr(Text(), doc=doc)

    def show(files: Kobject) -> str:
        return str(read(files))

    attr.show(show)
    return attr


def _table(doc: str, read: Callable[[Any], str]) -> Attr[bytes]:
    """A table that may be longer than the page that sysfs gives to a text: bytes at offsets, made anew at the start."""
    attr: Attr[bytes] = Attr(Bytes(), doc=doc, mode=0o444)
    made: WeakKeyDictionary[Kobject, bytes] = WeakKeyDictionary()

    def size(files: Kobject) -> int:
        made[files] = read(files).encode()
        return len(made[files])

    def read_at(files: Kobject, pos: int, nr_bytes: int, _nonblock: bool) -> bytes:
        if not pos or files not in made:
            size(files)
        return made[files][pos : pos + nr_bytes]

    attr.size(size)
    attr.read(read_at)
    return attr


class FaultFiles(Kobject):
    """What concerns all memories."""

    policy = Attr(Choice(*Policy), doc="What is done about a page that ECC cannot correct.")
    inject = Attr(Text(), doc="Break something: `bit|row|bank|device key=value ...`, or dcgmi's `--inject` options.")
    events = _table(
        "Sequence number, time, XID, location, client, what: one line each.", lambda f: _lines(f.fault.events.records)
    )
    counters = _value(
        "XID, location, events ever, those not acknowledged, name: one line each.",
        lambda f: _lines(f.fault.events.table()),
    )
    ack = Attr(Text(), doc="Last event that was taken note of; write its number, or `all`.", mode=0o644)
    unacknowledged = _value("Events since then.", lambda f: f.fault.events.nr_open)
    stat = _value(
        "Errors corrected or not, what pages were made good from, what was lost: name and count.",
        lambda f: "".join(f"{name} {nr}\n" for name, nr in f.fault.stats().items()),
    )
    recovery_action = _value(
        "What each location needs, in NVML's words: none, reset, drain.",
        lambda f: f.by_location(f.fault.recovery_action),
    )
    remapped_rows = _value(
        "NVML's fields of each location: rows remapped for correctable and uncorrectable errors, pending, failed.",
        lambda f: f.by_location(f.remaps),
    )
    remap_histogram = _value(
        "Banks of each location by spare rows left: max, high, partial, low, none.",
        lambda f: f.by_location(f.histogram),
    )
    retired_pages = _table(
        "Pages out of use: location, address, cause, time in ns, whether a reset brings it back.", lambda f: f.retired()
    )
    page_ce_threshold = Attr(Int(1, 1_000_000), doc="Corrected errors of a page in a cycle that are too many.")
    page_ce_refresh_cycle = Attr(Int(1, 31_536_000), doc="Length of the cycle in seconds.")
    page_ce_action = Attr(Choice(*Action), doc="What is done about such a page; rasdaemon's words.")
    spare_rows_per_bank = Attr(Int(0, 1024), doc="Rows of a bank that can be remapped.")
    spare_rows = Attr(Int(0, 1_000_000), doc="Rows of a location that can be remapped.")
    spare = Attr(
        Text(), doc="The device that takes over from a lost one; `auto`: the one with most free memory.", mode=0o644
    )
    drain = Attr(Text(), doc="Empty a device: its name.")
    reset = Attr(Text(), doc="Reset a device, so that remappings take effect and a lost one is back: its name.")
    failovers = _table(
        "Time, client, from, to, pages by what became of them.", lambda f: _lines(f.fault.failover.reports)
    )
    scrub = Attr(Trigger(), doc="Scrub all memory once.")
    scrub_rate = Attr(Size(0, 1 << 40), doc="Bytes/s that are scrubbed in the background; 0: none.")
    scrub_position = _value("Bytes of this round that are scrubbed.", lambda f: f.fault.scrubber.position)
    prediction = _value(
        "Of the learnt predictor and of the rule: alarms, hits, false, misses, precision, recall, median lead in s.",
        lambda f: f.prediction_table(),
    )
    decisions = _table(
        "Alarms: location, time in ns, bank, probability; precision, recall and lead so far.",
        lambda f: f.decision_table(),
    )
    predict_action = Attr(Choice("account", "soft"), doc="What an alarm does: nothing, or retire the bank's bad rows.")

    def __init__(self, fault: FaultModule) -> None:
        self.fault = fault

    # Settings.

    @policy.show
    def _policy_show(self) -> str:
        return self.fault.recovery.policy

    @policy.store
    def _policy_store(self, name: str) -> None:
        self.fault.recovery.policy = Policy(name)

    @page_ce_threshold.show
    def _threshold_show(self) -> int:
        return self.fault.rule.threshold

    @page_ce_threshold.store
    def _threshold_store(self, nr: int) -> None:
        self.fault.rule.threshold = nr

    @page_ce_refresh_cycle.show
    def _cycle_show(self) -> int:
        return self.fault.rule.cycle_ns // _NS

    @page_ce_refresh_cycle.store
    def _cycle_store(self, seconds: int) -> None:
        self.fault.rule.cycle_ns = seconds * _NS

    @page_ce_action.show
    def _action_show(self) -> str:
        return self.fault.rule.action

    @page_ce_action.store
    def _action_store(self, name: str) -> None:
        self.fault.rule.action = Action(name)

    @spare_rows_per_bank.show
    def _per_bank_show(self) -> int:
        return self.fault.limits.per_bank

    @spare_rows_per_bank.store
    def _per_bank_store(self, nr: int) -> None:
        self.fault.limits.per_bank = nr

    @spare_rows.show
    def _in_all_show(self) -> int:
        return self.fault.limits.in_all

    @spare_rows.store
    def _in_all_store(self, nr: int) -> None:
        self.fault.limits.in_all = nr

    @scrub_rate.show
    def _rate_show(self) -> int:
        return self.fault.scrubber.bytes_per_s

    @scrub_rate.store
    def _rate_store(self, bytes_per_s: int) -> None:
        self.fault.scrubber.bytes_per_s = bytes_per_s

    @predict_action.show
    def _predict_show(self) -> str:
        return "soft" if self.fault.acts_on_predictions else "account"

    @predict_action.store
    def _predict_store(self, name: str) -> None:
        self.fault.acts_on_predictions = name == "soft"

    @spare.show
    def _spare_show(self) -> str:
        number = self.fault.failover.spare
        return _AUTO if number is None else self.fault.memory.locations[number].name

    @spare.store
    def _spare_store(self, text: str) -> None:
        self.fault.failover.spare = None if text.strip() == _AUTO else self._device(text).number

    # What it is told.

    @inject.store
    def _inject(self, text: str) -> None:
        self.fault.inject(text)

    @ack.show
    def _ack_show(self) -> str:
        return str(self.fault.events.acknowledged)

    @ack.store
    def _ack_store(self, text: str) -> None:
        word = text.strip()
        if word != "all" and not word.isdecimal():
            raise OSError(errno.EINVAL, f"{word!r} is no number, and not `all`")
        self.fault.events.acknowledge(None if word == "all" else int(word))

    @drain.store
    def _drain(self, text: str) -> Operation[None]:
        self.fault.drain(self._device(text))
        yield from settle(self.fault.memory)

    @reset.store
    def _reset(self, text: str) -> None:
        self.fault.reset(self._device(text))

    @scrub.store
    def _scrub(self, _text: str) -> Operation[None]:
        scrubber = self.fault.scrubber
        for _ in range(-(-scrubber.total_bytes // _SLICE_BYTES)):
            scrubber.scrub(_SLICE_BYTES)
            yield None

    def _device(self, text: str) -> Location:
        devices = self.fault.memory.locations[: self.fault.memory.nr_devices]
        found = next((each for each in devices if each.name == text.strip()), None)
        if found is None:
            raise GpuError(errno.EINVAL, f"{text.strip()!r} is none of {', '.join(each.name for each in devices)}")
        return found

    # Tables.

    def by_location(self, read: Callable[[Location], str]) -> str:
        """A line for each."""
        return "".join(f"{location.name} {read(location)}\n" for location in self.fault.memory.locations)

    def remaps(self, location: Location) -> str:
        rows = self.fault.rows[location.number]
        counts = [*rows.remapped.items(), ("pending", len(rows.pending)), ("failed", int(rows.failed))]
        return " ".join(f"{name}={nr}" for name, nr in counts)

    def histogram(self, location: Location) -> str:
        return " ".join(f"{name}={nr}" for name, nr in self.fault.rows[location.number].histogram().items())

    def retired(self) -> str:
        """Of all locations."""
        return "".join(
            f"{location.name} {page.address:#x} {page.cause} {page.time_ns} "
            f"{'pending' if frame in self.fault.rows[location.number].pending else 'retired'}\n"
            for location, pages in zip(self.fault.memory.locations, self.fault.placing.retired, strict=True)
            for frame, page in sorted(pages.items())
        )

    def prediction_table(self) -> str:
        """A line for each location and predictor."""
        return "".join(
            f"{location.name} {name} {_score(board)}\n"
            for location, predictor in zip(self.fault.memory.locations, self.fault.predictors, strict=True)
            for name, board in (("learnt", predictor.learnt), ("rule", predictor.by_rule))
        )

    def decision_table(self) -> str:
        """Of all locations, each in the order of time."""
        return "".join(
            f"{location.name} {decision}\n"
            for location, predictor in zip(self.fault.memory.locations, self.fault.predictors, strict=True)
            for decision in predictor.decisions
        )


def _score(board: Scoreboard) -> str:
    counts = f"{board.nr_alarms} {board.nr_hits} {board.nr_false} {board.nr_misses}"
    return f"{counts} {board.precision:.2f} {board.recall:.2f} {board.median_lead_ns // _NS}"


def _lines(records: Any) -> str:
    return "".join(f"{record}\n" for record in records)


class CheckpointFiles(Kobject):
    """The directory `fault/checkpoint`."""

    create = Attr(Text(), doc="Make a checkpoint of a client: its name, and `full` where it is not to be an increment.")
    rollback = Attr(
        Text(), doc="All bytes of a client as they were at its last checkpoint: its name. ENOENT without one."
    )
    restore = Attr(Text(), doc="A client's memory from its files: its name, and the sequence number of an earlier one.")
    list = _table(
        "Client, number, full or parent, time in ns, pages, bytes, ns it took: one line each.", lambda f: f.table()
    )
    automatic = Attr(Bool(), doc="Whether checkpoints of all clients are made as often as interval says.")
    interval = Attr(
        Text(), doc="Seconds from one to the next, or `auto`: what Daly's formula makes of cost and mtbf.", mode=0o644
    )
    interval_now = _value(
        "Seconds that interval comes to now; 0 until a cost is known.", lambda f: f"{f.interval_s():.6f}"
    )
    mtbf = Attr(Text(), doc="Mean seconds between failures, or `auto`: what was seen, and a prior.", mode=0o644)
    mtbf_now = _value("Seconds that mtbf comes to now.", lambda f: f"{f.mtbf_s():.0f}")
    cost = _value("Seconds that a checkpoint takes, a moving average.", lambda f: f"{f.known.cost_ns / _NS:.6f}")
    max_increments = Attr(Int(0, 1000), doc="Increments in a row before the next checkpoint is full.")

    def __init__(self, fault: FaultModule) -> None:
        self.fault = fault
        self.checkpoints = fault.checkpoints
        self.known = fault.checkpoints.interval

    def interval_s(self) -> float:
        memory = self.fault.memory
        return self.known.best_ns(memory.clock.now_ns(), memory.nr_devices) / _NS

    def mtbf_s(self) -> float:
        memory = self.fault.memory
        return self.known.mtbf_ns(memory.clock.now_ns(), memory.nr_devices) / _NS

    @create.store
    def _create(self, text: str) -> Operation[None]:
        name, _, how = text.strip().partition(" ")
        if how not in ("", "full"):
            raise OSError(errno.EINVAL, f"{how!r} is not `full`")
        yield from self.checkpoints.creation(name, how == "full")

    @rollback.store
    def _rollback(self, text: str) -> Operation[None]:
        if self.fault.is_held(text.strip()):
            raise GpuError(errno.EBUSY, f"{text.strip()} is being handed over")
        if not self.fault.roll_back(text.strip()):
            raise GpuError(errno.ENOENT, f"no checkpoint of {text.strip()}")
        yield from settle(self.fault.memory)

    @restore.store
    def _restore(self, text: str) -> Operation[None]:
        name, _, number = text.strip().partition(" ")
        if number and not number.isdecimal():
            raise OSError(errno.EINVAL, f"{number!r} is no number")
        if name not in self.fault.memory.clients:
            raise GpuError(errno.ENOENT, f"no client {name}")
        self.checkpoints.restore(name, int(number) if number else None)
        yield from settle(self.fault.memory)

    def table(self) -> str:
        return "".join(
            f"{each.label.client} {each.label.sequence} {each.label.parent or 'full'} {each.time_ns}"
            f" {each.nr_pages} {each.nr_bytes} {each.cost_ns}\n"
            for records in self.checkpoints.records.values()
            for each in records
        )

    @automatic.show
    def _automatic_show(self) -> int:
        return int(self.checkpoints.automatic)

    @automatic.store
    def _automatic_store(self, on: int) -> None:
        self.checkpoints.automatic = bool(on)

    @interval.show
    def _interval_show(self) -> str:
        return _seconds(self.known.fixed_ns)

    @interval.store
    def _interval_store(self, text: str) -> None:
        self.known.fixed_ns = _parse_seconds(text)

    @mtbf.show
    def _mtbf_show(self) -> str:
        return _seconds(self.known.fixed_mtbf_ns)

    @mtbf.store
    def _mtbf_store(self, text: str) -> None:
        self.known.fixed_mtbf_ns = _parse_seconds(text)

    @max_increments.show
    def _increments_show(self) -> int:
        return self.checkpoints.max_increments

    @max_increments.store
    def _increments_store(self, nr: int) -> None:
        self.checkpoints.max_increments = nr


def _seconds(ns: int) -> str:
    return f"{ns / _NS:g}" if ns else _AUTO


def _parse_seconds(text: str) -> int:
    """`auto` is 0. Raises OSError(EINVAL)."""
    if text.strip() == _AUTO:
        return 0
    try:
        ns = round(float(text) * _NS)
    except (ValueError, OverflowError):
        ns = 0
    if not 0 < ns < 1 << 62:
        raise OSError(errno.EINVAL, f"{text.strip()!r} is no time in seconds, and not `{_AUTO}`")
    return ns
