# SPDX-License-Identifier: GPL-2.0-only
"""What the emulated CPUs did since boot (kernel/sched/cputime.c): kernel work, or nothing.

Emulated processes run no instructions, so the only time that passes on an emulated CPU is the emulated kernel's: each
turn of whoever holds the machine. The daemon measures the turns and charges them here, those of a kernel thread to the
first CPU of its node, those of requests to CPU 0, which may get more than a CPU has: then it is never idle. A turn is
also the only context switch there is. In library mode nobody measures, and the CPUs are idle.
"""

from collections.abc import Callable, Sequence

_LOAD_PERIOD_NS = 5_000_000_000
_FIXED_1, _FIXED_SHIFT = 1 << 11, 11
_EXP = (1884, 2014, 2037)  # include/linux/sched/loadavg.h: 1/exp(5 s / 1, 5, 15 min) in 11 bits


class CpuTime:
    """Time per CPU, and the load average that follows from it."""

    def __init__(self, cpus: Sequence[Sequence[int]], now_ns: Callable[[], int]) -> None:
        """`cpus`: the CPUs of each node."""
        self.system_ns = [0] * sum(len(of_node) for of_node in cpus)
        self.nr_switches = 0
        self._cpu: dict[str, int] = {}
        self._first = [of_node[0] if of_node else 0 for of_node in cpus]
        self._now_ns = now_ns
        self._since_ns = now_ns()
        self._averages = [0, 0, 0]
        self._seen_ns = 0

    def charge(self, thread: str, ns: int) -> None:
        """`thread` held the machine for so long."""
        cpu = self._cpu.get(thread)
        if cpu is None:
            cpu = self._cpu[thread] = self._cpu_of(thread)
        self.system_ns[cpu] += ns
        self.nr_switches += 1

    def _cpu_of(self, thread: str) -> int:
        """kcompactd1 and kswapd1 run on node 1."""
        name = thread.rstrip("0123456789")
        nid = int(thread[len(name) :] or 0) if name in ("kcompactd", "kswapd") else 0
        return self._first[nid] if nid < len(self._first) else 0

    def idle_ns(self, cpu: int, uptime_ns: int) -> int:
        return max(uptime_ns - self.system_ns[cpu], 0)

    def loadavg(self) -> list[float]:
        """Averages over 1, 5 and 15 minutes, by calc_global_load()'s formula.

        The kernel samples the running threads every 5 s. Here their mean over the periods since this was last asked
        stands for the samples: time spent over time passed.
        """
        nr_periods = (self._now_ns() - self._since_ns) // _LOAD_PERIOD_NS
        if nr_periods:
            spent_ns = sum(self.system_ns)
            active = (spent_ns - self._seen_ns) * _FIXED_1 // (nr_periods * _LOAD_PERIOD_NS)
            self._since_ns += nr_periods * _LOAD_PERIOD_NS
            self._seen_ns = spent_ns
            self._averages = [
                _calc_load(load, exp, active, nr_periods) for load, exp in zip(self._averages, _EXP, strict=True)
            ]
        return [load / _FIXED_1 for load in self._averages]


def _calc_load(load: int, exp: int, active: int, nr_periods: int) -> int:
    """calc_load() once for each period; the power makes many of them one step, as calc_load_n() does."""
    decay = (exp / _FIXED_1) ** nr_periods
    return round(load * decay + active * (1 - decay))
