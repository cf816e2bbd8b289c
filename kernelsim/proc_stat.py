# SPDX-License-Identifier: GPL-2.0-only
"""/proc/stat, uptime, loadavg, cpuinfo, swaps: what programs set the memory files in relation to (fs/proc/*.c).

They are here so that the CPUs are the same everywhere: in /proc, in /sys/devices/system/{cpu,node}, and in what libc
makes of those. What these show is the emulated machine's (cputime.py); user time and interrupts it has none of.
Differences from Linux: cpuinfo says only what is emulated: which processors, and which node (socket) each is in.
"""

from collections.abc import Callable, Iterator, Sequence

from kernelsim.attr import Attr, Kobject, Text
from kernelsim.cputime import CpuTime

USER_HZ = 100
_TICK_NS = 1_000_000_000 // USER_HZ


class ProcStat(Kobject):
    """The files that are about CPUs and time."""

    stat = Attr(Text(), doc="CPU time by use in 1/100 s, context switches, boot time, processes.")
    uptime = Attr(Text(), doc="Seconds since boot; seconds that the CPUs were idle, added up.")
    loadavg = Attr(Text(), doc="Load over 1, 5 and 15 minutes; running and all processes; last pid.")
    cpuinfo = Attr(Text(), doc="The processors, and the node that each is in.")
    swaps = Attr(Text(), doc="Swap areas: there are none.")

    def __init__(
        self,
        cpus: Sequence[Sequence[int]],
        cputime: CpuTime,
        now_ns: Callable[[], int],
        btime_s: Callable[[], int],
        processes: Callable[[], tuple[int, int, int]],
    ) -> None:
        """`cpus` of each node; `btime_s`: when the machine was booted; `processes`: how many, last pid, running."""
        self.cpus = cpus
        self.cputime = cputime
        self.now_ns = now_ns
        self.btime_s = btime_s
        self.processes = processes

    @stat.show
    def _stat(self) -> str:
        _nr, last_pid, nr_running = self.processes()
        rows = [self._cpu_times(cpu) for cpu in range(len(self.cputime.system_ns))]
        lines = [_cpu_line("cpu ", [sum(column) for column in zip(*rows, strict=True)])]
        lines += [_cpu_line(f"cpu{cpu}", row) for cpu, row in enumerate(rows)]
        lines += ["intr 0", f"ctxt {self.cputime.nr_switches}", f"btime {self.btime_s()}", f"processes {last_pid}"]
        lines += [f"procs_running {nr_running}", "procs_blocked 0", "softirq 0" + " 0" * 10]
        return "\n".join(lines)

    def _cpu_times(self, cpu: int) -> tuple[int, int]:
        """System and idle time in ticks."""
        idle_ns = self.cputime.idle_ns(cpu, self.now_ns())
        return self.cputime.system_ns[cpu] // _TICK_NS, idle_ns // _TICK_NS

    @uptime.show
    def _uptime(self) -> str:
        now_ns = self.now_ns()
        idle_ns = sum(self.cputime.idle_ns(cpu, now_ns) for cpu in range(len(self.cputime.system_ns)))
        return f"{_hundredths(now_ns)} {_hundredths(idle_ns)}"

    @loadavg.show
    def _loadavg(self) -> str:
        nr, last_pid, nr_running = self.processes()
        averages = " ".join(f"{load:.2f}" for load in self.cputime.loadavg())
        return f"{averages} {nr_running}/{nr} {last_pid}"

    @cpuinfo.show
    def _cpuinfo(self) -> str:
        return "".join(f"{line}\n" for line in self._cpuinfo_lines())

    def _cpuinfo_lines(self) -> Iterator[str]:
        for nid, cpus in enumerate(self.cpus):
            for core, cpu in enumerate(cpus):
                yield f"processor\t: {cpu}"
                yield "vendor_id\t: dpud"
                yield "model name\t: kernelsim emulated CPU"
                yield f"physical id\t: {nid}"
                yield f"siblings\t: {len(cpus)}"
                yield f"core id\t\t: {core}"
                yield f"cpu cores\t: {len(cpus)}"
                yield ""

    @swaps.show
    def _swaps(self) -> str:
        return "Filename\t\t\t\tType\t\tSize\t\tUsed\t\tPriority\n"


def _cpu_line(name: str, times: Sequence[int]) -> str:
    system, idle = times
    return f"{name} 0 0 {system} {idle} 0 0 0 0 0 0"


def _hundredths(ns: int) -> str:
    seconds, rest = divmod(ns // _TICK_NS, USER_HZ)
    return f"{seconds}.{rest:02d}"
