# SPDX-License-Identifier: MIT
"""Pressure of one client: the share of time that it waits for memory, in the format of the kernel's PSI.

Theory of operation
    A client's tasks are accesses that run, and tasks that wait: for admission, for a page to come back, for room to
    be made. An access that waits does not run meanwhile. `some` is time in which at least one waits, `full` time in
    which one waits and none runs: all that the client wants to do now is stalled (psi.h: a task that is stalled counts
    as running only for the CPU). Who does nothing at all neither waits nor runs. Time is counted
    in periods of 2 s + 1 tick. At the end of each, the share of it that was spent waiting goes into three averages,
    which forget by a factor of exp(-2s/10s), exp(-2s/60s) and exp(-2s/300s), in fixed point with 11 fraction bits, as
    the load average does. Source: kernel/sched/psi.c (update_averages, calc_avgs, psi_show), kernel/sched/loadavg.c
    (calc_load, calc_load_n, fixed_power_int), include/linux/sched/loadavg.h.

Differs from Linux: averages are brought up to date when somebody looks or the state changes, not by a worker. That
gives what the worker would have given had it always run on time. Its periods begin with the object.

Invariant: `full` never exceeds `some`, in totals and averages.
"""

NS_PER_S = 1_000_000_000
HZ = 250
"""Ticks of the kernel whose periods these are: Debian's and Ubuntu's."""

PERIOD_NS = (2 * HZ + 1) * NS_PER_S // HZ
"""PSI_FREQ: one tick more than the load average's, so that the two do not run in step."""

FRACTION_BITS = 11
ONE = 1 << FRACTION_BITS
DECAYS = (1677, 1981, 2034)
"""exp(-2/10), exp(-2/60), exp(-2/300) in units of 1/ONE."""

_WINDOWS = ("avg10", "avg60", "avg300")


def decayed(average: int, decay: int, active: int) -> int:
    """One step of a moving average; it rounds up while it rises. All in units of 1/ONE but `decay` of ONE."""
    total = average * decay + active * (ONE - decay)
    if active >= average:
        total += ONE - 1
    return total // ONE


def power(decay: int, nr: int) -> int:
    """`decay` to the power of `nr`, rounded to nearest at each multiplication, binary digit by binary digit."""
    result = ONE
    while nr:
        if nr & 1:
            result = (result * decay + ONE // 2) >> FRACTION_BITS
        nr >>= 1
        if nr:
            decay = (decay * decay + ONE // 2) >> FRACTION_BITS
    return result


class _State:
    """`some` or `full`: total and averages."""

    def __init__(self) -> None:
        self.total_ns = 0
        self.averages = [0, 0, 0]
        self._averaged_ns = 0  # of the total, what is in the averages

    def close_period(self, period_ns: int, nr_missed: int) -> None:
        """A period is over, after `nr_missed` ones in which nobody waited."""
        sample_ns = min(self.total_ns - self._averaged_ns, period_ns)
        self._averaged_ns += sample_ns
        if nr_missed:
            self.averages = [
                decayed(average, power(decay, nr_missed), 0)
                for average, decay in zip(self.averages, DECAYS, strict=True)
            ]
        percent = sample_ns * 100 // period_ns * ONE
        self.averages = [decayed(average, decay, percent) for average, decay in zip(self.averages, DECAYS, strict=True)]

    def line(self, name: str) -> str:
        shown = (
            f"{key}={average >> FRACTION_BITS}.{((average & ONE - 1) * 100) >> FRACTION_BITS:02d}"
            for key, average in zip(_WINDOWS, self.averages, strict=True)
        )
        return f"{name} {' '.join(shown)} total={self.total_ns // 1000}\n"


class PressureStall:
    """Stall accounting of one client. Times are ns of one clock; one that lies before the last changes nothing."""

    def __init__(self, now_ns: int = 0) -> None:
        self.some, self.full = _State(), _State()
        self._nr_waiting = 0
        self._nr_running = 0
        self._at_ns = now_ns
        self._period_end_ns = now_ns + PERIOD_NS
        self._closed_ns = now_ns

    def begin(self, now_ns: int) -> None:
        """One more task waits for memory."""
        self._advance(now_ns)
        self._nr_waiting += 1

    def end(self, now_ns: int) -> None:
        """It got it, or gave up."""
        self._advance(now_ns)
        assert self._nr_waiting, "nobody waits"
        self._nr_waiting -= 1

    def run(self, now_ns: int) -> None:
        """One more task makes progress."""
        self._advance(now_ns)
        self._nr_running += 1

    def rest(self, now_ns: int) -> None:
        """It no longer does."""
        self._advance(now_ns)
        assert self._nr_running, "nobody runs"
        self._nr_running -= 1

    def text(self, now_ns: int) -> str:
        """Two lines: averages in percent, totals in us."""
        self._advance(now_ns)
        return self.some.line("some") + self.full.line("full")

    def _advance(self, now_ns: int) -> None:
        """Count time up to now, and close the periods that ended in it."""
        while now_ns >= self._period_end_ns:
            if not self._nr_waiting:
                self._advance_idle(now_ns)
                return
            self._count(self._period_end_ns)
            self._close(self._period_end_ns, 0)
        self._count(now_ns)

    def _advance_idle(self, now_ns: int) -> None:
        """The same where nobody waits: the first period may have had waiting in it, all after it have none."""
        self._count(self._period_end_ns)
        self._close(self._period_end_ns, 0)
        nr_missed = (now_ns - self._closed_ns) // PERIOD_NS
        if nr_missed:
            self._closed_ns += (nr_missed - 1) * PERIOD_NS
            self._close(self._closed_ns + PERIOD_NS, nr_missed - 1)
        self._count(now_ns)

    def _close(self, at_ns: int, nr_missed: int) -> None:
        period_ns = at_ns - self._closed_ns
        for state in (self.some, self.full):
            state.close_period(period_ns, nr_missed)
        self._closed_ns = at_ns
        self._period_end_ns = at_ns + PERIOD_NS

    def _count(self, now_ns: int) -> None:
        passed_ns = max(0, now_ns - self._at_ns)
        if self._nr_waiting:
            self.some.total_ns += passed_ns
            if not self._nr_running:
                self.full.total_ns += passed_ns
        self._at_ns = max(self._at_ns, now_ns)
