# SPDX-License-Identifier: GPL-2.0-only
"""Debian's programs, unmodified, under `dpud exec`: what they print is the emulated machine.

`make test` installs them (scripts/debian-packages). Nothing is asserted about a program's layout that could be asserted
about what it says.
"""

import fcntl
import json
import os
import pty
import re
import select
import shutil
import signal
import struct
import subprocess
import sys
import termios
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
from emulated import DPUD, Emulated, emulated, has_fuse

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not has_fuse(), reason="mounts with allow_other"),
]

CONFIG = '[machine]\ncpus = 6\n[[machine.nodes]]\nmemory = "512M"\n[[machine.nodes]]\nmemory = "256M"\n'
NODE_MIB = (512, 256)
NR_CPUS = 6


@pytest.fixture(scope="module")
def dpud() -> Iterator[Emulated]:
    with emulated(CONFIG) as found:
        yield found


def needs(program: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(shutil.which(program) is None, reason=f"{program} is not installed")


def meminfo(dpud: Emulated) -> dict[str, int]:
    """kB by name."""
    return {line.split(":")[0]: int(line.split()[1]) for line in dpud.text("/proc/meminfo").splitlines()}


def numbers(text: str) -> list[int]:
    return [int(word) for word in re.findall(r"\d+", text)]


# dmesg


def test_dmesg_shows_what_was_logged(dpud: Emulated) -> None:
    lines = dpud.sh("echo '<3>dpud: an error' > /dev/kmsg; echo '<6>dpud: a word' > /dev/kmsg; dmesg").splitlines()
    assert lines[0].endswith(f"{NR_CPUS} CPUs, {meminfo(dpud)['MemTotal']} kB of memory")
    assert [line.split("] ")[1] for line in lines[-2:]] == ["dpud: an error", "dpud: a word"]


def test_dmesg_decodes_and_selects_levels(dpud: Emulated) -> None:
    dpud.sh("echo '<3>dpud: bad' > /dev/kmsg; echo '<7>dpud: detail' > /dev/kmsg")
    assert re.search(r"^user  :err   : \[.*\] dpud: bad$", dpud.out("dmesg", "-x"), re.M)
    errors = dpud.out("dmesg", "--level=err")
    assert "dpud: bad" in errors
    assert "dpud: detail" not in errors


def test_dmesg_writes_json(dpud: Emulated) -> None:
    dpud.sh("echo '<4>dpud: json' > /dev/kmsg")
    last = json.loads(dpud.out("dmesg", "-J"))["dmesg"][-1]
    assert (last["pri"], last["msg"]) == (1 | 4, "dpud: json")  # this dmesg ors facility and level
    assert abs(float(last["time"]) - time.monotonic()) < 60


def test_dmesg_knows_the_time_of_day(dpud: Emulated) -> None:
    dpud.sh("echo 'dpud: now' > /dev/kmsg")
    line = dpud.sh("LC_ALL=C TZ=UTC dmesg -T").splitlines()[-1]
    stamp = time.strptime(re.match(r"\[(.*)\] dpud: now", line)[1], "%a %b %d %H:%M:%S %Y")  # type: ignore[index]
    assert abs(time.time() - time.mktime(stamp) + time.timezone) < 60


@pytest.mark.parametrize("option", ["-w", "-W"])
def test_dmesg_follows(dpud: Emulated, option: str) -> None:
    """-w after what there is, -W only what comes."""
    before, mark = f"dpud: before {option}", f"dpud: after {option}"
    (dpud.mnt / "dev/kmsg").write_text(before)
    time.sleep(1.1)  # the kernel may go by a file size that is a second old
    command = [*DPUD, "exec", "--mount", str(dpud.mnt), "dmesg", option]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as follower:
        assert follower.stdout is not None
        children = Path(f"/proc/{follower.pid}/task/{follower.pid}/children")
        waiting = "no"
        while "request_wait_answer" not in waiting:
            child = children.read_text().strip()
            waiting = Path(f"/proc/{child}/wchan").read_text() if child else "no"
            time.sleep(0.01)
        (dpud.mnt / "dev/kmsg").write_text(mark)
        seen = []
        for line in follower.stdout:
            seen.append(line.split("] ")[1].strip())
            if seen[-1] == mark:
                break
        follower.terminate()
    assert (before in seen) == (option == "-w")


def test_tail_follows_the_log(dpud: Emulated) -> None:
    command = [*DPUD, "exec", "--mount", str(dpud.mnt), "stdbuf", "-oL", "tail", "-f", "-c", "+1", "/dev/kmsg"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as tail:
        assert tail.stdout is not None
        assert "kernelsim:" in tail.stdout.readline()
        (dpud.mnt / "dev/kmsg").write_text("dpud: for tail\n")
        assert any("dpud: for tail" in line for line in tail.stdout)
        tail.terminate()


def test_dmesg_restrict(dpud: Emulated) -> None:
    as_nobody = "setpriv --reuid=65534 --regid=65534 --clear-groups head -c 1 /dev/kmsg"
    assert dpud.exec("sh", "-c", f"echo 1 > /proc/sys/kernel/dmesg_restrict; {as_nobody}").returncode == 1
    assert dpud.exec("sh", "-c", f"echo 0 > /proc/sys/kernel/dmesg_restrict; {as_nobody}").returncode in (0, 1)


# sysctl


def test_sysctl_a_lists_every_readable_sysctl(dpud: Emulated) -> None:
    listed = {line.split(" = ")[0] for line in dpud.exec("sysctl", "-a").stdout.splitlines()}
    files = [path for path in (dpud.mnt / "proc/sys").rglob("*") if path.is_file() and path.stat().st_mode & 0o400]
    files = [path for path in files if path.read_text()]  # stat_refresh has nothing to show, here as there
    ours = {".".join(path.relative_to(dpud.mnt / "proc/sys").parts) for path in files}
    assert "vm.dpu_compact_enabled" in ours
    assert ours <= listed
    assert "kernel.ostype" in listed, "the real kernel's stay in sight"


def test_sysctl_w_and_p(dpud: Emulated, tmp_path: Path) -> None:
    conf = tmp_path / "sysctl.conf"
    conf.write_text("# a comment\nvm.dpu_compact_min_fragments = 77\nkernel.printk = 3 4 1 7\n")
    assert dpud.sh("sysctl -w vm.extfrag_threshold=444; sysctl -n vm.extfrag_threshold").splitlines()[-1] == "444"
    dpud.out("sysctl", "-p", str(conf))
    assert dpud.text("/proc/sys/vm/dpu_compact_min_fragments") == "77\n"
    assert dpud.text("/proc/sys/kernel/printk") == "3\t4\t1\t7\n"
    bad = dpud.exec("sysctl", "-w", "vm.extfrag_threshold=1001")
    assert "Invalid argument" in bad.stderr
    assert dpud.text("/proc/sys/vm/extfrag_threshold") == "444\n"


# NUMA and CPUs


@needs("numactl")
def test_numactl_h(dpud: Emulated) -> None:
    text = dpud.out("numactl", "-H")
    assert "available: 2 nodes (0-1)" in text
    sizes = [int(size) for size in re.findall(r"node \d size: (\d+) MB", text)]
    totals = [int(kb) // 1024 for nid in (0, 1) for kb in re.findall(r"MemTotal: +(\d+)", _node(dpud, nid, "meminfo"))]
    assert sizes == totals
    assert all(mib * 0.95 < size < mib for size, mib in zip(sizes, NODE_MIB, strict=True))
    assert "node 0 cpus: 0 1 2" in text
    assert re.search(r"^  1:  20  10", text, re.M)


def _node(dpud: Emulated, nid: int, name: str) -> str:
    return dpud.text(f"/sys/devices/system/node/node{nid}/{name}")


@needs("numastat")
@pytest.mark.parametrize("option", ["", "-n", "-m"])
def test_numastat(dpud: Emulated, option: str) -> None:
    text = dpud.sh(f"numastat {option}".strip())
    if option == "-m":
        total = float(re.search(r"MemTotal +([\d.]+) +([\d.]+) +([\d.]+)", text)[3])  # type: ignore[index]
        assert abs(total - sum(NODE_MIB)) < 0.05 * sum(NODE_MIB)
    else:
        assert "numa_hit" in text.lower() or "Numa_Hit" in text
        assert "node1" in text.lower().replace(" ", "")


def test_lscpu(dpud: Emulated) -> None:
    found = json.loads(dpud.out("lscpu", "-J"))["lscpu"]
    flat = {entry["field"]: entry["data"] for entry in _flatten(found)}
    assert flat["CPU(s):"] == str(NR_CPUS)
    assert flat["On-line CPU(s) list:"] == f"0-{NR_CPUS - 1}"
    assert (flat["Socket(s):"], flat["Core(s) per socket:"], flat["Thread(s) per core:"]) == ("2", "3", "1")
    assert flat["NUMA node1 CPU(s):"] == "3-5"


def _flatten(entries: list[dict[str, object]]) -> Iterator[dict[str, object]]:
    for entry in entries:
        yield entry
        yield from _flatten(entry.get("children", []))  # type: ignore[arg-type]


def test_lsmem(dpud: Emulated) -> None:
    found = json.loads(dpud.out("lsmem", "-J", "-b", "--summary=never", "-o", "SIZE,STATE"))["memory"]
    assert sum(int(block["size"]) for block in found) == sum(NODE_MIB) << 20
    assert {block["state"] for block in found} == {"online"}
    assert f"Total online memory:     {sum(NODE_MIB)}M" in dpud.out("lsmem", "--summary=only")


def test_nproc_is_the_emulated_one_s_for_libc(dpud: Emulated) -> None:
    assert dpud.out("getconf", "_NPROCESSORS_ONLN") == f"{NR_CPUS}\n"


# Memory and time


def test_free(dpud: Emulated) -> None:
    row = numbers(dpud.out("free", "-b").splitlines()[1])
    assert row[0] == meminfo(dpud)["MemTotal"] << 10


def test_vmstat_s_and_m_and_d(dpud: Emulated) -> None:
    text = dpud.out("vmstat", "-s")
    assert f"{meminfo(dpud)['MemTotal']} K total memory" in text
    assert re.search(r"\d+ boot time", text)
    (dpud.mnt / "sys/kernel/config/kernelsim/mm/one").mkdir()
    (dpud.mnt / "sys/kernel/config/kernelsim/mm/one/anon").write_text("1M")
    slabs = {line.split()[0]: numbers(line)[0] for line in dpud.out("vmstat", "-m").splitlines()[1:]}
    assert slabs["mm_struct"] == 1
    assert slabs["vm_area_struct"] >= 1
    (dpud.mnt / "sys/kernel/config/kernelsim/mm/one").rmdir()
    assert len(dpud.out("vmstat", "1", "2").splitlines()) == 4


@needs("sar")
def test_sar_b_sees_faults(dpud: Emulated) -> None:
    touch = "mkdir $D/s; sleep 0.3; echo 64M > $D/s/anon; sleep 0.9; echo 1 > $D/s/anon; rmdir $D/s"
    script = f"D=/sys/kernel/config/kernelsim/mm; (sleep 0.5; {touch}) & LC_ALL=C sar -B 1 3; wait"
    rows = [line.split() for line in dpud.sh(script).splitlines()]
    head = next(row for row in rows if "fault/s" in row)
    faults = [float(row[head.index("fault/s")]) for row in rows if len(row) == len(head) and row[0] != "Average:"
              and row != head]  # fmt: skip
    assert sum(faults) > 10_000


@needs("mpstat")
def test_mpstat_has_the_cpus(dpud: Emulated) -> None:
    text = dpud.sh("LC_ALL=C mpstat -P ALL")
    assert f"({NR_CPUS} CPU)" in text
    assert len([line for line in text.splitlines() if re.match(r"\S+ +[AP]?M? *\d+ ", line)]) == NR_CPUS


def test_uptime_and_watch(dpud: Emulated) -> None:
    up = float(dpud.text("/proc/uptime").split()[0])
    assert abs(up - time.monotonic()) < 5
    assert "load average" in dpud.out("uptime")
    shown = dpud.exec("sh", "-c", "TERM=xterm timeout 3 watch -n 0.5 -t -g cat /proc/uptime")
    assert shown.returncode == 0, "watch -g ends at a change"


def test_top_and_ps(dpud: Emulated) -> None:
    text = dpud.sh("TERM=dumb top -b -n 1")
    total = float(re.search(r"Mem *: +([\d.]+) total", text)[1])  # type: ignore[index]
    assert abs(total - meminfo(dpud)["MemTotal"] / 1024) < 1
    assert re.search(r"^ *1 ", dpud.out("ps", "-eo", "pid,comm"), re.M)


# Monitors


def on_screen(dpud: Emulated, *command: str) -> str:
    """What a program that fills the screen has put there in two seconds, without the terminal's codes."""
    words = [*DPUD, "exec", "--mount", str(dpud.mnt), "--", *command]
    pid, terminal = pty.fork()
    if not pid:
        os.environ |= {"TERM": "xterm", "LC_ALL": "C"}
        os.execv(words[0], words)
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 50, 160, 0, 0))
    out, end = b"", time.monotonic() + 2
    try:
        while left := max(end - time.monotonic(), 0):
            if select.select([terminal], [], [], left)[0]:
                out += os.read(terminal, 65536)
                end = end if b"Mem" in out or b"Cache" in out else time.monotonic() + 2  # it has not begun
    finally:
        os.kill(pid, signal.SIGKILL)
        os.close(terminal)
        os.waitpid(pid, 0)
    return re.sub(rb"\x1b(\[[0-9;?]*[A-Za-z]|[()][A-Z0-9]|[=>])", b" ", out).decode(errors="replace")


@needs("htop")
def test_htop(dpud: Emulated) -> None:
    shown = " ".join(on_screen(dpud, "htop").split())
    total = re.search(r"Mem \[.*?[\d.]+[KMG]/([\d.]+)M", shown)
    assert total, shown[:1000]
    assert abs(float(total[1]) - meminfo(dpud)["MemTotal"] / 1024) < 1
    cpus = re.findall(r"(?:^| )(\d) \[", shown[: total.start()])
    assert sorted(map(int, cpus)) == list(range(NR_CPUS))


@needs("slabtop")
def test_slabtop(dpud: Emulated) -> None:
    (dpud.mnt / "sys/kernel/config/kernelsim/mm/slabtop").mkdir()
    try:
        lines = [line.split() for line in dpud.out("slabtop", "-o").splitlines()]
    finally:
        (dpud.mnt / "sys/kernel/config/kernelsim/mm/slabtop").rmdir()
    active = {line[-1]: int(line[1]) for line in lines if len(line) == 8 and line[0].isdigit()}
    assert active["mm_struct"] == 1
    assert "mm_struct" in on_screen(dpud, "slabtop")


@needs("smem")
def test_smem_of_the_whole_system(dpud: Emulated) -> None:
    lines = dpud.out("smem", "-w").splitlines()
    used = {line[:24].strip(): numbers(line[24:]) for line in lines[1:]}
    kb = meminfo(dpud)
    assert used["free memory"] == [kb["MemFree"], kb["MemFree"], 0]
    assert sum(row[0] for row in used.values()) == kb["MemTotal"]


@needs("atop")
def test_atop(dpud: Emulated) -> None:
    """It waits until as many tasks are in /proc as loadavg says."""
    (line,) = (line.split() for line in dpud.out("atop", "-P", "MEM", "1", "1").splitlines() if line.startswith("MEM"))
    kb = meminfo(dpud)
    assert [int(word) for word in line[6:9]] == [4096, kb["MemTotal"] // 4, kb["MemFree"] // 4]


@needs("lstopo-no-graphics")
def test_lstopo_finds_the_nodes(dpud: Emulated) -> None:
    """The host's kernel lets nobody use the CPUs that it lacks; hwloc leaves them out unless it is asked for them."""
    found = ElementTree.fromstring(dpud.out("lstopo-no-graphics", "--of", "xml", "--no-io", "--disallowed"))
    nodes = {node.get("os_index"): node for node in found.iter("object") if node.get("type") == "NUMANode"}
    for number, node in nodes.items():
        (total,) = re.findall(r"MemTotal: +(\d+) kB", dpud.text(f"/sys/devices/system/node/node{number}/meminfo"))
        assert int(node.get("local_memory", 0)) == int(total) << 10
    assert list(nodes) == [str(number) for number in range(len(NODE_MIB))]


@needs("nmon")
def test_nmon_records(dpud: Emulated, tmp_path: Path) -> None:
    """nmon goes on in the background, and counts processes in /proc, which are the host's."""
    file = tmp_path / "nmon.csv"
    dpud.sh(f"nmon -F {file} -s 1 -c 1 -p | {{ read -r pid; while [ -d /proc/$pid ]; do sleep 0.1; done; }}")
    records = [line.split(",") for line in file.read_text().splitlines()]
    (mem,) = (record for record in records if record[:2] == ["MEM", "T0001"])
    kb = meminfo(dpud)
    assert abs(float(mem[2]) - kb["MemTotal"] / 1024) < 1
    assert abs(float(mem[6]) - kb["MemFree"] / 1024) < 1
    assert sum(record[0].startswith("CPU0") and record[1] == "T0001" for record in records) == NR_CPUS


@needs("iostat")
def test_iostat_shows_the_cpus(dpud: Emulated) -> None:
    lines = dpud.out("iostat", "-c").splitlines()
    assert lines[0].endswith(f"({NR_CPUS} CPU)")
    user, nice, system, iowait, steal, idle = (float(word) for word in lines[3].split())
    assert (user, nice, iowait, steal) == (0, 0, 0, 0)
    assert system + idle == pytest.approx(100, abs=0.02)


@needs("hugeadm")
def test_hugeadm_lists_pools(dpud: Emulated) -> None:
    dpud.sh("echo 3 > /proc/sys/vm/nr_hugepages")
    try:
        pools = [line.split() for line in dpud.out("hugeadm", "--pool-list").splitlines()[1:]]
    finally:
        dpud.sh("echo 0 > /proc/sys/vm/nr_hugepages")
    assert pools[0] == ["2097152", "3", "3", "3", "*"]
    assert {int(pool[0]) for pool in pools} == {2 << 20, 1 << 30}


# Collectors


@needs("prometheus-node-exporter")
def test_node_exporter(dpud: Emulated) -> None:
    port = 19_100 + os.getpid() % 1000
    names = ("buddyinfo", "zoneinfo", "meminfo_numa", "meminfo", "vmstat", "cpu", "stat")
    command = ["prometheus-node-exporter", f"--path.procfs={dpud.mnt}/proc", f"--path.sysfs={dpud.mnt}/sys"]
    command += ["--collector.disable-defaults", f"--web.listen-address=127.0.0.1:{port}"]
    command += ["--collector.vmstat.fields=^(pgfault|compact_.*|nr_free_pages)$"]
    command += [f"--collector.{name}" for name in names if name != "zoneinfo" or (dpud.mnt / "proc/zoneinfo").exists()]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL) as exporter:
        try:
            metrics = scrape(port)
        finally:
            exporter.terminate()
    assert metrics["node_memory_MemTotal_bytes"] == meminfo(dpud)["MemTotal"] << 10
    for nid in (0, 1):
        kb = re.search(r"MemTotal: +(\d+)", _node(dpud, nid, "meminfo"))[1]  # type: ignore[index]
        assert metrics[f'node_memory_numa_MemTotal{{node="{nid}"}}'] == int(kb) << 10
    for line in dpud.text("/proc/buddyinfo").splitlines():
        node, zone, *counts = line.replace(",", "").split()[1:2] + line.split()[3:]
        for order, count in enumerate(counts):
            assert metrics[f'node_buddyinfo_blocks{{node="{node}",size="{order}",zone="{zone}"}}'] == int(count)
    assert metrics['node_cpu_seconds_total{cpu="5",mode="user"}'] == 0
    assert [name for name in metrics if name.startswith("node_scrape_collector_success")]
    assert all(value == 1 for name, value in metrics.items() if name.startswith("node_scrape_collector_success"))


def scrape(port: int) -> dict[str, float]:
    for _ in range(200):
        try:
            text = urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=20).read().decode()
            break
        except OSError:
            time.sleep(0.05)
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _space, value in lines}


def test_psutil(dpud: Emulated) -> None:
    pytest.importorskip("psutil")
    script = f"import psutil; psutil.PROCFS_PATH = '{dpud.mnt}/proc'\n"
    script += "print(psutil.virtual_memory().total, psutil.cpu_count(), psutil.swap_memory().total)"
    total, cpus, swap = numbers(dpud.out(sys.executable, "-W", "ignore", "-c", script))
    assert (total, cpus, swap) == (meminfo(dpud)["MemTotal"] << 10, NR_CPUS, 0)


# Tools that read any file

READERS = [
    "cat {}", "head -c 100000 {}", "tail -n 100000 {}", "tail -c +1 {}", "xxd {} | xxd -r", "dd if={} bs=7",
    "dd if={} bs=64k", "grep '' {}", "sed -n p {}", "awk '{{print}}' {}", "gawk '{{print}}' {}", "perl -pe 1 {}",
    "while read -r line; do echo \"$line\"; done < {}", "cp {} /tmp/x$$; cat /tmp/x$$; rm /tmp/x$$", "sort {}",
    "tee < {}",    "cat < {}", "cut -b 1- {}", "python3 -c \"print(open('{}').read())\"", "tac {} | tac",
    "split -l 1000 --filter=cat {}",    "busybox head -n 9999 {}", "busybox grep '' {}",
    "busybox awk '{{print}}' {}", "busybox tail -n 9999 {}",
    "busybox cat {}", "busybox cp {} /tmp/x$$; cat /tmp/x$$; rm /tmp/x$$",
    "python3 -c \"import shutil; shutil.copyfile('{}', '/tmp/y')\"; cat /tmp/y; rm /tmp/y",
    "busybox dd if={} bs=64k", "busybox sed -n p {}", "mawk '{{print}}' {}", "base64 {} | base64 -d",
]  # fmt: skip


@pytest.mark.parametrize(
    "path", ["/proc/buddyinfo", "/proc/sys/vm/extfrag_threshold", "/sys/devices/system/node/node0/distance"]
)
def test_readers_read_it_all(dpud: Emulated, path: str) -> None:
    """One shell runs them all, as starting `dpud exec` for each would take longer than they do."""
    text = dpud.text(path)
    commands = [command.format(path) for command in READERS if shutil.which(command.split()[0]) or "while" in command]
    if path.startswith("/proc/sys"):
        # a sysctl is read at position 0 only, as on the real one: what takes small pieces gets the first
        commands = [command for command in commands if "bs=7" not in command and "while read" not in command]
    done = dpud.exec("sh", "-c", "; printf '\\0'; ".join(f"{{ {command}; }} 2>&1" for command in commands))
    outputs = dict(zip(commands, done.stdout.split("\0"), strict=True))
    for command, output in outputs.items():
        kept = [line for line in output.splitlines() if "records" not in line and "copied" not in line]
        assert " ".join(kept).split() == text.split(), command


def test_tree_walkers(dpud: Emulated, tmp_path: Path) -> None:
    """find, grep -r, tar, cp -r, rsync, stat and getfattr over whole directories."""
    vm = "/proc/sys/vm"
    names = set(os.listdir(dpud.mnt / "proc/sys/vm"))
    assert set(dpud.sh(f"find {vm} -type f -printf '%f\\n'").split()) == names
    assert "dpu_compact_enabled" in dpud.exec("grep", "-r", "", vm).stdout
    dpud.sh(f"cp -r {vm} {tmp_path}/copy 2>/dev/null || true")
    assert (tmp_path / "copy/extfrag_threshold").read_text() == dpud.text(f"{vm}/extfrag_threshold")
    assert dpud.exec("sh", "-c", f"tar -cf - -C {vm} . 2>/dev/null | tar -t | wc -l").stdout.strip().isdigit()
    assert dpud.sh(f"stat -c '%a %s %F' {vm}/extfrag_threshold") == "644 0 regular empty file\n"
    assert dpud.exec("getfattr", "-d", f"{vm}/extfrag_threshold").stderr == ""
    node = "/sys/devices/system/node/node0"
    done = dpud.exec("rsync", "-r", "--exclude=compact*", node, f"{tmp_path}/node/")
    assert "read errors mapping" in done.stderr, "rsync goes by st_size 4096, and fails on the real ones too"
    dpud.sh(f"cp -r {node} {tmp_path}/copied 2>/dev/null || true")
    assert (tmp_path / "copied/distance").read_text() == _node(dpud, 0, "distance")


def test_strace_sees_ordinary_files(dpud: Emulated) -> None:
    if shutil.which("strace") is None:
        pytest.skip("not installed")
    done = dpud.exec("strace", "-e", "trace=openat,read", "cat", "/proc/buddyinfo")
    assert "Node 0, zone" in done.stderr
