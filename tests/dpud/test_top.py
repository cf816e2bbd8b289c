# SPDX-License-Identifier: GPL-2.0-only
"""`dpud top` and `dpud status` as a terminal and a program see them: a real daemon, a pty, pyte as the terminal."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jsonschema
import pyte
import pytest
from emulated import DPUD, Emulated, emulated, has_fuse

ROOT = Path(__file__).parents[2]
TIMEOUT_S = 60
CONFIG = """
[[machine.nodes]]
memory = "64M"
[[machine.nodes]]
memory = "128M"
[gpu]
memory = "16M"
host_memory = "16M"
pool = "16M"
[sysctl]
vm.compaction_proactiveness = 0
"""

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(not has_fuse(), reason="needs /dev/fuse"),
]


@pytest.fixture(scope="module")
def daemon() -> Iterator[Emulated]:
    """Half of a process on node 1 is freed, and a client has memory of the GPU."""
    with emulated(CONFIG) as found:
        config = found.mnt / "sys/kernel/config"
        web, buffer = config / "kernelsim/mm/web", config / "gpu_memvirt/gpu0/clients/train/buffers/x"
        web.mkdir()
        buffer.mkdir(parents=True)
        for file, text in (
            (web / "node", "1"),
            (web / "anon", "64M"),
            (web / "holes", "50 seed=7"),
            (buffer / "size", "4M"),
        ):
            file.write_text(text)
        yield found


def dpud(*words: str) -> str:
    done = subprocess.run([*DPUD, *words], capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


class Terminal:
    """A pty with `dpud top` in it, and what its screen shows."""

    def __init__(self, mnt: Path, columns: int, rows: int) -> None:
        self.screen = pyte.Screen(columns, rows)
        self._stream = pyte.ByteStream(self.screen)
        self.raw = b""
        self._master, slave = pty.openpty()
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        self._set_size(columns, rows)
        command = [*DPUD, "top", "--mount", str(mnt), "--interval", "0.2"]
        environment = {
            name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")
        }
        environment |= {"TERM": "xterm-256color", "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True
        )

    def _set_size(self, columns: int, rows: int) -> None:
        fcntl.ioctl(self.slave, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def resize(self, columns: int, rows: int) -> None:
        self.screen.resize(rows, columns)
        self._set_size(columns, rows)
        self.process.send_signal(signal.SIGWINCH)  # it is not in the foreground of a session that has this terminal

    def press(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    @property
    def lines(self) -> list[str]:
        return [line.rstrip() for line in self.screen.display]

    def until(self, seen: Callable[[list[str]], object]) -> None:
        deadline = time.monotonic() + TIMEOUT_S
        while not seen(self.lines):
            assert time.monotonic() < deadline, "\n".join(self.lines)
            self._take(0.1)

    def _take(self, timeout_s: float) -> bool:
        """Whether there was something."""
        if not select.select([self._master], [], [], timeout_s)[0]:
            return False
        data = os.read(self._master, 1 << 16)
        self.raw += data
        self._stream.feed(data)
        return True

    def end(self) -> int:
        """Its exit code, once it ended."""
        deadline = time.monotonic() + TIMEOUT_S
        while (code := self.process.poll()) is None:
            assert time.monotonic() < deadline
            self._take(0.05)
        while self._take(0.2):
            pass
        return code

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)
        os.close(self.slave)

    def assert_restored(self) -> None:
        assert termios.tcgetattr(self.slave) == self.before
        assert self.raw.rindex(b"\x1b[?1049l") > self.raw.rindex(b"\x1b[?1049h"), "it left the other screen on"
        assert self.raw.rindex(b"\x1b[?25h") > self.raw.rindex(b"\x1b[?25l"), "it left the cursor hidden"


@contextmanager
def top(daemon: Emulated, columns: int, rows: int) -> Iterator[Terminal]:
    terminal = Terminal(daemon.mnt, columns, rows)
    try:
        terminal.until(lambda lines: "q quit" in lines[-1])
        yield terminal
    finally:
        terminal.close()


@pytest.mark.parametrize(("columns", "rows"), [(80, 24), (200, 60)])
def test_it_fits_the_terminal_and_shows_all_there_is(daemon: Emulated, columns: int, rows: int) -> None:
    with top(daemon, columns, rows) as terminal:
        text = "\n".join(terminal.lines)
        for what in ("DMA32", "locked", "order", "modelled", "measured", "gpu0", "swap nvme", "train", "[0] 1"):
            assert what in text, (what, text)
        assert "…" not in text
        terminal.press("q")
        assert terminal.end() == 0
        terminal.assert_restored()


def test_keys_pause_change_the_node_and_compact_it(daemon: Emulated) -> None:
    free = re.compile(r"^DMA32 +\d+M +((?:\d+ *){11})$", re.MULTILINE)
    with top(daemon, 80, 24) as terminal:
        terminal.press("\t")
        terminal.until(lambda lines: "0 [1]" in lines[0])
        before = blocks(daemon, 1)
        terminal.until(lambda lines: [*map(int, free.search("\n".join(lines))[1].split())] == before)  # type: ignore[index]
        terminal.press("c")
        terminal.until(lambda lines: "Node 1 was compacted by the DPU" in lines[-1])
        after = blocks(daemon, 1)
        assert after != before
        terminal.until(lambda lines: [*map(int, free.search("\n".join(lines))[1].split())] == after)  # type: ignore[index]
        terminal.press("p")
        terminal.until(lambda lines: lines[0].endswith("PAUSED"))
        terminal.press("p\x1b[D")
        terminal.until(lambda lines: "[0] 1" in lines[0] and "PAUSED" not in lines[0])
        terminal.press("t")
        terminal.until(lambda lines: "Node 0 was compacted by the CPU" in lines[-1])
        terminal.until(lambda lines: "q quit" in lines[-1])


def blocks(daemon: Emulated, node: int) -> list[int]:
    lines = daemon.text("/proc/buddyinfo").splitlines()
    return [int(word) for line in lines if line.startswith(f"Node {node}, zone    DMA32") for word in line.split()[4:]]


def test_it_follows_the_size_of_the_window(daemon: Emulated) -> None:
    with top(daemon, 80, 24) as terminal:
        terminal.resize(120, 40)
        terminal.until(lambda lines: "q quit" in lines[39])
        terminal.resize(60, 12)
        terminal.until(lambda lines: "tab/arrows" in lines[11] and lines[0].startswith("dpud top"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signals_leave_the_terminal_as_it_was(daemon: Emulated, signum: signal.Signals) -> None:
    with top(daemon, 80, 24) as terminal:
        terminal.process.send_signal(signum)
        assert terminal.end() == 128 + signum
        terminal.assert_restored()


def test_the_daemon_s_end_is_said_after_the_terminal_is_as_it_was() -> None:
    with emulated('[[machine.nodes]]\nmemory = "64M"\n[gpu]\ndevices = 0\n') as short, top(short, 80, 24) as terminal:
        short.daemon.terminate()
        assert terminal.end() == 2
        terminal.assert_restored()
        assert b"is gone" in terminal.raw[terminal.raw.rindex(b"\x1b[?1049l") :]


def test_a_pipe_gets_it_once_and_plain(daemon: Emulated) -> None:
    text = dpud("top", "--mount", str(daemon.mnt))
    assert "\x1b" not in text
    assert "DMA32" in text
    assert "train" in text


def test_the_map_shows_what_kpageflags_says(daemon: Emulated) -> None:
    """The first zone that has 64M: 32 blocks, a character each at this size; the first MiB belongs to the kernel."""
    flags = (daemon.mnt / "proc/kpageflags").open("rb", buffering=0).read(8 * 16384)
    words = struct.unpack(f"<{len(flags) // 8}Q", flags)
    used = [
        sum(not word >> 10 & 1 and not word >> 20 & 1 for word in words[at : at + 512]) for at in range(0, 16384, 512)
    ]
    text = dpud("top", "--once", "--mount", str(daemon.mnt))
    rows = [
        line[14:]
        for line in text.splitlines()
        if re.match(r"DMA(32)? +\d+M [ ░▒▓█·]", line) or re.match(r"DMA(32)? +\d+M$", line)
    ]
    cells = "".join(
        row.ljust(8 if number == 0 else 24)[: 8 if number == 0 else 24] for number, row in enumerate(rows[:2])
    )
    assert [cell != " " for cell in cells] == [nr > 0 for nr in used]


def test_status_as_json_is_what_its_schema_says(daemon: Emulated) -> None:
    data = json.loads(dpud("status", "--json", "--mount", str(daemon.mnt)))
    jsonschema.validate(data, json.loads((ROOT / "docs/status.schema.json").read_text()))
    assert [zone["free_blocks"] for zone in data["zones"] if zone["node"] == 1] == [blocks(daemon, 1)]
    assert data["gpus"][0]["clients"][0]["granted_bytes"] == 4 << 20
    assert data["settings"]["dpu_compact_enabled"] == 1


def test_status_shows_gpus(daemon: Emulated) -> None:
    text = dpud("status", "--mount", str(daemon.mnt))
    assert "GPU memory: gpu0" in text
    assert "client train" in text


def test_without_a_daemon_it_says_so() -> None:
    command = [sys.executable, "-m", "dpud", "top", "--mount", "/nonexistent"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, stdin=subprocess.DEVNULL)
    assert done.returncode == 2
    assert done.stderr == "dpud: no dpud answers at /nonexistent: No such file or directory\n"
