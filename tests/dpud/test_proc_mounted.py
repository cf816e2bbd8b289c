# SPDX-License-Identifier: GPL-2.0-only
"""Page files and /proc/PID through the mount, as unmodified programs read them (psutil, page-types)."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened"),
]

CONFIG = '[machine]\nnodes = [{memory = "256M"}, {memory = "256M"}]\n[memory]\nbytes = "stamp"\n'
TIMEOUT_S = 120
MAKE = """\
import errno, os, struct
mm = "/sys/kernel/config/kernelsim/mm"
def write(path, text):
    with open(path, "w") as file: file.write(text)
os.mkdir(f"{mm}/web")
for name, text in (("anon", "64M"), ("file", "8M"), ("holes", "25 seed=1"), ("mlock", "10"), ("fork", "worker")):
    write(f"{mm}/web/{name}", text)
emulated = os.environ["DPUD_MOUNT"] + "/proc"
"""

PSUTIL = """
import psutil
psutil.PROCFS_PATH = emulated
assert psutil.pids() == [100, 101], psutil.pids()
web, worker = psutil.Process(100), psutil.Process(101)
assert (web.name(), worker.name(), worker.ppid(), web.status()) == ("web", "worker", 100, "sleeping")
assert (web.num_threads(), web.uids().real, web.cmdline()) == (1, 0, ["web"])
info = web.memory_info()
assert info.rss == int(open(f"{mm}/web/rss").read())
assert info.vms == info.data + (8 << 20) == 72 << 20, info
full = web.memory_full_info()
assert full.uss == 0 and abs(full.pss - info.rss // 2) < 8192, full  # all of it is shared with the child
maps = {entry.path: entry for entry in web.memory_maps()}
assert maps["[anon]"].rss + 8 * (1 << 20) == info.rss
(path,) = [path for path in maps if path.startswith("/kernelsim/")]
assert maps[path].pss == 4 << 20
print("psutil")
"""

PAGE_TYPES = """
import collections
def entries(path, first=0, nr=1 << 62):
    with open(path, "rb", buffering=0) as file:
        found = []
        while len(found) < nr:
            data = os.pread(file.fileno(), 8 * min(65536, nr - len(found)), 8 * (first + len(found)))
            if not data:
                break
            found += struct.unpack(f"{len(data) // 8}Q", data)
    return found
flags, count = entries("/proc/kpageflags"), entries("/proc/kpagecount")
assert len(flags) == len(count) == 512 * 256, len(flags)
vmstat = dict(line.split() for line in open("/proc/vmstat"))
free = sum(flag >> 10 & 1 for flag in flags)
zones = sum(int(line.split()[-1]) for line in open("/proc/zoneinfo") if "pages free" in line)
assert abs(free - int(vmstat["nr_free_pages"])) < 64 and abs(free - zones) < 64
mapped = collections.Counter()
for pid in (100, 101):
    for line in open(f"{emulated}/{pid}/maps"):
        start, end = (int(address, 16) >> 12 for address in line.split()[0].split("-"))
        for entry in entries(f"{emulated}/{pid}/pagemap", start, end - start):
            if entry >> 63:
                mapped[entry & (1 << 55) - 1] += 1
assert len(mapped) > 12000
assert all(count[pfn] == nr for pfn, nr in mapped.items())
assert all(flags[pfn] >> 11 & 1 for pfn in mapped)  # MMAP
fd = os.open("/proc/kpageflags", os.O_RDONLY)
assert os.fstat(fd).st_size == 0
for size, offset in ((12, 0), (8, 4), (1, 0)):
    try:
        os.pread(fd, size, offset)
        raise SystemExit("a part of an entry was read")
    except OSError as error:
        assert error.errno == errno.EINVAL
assert os.path.exists(f"/proc/self/maps") and open("/proc/self/comm").read() != "web\\n"
print("page-types")
"""

LEAVING = """
import time
os.rmdir(f"{mm}/worker")
deadline = time.monotonic() + 20
while os.path.exists(f"{emulated}/101") and time.monotonic() < deadline:  # the kernel keeps names for a second
    time.sleep(0.05)
assert sorted(name for name in os.listdir(emulated) if name.isdigit()) == ["100"]
assert open("/proc/sys/vm/overcommit_memory").read() == "0\\n"
write("/proc/sys/vm/overcommit_memory", "2")
try:
    write(f"{mm}/web/anon", "400M")
    raise SystemExit("more was promised than there is")
except OSError as error:
    assert error.errno == errno.ENOMEM
print("leaving")
"""


def test_programs_understand_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One daemon for all of them; each says when it is through."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "config").write_text(CONFIG)
    dpud = [sys.executable, "-P", "-m", "dpud", "exec", "--config", str(tmp_path / "config"), "--"]
    done = subprocess.run(
        [*dpud, sys.executable, "-W", "ignore", "-c", MAKE + PSUTIL + PAGE_TYPES + LEAVING],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stdout) == (0, "psutil\npage-types\nleaving\n"), done.stderr
