# SPDX-License-Identifier: MIT
"""The directory `migration`.

echo 'client=train device=1' > start              to another device of this daemon
echo 'unix:/run/b.sock' > listen                  (in the other daemon)
echo 'client=train to=unix:/run/b.sock' > start   to the other daemon
cat progress                                      at any time

`state` has QEMU's names, and the parameters those of QEMU's migrate-set-parameters, as far as they are the same thing.
"""

from pathlib import Path
from typing import Any

from dpud.gpu.attrs import value
from dpud.gpu.compression.system import algorithms
from dpud.gpu.migration.converge import Strategy
from dpud.gpu.migration.encoding import DEFAULT_CACHE_BYTES
from dpud.gpu.migration.engine import Settings
from dpud.gpu.migration.module import MigrationModule
from dpud.gpu.migration.state import COLUMNS, State
from kernelsim.attr import Attr, Bool, Choice, Guard, Int, Kobject, Size, Text, Trigger

_DEFAULTS = Settings()
_NS_PER_MS = 1_000_000


class MigrationFiles(Kobject):
    """Start, watch and tune migrations; take those that come."""

    start = Attr(
        Text(),
        guard=Guard.HOST,
        doc="`client=NAME device=N`, or `client=NAME to=ADDRESS` as in listen. EBUSY while one is.",
    )
    cancel = Attr(Trigger(), doc="Stop it, and stay. EBUSY once the client may run over there; ESRCH if none is.")
    listen = Attr(
        Text(),
        mode=0o644,
        guard=Guard.HOST,
        doc="Address to take migrations at: `unix:/PATH`, `tcp:NUMBER:PORT`, or `none`.",
    )
    recover = Attr(Text(), doc="`ID own` or `ID drop`: what came in, was prepared, and whose source is gone for good.")
    strategy = Attr(
        Choice(*(each.value for each in Strategy)), Strategy.AUTO.value, doc="auto: pre-copy, unless it would not end."
    )
    bandwidth_limit = Attr(Size(), _DEFAULTS.bandwidth_bytes_per_s, doc="Bytes/s that may go over; 0: no limit.")
    downtime_limit = Attr(
        Int(0, 2_000_000), _DEFAULTS.downtime_limit_ns // _NS_PER_MS, doc="ms that the client may be held for."
    )
    max_rounds = Attr(Int(1, 1000), _DEFAULTS.max_rounds, doc="Rounds of pre-copy after which the client is held.")
    auto_converge = Attr(Bool(), int(_DEFAULTS.auto_converge), doc="precopy slows writers down where it would not end.")
    cpu_throttle_initial = Attr(Int(1, 99), _DEFAULTS.throttle_initial, doc="Percent that writers are slowed at first.")
    cpu_throttle_increment = Attr(Int(1, 99), _DEFAULTS.throttle_increment, doc="Percent more after each round.")
    max_cpu_throttle = Attr(Int(1, 99), _DEFAULTS.throttle_max, doc="Percent at most.")
    compression = Attr(Choice("none", *algorithms()), "lz4", doc="Of pages that go to another daemon.")
    cache_size = Attr(Size(), DEFAULT_CACHE_BYTES, doc="Bytes of pages kept to send differences to them; 0: none.")
    journal = Attr(
        Text(), mode=0o644, guard=Guard.HOST, doc="Folder in which promises are kept; empty: in memory only."
    )
    progress = Attr(Text(), doc="The last migration, and those under way: a line each under a head.")
    history = Attr(Text(), doc="The same columns of all, oldest first, up to 64 of each direction.")
    why = Attr(Text(), doc="Why the last one took its strategy, failed, or waits.")
    stat = Attr(Text(), doc="Counters: name and number.")
    blocktime = Attr(Text(), doc="Accesses that waited for pages in post-copy: number, and ns of p50, p99, max.")

    state = value("State of the last one, as QEMU names it.", lambda files: files.last("state") or State.NONE)
    digest = value("Of all pages of the last one at its switch, on both sides.", lambda files: files.last("digest"))

    def __init__(self, migration: MigrationModule) -> None:
        self.migration = migration

    @start.store
    def _start(self, text: str) -> None:
        self.migration.start(text)

    @cancel.store
    def _cancel(self, _text: str) -> None:
        self.migration.cancel()

    @listen.show
    def _listen_show(self) -> str:
        listening = self.migration.listening
        return "none" if listening is None else listening.address

    @listen.store
    def _listen_store(self, text: str) -> None:
        address = text.strip()
        self.migration.listen("" if address == "none" else address)

    @recover.store
    def _recover(self, text: str) -> None:
        self.migration.decide(text)

    @journal.show
    def _journal_show(self) -> str:
        return self.migration.journal_folder

    @journal.store
    def _journal_store(self, text: str) -> None:
        folder = text.strip()
        self.migration.use_journal(Path(folder) if folder else None)

    # Parameters.

    @strategy.stored
    def _strategy(self, _old: str, new: str) -> None:
        self.migration.settings.strategy = Strategy(new)

    @bandwidth_limit.stored
    def _bandwidth(self, _old: int, new: int) -> None:
        self.migration.settings.bandwidth_bytes_per_s = new

    @downtime_limit.stored
    def _downtime(self, _old: int, new: int) -> None:
        self.migration.settings.downtime_limit_ns = new * _NS_PER_MS

    @max_rounds.stored
    def _rounds(self, _old: int, new: int) -> None:
        self.migration.settings.max_rounds = new

    @auto_converge.stored
    def _converge(self, _old: int, new: int) -> None:
        self.migration.settings.auto_converge = bool(new)

    @cpu_throttle_initial.stored
    def _throttle_initial(self, _old: int, new: int) -> None:
        self.migration.settings.throttle_initial = new

    @cpu_throttle_increment.stored
    def _throttle_increment(self, _old: int, new: int) -> None:
        self.migration.settings.throttle_increment = new

    @max_cpu_throttle.stored
    def _throttle_max(self, _old: int, new: int) -> None:
        self.migration.settings.throttle_max = new

    @compression.stored
    def _compression(self, _old: str, new: str) -> None:
        self.migration.compression = new

    @cache_size.stored
    def _cache_size(self, _old: int, new: int) -> None:
        self.migration.cache_bytes = new

    # What is going on.

    @progress.show
    def _progress(self) -> str:
        last = self.migration.last
        return self._table([each for each in self.migration.all_progress() if each is last or not each.is_over])

    @history.show
    def _history(self) -> str:
        return self._table(list(self.migration.all_progress()))

    def _table(self, shown: list[Any]) -> str:
        now_ns = self.migration.memory.clock.now_ns()
        return "".join(f"{line}\n" for line in (COLUMNS, *(each.line(now_ns) for each in shown)))

    @why.show
    def _why(self) -> str:
        return self.last("why")

    def last(self, what: str) -> str:
        """Of the last migration; empty if there was none."""
        last = self.migration.last
        return "" if last is None else str(getattr(last, what))

    @stat.show
    def _stat(self) -> str:
        return "".join(f"{name} {nr}\n" for name, nr in self.migration.stats().items())

    @blocktime.show
    def _blocktime(self) -> str:
        return "".join(f"{name} {nr}\n" for name, nr in self.migration.blocktime().items())
