# SPDX-License-Identifier: GPL-2.0-only
"""The DPU driver of a machine with a journal: what the core hears from the device is noted, and heard again.

When a batch is over, and how long it took, depends on threads and on the host. In a replay no rank runs on its own: a
batch that was submitted waits until the core hears that it is over, as it did then, and is run to its end at that
moment. Its bytes are moved by the same program; only the times are those that were measured then. Nobody can tell the
difference, because the pages of a batch are out of reach for everybody else while it is under way.

Only for emulated ranks: what a DPU of the `dpu` package does cannot be done again.
"""

import errno
from dataclasses import replace

from dpud.dpu.batch import Batch
from dpud.dpu.driver import BatchCompletion, DpuConfig, DpuDriver
from dpud.inject import Diverged, Outside
from kernelsim.dpu_hw import DpuResult

_STARTED, _NO_DEVICE = 1, 0


class NotedCompletion(BatchCompletion):
    """A batch under way."""

    def __init__(self, driver: "NotedDriver") -> None:
        super().__init__()
        self._driver = driver

    def done(self) -> bool:
        over = bool(self._driver.outside.take(lambda: int(super(NotedCompletion, self).done())))
        if over:
            self._driver.run_until(self)
        return over

    def wait(self, timeout_s: float) -> bool:
        if self._driver.outside.replaying:
            return True  # the core asks done() next, and that knows
        return super().wait(timeout_s)

    @property
    def over(self) -> bool:
        """Is it, whatever the core has heard?"""
        return super().done()

    def result(self) -> DpuResult:
        outside = self._driver.outside
        if outside.take(lambda: int(isinstance(self._outcome, Exception))):
            raise OSError(errno.ENODEV, "no DPU rank is present")
        return noted(outside, super().result())


def noted(outside: Outside, result: DpuResult) -> DpuResult:
    """A result with the times that count."""
    return replace(
        result, device_ns=outside.take(lambda: int(result.device_ns)), wall_ns=outside.take(lambda: int(result.wall_ns))
    )


class NotedDriver(DpuDriver):
    """The driver. In a replay, batches run when they are heard of (`held`)."""

    def __init__(self, config: DpuConfig, outside: Outside) -> None:
        self.outside = outside
        self.held = False
        super().__init__(config)

    @property
    def nr_present(self) -> int:
        return self.outside.take(lambda: self.pool.nr_present)

    def _execute(self, batch: Batch) -> DpuResult:
        return noted(self.outside, super()._execute(batch))

    def _submit(self, batch: Batch) -> BatchCompletion:
        if self.outside.take(lambda: _STARTED if self.pool.nr_present else _NO_DEVICE) == _NO_DEVICE:
            raise OSError(errno.ENODEV, "no DPU rank is present")
        completion = NotedCompletion(self)
        self._queue(self._drawn(batch), completion)
        return completion

    def _start_waiting(self) -> None:
        if not self.held:
            super()._start_waiting()

    def run_until(self, completion: NotedCompletion) -> None:
        """In a replay: run batches, in their order, until that one is over."""
        while self.held and not completion.over:
            started = self._start_one()
            for rank in self.pool.ranks:
                rank.worker.drain()
            if not started and not completion.over:
                raise Diverged("a batch was over that cannot be run")

    def release(self) -> None:
        """The replay is over: what waits may start."""
        self.held = False
        self._start_waiting()
