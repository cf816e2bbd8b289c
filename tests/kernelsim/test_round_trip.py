# SPDX-License-Identifier: GPL-2.0-only
"""An emulated machine's own files, captured as a real machine's are, make the same machine again.

The reader is the importer of real machines, so this holds the files to the kernel's formats once more.
"""

from pathlib import Path

import numpy as np
from machines import Lab

from dpud.capture import read_capture
from dpud.physmem import PhysMem
from kernelsim.machine import Machine
from kernelsim.operation import complete

TEXTS = ("buddyinfo", "pagetypeinfo", "zoneinfo", "vmstat", "meminfo")
FLAGS = sum(1 << bit for bit in (4, 5, 6, 10, 12, 14, 15, 16, 18, 22, 32, 33))
"""DIRTY LRU ACTIVE BUDDY ANON SWAPBACKED COMPOUND_HEAD COMPOUND_TAIL UNEVICTABLE THP RESERVED MLOCKED"""


def test_a_captured_emulated_machine_is_imported_as_it_was(tmp_path: Path) -> None:
    lab = Lab((64, 32), nr_cpus=1)
    lab.spawn("a", anon="24M", file="3M", mlock="20", holes="30 seed=1", fork="b")
    lab.spawn("huge", thp="1", anon="8M", fork="c")
    for name in TEXTS:
        (tmp_path / name).write_text(lab.read(f"/proc/{name}"))
    (tmp_path / "buddyinfo.end").write_text(lab.read("/proc/buddyinfo"))
    flags, count = lab.read_numbers("/proc/kpageflags"), lab.read_numbers("/proc/kpagecount")
    (tmp_path / "kpageflags").write_bytes(flags.tobytes())
    (tmp_path / "kpagecount").write_bytes(count.tobytes())
    again = Machine.from_image(read_capture(tmp_path), alloc_words=PhysMem().alloc)
    for name in ("buddyinfo", "pagetypeinfo"):
        assert again.registry.read(f"/proc/{name}").decode() == lab.read(f"/proc/{name}")
    file = again.registry.nodes["/proc/kpageflags"]
    data = complete(file.attr.read_stream(file.kobj, 0, 1 << 20, False))  # type: ignore[attr-defined]
    differ = (np.frombuffer(data, dtype=np.uint64) ^ flags) & np.uint64(FLAGS)
    table = flags >> np.uint64(26) & np.uint64(1) == 1  # the new owners have other page tables
    assert np.count_nonzero(differ[~table]) == 0
    file = again.registry.nodes["/proc/kpagecount"]
    data = complete(file.attr.read_stream(file.kobj, 0, 1 << 20, False))  # type: ignore[attr-defined]
    assert (np.frombuffer(data, dtype=np.uint64) == count).all()
    assert again.check() == []
