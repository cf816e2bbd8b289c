# SPDX-License-Identifier: GPL-2.0-only
"""dpud.service under a real systemd: started, used, reloaded, restarted, killed, hung, stopped."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from booted import Booted, booted, can_boot, until

ROOT = Path(__file__).parents[2]
MNT = "/run/dpud"

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(not can_boot(), reason="needs root, systemd and a cgroup2 hierarchy"),
    pytest.mark.skipif(ROOT.is_relative_to("/tmp"), reason="the unit has a /tmp of its own, without this checkout"),
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened"),
]

DROP_IN = f"""
[Service]
# This checkout's modules, whatever the environment has installed.
Environment=PYTHONPATH={ROOT} PYTHONDONTWRITEBYTECODE=1
"""


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Booted]:
    with booted(tmp_path_factory.mktemp("root")) as system:
        for folder in Path(sys.executable).resolve().parents:  # the service's user has to reach the interpreter
            system.out("chmod", "o+x", str(folder))
        system.out("make", "-s", "-C", str(ROOT), "install-system", "PREFIX=/usr")
        configure(system, "test", DROP_IN)
        yield system


def configure(system: Booted, name: str, text: str) -> None:
    """Add to the unit."""
    folder = "/etc/systemd/system/dpud.service.d"
    system.sh(f"mkdir -p {folder}; cat >{folder}/{name}.conf <<'.'\n{text}\n.")
    system.out("systemctl", "daemon-reload")


@pytest.fixture
def running(system: Booted) -> Booted:
    if not system.is_active():
        system.run("systemctl", "reset-failed", "dpud")
        system.out("systemctl", "start", "dpud")
    return system


def main_pid(system: Booted) -> int:
    return int(system.show("MainPID"))


def answers(system: Booted) -> bool:
    return system.run("cat", f"{MNT}/proc/sys/vm/dpu_compact_enabled").stdout == "1\n"


def kill(system: Booted, number: int) -> int:
    """Send the daemon a signal -> its pid."""
    pid = main_pid(system)
    system.out("kill", f"-{number}", str(pid))
    return pid


@pytest.fixture(scope="module")
def unit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unit as it is installed, but for the program."""
    path = tmp_path_factory.mktemp("unit") / "dpud.service"
    text = (ROOT / "systemd/dpud.service").read_text()
    path.write_text(text.replace("@DPUD@", "/bin/true").replace("@SYSCONF@", "/etc"))
    return path


def test_the_unit_exposes_little_and_says_why(unit: Path) -> None:
    """At most 3.0 of 10, as systemd counts; whatever is exposed is in the comments."""
    command = ["systemd-analyze", "security", "--offline=true", "--threshold=30", "--json=short", str(unit)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    exposed = [each["json_field"] for each in json.loads(done.stdout) if each["exposure"]]
    assert 3 < len(exposed) < 20
    comments = "\n".join(line for line in unit.read_text().splitlines() if line.startswith("#"))
    for field in exposed:
        assert re.split("_|Or", field)[0] in comments, field


def test_the_unit_has_no_mistakes(unit: Path) -> None:
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", str(unit)], capture_output=True, text=True)
    complaints = [line for line in done.stderr.splitlines() if "dpud.service" in line]
    assert complaints == []


def test_it_starts_and_is_used_like_any_other(running: Booted) -> None:
    assert running.out("systemctl", "is-active", "dpud") == "active"
    script = f"cd {MNT}/proc/sys/vm; echo 64 >dpu_compact_min_fragments; cat dpu_compact_min_fragments"
    assert running.sh(script) == "64"
    node = "sys/devices/system/node/node0"
    assert running.sh(f"echo 1 >{MNT}/{node}/compact_dpu; grep -c '' {MNT}/proc/buddyinfo") == "3"
    assert running.show("StatusText") == f"serving {MNT} (2 nodes, 8G)"


def test_files_are_root_s_and_others_may_only_look(running: Booted) -> None:
    file = f"{MNT}/proc/sys/vm/dpu_compact_enabled"
    assert running.out("stat", "-c", "%U %G %a", file) == "root root 644"
    as_nobody = ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"]
    assert running.out(*as_nobody, "cat", file) == "1"
    refused = running.run(*as_nobody, "sh", "-c", f"echo 0 >{file}")
    assert (refused.returncode != 0, "Permission denied" in refused.stderr) == (True, True)


def test_the_daemon_has_no_privileges(running: Booted) -> None:
    status = running.sh(f"cat /proc/{main_pid(running)}/status")
    assert re.search(r"^CapEff:\s0+$", status, re.MULTILINE)
    assert re.search(r"^CapBnd:\s0+$", status, re.MULTILINE)
    assert re.search(r"^NoNewPrivs:\s1$", status, re.MULTILINE)
    assert running.out("ps", "-o", "ni=", "-p", str(main_pid(running))) == "-10"
    uid = running.out("id", "-u", "dpud")
    assert uid != "0"
    assert re.search(rf"^Uid:\s{uid}\s{uid}\s{uid}\s{uid}$", status, re.MULTILINE)


def test_its_log_is_in_the_journal_with_the_kernel_s_levels(running: Booted) -> None:
    running.sh(f"echo '<3>a device that failed' >{MNT}/dev/kmsg; echo '<7>of no interest' >{MNT}/dev/kmsg")
    until(lambda: "a device that failed" in running.journal("-o", "cat", "-p", "err"))
    assert "of no interest" not in running.journal()
    assert f"dpud: ready at {MNT}" in running.journal("-o", "cat")
    assert f"dpud: ready at {MNT}" not in running.journal("-o", "cat", "-p", "err")


def test_reload_changes_what_can_change_and_names_the_rest(running: Booted) -> None:
    pid = main_pid(running)
    running.sh("sed 's/^level = .*/level = \"debug\"/' -i /etc/dpud.toml")
    more = "vm.extfrag_threshold = 321\\n[machine]\\ncpus = 8\\n"
    running.sh(f"printf '{more}' >/tmp/more; sed '/^.sysctl/r /tmp/more' -i /etc/dpud.toml")
    running.out("systemctl", "reload", "dpud")
    assert main_pid(running) == pid
    assert running.sh(f"cat {MNT}/proc/sys/vm/extfrag_threshold") == "321"
    log = running.journal("-o", "cat")
    assert "sysctl.vm.extfrag_threshold: 500 -> 321" in log
    assert "log.level: " in log
    assert "machine.cpus: needs a restart" in log
    running.sh(f"echo '<7>of interest now' >{MNT}/dev/kmsg")
    until(lambda: "of interest now" in running.journal("-o", "cat", "-p", "debug"))
    running.sh("echo nonsense >>/etc/dpud.toml")
    refused = running.run("systemctl", "reload", "dpud")
    assert refused.returncode != 0
    assert re.search(r"/etc/dpud.toml:\d+: ", running.journal("-o", "cat"))
    assert answers(running)
    running.sh("sed '$d' -i /etc/dpud.toml")
    running.out("systemctl", "restart", "dpud")
    assert main_pid(running) != pid
    assert running.sh(f"ls -d {MNT}/sys/devices/system/cpu/cpu[0-9]* | wc -l") == "8"


def test_it_comes_back_when_it_was_killed_and_nothing_stale_is_left(running: Booted) -> None:
    reader = running.run
    pid = kill(running, signal.SIGKILL)
    until(lambda: running.is_active() and main_pid(running) not in (0, pid) and answers(running))
    assert reader("stat", MNT).returncode == 0
    assert running.sh(f"grep -c ' {MNT} ' /proc/mounts") == "1"
    assert int(running.show("NRestarts")) >= 1


def test_a_reader_that_waits_when_it_is_killed_is_not_left_waiting(running: Booted) -> None:
    """In the last request of the old daemon: it ends with an error when the new one starts."""
    pid = main_pid(running)
    running.out("kill", "-STOP", str(pid))
    enter = ["nsenter", "--target", str(running.pid), "--mount", "--root", "--"]
    with subprocess.Popen([*enter, "cat", f"{MNT}/proc/buddyinfo"], stderr=subprocess.PIPE, text=True) as reader:
        time.sleep(0.2)
        running.out("kill", "-KILL", str(pid))
        _, problem = reader.communicate(timeout=60)
    assert reader.returncode == 1
    assert re.search("not connected|connection abort", problem)
    until(lambda: running.is_active() and answers(running))


def test_a_hung_daemon_is_restarted_by_the_watchdog(running: Booted) -> None:
    configure(running, "watchdog", "[Service]\nWatchdogSec=3\nTimeoutAbortSec=1")
    running.out("systemctl", "restart", "dpud")
    pid = kill(running, signal.SIGSTOP)
    until(lambda: running.is_active() and main_pid(running) not in (0, pid) and answers(running))
    assert "Watchdog timeout" in running.journal("-o", "cat")
    configure(running, "watchdog", "")


def test_it_stops_and_nothing_is_mounted(running: Booted) -> None:
    running.out("systemctl", "stop", "dpud")
    assert running.show("Result") == "success"
    assert MNT not in running.sh("cat /proc/mounts")
    assert running.run("ls", MNT).returncode != 0


def test_what_was_installed_is_found_and_can_be_removed(running: Booted) -> None:
    assert "man/man1/dpud.1" in running.sh("man -w dpud")
    assert running.sh("bash -c 'source /usr/share/bash-completion/completions/dpud; complete -p dpud'")
    running.out("make", "-s", "-C", str(ROOT), "uninstall-system", "PREFIX=/usr")
    assert running.run("systemctl", "cat", "dpud").returncode != 0
    assert running.sh("find /usr/share /usr/lib/systemd /usr/lib/sysusers.d -name '*dpud*' | wc -l") == "0"
    assert running.sh("ls /etc/dpud.toml") == "/etc/dpud.toml", "it was changed, so it stays"
