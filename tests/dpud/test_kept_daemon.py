# SPDX-License-Identifier: GPL-2.0-only
"""`dpud run` with a state directory, killed for real; `dpud journal`; a disk that is full."""

import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from dpud.bench.kept import Daemon, started
from dpud.errors import UserError

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened"),
]
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root to mount a small file system")
NR_KILLS, NR_WORKERS = 24, 2
TIMEOUT_S = 60
ROOT = Path(__file__).parent.parent.parent
JOURNAL = f"{sys.executable} -P -m dpud journal"


def dpud(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-m", "dpud", *words], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[Daemon]:
    one = Daemon(tmp_path)
    yield one
    one.kill()


def test_what_was_echoed_is_there_after_kill_9(daemon: Daemon) -> None:
    daemon.start()
    web = daemon.mount / "sys/kernel/config/kernelsim/mm/web"
    web.mkdir()
    (web / "anon").write_text("1M\n")
    (daemon.mount / "proc/sys/vm/extfrag_threshold").write_text("321\n")
    data = daemon.mount / "sys/kernel/config/gpu_memvirt/gpu0/clients/c/buffers/b"
    data.parent.parent.mkdir()
    data.mkdir()
    (data / "size").write_text("1M")
    written = random.Random(1).randbytes(1 << 20)
    with open(data / "data", "r+b", buffering=0) as file:
        assert file.write(written) == len(written)
    (data / "reclaim").write_text("512K")
    daemon.kill()
    daemon.start()
    assert (daemon.mount / "proc/sys/vm/extfrag_threshold").read_text() == "321\n"
    assert (web / "verify").read_text() == "ok\n"
    assert (data / "data").read_bytes() == written


def test_journal_show_and_verify(daemon: Daemon) -> None:
    with started(daemon):
        (daemon.mount / "proc/sys/vm/extfrag_threshold").write_text("321\n")
        (daemon.mount / "dev/kmsg").write_text("a line\n")
    shown = dpud("journal", "show", str(daemon.state))
    assert shown.returncode == 0
    lines = shown.stdout.splitlines()
    assert [line.split()[1] for line in lines[:2]] == ["format", "boot"]
    (line,) = [line for line in lines if "extfrag_threshold" in line]
    assert line.endswith(" stores 1 321 into /proc/sys/vm/extfrag_threshold -> 0 [0]")
    (line,) = [line for line in lines if "a line" in line]
    assert " write-stream /dev/kmsg 'a line\\n' " in line
    assert f" pid={os.getpid()} -> 7 " in line
    verified = dpud("journal", "verify", str(daemon.state))
    assert (verified.returncode, verified.stdout.endswith(" bytes, whole\n")) == (0, True)
    with open(daemon.state / "journal", "r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 1)
    torn = dpud("journal", "verify", str(daemon.state))
    assert (torn.returncode, "nothing is behind it" in torn.stdout) == (1, True)
    assert "nothing is behind it: cut off\n" in daemon.start()


def test_a_captured_machine_cannot_be_kept(daemon: Daemon, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"state.directory: a machine that was captured \(--from\) cannot be kept"):
        daemon.start("--from", str(tmp_path))


def append(path: Path, data: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        file.write(data)


def until_it_fails(work: Callable[[int], object]) -> tuple[int, str]:
    """(the last number that it was done with, why not with the next)."""
    for number in range(1, 100_000):
        try:
            work(number)
        except OSError as error:
            return number - 1, str(error)
    raise AssertionError("it never fails")


@needs_root
def test_a_full_disk_fails_requests_and_loses_none(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path)
    daemon.state.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", daemon.state], check=True)
    try:
        daemon.start()
        kmsg, knob = daemon.mount / "dev/kmsg", daemon.mount / "proc/sys/vm/extfrag_threshold"
        filler = daemon.state / "filler"
        assert "No space left" in until_it_fails(lambda _: append(filler, bytes(1 << 16)))[1]
        done, why = until_it_fails(lambda number: knob.write_text(f"{number % 1000:#x}\n"))
        assert "No space left" in why
        assert knob.read_text() == f"{done % 1000}\n", "read, and unchanged"
        assert knob.write_text("5\n"), "for numbers that need no Python there is some room besides"
        done, why = until_it_fails(lambda number: (knob.write_text(f"{number % 1000}\n"), knob.read_text()))
        assert "No space left" in why
        assert knob.read_text() == f"{done % 1000}\n", "read, and unchanged"
        with pytest.raises(OSError, match="No space left"):
            kmsg.write_text("a line\n")
        filler.unlink()
        knob.write_text("77\n")
        daemon.kill()
        daemon.start()
        assert knob.read_text() == "77\n"
    finally:
        daemon.kill()
        subprocess.run(["umount", "-l", daemon.state], check=True)


def test_the_guide_s_commands_keep_the_machine(tmp_path: Path) -> None:
    """Line by line, on another mount point. A daemon in the background is waited for, as a person would."""
    _, _, rest = (ROOT / "docs/guide.md").read_text().partition('With `[state]` `directory = "state"`')
    lines = [line.strip() for line in rest.split("\n\n")[1].splitlines()]
    assert lines[0] == "dpud run --config kept.toml &"
    daemon, outputs = Daemon(tmp_path), []
    for line in lines:
        command = line.partition("#")[0].replace("/run/dpud", str(daemon.mount)).replace("dpud journal", JOURNAL)
        if line.startswith("dpud run"):
            daemon.start()
        elif line == "kill -9 $!":
            daemon.kill()
        else:
            outputs.append(subprocess.check_output(["sh", "-c", command], cwd=tmp_path, text=True))
    daemon.kill()
    assert outputs[1] == "321\n"
    assert "321 into /proc/sys/vm/extfrag_threshold" in outputs[2]
    assert outputs[3].endswith("whole\n")


KILLS = """
import json, random, sys
from pathlib import Path
from dpud.bench import kills
kills.prepare()
seen = kills.series(Path(sys.argv[1]), int(sys.argv[2]), random.Random(int(sys.argv[3])), int(sys.argv[4]))
print(json.dumps(vars(seen)))
"""


def test_nothing_acknowledged_is_lost_however_often_it_is_killed(tmp_path: Path) -> None:
    """The same as `dpud bench kills`, shorter."""
    seed = int(time.time())
    arguments = [str(tmp_path), str(NR_KILLS), str(seed), str(NR_WORKERS)]
    done = subprocess.run(
        [sys.executable, "-c", KILLS, *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    seen = json.loads(done.stdout)
    assert seen["lost"] == [], f"seed {seed}"
    assert seen["nr_kills"] == NR_KILLS
    assert seen["nr_checks"] >= NR_WORKERS
    assert seen["nr_done"] > 100
