# SPDX-License-Identifier: GPL-2.0-only
"""`dpud run` and `dpud exec` for real: mounts, signals, deaths, and what they leave behind (nothing)."""

import os
import pty
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dpud.capture import DEMO

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened"),
]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")

DPUD = [sys.executable, "-P", "-m", "dpud"]
ORDINARY_USER = [sys.executable, "-P", str(Path(__file__).parent.parent / "ordinary_user.py")]
TIMEOUT_S = 120

SEED_LINES = """
cat /proc/sys/vm/dpu_compact_enabled
echo 64 | tee /proc/sys/vm/dpu_compact_min_fragments
cat /proc/sys/vm/dpu_compact_min_fragments
echo 1 | tee /sys/devices/system/node/node0/compact_dpu
for node in /sys/devices/system/node/node*/compact_dpu; do echo 1 | tee $node; done
dmesg | grep -o 'DPU Memory Compaction initialized'
grep -q pages_moved /sys/kernel/debug/dpu_compact/stats
"""
SEED_OUTPUT = "1\n64\n64\n1\n1\n1\nDPU Memory Compaction initialized\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for mount points of the test; nothing may be left in it, mounted or not."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    yield tmp_path
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()
    assert os.listdir(tmp_path) == []


@contextmanager
def running(mountpoint: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    """A daemon that has said it is ready; ended afterwards if the test has not done so."""
    command = [*DPUD, "run", "--mount", str(mountpoint), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        try:
            assert daemon.stderr.readline().startswith(f"dpud: ready at {mountpoint} (2 nodes, 8G) in ")
            yield daemon
        finally:
            daemon.terminate()


def dpud(*words: str, prefix: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, *DPUD, *words],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
        env=os.environ | env,
    )


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_unmounts_and_removes_what_was_made(place: Path, signum: int) -> None:
    with running(place / "new") as daemon:
        assert (place / "new/proc/sys/vm/dpu_compact_enabled").read_text() == "1\n"
        daemon.send_signal(signum)
        assert daemon.wait(TIMEOUT_S) == 0
    assert not (place / "new").exists()


def test_a_blocked_reader_does_not_keep_the_daemon_alive(place: Path) -> None:
    reading = ["cat", place / "new/dev/kmsg"]
    with running(place / "new") as daemon, subprocess.Popen(reading, stdout=subprocess.PIPE) as reader:
        assert reader.stdout is not None
        assert any(b"DPU" in line for line in reader.stdout)  # the last record: now it waits for the next
        daemon.terminate()
        assert daemon.wait(TIMEOUT_S) == 0


def test_a_second_daemon_on_a_live_mount_is_refused(place: Path) -> None:
    with running(place / "new"):
        done = dpud("run", "--mount", str(place / "new"))
        assert done.returncode == 2
        assert done.stderr == f"dpud: {place}/new: something is mounted there already\n"
        assert (place / "new/proc/sys/vm/dpu_compact_enabled").read_text() == "1\n"


def test_the_mount_of_a_killed_daemon_is_cleared_by_the_next(place: Path) -> None:
    mountpoint = place / "new"
    with running(mountpoint) as daemon:
        daemon.kill()
        daemon.wait(TIMEOUT_S)
    with pytest.raises(OSError, match="not connected"):
        os.listdir(mountpoint)
    assert dpud("exec", "--mount", str(mountpoint), "true").returncode == 2
    with running(mountpoint):
        assert (mountpoint / "proc/sys/vm/dpu_compact_enabled").read_text() == "1\n"
    mountpoint.rmdir()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[machine]\nfoo = 1\n", ":2: machine.foo: unknown key"),
        ('[dpu]\nprofile = "none"\n', 'dpu.profile: "none": '),
        ('[dpu]\nproperties = "foo=1"\n', "dpu.properties: the profile argument: foo=1: unknown property: invalid"),
        ('[dpu]\nbackend = "dpu"\nbinary = "x"\n', "dpu.backend: \"dpu\": No module named 'dpu'"),
    ],
)
def test_a_bad_configuration_leaves_nothing(
    place: Path, tmp_path_factory: pytest.TempPathFactory, text: str, problem: str
) -> None:
    config = tmp_path_factory.mktemp("config") / "dpud.toml"
    config.write_text(text)
    done = dpud("run", "--mount", str(place / "new"), "--config", str(config))
    assert done.returncode == 2
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1


def test_exec_over_a_captured_machine(place: Path) -> None:
    """Zones DMA and DMA32 of the demo's capture come out to the byte; they were quiet when it was made."""
    captured = (DEMO / "buddyinfo").read_text().splitlines(keepends=True)
    done = dpud("exec", "--from", str(DEMO), "cat", "/proc/buddyinfo")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines(keepends=True)[:2] == captured[:2]


def test_a_broken_capture_is_one_line(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    done = dpud("exec", "--from", str(tmp_path_factory.mktemp("empty")), "true")
    assert done.returncode == 2
    assert "zoneinfo" in done.stderr
    assert done.stderr.count("\n") == 1


def test_systemd_is_told(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    address = str(tmp_path_factory.mktemp("notify") / "socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify, pytest.MonkeyPatch.context() as patch:
        notify.bind(address)
        notify.settimeout(TIMEOUT_S)
        patch.setenv("NOTIFY_SOCKET", address)
        with running(place / "new"):
            assert notify.recv(100).split(b"\n")[0] == b"READY=1"


def test_status_reads_a_running_daemon(place: Path) -> None:
    with running(place / "new"):
        done = dpud("status", "--mount", str(place / "new"), COLUMNS="200")
    assert (done.returncode, done.stderr) == (0, "")
    for word in ("Node 0", "dpu_compact_enabled", "pages_moved"):
        assert word in done.stdout


def test_a_daemon_goes_before_others_if_it_may(place: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What nice(1) gets is what it may have."""
    config = tmp_path_factory.mktemp("nice") / "config.toml"
    config.write_text("[mount]\nnice = 5\n")
    with running(place / "mnt") as daemon, running(place / "other", "--config", str(config)) as modest:
        allowed = subprocess.run(["nice", "-n", "-10", "nice"], capture_output=True, text=True, check=False).stdout
        assert os.getpriority(os.PRIO_PROCESS, daemon.pid) == int(allowed)
        assert os.getpriority(os.PRIO_PROCESS, modest.pid) == 5
        group = Path(f"/proc/{daemon.pid}/autogroup")  # not of a session of its own, so that is left alone
        assert not group.exists() or group.read_text() == Path("/proc/self/autogroup").read_text()


def test_exec_runs_the_seed_s_lines(place: Path) -> None:
    done = dpud("exec", "--", "sh", "-ec", SEED_LINES)
    assert (done.returncode, done.stdout, done.stderr) == (0, SEED_OUTPUT, "")


def test_exec_s_daemon_does_not_see_its_own_files_in_the_real_places() -> None:
    """It would wait for itself: glibc opens /proc/sys/vm/overcommit_memory when it gives a thread's memory back."""
    count = "for p in $(cat /proc/$PPID/task/$PPID/children); do grep -c '^dpud /proc' /proc/$p/mounts || true; done"
    done = dpud("exec", "--", "sh", "-c", count)
    of_daemon, of_command = map(int, done.stdout.split())
    assert of_daemon == 0
    assert of_command > 3


def test_exec_over_a_running_daemon_changes_that_one(place: Path) -> None:
    with running(place / "new"):
        done = dpud("exec", "--mount", str(place / "new"), "sh", "-ec", SEED_LINES)
        assert (done.returncode, done.stdout, done.stderr) == (0, SEED_OUTPUT, "")
        assert (place / "new/proc/sys/vm/dpu_compact_min_fragments").read_text() == "64\n"


@needs_root
def test_exec_works_for_an_ordinary_user_who_may_open_fuse() -> None:
    with tempfile.TemporaryDirectory(prefix="dpud-test-") as folder:
        os.chmod(folder, 0o777)
        prefix = (*ORDINARY_USER, "--fuse", "env", "-u", "XDG_RUNTIME_DIR", f"TMPDIR={folder}")
        done = dpud("exec", "--", "sh", "-ec", "id -u" + SEED_LINES, prefix=prefix)
        assert (done.returncode, done.stdout, done.stderr) == (0, "0\n" + SEED_OUTPUT, "")
        assert os.listdir(folder) == []


@needs_root
@pytest.mark.parametrize("words", [["exec", "true"], ["run", "--mount", "/tmp/dpud-never"]])
def test_an_ordinary_user_who_may_not_is_told(words: list[str]) -> None:
    if os.stat("/dev/fuse").st_mode & 0o006:
        pytest.skip("everybody may open /dev/fuse here")
    done = dpud(*words, prefix=tuple(ORDINARY_USER))
    assert done.returncode == 2
    way_out = "run dpud as root, or have root `chmod 666 /dev/fuse`"
    assert done.stderr == f"dpud: cannot open /dev/fuse as uid 65534: Permission denied: {way_out}\n"
    assert not os.path.exists("/tmp/dpud-never")


@needs_root
def test_an_ordinary_user_may_look_into_root_s_daemon() -> None:
    with open_to_all() as mountpoint, running(mountpoint):
        script = "cat /proc/sys/vm/dpu_compact_enabled; echo 0 2>/dev/null >/proc/sys/vm/dpu_compact_enabled"
        done = dpud("exec", "--mount", str(mountpoint), "sh", "-c", script, prefix=tuple(ORDINARY_USER))
        assert done.stdout == "1\n"
        assert done.returncode != 0
        assert (mountpoint / "proc/sys/vm/dpu_compact_enabled").read_text() == "1\n"


@contextmanager
def open_to_all() -> Iterator[Path]:
    """A mount point that another user can get to, which pytest's own folders are not."""
    path = Path(f"/tmp/dpud-test-{os.getpid()}")
    yield path
    assert not path.exists()


def test_exec_killed_ends_the_daemon(place: Path) -> None:
    """The command lives on, as it does under any killed parent; the daemon goes with its folder."""
    command = [*DPUD, "exec", "--", "sh", "-c", "echo $DPUD_MOUNT; exec cat /dev/kmsg"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        mountpoint = process.stdout.readline().strip()
        assert any("DPU" in line for line in process.stdout)
        process.kill()
        process.stdout.read()  # until the blocked cat ends, by the daemon's end
    until(lambda: not os.path.lexists(mountpoint))


def test_exec_over_a_killed_daemon_still_gives_the_command_s_code(place: Path) -> None:
    script = 'kill -9 $(pgrep -f "run --mount $DPUD_MOUNT"); '
    script += "while cat /proc/buddyinfo 2>/dev/null; do :; done; exit 3"
    assert dpud("exec", "--", "sh", "-c", script).returncode == 3


def test_ctrl_c_goes_to_the_command(place: Path) -> None:
    """On a terminal of its own: the command gets the interrupt, dpud exec stays for its exit code."""
    pid, terminal = pty.fork()
    if pid == 0:
        script = "trap 'echo caught; exit 9' INT; echo ready; while :; do sleep 0.05; done"
        os.execv(DPUD[0], [*DPUD, "exec", "--", "sh", "-c", script])
    read_until(terminal, b"ready")
    os.write(terminal, b"\x03")
    read_until(terminal, b"caught")
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    os.close(terminal)


def read_until(terminal: int, word: bytes) -> None:
    seen = b""
    while word not in seen:
        seen += os.read(terminal, 1000)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(TIMEOUT_S * 100):
        if condition():
            return
        signal.sigtimedwait([], 0.01)
    raise AssertionError("it never came true")
