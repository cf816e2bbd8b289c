# SPDX-License-Identifier: GPL-2.0-only
"""The toy registry through the kernel: shells, dd, dmesg, other users, blocked readers, dying daemons."""

import errno
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from mounted import AS_NOBODY, BINDINGS, DEADLINE_S, Mounted, is_available, mounted, until
from toy import BIG_LINES
from wiring import errno_of, let_others_in

from fs.fuse_ops import mount
from fs.kernfs import Tree
from fs.mountpoint import MountError, detach_stale, is_stale
from kernelsim.attr import Registry

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(os.geteuid() != 0, reason="mounts with allow_other and changes users"),
]


@pytest.fixture(scope="module", params=BINDINGS)
def mnt(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Mounted]:
    if not is_available(request.param):
        pytest.skip(f"no library or no /dev/fuse for {request.param}")
    folder = tmp_path_factory.mktemp("toy")
    let_others_in(folder)
    with mounted(folder, request.param) as found:
        yield found


def test_echo_and_cat(mnt: Mounted) -> None:
    assert mnt.out("echo 64 > proc/sys/vm/threshold; cat proc/sys/vm/threshold") == "64\n"
    assert mnt.out("echo 500 | tee proc/sys/vm/threshold; cat proc/sys/vm/threshold") == "500\n500\n"
    assert mnt.out("cat sys/devices/system/node/node0/enabled") == "always [madvise] never\n"
    assert mnt.out("cat sys/class/node/node0/online") == "0-1\n"


def test_bad_values_reach_the_shell_as_einval(mnt: Mounted) -> None:
    done = mnt.sh("echo 1001 > proc/sys/vm/threshold")
    assert done.returncode != 0
    assert mnt.out("cat proc/sys/vm/threshold") == "500\n"
    assert errno_of(write, mnt.root / "proc/sys/vm/threshold", b"x") == errno.EINVAL


def test_truncation_alone_changes_nothing(mnt: Mounted) -> None:
    mnt.out(": > proc/sys/vm/threshold; printf '' > proc/sys/vm/threshold; truncate -s 0 proc/buddyinfo")
    assert mnt.out("cat proc/sys/vm/threshold") == "500\n"


def test_short_writes_and_short_reads(mnt: Mounted) -> None:
    assert mnt.out("echo '7 abc' > proc/sys/vm/threshold; cat proc/sys/vm/threshold") == "7\n"
    mnt.out("echo 8 >> proc/sys/vm/threshold")
    assert mnt.out("cat proc/sys/vm/threshold; echo 500 > proc/sys/vm/threshold") == "8\n"
    assert mnt.out("dd if=proc/sys/vm/threshold bs=1 count=5 2>/dev/null") == "5"
    node = "sys/devices/system/node/node0"
    assert mnt.out(f"dd if={node}/online bs=1 2>/dev/null") == "0-1\n"
    assert mnt.out(f"echo 5 >> {node}/scale; cat {node}/scale") == "5\n"


def test_long_and_changing_texts(mnt: Mounted) -> None:
    lines = mnt.out("cat proc/big").splitlines()
    assert [int(line) for line in lines] == list(range(BIG_LINES))
    for size in (1, 7, 4096):
        assert len(set(mnt.out(f"dd if=proc/buddyinfo bs={size} 2>/dev/null").splitlines())) == 1


def test_listing(mnt: Mounted) -> None:
    assert mnt.out("ls -a proc/sys/vm").split() == sorted(
        [".", "..", "threshold", "enabled", "secret", "nr_pages", "compact_memory"]
    )
    assert os.listdir(mnt.root / "proc") == ["sys", "buddyinfo", "big", "pagetypeinfo"]
    inode = os.stat(mnt.root / "proc/sys/vm/threshold").st_ino
    assert {e.name: e.inode() for e in os.scandir(mnt.root / "proc/sys/vm")}["threshold"] == inode
    assert mnt.out("stat -c '%a %s %o %h' proc/sys/vm/threshold proc/sys/vm") == "644 0 1024 1\n555 0 1024 1\n"
    assert mnt.out("stat -c '%a %s' sys/devices/system/node/node0/compact") == "200 4096\n"


def test_write_only_files_are_unreadable_for_root(mnt: Mounted) -> None:
    for path in ("proc/sys/vm/compact_memory", "sys/devices/system/node/node0/compact"):
        assert errno_of(os.open, mnt.root / path, os.O_RDONLY) == errno.EACCES
        assert errno_of(os.open, mnt.root / path, os.O_RDWR) == errno.EACCES
        mnt.out(f"echo 1 > {path}")


def test_an_ordinary_user(mnt: Mounted) -> None:
    assert mnt.out("cat proc/sys/vm/threshold", *AS_NOBODY) == "500\n"
    for path in ("proc/sys/vm/secret", "proc/sys/vm/compact_memory", "proc/pagetypeinfo"):
        assert "Permission denied" in mnt.sh(f"cat {path}", *AS_NOBODY).stderr
    assert "Permission denied" in mnt.sh("echo 1 > proc/sys/vm/threshold", *AS_NOBODY).stderr
    handed_over = f"exec 3> proc/sys/vm/threshold; {' '.join(AS_NOBODY)} sh -c 'echo 5 | dd >&3'"
    assert "Operation not permitted" in mnt.sh(handed_over).stderr
    assert mnt.out("cat proc/sys/vm/threshold") == "500\n"


def test_names_cannot_be_made_or_removed(mnt: Mounted) -> None:
    flags = os.O_CREAT | os.O_WRONLY
    proc, sysfs = mnt.root / "proc/sys/vm", mnt.root / "sys/devices/system/node/node0"
    assert errno_of(os.open, proc / "new", flags) == errno.ENOENT
    assert errno_of(os.open, sysfs / "new", flags) == errno.EACCES
    assert errno_of(os.mkdir, proc / "new") == errno.ENOENT
    assert errno_of(os.mkdir, sysfs / "new") == errno.EPERM
    assert errno_of(os.mkdir, sysfs / "online") == errno.EEXIST
    assert errno_of(os.unlink, proc / "threshold") == errno.EACCES
    assert errno_of(os.unlink, sysfs / "online") == errno.EPERM
    assert errno_of(os.rename, sysfs / "online", sysfs / "offline") == errno.EPERM
    assert errno_of(os.chmod, proc / "threshold", 0o666) == errno.EPERM
    assert errno_of(os.chmod, sysfs / "scale", 0o600) == 0
    assert errno_of(os.utime, proc / "threshold") == 0


def test_a_bug_in_a_hook_is_eio_and_a_log_entry(mnt: Mounted) -> None:
    assert errno_of(write, mnt.root / "sys/kernel/debug/toy/broken", b"1") == errno.EIO
    assert "ZeroDivisionError" in mnt.log.read_text()
    assert mnt.out("cat proc/sys/vm/enabled") == "1\n"


def test_mkdir_and_rmdir(mnt: Mounted) -> None:
    os.chdir("/")
    config = mnt.root / "sys/kernel/config/toy"
    (config / "a").mkdir()
    assert mnt.out("cd sys/kernel/config/toy/a; echo 64K > size; cat size; ls") == "65536\nbuffers\ndata\nsize\nslow\n"
    (config / "a/buffers/one").mkdir()
    assert errno_of(os.rmdir, config / "a") == errno.ENOTEMPTY
    (config / "a/buffers/one").rmdir()
    (config / "a").rmdir()
    assert os.listdir(config) == []
    assert errno_of((config / "a/size").read_text) == errno.ENOENT


def test_rmdir_waits_for_a_store(mnt: Mounted) -> None:
    item = mnt.root / "sys/kernel/config/toy/busy"
    item.mkdir()
    mnt.out("echo 0 > sys/kernel/debug/toy/gate")
    slow = os.open(item / "slow", os.O_WRONLY)  # so that the writer can wait for the store only
    with subprocess.Popen(["echo", "1"], stdout=slow) as store:
        os.close(slow)
        until(lambda: is_waiting(store))
        with subprocess.Popen(["rmdir", str(item)]) as remove:
            until(lambda: is_waiting(remove))
            assert mnt.out("cat proc/sys/vm/enabled") == "1\n"
            assert item.exists()
            mnt.out("echo 1 > sys/kernel/debug/toy/gate")
            assert remove.wait(DEADLINE_S) == 0
        assert store.wait(DEADLINE_S) == 0
    assert not item.exists()


def test_bytes_go_in_and_out_with_dd(mnt: Mounted) -> None:
    """As many as a request holds at once, and where dd says."""
    mnt.out("mkdir sys/kernel/config/toy/bytes")
    mnt.out("head -c 300000 /dev/zero | tr '\\0' a | dd of=sys/kernel/config/toy/bytes/data bs=1M 2>/dev/null")
    mnt.out("printf bc | dd of=sys/kernel/config/toy/bytes/data bs=1 seek=131071 conv=notrunc 2>/dev/null")
    found = (mnt.root / "sys/kernel/config/toy/bytes/data").read_bytes()
    assert found == b"a" * 131071 + b"bc" + b"a" * (300000 - 131073)
    assert mnt.out("stat -c %s sys/kernel/config/toy/bytes/data") == "300000\n"
    over = mnt.sh("head -c 300001 /dev/zero > sys/kernel/config/toy/bytes/data")
    assert "No space left on device" in over.stderr
    mnt.out("rmdir sys/kernel/config/toy/bytes")


def test_records_of_a_stream(mnt: Mounted) -> None:
    mnt.out("echo '<2>DPU: hello' > dev/kmsg; printf 'two\\n' > dev/kmsg")
    fd = os.open(mnt.root / "dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
    try:
        records = [os.read(fd, 8191) for _ in range(3)]
        assert [r.split(b";")[1] for r in records] == [b"first\n", b"<2>DPU: hello\n", b"two\n"]
        assert errno_of(os.read, fd, 8191) == errno.EAGAIN
        assert os.lseek(fd, 0, os.SEEK_SET) == 0
        assert os.read(fd, 8191) == records[0]
    finally:
        os.close(fd)


def test_debians_dmesg(mnt: Mounted) -> None:
    mnt.out("echo 'DPU: Compacting 128 fragments' > dev/kmsg")
    script = "mount --bind dev/kmsg /dev/kmsg && dmesg | grep DPU: | tail -n1"
    assert mnt.out(script, "unshare", "-m", "--propagation", "private").endswith("] DPU: Compacting 128 fragments\n")


def test_a_hundred_blocked_readers_hurt_nobody(mnt: Mounted) -> None:
    """And SIGKILL ends every one of them at once, as it does on the real file."""
    script = "exec dd if=dev/kmsg of=/dev/null iflag=skip_bytes skip=1000000 2>/dev/null"
    readers = [subprocess.Popen(["sh", "-c", script], cwd=mnt.root) for _ in range(100)]
    try:
        until(lambda: all(is_waiting(reader) for reader in readers))
        assert mnt.out("cat proc/sys/vm/enabled") == "1\n"
    finally:
        for reader in readers:
            reader.kill()
    assert {reader.wait(DEADLINE_S) for reader in readers} == {-signal.SIGKILL}


def test_a_long_store_can_be_interrupted(mnt: Mounted) -> None:
    mnt.out("echo 0 > sys/kernel/debug/toy/gate")
    with subprocess.Popen(["sh", "-c", "echo 1 > sys/kernel/debug/toy/slow"], cwd=mnt.root) as store:
        until(lambda: is_waiting(store))
        assert mnt.out("cat sys/kernel/debug/toy/stats") == "waiting 1\n"
        store.terminate()
        assert store.wait(DEADLINE_S) == -signal.SIGTERM
    until(lambda: mnt.out("cat sys/kernel/debug/toy/stats") == "waiting 0\n")
    mnt.out("echo 1 > sys/kernel/debug/toy/gate")


NR_RUNS = 10


@pytest.mark.parametrize("binding", BINDINGS)
def test_requests_per_command(tmp_path: Path, binding: str) -> None:
    """The kernel asks for nothing that it need not know (fuse.md 8.3)."""
    if not is_available(binding):
        pytest.skip("no such library")
    with mounted(tmp_path, binding, "--debug") as mnt:
        scripts = {"cat": "cat proc/sys/vm/threshold", "echo": "echo 5 > proc/sys/vm/threshold"}
        for script in scripts.values():  # so that the kernel learns what is not there
            mnt.out(script)
        counts = {name: requests(mnt, script) for name, script in scripts.items()}
    assert counts["cat"].total() <= 5 * NR_RUNS, counts
    assert counts["echo"].total() <= 6 * NR_RUNS, counts
    assert not {"GETXATTR", "FLUSH", "ACCESS", "POLL", "FSYNC"} & {*counts["cat"], *counts["echo"]}


def requests(mnt: Mounted, script: str) -> "Counter[str]":
    """Requests that NR_RUNS runs of a script cause, by name; looking up names is not counted."""
    until(lambda: mnt.log.read_text().count("opcode: OPEN ") == mnt.log.read_text().count("opcode: RELEASE "))
    before = len(mnt.log.read_text())
    for _ in range(NR_RUNS):
        mnt.out(script)
    found = re.findall(r"opcode: (\w+)", mnt.log.read_text()[before:])
    return Counter(name for name in found if name not in ("LOOKUP", "INTERRUPT"))


@pytest.mark.parametrize("binding", BINDINGS)
def test_sigterm_unmounts_with_readers_blocked(tmp_path: Path, binding: str) -> None:
    if not is_available(binding):
        pytest.skip("no such library")
    with mounted(tmp_path, binding) as mnt:
        script = "exec dd if=dev/kmsg iflag=skip_bytes skip=1000000 2>/dev/null"
        with subprocess.Popen(["sh", "-c", script], cwd=mnt.root) as reader:
            until(lambda: is_waiting(reader))
            assert mnt.stop() == 0
            assert reader.wait(DEADLINE_S) != 0
        assert not os.path.ismount(mnt.root)


def test_a_killed_daemon_leaves_a_mount_that_can_be_cleaned_up(tmp_path: Path) -> None:
    with mounted(tmp_path) as mnt:
        fd = os.open(mnt.root / "proc/buddyinfo", os.O_RDONLY)
        mnt.stop(signal.SIGKILL)
        assert is_stale(str(mnt.root))
        assert detach_stale(str(mnt.root))
        assert not is_stale(str(mnt.root))
        assert errno_of(os.close, fd) in (0, errno.ENOTCONN)
        with mounted(tmp_path) as again:
            assert again.out("cat proc/sys/vm/enabled") == "1\n"


def test_a_second_mount_is_refused(tmp_path: Path) -> None:
    with mounted(tmp_path) as mnt, pytest.raises(MountError, match="mounted there already"):
        mount(Tree(Registry()), str(mnt.root))


def is_waiting(process: "subprocess.Popen[bytes]") -> bool:
    """Whether a process (the shell itself, or what it became) waits for an answer of the daemon."""
    assert process.poll() is None, "it did not wait"
    return "request_wait_answer" in Path(f"/proc/{process.pid}/wchan").read_text()


def write(path: Path, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        os.write(fd, data)
    finally:
        os.close(fd)
