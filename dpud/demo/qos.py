# SPDX-License-Identifier: GPL-2.0-only
"""The scene `dpud demo qos`: two programs share a GPU's bandwidth, under one policy after the other."""

import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from dpud.demo.shell import Shell
from dpud.demo.timeline import page

QOS = "/sys/class/gpu_memvirt/gpu0/qos"
CLIENTS = "/sys/kernel/config/gpu_memvirt/gpu0/clients"
NAMES = ("serve", "train")
MB = 1_000_000
PERIOD_S = 0.2
_SECONDS = 2
_BUFFER_MIB = 16


class Recorder:
    """Reads, five times a second, how many bytes each client was granted."""

    def __init__(self) -> None:
        self.lines: dict[str, list[tuple[float, float]]] = {name: [] for name in NAMES}
        self.phases: list[tuple[float, str]] = []
        self._begin = time.monotonic()
        self._before = granted(), self._begin
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        while not self._stop.wait(PERIOD_S):
            self._look()

    def _look(self) -> None:
        (before, before_s), now, now_s = self._before, granted(), time.monotonic()
        for name, line in self.lines.items():
            rate = (now.get(name, 0) - before.get(name, 0)) / MB / (now_s - before_s)
            line.append((now_s - self._begin, rate))
        self._before = now, now_s

    def phase(self, name: str) -> None:
        self.phases.append((time.monotonic() - self._begin, name))

    @contextmanager
    def recording(self) -> Iterator["Recorder"]:
        self._thread.start()
        try:
            yield self
        finally:
            self._stop.set()
            self._thread.join()


def granted() -> dict[str, int]:
    """Bytes by client, from the table `clients`."""
    head, *rows = (line.split() for line in Path(QOS, "clients").read_text().splitlines())
    return {row[0]: int(row[head.index("granted")]) for row in rows}


def play(console: Console) -> None:
    console.rule("Two programs share a GPU's bandwidth")
    shell = Shell(console)
    _begin(shell)
    with Recorder().recording() as recorder:
        _share(shell, recorder)
        _limit(shell, recorder)
        _rank(shell, recorder)
        _adapt(shell, recorder)
    _explain(shell)
    folder = Path(tempfile.mkdtemp(prefix="dpud-demo-qos-"))
    file = folder / "bandwidth.html"
    file.write_text(page("Bandwidth of two clients of a GPU", recorder.lines, recorder.phases, "MB/s"))
    shell.say(f"What each client got, all the while: {file}")


def _begin(shell: Shell) -> None:
    shell.say(
        "A simulated GPU whose memory moves 100 MB/s, all clients together; bandwidth is in bytes a second here, never "
        "in percent. A model is trained and another one serves; both want everything there is."
    )
    shell.cd(CLIENTS)
    shell.sh(f"echo {100 * MB} > {QOS}/total_bandwidth; mkdir {' '.join(NAMES)}")
    names = " ".join(NAMES)
    shell.sh(f"for c in {names}; do mkdir $c/buffers/b; echo {_BUFFER_MIB}M > $c/buffers/b/size; done")


def _contend(shell: Shell, recorder: Recorder, name: str) -> None:
    """Both write as fast as they can for a while; what each got is shown."""
    recorder.phase(name)
    write = f"dd if=/dev/zero of=$0/buffers/b/data bs=1M count={_BUFFER_MIB} 2>/dev/null"
    writers = " ".join(f"timeout {_SECONDS} sh -c 'while :; do {write}; done' {client} &" for client in NAMES)
    before = granted()
    begin = time.monotonic()
    with _progress(shell.console, name):
        shell.sh(f"{writers} wait")
    took_s = time.monotonic() - begin
    now = granted()
    for client in NAMES:
        shell.console.print(f"{client}: {(now[client] - before[client]) / MB / took_s:.1f} MB/s", highlight=False)


@contextmanager
def _progress(console: Console, name: str) -> Iterator[None]:
    """A bar of the seconds that it takes, on a terminal."""
    columns = TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task, over = progress.add_task(name, total=_SECONDS), threading.Event()

        def advance() -> None:
            while not over.wait(0.1):
                progress.advance(task, 0.1)

        thread = threading.Thread(target=advance, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()


def _share(shell: Shell, recorder: Recorder) -> None:
    shell.say("The policy `fair` divides by share. Both have 100, so each gets a half:")
    shell.sh(f"cat {QOS}/policy {' '.join(f'{name}/qos_share' for name in NAMES)}")
    _contend(shell, recorder, "fair")
    shell.say("With a share of 300 the service gets three quarters:")
    shell.sh("echo 300 > serve/qos_share")
    _contend(shell, recorder, "share 3:1")


def _limit(shell: Shell, recorder: Recorder) -> None:
    shell.say("A limit is never exceeded, but for its burst; what is left over goes to the other.")
    shell.sh(f"echo 100 > serve/qos_share; echo {10 * MB} > train/qos_limit; echo 64K > train/qos_burst")
    _contend(shell, recorder, "train limited to 10")


def _rank(shell: Shell, recorder: Recorder) -> None:
    shell.say(
        "The policy `priority` gives the lower level what the higher one leaves, which is nothing here. What is "
        "reserved is an exception: the training has 20 MB/s for certain."
    )
    shell.sh(f"echo 0 > train/qos_limit; echo {20 * MB} > train/qos_reservation")
    shell.sh(f"echo 0 > serve/qos_priority; echo 4 > train/qos_priority; echo priority > {QOS}/policy")
    _contend(shell, recorder, "priority, 20 reserved")
    shell.say("More cannot be promised than there is:")
    shell.sh(f"env echo {90 * MB} > serve/qos_reservation || true")


def _adapt(shell: Shell, recorder: Recorder) -> None:
    shell.say(
        "The policy `adaptive` divides by share, as long as latency targets are met. Level 0 is to wait 200 us at "
        "most; where it waits longer, all levels below are capped until it does not."
    )
    shell.sh(
        f"echo 0 > train/qos_reservation; echo 200 > {QOS}/levels/0/latency_target_us; echo adaptive > {QOS}/policy"
    )
    _contend(shell, recorder, "adaptive, target 200 us")
    shell.sh(f"cd {QOS}/levels; grep . 0/cap 0/latency 4/latency")


def _explain(shell: Shell) -> None:
    shell.say("Every byte is somebody's, and each decision is on record: it can be made again, from the log alone.")
    shell.sh(f"cat {QOS}/clients {QOS}/traffic; cat {QOS}/decisions | tail -n 3; cat {QOS}/verify")
