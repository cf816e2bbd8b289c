# SPDX-License-Identifier: GPL-2.0-only
"""/proc/PID of emulated processes (fs/proc/base.c, array.c, task_mmu.c, 6.18).

The directory comes with the process, from mkdir, fork or an imported machine, and goes when its memory is gone. Pids
of configfs processes count up from 100, behind those of an imported machine, which are the real ones. They are not the
pids of the host: under `dpud exec` /proc/PID is the host's, and emulated processes are below the mount point alone.

Emulated processes are root's, have one thread, no program, no stack and no CPU time, and open no files: fields about
these are 0, and files about nothing else do not exist. A process is running (R) while somebody works on its memory,
else it sleeps (S).

What Linux computes under mmap_lock in one go is added up here in slices: a mapping that goes meanwhile is left out.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from kernelsim import proc_maps as maps_text
from kernelsim import task_mmu as mmu
from kernelsim.attr import Attr, Entries, Flavour, Guard, Int, Kobject, Text
from kernelsim.bitmap import format_list, format_mask
from kernelsim.kinds import c_string
from kernelsim.ksm_sysfs import ProcPidKsm
from kernelsim.mmap import Mm
from kernelsim.operation import Operation
from kernelsim.page import PAGE_SIZE
from kernelsim.tlb import flush_tlb_mm

if TYPE_CHECKING:
    from kernelsim.machine import Machine

TASK_COMM_LEN = 16
OOM_SCORE_ADJ_MIN, OOM_SCORE_ADJ_MAX = -1000, 1000
CLEAR_REFS_ALL, CLEAR_REFS_ANON, CLEAR_REFS_MAPPED, CLEAR_REFS_SOFT_DIRTY, CLEAR_REFS_MM_HIWATER_RSS = range(1, 6)
_PROC_NUMBUF = 13
_USER_HZ = 100
_SIGCHLD = 17
_RLIM_INFINITY = 2**64 - 1
_KB = PAGE_SIZE // 1024
_ENTRIES = Entries()


class _ProcInt(Int):
    """A number with space around it; only the first 12 bytes count (the numbuf of fs/proc/base.c)."""

    def parse(self, data: bytes, flavour: Flavour) -> tuple[int, int]:
        window = data[: _PROC_NUMBUF - 1]
        value, _ = super().parse(window.strip(b" \t\n\v\f\r"), flavour)
        return value, len(window)


class _Comm(Text):
    """A name, newline included; what does not fit is cut off."""

    def parse(self, data: bytes, flavour: Flavour) -> tuple[str, int]:
        return c_string(data[: TASK_COMM_LEN - 1]).decode("utf-8", "surrogateescape"), len(data)


class ProcPid(Kobject):
    """One process's directory. `busy()`: somebody works on its memory."""

    maps = Attr(Text(), guard=Guard.PTRACE, doc="Mappings, by address.")
    smaps = Attr(Text(), guard=Guard.PTRACE, doc="Mappings, and what is resident of each.")
    smaps_rollup = Attr(Text(), guard=Guard.PTRACE, doc="The sum over smaps.")
    numa_maps = Attr(Text(), guard=Guard.PTRACE, doc="Mappings, and how many of their pages each node has.")
    pagemap = Attr(
        Entries(),
        mode=0o400,
        guard=Guard.PTRACE,
        doc="The frame behind each virtual page (admin-guide/mm/pagemap.rst).",
    )
    clear_refs = Attr(
        _ProcInt(CLEAR_REFS_ALL, CLEAR_REFS_MM_HIWATER_RSS),
        mode=0o200,
        doc="Forget what was accessed: 1 all, 2 anonymous, 3 file pages; 4 nothing (no soft-dirty bits); 5 VmHWM.",
    )
    status = Attr(Text(), doc="Names, ids and sizes, one a line.")
    stat = Attr(Text(), doc="The same and more in one line (proc_pid_stat(5)).")
    statm = Attr(Text(), doc="Sizes in pages.")
    comm = Attr(_Comm(), mode=0o644, doc="The process's name, up to 15 bytes.")
    cmdline = Attr(Text(), doc="The process's name, ended with NUL.")
    oom_score = Attr(Text(), doc="How much ending it would help, 0 to 2000.")
    oom_score_adj = Attr(_ProcInt(OOM_SCORE_ADJ_MIN, OOM_SCORE_ADJ_MAX), 0, doc="Added to that, in 1000ths of memory.")

    def __init__(self, machine: Machine, mm: Mm, pid: int, ppid: int, busy: Callable[[], bool]) -> None:
        self.machine = machine
        self.mm = mm
        self.pid = pid
        self.ppid = ppid
        self.busy = busy
        self.gone = False
        self.ksm: ProcPidKsm | None = None
        self._start_ns = machine.clock.now_ns()

    # Mappings.

    @maps.show
    def _maps(self) -> str:
        return "".join(maps_text.maps_line(vma) for vma in maps_text.by_address(self.mm))

    @smaps.show
    def _smaps(self) -> Operation[str]:
        text = ""
        for vma in maps_text.by_address(self.mm):
            mss = maps_text.new_stats()
            for _ in maps_text.gather(vma, mss):
                yield None
                self._check_alive()
            text += maps_text.smap(vma, mss) if vma in self.mm.vma else ""
        return text

    @smaps_rollup.show
    def _smaps_rollup(self) -> Operation[str]:
        mss = maps_text.new_stats()
        head = maps_text.rollup_head(self.mm)
        for vma in maps_text.by_address(self.mm):
            for _ in maps_text.gather(vma, mss):
                yield None
                self._check_alive()
        return head + maps_text.smap_stats(mss, True)

    @numa_maps.show
    def _numa_maps(self) -> Operation[str]:
        text = ""
        for vma in maps_text.by_address(self.mm):
            md = np.zeros(mmu.NR_NUMA_STATS + self.machine.mem.nr_nodes, dtype=np.int64)
            for _ in maps_text.gather_numa(vma, md):
                yield None
                self._check_alive()
            text += maps_text.numa_line(vma, md) if vma in self.mm.vma else ""
        return text

    def _check_alive(self) -> None:
        if self.gone:
            raise OSError(errno.ESRCH, "the process has ended")

    @pagemap.read
    def _pagemap(self, pos: int, size: int, _nonblock: bool) -> bytes:
        first, nr = _ENTRIES.span(pos, size)
        out = np.empty(max(min(nr, mmu.TASK_SIZE_VPN - first), 0), dtype=np.uint64)
        if len(out):
            mmu.pagemap_read(self.machine.mem.pages, self.machine.vm.pt, self.mm.root, first, out)
        return out.tobytes()

    @clear_refs.store
    def _clear_refs(self, what: int) -> None:
        vm, mm = self.machine.vm, self.mm
        if what == CLEAR_REFS_MM_HIWATER_RSS:
            mm.reset_hiwater_rss()
            return
        for vma in mm.vma:
            wanted = what == CLEAR_REFS_ALL or what == (CLEAR_REFS_MAPPED if vma.file else CLEAR_REFS_ANON)
            if wanted:
                mmu.clear_refs(vm.mem.pages, vm.vmas, vm.pt, vma.id, vma.start, vma.end)
        flush_tlb_mm(vm.tlbs, vm.events, mm.id)

    # What it is and how large.

    @property
    def _pgtable_pages(self) -> int:
        return int(mmu.nr_page_tables(self.machine.vm.pt, self.mm.root))

    @property
    def _rss_file(self) -> int:
        return int(self.machine.vm.mms["rss_file"][self.mm.id])

    @property
    def _data_vm(self) -> int:
        """Pages of private writable mappings."""
        return sum(vma.nr_pages for vma in self.mm.vma if vma.file is None)

    @property
    def _state(self) -> str:
        return "R" if self.busy() else "S"

    @status.show
    def _status(self) -> str:
        nr_nodes, nr_cpus = self.machine.mem.nr_nodes, self.machine.vm.nr_cpus
        state = "R (running)" if self._state == "R" else "S (sleeping)"
        ids = (("Tgid", self.pid), ("Ngid", 0), ("Pid", self.pid), ("PPid", self.ppid), ("TracerPid", 0))
        lines = [f"Name:\t{self._name}", f"State:\t{state}"]
        lines += [f"{name}:\t{value}" for name, value in ids]
        lines += ["Uid:\t0\t0\t0\t0", "Gid:\t0\t0\t0\t0"]
        lines += [f"{name}:\t{pages * _KB:8d} kB" for name, pages in self._sizes()]
        lines += [f"THP_enabled:\t{int(self.machine.has('TRANSPARENT_HUGEPAGE'))}", "Threads:\t1"]
        for name, nr in (("Cpus", nr_cpus), ("Mems", nr_nodes)):
            lines += [f"{name}_allowed:\t{format_mask(range(nr), nr)}"]
            lines += [f"{name}_allowed_list:\t{format_list(range(nr)).strip()}"]
        return "\n".join(lines) + "\n"

    def _sizes(self) -> tuple[tuple[str, int], ...]:
        """In pages; as in task_mem(). There is no program, no stack, no shared memory and no swap."""
        mm = self.mm
        return (
            ("VmPeak", mm.hiwater_vm),
            ("VmSize", mm.total_vm),
            ("VmLck", sum(vma.nr_pages for vma in mm.vma if vma.locked)),
            ("VmPin", len(mm.pinned)),
            ("VmHWM", mm.hiwater_rss),
            ("VmRSS", mm.rss_pages),
            ("RssAnon", mm.rss_pages - self._rss_file),
            ("RssFile", self._rss_file),
            ("RssShmem", 0),
            ("VmData", self._data_vm),
            ("VmStk", 0),
            ("VmExe", 0),
            ("VmLib", 0),
            ("VmPTE", self._pgtable_pages),
            ("VmSwap", 0),
            ("HugetlbPages", 0),
        )

    @stat.show
    def _stat(self) -> str:
        """52 fields, those from `state` on in `fields`."""
        fields = [0] * 50
        named = {
            4: self.ppid,
            5: self.pid,
            6: self.pid,
            8: -1,
            10: self.mm.min_flt,
            12: self.mm.maj_flt,
            18: 20,
            20: 1,
            22: self._start_ns * _USER_HZ // 10**9,
        }
        named |= {23: self.mm.total_vm * PAGE_SIZE, 24: self.mm.rss_pages, 25: _RLIM_INFINITY}
        named |= {38: _SIGCHLD, 39: self.mm.cpu}
        for number, value in named.items():
            fields[number - 3] = value
        return f"{self.pid} ({self._name}) {self._state} {' '.join(map(str, fields[1:]))}\n"

    @statm.show
    def _statm(self) -> str:
        return f"{self.mm.total_vm} {self.mm.rss_pages} {self._rss_file} 0 0 {self._data_vm} 0\n"

    @property
    def _name(self) -> str:
        return self.mm.comm[: TASK_COMM_LEN - 1]

    @comm.show
    def _show_comm(self) -> bytes:
        return f"{self._name}\n".encode("utf-8", "surrogateescape")

    @comm.store
    def _set_comm(self, name: str) -> None:
        self.mm.comm = name

    @cmdline.show
    def _cmdline(self) -> bytes:
        return f"{self._name}\0".encode("utf-8", "surrogateescape")

    # Out of memory.

    def oom_badness(self) -> int | None:
        """Pages it has, and the adjustment (mm/oom_kill.c); None: never to be killed."""
        if self.oom_score_adj == OOM_SCORE_ADJ_MIN:
            return None
        total = self.machine.vm.overcommit.totalram_pages
        return self.mm.rss_pages + self._pgtable_pages + self.oom_score_adj * (total // 1000)

    @oom_score.show
    def _oom_score(self) -> str:
        """proc_oom_score(): badness, in 1000ths of memory above 1000, cut to 2000."""
        badness = self.oom_badness()
        total = self.machine.vm.overcommit.totalram_pages
        return "0" if badness is None else str((1000 + int(badness * 1000 / total)) * 2 // 3)


FIRST_PID = 100
"""Of the first process; kernel threads have lower ones."""


class Tasks:
    """Who has a directory in /proc."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine
        self.by_pid: dict[int, ProcPid] = {}
        self.next_pid = FIRST_PID

    def take_pid(self) -> int:
        pid = self.next_pid
        self.next_pid += 1
        return pid

    def add(self, mm: Mm, pid: int, ppid: int = 0, busy: Callable[[], bool] = lambda: False) -> ProcPid:
        """Show a process. Pids taken later are higher."""
        task = self.by_pid[pid] = ProcPid(self.machine, mm, pid, ppid, busy)
        self.next_pid = max(self.next_pid, pid + 1)
        self.machine.add_files(f"/proc/{pid}", task)
        if self.machine.ksm is not None:
            task.ksm = ProcPidKsm(self.machine.ksm, mm)
            self.machine.add_files(f"/proc/{pid}", task.ksm)
        return task

    def release_task(self, pid: int) -> None:
        """The process has ended."""
        task = self.by_pid.pop(pid)
        task.gone = True
        if task.ksm is not None:
            self.machine.registry.remove(f"/proc/{pid}", task.ksm)
        self.machine.registry.remove(f"/proc/{pid}", task)
