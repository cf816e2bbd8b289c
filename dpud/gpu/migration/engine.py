# SPDX-License-Identifier: MIT
"""A migration, seen from who has the pages: rounds, the choice of a strategy, the switch, and who owns what after it.

Theory of operation
    Pre-copy: all pages are sent while their writer runs; then, round by round, those written to since. Once what is
    left takes no longer than `downtime_limit`, the writer is held, the rest is sent, both sides compare a digest of
    all pages (made of hashes that they took as pages went over, hashes.py), and the target becomes the owner.
    converge.py predicts whether that ever comes. If it does not, the writer is slowed down (auto-converge), or, after
    one round, the switch comes first and the rest follows: post-copy.

    Owner is the source until the target has said that it is. The source promises the target the pages in its journal
    (`handed-over`), tells it, and from then on runs the writer again only if the target says that it does not have
    them. So whatever is killed, and when: the one whose journal says so is the owner, and has every page.
        begun        -> the source is; what the target has is thrown away
        handed-over  -> the target is asked: owner, or prepared (it is told again), or it has nothing: the source is
        released     -> the target is
        kept         -> the source is

Differs from QEMU: a page that is dirtied again before its turn in a round is sent in that round all the same, as in
QEMU; but the decision to throttle is made by prediction, not by a share of dirtied bytes. A target that was lost in
post-copy does not lose the memory: the source still has it as it was at the switch, and says so.
"""

import errno
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dpud.gpu.clock import Clock, Debt, ManualClock, PacedClock
from dpud.gpu.errors import GpuError
from dpud.gpu.migration.channel import ConnectionLost
from dpud.gpu.migration.converge import Prediction, Strategy, dirty_rate, predict
from dpud.gpu.migration.journal import Journal
from dpud.gpu.migration.pages import BATCH_BYTES, Mask, Pages, Source, batches
from dpud.gpu.migration.state import Cancelled, Progress, State
from dpud.gpu.performance import performance
from kernelsim.operation import Operation

NS_PER_S = 1_000_000_000
_BURST_NS = NS_PER_S // 10
"""How far behind the bandwidth limit it may fall and still catch up; and how much of it goes over at once."""

POSTCOPY_BYTES = 128 << 10
"""Of what nobody waits for goes over at once; somebody may begin to wait behind it."""

log = logging.getLogger("dpud.gpu.migration")


@dataclass
class Settings:
    """The defaults are QEMU's, but for max_rounds, which it does not have, and the bandwidth, which it limits."""

    strategy: Strategy = Strategy.AUTO
    bandwidth_bytes_per_s: int = 0
    """0: as fast as it goes."""
    downtime_limit_ns: int = 300_000_000
    max_rounds: int = 30
    auto_converge: bool = True
    throttle_initial: int = 20
    throttle_increment: int = 10
    throttle_max: int = 99
    retry_ns: int = NS_PER_S
    """Between attempts to find a target again that may own the pages."""


class TargetLost(GpuError):
    """The target was promised the pages, and says that it does not have them: the source may go on."""

    def __init__(self) -> None:
        super().__init__(errno.EIO, "the target has lost the pages; they are here as they were at the switch")


class Target(Protocol):
    """Where the pages go: another device (device_target.py) or another daemon (remote_target.py)."""

    @property
    def name(self) -> str: ...

    def setup(self) -> Operation[None]:
        """Be let in. Raises OSError."""
        ...

    def send(self, area: int, pages: Pages) -> Operation[int]:
        """Bring pages over, as they are now -> bytes that it took."""
        ...

    def end_round(self) -> Operation[None]:
        """Returns when all that was sent is there."""
        ...

    def prepare(self, missing: list[Mask] | None) -> Operation[str]:
        """Have both sides compare all pages, but those that come later -> the digest. Raises GpuError(EIO)."""
        ...

    def commit(self) -> Operation[None]:
        """Make the target the owner. Raises ConnectionLost: it may be."""
        ...

    def resume(self) -> Operation[str]:
        """Ask again after a lost connection: absent, prepared, owner, running. Raises OSError."""
        ...

    def missing(self) -> list[Mask]:
        """After the switch: what the target does not have, as it last said."""
        ...

    def wanted(self) -> tuple[int, Pages] | None:
        """Pages that somebody over there waits for. Raises ConnectionLost."""
        ...

    def finish(self) -> Operation[None]:
        """Nothing more comes; returns when it is all there."""
        ...

    def abort(self, why: str) -> None:
        """The source stays the owner."""
        ...


class Migration:
    """One, from begin to end: drive `run`."""

    def __init__(
        self, source: Source, target: Target, clock: Clock, settings: Settings, progress: Progress, journal: Journal
    ) -> None:
        self.source, self.target, self.clock = source, target, clock
        self.settings, self.progress, self.journal = settings, progress, journal
        self.areas = source.manifest.areas
        progress.total_bytes = source.manifest.nr_bytes
        self._cancelled = False
        self._handed_over = False
        self._paced_ns = 0
        self._nr_pages = max(1, source.manifest.nr_pages)
        self._page_bytes = max(1, source.manifest.nr_bytes // self._nr_pages)
        self._throttle_base = 0.0

    def cancel(self) -> None:
        """Stop at the next batch. Raises GpuError(EBUSY) once the target may own the pages."""
        if self._handed_over or self.progress.is_over:
            raise GpuError(errno.EBUSY, f"it is {self.progress.state}")
        self._cancelled = True

    def run(self) -> Operation[None]:
        """All of it; how it ended is in `progress`."""
        return self._ended(self._all())

    def resume(self, postcopy: bool) -> Operation[None]:
        """What is left of one whose process was killed after it had promised the pages."""
        return self._ended(self._rest(postcopy))

    def _all(self) -> Operation[None]:
        self.journal.append(self.progress.id, "begun", client=self.progress.client, target=self.target.name)
        yield from self.target.setup()
        self.source.start()
        postcopy = yield from self._precopy()
        yield from self._switch(postcopy)
        if any(mask.any() for mask in self.target.missing()):
            yield from self._postcopy()
        self._release()

    def _rest(self, postcopy: bool) -> Operation[None]:
        self._handed_over = True
        self._to(State.DEVICE)
        self.source.freeze()
        status = yield from self._resume()
        if status == "prepared":
            yield from self._commit()
            status = (yield from self._resume()) if postcopy else "owner"
        if status == "running":
            yield from self._postcopy()
        self._release()

    def _ended(self, operation: Operation[None]) -> Operation[None]:
        self.progress.begin_ns = self.clock.now_ns()
        self._to(State.SETUP)
        try:
            yield from operation
        except Cancelled as cancelled:
            self._to(State.CANCELLING)
            self._keep(str(cancelled.strerror))
            self._to(State.CANCELLED)
        except OSError as error:
            self._fail(error)
        except Exception as error:  # a mistake of ours must not hold a client for ever
            log.exception("migration of %s", self.progress.client)
            self._fail(GpuError(errno.EIO, f"{type(error).__name__}: {error}"))
        except GeneratorExit:
            if not self.progress.is_over:
                self._fail(GpuError(errno.EINTR, "the daemon was ended"))
            raise

    # Before the switch.

    def _precopy(self) -> Operation[bool]:
        """Rounds while the writer runs -> whether the rest is to follow after the switch."""
        strategy = self.settings.strategy
        if strategy in (Strategy.STOP_AND_COPY, Strategy.POSTCOPY):
            self._chose(strategy, "asked for")
            return strategy is Strategy.POSTCOPY
        self._to(State.ACTIVE)
        while True:
            seconds = yield from self._round()
            if strategy is Strategy.HYBRID:
                self._chose(strategy, "asked for")
                return True
            if self.progress.expected_downtime_ns <= self.settings.downtime_limit_ns:
                self._chose(Strategy.PRECOPY, f"{self.progress.rounds} rounds")
                return False
            if self.progress.rounds >= self.settings.max_rounds:
                self._chose(Strategy.PRECOPY, "no more rounds")
                return False
            ahead = self._predict(seconds)
            if ahead.converges:
                self._chose(Strategy.PRECOPY, f"{ahead.rounds} more rounds, then {ahead.downtime_s * 1e3:.1f} ms")
            elif strategy is Strategy.AUTO:
                self._chose(Strategy.HYBRID, f"pre-copy would end with {ahead.downtime_s * 1e3:.1f} ms")
                return True
            elif self.settings.auto_converge:
                self._throttle()

    def _round(self) -> Operation[float]:
        """Send all that is dirty now -> seconds."""
        begin_ns, before = self.clock.now_ns(), self.progress.moved_pages
        self._paced_ns = begin_ns
        nr_bytes = 0
        for area, pages in self._take():
            nr_bytes += len(pages) * self.areas[area].page_bytes
            yield from self._send(area, pages)
        yield from self.target.end_round()
        self.progress.rounds += 1
        self.progress.round_pages.append(self.progress.moved_pages - before)
        ns = max(1, self.clock.now_ns() - begin_ns)
        self._measure(nr_bytes, self.progress.moved_pages - before, ns)
        performance(log, f"round {self.progress.rounds} of {self.progress.client}", nr_bytes, begin_ns, begin_ns + ns)
        return ns / NS_PER_S

    def _take(self) -> list[tuple[int, Pages]]:
        """What is dirty now, by area."""
        return [(area, self.source.take(area)) for area in range(len(self.areas))]

    def _send_all(self) -> Operation[None]:
        for area, pages in self._take():
            yield from self._send(area, pages)

    def _send(self, area: int, pages: Pages) -> Operation[None]:
        at_once = self.settings.bandwidth_bytes_per_s * _BURST_NS // NS_PER_S or BATCH_BYTES
        for batch in batches(pages, self.areas[area].page_bytes, min(at_once, BATCH_BYTES)):
            self._check()
            yield from self.source.admission(area, len(batch))
            nr_bytes = yield from self.target.send(area, batch)
            self.progress.moved_bytes += nr_bytes
            self.progress.moved_pages += len(batch)
            left = self.progress.remaining_bytes - len(batch) * self.areas[area].page_bytes
            self.progress.remaining_bytes = max(0, left)
            yield from self._pace(nr_bytes)

    def _check(self) -> None:
        if self._cancelled and not self._handed_over:
            raise Cancelled

    def _pace(self, nr_bytes: int) -> Operation[None]:
        """Let time pass, by absolute deadlines, so that no more than the limit goes over."""
        limit = self.settings.bandwidth_bytes_per_s
        if limit:
            self._paced_ns = max(self._paced_ns, self.clock.now_ns() - _BURST_NS)
            self._paced_ns += nr_bytes * NS_PER_S // limit
            yield from until(self.clock, self._paced_ns)
        else:
            yield from until(self.clock, 0)

    def _measure(self, nr_bytes: int, nr_pages: int, ns: int) -> None:
        """Rates of a round, and what they mean for stopping now."""
        progress, left = self.progress, self.source.nr_dirty_bytes
        if nr_bytes:
            progress.bandwidth_bytes_per_s = max(1, nr_bytes * NS_PER_S // ns)
        rate = dirty_rate(self._nr_pages, min(left // self._page_bytes, self._nr_pages), ns / NS_PER_S)
        progress.dirty_bytes_per_s = int(rate * self._page_bytes)
        progress.remaining_bytes = left
        progress.expected_downtime_ns = left * NS_PER_S // max(1, progress.bandwidth_bytes_per_s)

    def _predict(self, _seconds: float) -> Prediction:
        progress, settings = self.progress, self.settings
        return predict(
            self._nr_pages,
            progress.dirty_bytes_per_s / self._page_bytes,
            max(1, progress.bandwidth_bytes_per_s) / self._page_bytes,
            settings.downtime_limit_ns / NS_PER_S,
            settings.max_rounds - progress.rounds,
            progress.remaining_bytes / self._page_bytes,
        )

    def _throttle(self) -> None:
        """Slow the writer down, more each time."""
        progress, settings = self.progress, self.settings
        if not progress.throttle_percent:
            self._throttle_base = progress.dirty_bytes_per_s / self._page_bytes
            progress.throttle_percent = settings.throttle_initial
        else:
            progress.throttle_percent = min(
                settings.throttle_max, progress.throttle_percent + settings.throttle_increment
            )
        percent = progress.throttle_percent
        self.source.throttle(percent, self._throttle_base * (100 - percent) / 100)
        log.info("%s: writes are held down to %d percent", progress.client, 100 - percent)

    def _chose(self, strategy: Strategy, why: str) -> None:
        self.progress.strategy, self.progress.why = strategy, why

    # The switch.

    def _switch(self, postcopy: bool) -> Operation[None]:
        """Hold the writer, send what is left or say what comes later, and hand over."""
        self._to(State.DEVICE)
        self.source.freeze()
        begin_ns = self._paced_ns = self.clock.now_ns()
        missing: list[Mask] | None = None
        if postcopy:
            missing = [mask_of(pages, self.areas[area].nr_pages) for area, pages in self._take()]
        else:
            before = self.progress.moved_pages
            yield from self._send_all()
            while self.source.nr_dirty_bytes:  # the writer is held, but what is broken may have been made good
                yield from self._send_all()
            self.progress.round_pages.append(self.progress.moved_pages - before)
            yield from self.target.end_round()
        self.progress.digest = yield from self.target.prepare(missing)
        self._check()
        self.journal.append(self.progress.id, "handed-over", postcopy=postcopy, digest=self.progress.digest)
        self._handed_over = True
        yield from self._commit()
        self.progress.downtime_ns = self.clock.now_ns() - begin_ns
        self.progress.remaining_bytes = self._missing_bytes()

    def _commit(self) -> Operation[None]:
        """Until it is settled who owns the pages. Raises GpuError(EIO) where the target has lost them."""
        while True:
            try:
                yield from self.target.commit()
                return
            except ConnectionLost as error:
                self.progress.why = f"in doubt: {error.strerror}"
                status = yield from self._resume()
                if status in ("owner", "running"):
                    return

    def _resume(self) -> Operation[str]:
        """Ask the target what it has, until it answers."""
        while True:
            try:
                status = yield from self.target.resume()
                break
            except OSError as error:
                self.progress.why = f"waiting for the target: {error.strerror}"
                yield from until(self.clock, self.clock.now_ns() + self.settings.retry_ns)
        if status == "absent":
            raise TargetLost
        return status

    # After the switch.

    def _postcopy(self) -> Operation[None]:
        self._to(State.POSTCOPY_ACTIVE)
        while True:
            try:
                yield from self._push()
                yield from self.target.finish()
                return
            except ConnectionLost as error:
                self.progress.why = str(error.strerror)
                self._to(State.POSTCOPY_PAUSED)
                self._to(State.POSTCOPY_RECOVER)
                if (yield from self._resume()) == "owner":
                    return  # it had everything already
                self._to(State.POSTCOPY_ACTIVE)

    def _push(self) -> Operation[None]:
        """What is missing over there: what somebody waits for first, else in order."""
        missing = self.target.missing()
        for area, batch in self._in_order(missing):
            while (wanted := self.target.wanted()) is not None:
                at, pages = wanted
                self.progress.postcopy_requests += 1
                yield from self._send_missing(missing, at, pages)
            yield from self._send_missing(missing, area, batch)

    def _in_order(self, missing: list[Mask]) -> Iterator[tuple[int, Pages]]:
        for area, mask in enumerate(missing):
            for batch in batches(np.flatnonzero(mask), self.areas[area].page_bytes, POSTCOPY_BYTES):
                yield area, batch

    def _send_missing(self, missing: list[Mask], area: int, pages: Pages) -> Operation[None]:
        pages = pages[missing[area][pages]]
        if len(pages):
            missing[area][pages] = False
            yield from self._send(area, pages)

    def _missing_bytes(self) -> int:
        counts = (int(np.count_nonzero(mask)) for mask in self.target.missing())
        return sum(nr * area.page_bytes for nr, area in zip(counts, self.areas, strict=True))

    # The end.

    def _release(self) -> None:
        self.journal.append(self.progress.id, "released")
        self.progress.remaining_bytes = 0
        self.source.stop()
        self.source.release()
        self._to(State.COMPLETED)
        begin, end = self.progress.begin_ns, self.progress.end_ns
        performance(log, f"migrate {self.progress.client}", self.progress.moved_bytes, begin, end)

    def _fail(self, error: OSError) -> None:
        """Once the pages are promised, the source does not go on because something failed here: the target may."""
        log.error("migration of %s failed: %s", self.progress.client, error)
        self._to(State.FAILING)
        if self._handed_over and not isinstance(error, TargetLost):
            self.progress.why = f"still promised to the target: {error.strerror}"
        else:
            self._keep(str(error.strerror))
        self._to(State.FAILED)

    def _keep(self, why: str) -> None:
        """The source stays, or becomes again, the owner."""
        self.progress.why = why
        self.target.abort(why)
        self.source.stop()
        self.source.thaw()
        try:
            self.journal.append(self.progress.id, "kept", why=why)
        except OSError as error:  # nothing was promised: without the record the source is the owner too
            log.error("the journal: %s", error)

    def _to(self, state: State) -> None:
        self.progress.to(state, self.clock.now_ns())


def mask_of(pages: Pages, nr_pages: int) -> Mask:
    mask = np.zeros(nr_pages, dtype=np.bool_)
    mask[pages] = True
    return mask


def until(clock: Clock, ns: int) -> Operation[None]:
    """Give others a turn, and come back no sooner than at a time, on a clock that others may need meanwhile."""
    if isinstance(clock, ManualClock):
        clock.sleep_until(ns)
        yield None
        return
    if isinstance(clock, PacedClock) and not (debt := clock.debt()).is_over:
        yield debt
    debt = clock.until(ns) if isinstance(clock, PacedClock) else Debt(ns)
    yield None if debt.is_over else debt
