# SPDX-License-Identifier: GPL-2.0-only
"""`dpud exec` over a made-up tree: plain files stand for the daemon's mount, so nothing here needs FUSE.

Each case runs in a process of its own, because a process cannot leave a namespace again.
"""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from wiring import let_others_in

EXEC = "import sys; from dpud.exec import run; from dpud.errors import UserError\n"
EXEC += "try: sys.exit(run(sys.argv[2:], sys.argv[1]))\nexcept UserError as error: sys.exit(f'dpud: {error}')"

ORDINARY_USER = Path(__file__).parent.parent / "ordinary_user.py"

CAN_UNSHARE = subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode == 0
pytestmark = pytest.mark.skipif(not CAN_UNSHARE, reason="this system gives no mount namespace to this user")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The shape of the emulated tree, with contents to know it by."""
    for name, text in {
        "proc/sys/vm/dpu_compact_enabled": "1\n",
        "proc/sys/vm/swappiness": "77\n",
        "proc/buddyinfo": "emulated\n",
        "proc/not_in_a_real_kernel": "x\n",
        f"proc/{os.getpid()}/maps": "emulated\n",
        "sys/devices/system/node/node0/compact_dpu": "",
        "sys/kernel/debug/dpu_compact/stats": "pages_moved 0\n",
        "sys/kernel/tracing/current_tracer": "emulated\n",
        "proc/sys/kernel/ftrace_enabled": "emulated\n",
        "sys/kernel/config/kernelsim/mm/readme": "config\n",
        "sys/class/dpu_rank/dpu_rank0/nr_dpus": "64\n",
        "sys/kernel/mm/transparent_hugepage/enabled": "emulated\n",
        "proc/loadavg": "emulated\n",
        "dev/kmsg": "6,0,0,-;DPU: hello\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def dpud_exec(tree: Path, *command: str, prefix: Sequence[str] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*prefix, sys.executable, "-c", EXEC, str(tree), *command],
        capture_output=True,
        text=True,
        timeout=30,
        stdin=subprocess.DEVNULL,
    )


def shell(tree: Path, script: str) -> str:
    done = dpud_exec(tree, "sh", "-ec", script)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.slow
def test_real_paths_show_the_emulated_files(tree: Path) -> None:
    paths = "/proc/sys/vm/swappiness /proc/buddyinfo /dev/kmsg /sys/kernel/debug/dpu_compact/stats"
    paths += " /sys/kernel/config/kernelsim/mm/readme /sys/class/dpu_rank/dpu_rank0/nr_dpus"
    expected = "77\nemulated\n6,0,0,-;DPU: hello\npages_moved 0\nconfig\n64\n"
    assert shell(tree, f"cat {paths}") == expected


@pytest.mark.slow
def test_tracing_is_the_emulated_kernels_for_those_who_look_for_a_tracefs(tree: Path) -> None:
    """libtracefs takes the first mount of that type, or makes one; what it finds must still be the emulated one."""
    (tree / "sys/kernel/debug/tracing").symlink_to("../tracing")
    read = "cat /sys/kernel/tracing/current_tracer /sys/kernel/debug/tracing/current_tracer"
    assert shell(tree, read) == 2 * "emulated\n"
    if os.geteuid() == 0 and "tracefs" in Path("/proc/filesystems").read_text():
        place = "awk '$3 == \"tracefs\" { print $2; exit }' /proc/mounts"
        assert shell(tree, f"cat $({place})/current_tracer") == "emulated\n"
    if Path("/proc/sys/kernel/ftrace_enabled").exists():
        hostname = Path("/proc/sys/kernel/hostname").read_text()
        assert shell(tree, "cat /proc/sys/kernel/ftrace_enabled /proc/sys/kernel/hostname") == f"emulated\n{hostname}"


def test_writes_reach_the_emulated_files(tree: Path) -> None:
    assert shell(tree, "for node in /sys/devices/system/node/node*/compact_dpu; do echo 1 | tee $node; done")
    assert (tree / "sys/devices/system/node/node0/compact_dpu").read_text() == "1\n"


@pytest.mark.slow
def test_the_rest_of_the_real_tree_stays(tree: Path) -> None:
    """Shared directories keep their other entries, also the ones that had to be rebuilt."""
    for directory in ("/sys/kernel", "/sys/class", "/sys/devices/system", "/dev"):
        inside = set(shell(tree, f"ls -A {directory}").split())
        assert set(os.listdir(directory)) - {"fd"} <= inside | {"fd"}
    assert shell(tree, "cat /sys/class/net/lo/mtu") == Path("/sys/class/net/lo/mtu").read_text()
    assert shell(tree, f"cat /proc/{os.getpid()}/comm") == Path(f"/proc/{os.getpid()}/comm").read_text()


@pytest.mark.slow
def test_no_memory_management_but_the_emulated_can_be_reached(tree: Path) -> None:
    """Or whoever tries KSM or DAMON in there would set the host's going."""
    assert shell(tree, "ls -A /sys/kernel/mm /proc/sys/vm /sys/devices/system/node").split() == [
        *("/proc/sys/vm:", "dpu_compact_enabled", "swappiness"),
        *("/sys/devices/system/node:", "node0"),
        *("/sys/kernel/mm:", "transparent_hugepage"),
    ]


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/proc/pressure"), reason="this kernel knows no pressure (CONFIG_PSI)")
def test_the_pressure_of_the_real_memory_is_out_of_sight(tree: Path) -> None:
    assert shell(tree, "ls -A /proc/pressure; cat /proc/pressure/memory 2>&1 || true").endswith(
        "No such file or directory\n"
    )


def test_the_load_is_that_of_the_processes_to_be_seen(tree: Path) -> None:
    nr_tasks = shell(tree, "cat /proc/loadavg").split()[3]
    assert int(nr_tasks.split("/")[1]) >= 1


def mounts_over_the_kernels() -> str:
    """What this process sees mounted in the places of the kernel's own trees."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return "\n".join(line for line in lines if line.split()[1].startswith(("/proc", "/sys", "/dev")))


@pytest.mark.slow
def test_nothing_shows_outside(tree: Path) -> None:
    """Other tests mount their own folders meanwhile."""
    before = mounts_over_the_kernels()
    assert " /proc/buddyinfo " in shell(tree, "cat /proc/self/mounts")
    assert " /proc/buddyinfo " not in before
    assert mounts_over_the_kernels() == before
    assert Path("/proc/sys/vm/swappiness").read_text() != "77\n"


@pytest.mark.slow
def test_the_mount_point_is_in_the_environment(tree: Path) -> None:
    assert shell(tree, "cat $DPUD_MOUNT/proc/not_in_a_real_kernel") == "x\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "code"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "kill -9 $$"], 137),
        (["/nonexistent/cmd"], 127),
        (["no-such-command-anywhere"], 127),
        (["/etc/passwd"], 126),
    ],
)
def test_exit_code_is_what_a_shell_gives(tree: Path, command: list[str], code: int) -> None:
    done = dpud_exec(tree, *command)
    assert done.returncode == code
    assert done.stderr.count("\n") == (code in (126, 127)), done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_signals_are_passed_on_to_the_command(tree: Path, signum: int) -> None:
    script = f"trap 'echo caught; exit 5' {signum}; echo ready; while :; do sleep 0.01; done"
    with subprocess.Popen(
        [sys.executable, "-c", EXEC, str(tree), "sh", "-c", script], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signum)
        assert process.stdout.read() == "caught\n"
    assert process.returncode == 5


@pytest.mark.slow
def test_without_a_daemon_there_is_one_clear_line(tmp_path: Path) -> None:
    done = dpud_exec(tmp_path, "true")
    assert done.stderr == f"dpud: no dpud answers at {tmp_path}: No such file or directory\n"


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to become someone else")
def test_an_ordinary_user_gets_a_user_namespace(tree: Path) -> None:
    let_others_in(tree)
    os.chown(tree / "proc/sys/vm/swappiness", 65534, 65534)
    script = "id -u; echo 5 | tee /proc/sys/vm/swappiness; cat /sys/kernel/debug/dpu_compact/stats"
    done = dpud_exec(tree, "sh", "-c", script, prefix=[sys.executable, str(ORDINARY_USER)])
    assert (done.stdout, done.stderr) == ("0\n5\npages_moved 0\n", "")
