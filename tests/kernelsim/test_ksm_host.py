# SPDX-License-Identifier: GPL-2.0-only
"""The counts of /sys/kernel/mm/ksm, pass by pass, against those of the running kernel for the same pages."""

import mmap
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from machines import Lab, settle

from kernelsim.content import new_stamps
from kernelsim.page import PAGE_SIZE

KSM = Path("/sys/kernel/mm/ksm")
COUNTS = (
    "pages_shared", "pages_sharing", "pages_unshared", "pages_volatile", "pages_scanned", "pages_skipped",
    "stable_node_chains", "stable_node_dups", "general_profit",
)  # fmt: skip
KNOBS = {"pages_to_scan": "1000000", "sleep_millisecs": "20", "max_page_sharing": "8", "smart_scan": "1"}
PATTERN = [i % 5 for i in range(40)] + list(range(100, 120)) + [7] * 20


class Host:
    """This process and its children, under the running kernel's ksmd."""

    def __init__(self) -> None:
        self.memory = mmap.mmap(-1, len(PATTERN) * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.child = 0

    def counts(self) -> dict[str, int]:
        return {name: int((KSM / name).read_text()) for name in COUNTS}

    def scan(self, nr: int) -> int:
        """So many passes, or more -> how many there were now."""
        wanted = int((KSM / "full_scans").read_text()) + nr
        (KSM / "run").write_text("1")
        while int((KSM / "full_scans").read_text()) < wanted:
            os.sched_yield()
        (KSM / "run").write_text("0")
        return int((KSM / "full_scans").read_text())

    def put(self, page: int, kind: int) -> None:
        self.memory[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes([kind + 1, 1]) * (PAGE_SIZE // 2)

    def mergeable(self, yes: bool) -> None:
        self.memory.madvise(mmap.MADV_MERGEABLE if yes else mmap.MADV_UNMERGEABLE)

    def drop(self, nr: int) -> None:
        self.memory.madvise(mmap.MADV_DONTNEED, 0, nr * PAGE_SIZE)

    def fork(self) -> None:
        self.child = os.fork()
        if self.child == 0:
            signal.pause()
            os._exit(0)

    def end_child(self) -> None:
        if self.child:
            os.kill(self.child, signal.SIGKILL)
            os.waitpid(self.child, 0)
            self.child = 0

    def ksm_stat(self) -> str:
        return Path("/proc/self/ksm_stat").read_text()


class Emulated:
    """The same in here."""

    def __init__(self) -> None:
        self.lab = Lab((32,), "full")
        for name, value in KNOBS.items():
            self.lab.write(f"{KSM}/{name}", value)
        self.process = self.lab.spawn("a", anon=str(len(PATTERN) * PAGE_SIZE))
        self.vma = self.process.anon_vmas[0]

    def counts(self) -> dict[str, int]:
        return {name: int(self.lab.read(f"{KSM}/{name}")) for name in COUNTS}

    def scan(self, full_scans: int) -> None:
        self.lab.write(f"{KSM}/run", "1")
        while int(self.lab.read(f"{KSM}/full_scans")) < full_scans:
            self.lab.machine.clock.advance(20_000_000)  # type: ignore[attr-defined]
            self.lab.machine.step(self.lab.machine.clock.now_ns())
        self.lab.write(f"{KSM}/run", "0")

    def put(self, page: int, kind: int) -> None:
        vpns, stamps = np.array([self.vma.start + page]), new_stamps(1, (1 << 50) + kind)
        settle([self.process.mm.write_same(self.vma, vpns, stamps)])

    def mergeable(self, yes: bool) -> None:
        self.lab.set("a", mergeable=str(int(yes)))

    def drop(self, nr: int) -> None:
        settle([self.process.mm.madvise_dontneed(self.vma, self.vma.vpns()[:nr])])

    def fork(self) -> None:
        self.lab.set("a", fork="b")

    def end_child(self) -> None:
        settle([self.lab.end("b")])

    def ksm_stat(self) -> str:
        return self.lab.read(f"/proc/{self.lab.read('/sys/kernel/config/kernelsim/mm/a/pid').strip()}/ksm_stat")


@contextmanager
def host_ksm() -> Iterator[Host]:
    """The running kernel's KSM, unused; afterwards as it was. Skips where it may not be used."""
    if not os.access(KSM / "run", os.W_OK):
        pytest.skip("may not write to the host's /sys/kernel/mm/ksm")
    before = {name: (KSM / name).read_text() for name in KNOBS}
    host = Host()
    if (KSM / "run").read_text() != "0\n" or any(host.counts()[name] for name in COUNTS[:4]):
        pytest.skip("somebody uses the host's KSM")
    try:
        (KSM / "run").write_text("2")  # full_scans begins anew
        for name, value in KNOBS.items():
            (KSM / name).write_text(value)
        yield host
    finally:
        host.end_child()
        host.memory.close()
        (KSM / "run").write_text("2")
        for name, value in before.items():
            (KSM / name).write_text(value)
        (KSM / "run").write_text("0")


@pytest.mark.host
def test_counts_are_those_of_the_running_kernel() -> None:
    with host_ksm() as host:
        emulated = Emulated()
        at_first = host.counts()

        def agree(nr_passes: int) -> None:
            for _ in range(nr_passes):
                emulated.scan(host.scan(1))
                since = {name: nr - at_first[name] for name, nr in host.counts().items()}
                assert emulated.counts() == since
                assert emulated.ksm_stat() == host.ksm_stat()
                assert emulated.lab.machine.check() == []

        def both(what: str, *args: int) -> None:
            for one in (host, emulated):
                getattr(one, what)(*args)

        for page, kind in enumerate(PATTERN):
            both("put", page, kind)
        both("mergeable", True)
        agree(3)
        both("put", 0, 200)
        both("put", 3, 201)
        assert emulated.counts() == {name: nr - at_first[name] for name, nr in host.counts().items()}
        agree(2)
        both("fork")
        agree(2)
        both("drop", 10)
        agree(1)
        for page in (45, 46, 2):
            both("put", page, 7)
        agree(4)
        both("end_child")
        agree(2)
        both("mergeable", False)
        host.scan(1)
        assert emulated.ksm_stat() == host.ksm_stat()
