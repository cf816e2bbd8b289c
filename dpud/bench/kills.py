# SPDX-License-Identifier: GPL-2.0-only
"""kill -9 at random moments under load, again and again: is anything lost that somebody was told is done?

Several clients write, each what is its own, and note what was acknowledged. The daemon is killed, started again on its
state directory, and each client looks for all of it (kills_worker.py). Checkpoints are made all the time, CHECKPOINTS
bytes of journal apart, and every other kill waits for one to come to a step that is drawn. Each SERIES kills begin with
a new directory. The daemon is forked off from this process, which has everything imported: starting takes a fraction of
a second.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

from rich.progress import Progress

from dpud import config, daemon, namespace
from dpud.bench.kept import SMALL
from dpud.bench.report import Figure, Report
from dpud.checkpoint_keeper import STEPS, Keeper
from dpud.errors import UserError
from dpud.state import build_of
from dpud.state_segments import CHECKPOINT, JOURNAL, numbers

NR_KILLS, SERIES, NR_WORKERS = 1000, 25, 4
MAX_LIFE_S, MAX_WAIT_S = 0.6, 3.0
CHECKPOINTS = "64K"
_START_S = 120.0


@dataclass
class Seen:
    """What all clients of a run saw."""

    nr_kills: int = 0
    nr_done: int = 0
    nr_checks: int = 0
    nr_begun: int = 0
    """Checkpoints."""
    nr_made: int = 0
    """Those that are there at the end."""
    lost: list[str] = field(default_factory=list)


class Forked:
    """A daemon as a child of this process."""

    def __init__(self, folder: Path, more: str = "") -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.mount, self.state = folder / "mnt", folder / "state"
        kept = f'[state]\ndirectory = "{self.state}"\nsync = "none"\ncheckpoint_bytes = "{CHECKPOINTS}"\n'
        self.config = config.parse(f"{SMALL}{more}\n{kept}")
        self.pid = 0

    def start(self, dies_at: str | None = None) -> None:
        """Returns when it is ready; `dies_at`: the step of a checkpoint at which it kills itself, maybe even before.

        Raises UserError if it ends before.
        """
        reader, writer = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.closerange(3, writer)  # the clients' pipes above all
            os.closerange(writer + 1, os.sysconf("SC_OPEN_MAX"))
            self._live(writer, dies_at)
        os.close(writer)
        ready = os.read(reader, 1)
        os.close(reader)
        if not ready:
            _, status = os.waitpid(self.pid, 0)
            self.pid = 0
            if dies_at is not None and os.waitstatus_to_exitcode(status) == -signal.SIGKILL:
                return  # it came to that step before it was ready
            raise UserError(f"the daemon did not come back: {os.waitstatus_to_exitcode(status)}")

    def _live(self, ready_fd: int, dies_at: str | None) -> NoReturn:
        code = 1
        if dies_at is not None:
            Keeper.on_step = staticmethod(
                lambda step: os.kill(os.getpid(), signal.SIGKILL) if step == dies_at else None
            )
        try:
            daemon.run(daemon.RunOptions(self.config, mount=str(self.mount), ready_fd=ready_fd))
            code = 0
        except UserError as error:
            print(f"dpud: {error}", file=sys.stderr)
        finally:
            os._exit(code)

    def kill(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.pid = 0

    def wait(self, limit_s: float) -> None:
        """Until it is dead, by its own hand or after so long by ours."""
        deadline = time.monotonic() + limit_s
        while self.pid and time.monotonic() < deadline:
            if os.waitpid(self.pid, os.WNOHANG)[0]:
                self.pid = 0
                return
            time.sleep(0.01)
        self.kill()

    def clear(self) -> None:
        """What it leaves mounted."""
        if str(self.mount) in Path("/proc/self/mounts").read_text():
            namespace.detach(str(self.mount))


def prepare() -> None:
    """What every daemon would do first is done in this process, from which they are forked."""
    daemon.load_loops()
    build_of()


def series(folder: Path, nr_kills: int, chance: random.Random, nr_workers: int = NR_WORKERS) -> Seen:
    """So many kills on one state directory."""
    ours = Forked(folder)
    ours.start()
    try:
        with _workers(ours.mount, nr_workers) as workers:
            for number in range(nr_kills):
                if number % 2:
                    ours.wait(MAX_WAIT_S)
                else:
                    time.sleep(chance.random() ** 2 * MAX_LIFE_S)
                    ours.kill()
                ours.start(None if number % 2 else chance.choice(STEPS))
            time.sleep(MAX_LIFE_S)
            seen = _ended(workers)
    finally:
        ours.kill()
        ours.clear()
    seen.nr_kills = nr_kills
    seen.nr_begun = max(numbers(ours.state, JOURNAL), default=0)
    seen.nr_made = len(numbers(ours.state, CHECKPOINT))
    return seen


@contextmanager
def _workers(mount: Path, nr: int) -> Iterator[list["subprocess.Popen[bytes]"]]:
    program = str(Path(__file__).with_name("kills_worker.py"))
    command = [sys.executable, "-P", program, str(mount)]
    pipe = subprocess.PIPE
    workers = [subprocess.Popen([*command, str(number)], stdin=pipe, stdout=pipe) for number in range(nr)]
    try:
        yield workers
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()


def _ended(workers: list["subprocess.Popen[bytes]"]) -> Seen:
    """All have looked once more."""
    seen = Seen()
    for worker in workers:
        out, _ = worker.communicate(timeout=_START_S)
        if worker.returncode:
            raise UserError("a client ended with an error that no kill explains")
        one = json.loads(out)
        seen.nr_done += one["nr_done"]
        seen.nr_checks += one["nr_checks"]
        seen.lost += one["lost"]
    return seen


def run(*, seed: int | None = None, ops: int | None = None) -> Report:
    """`ops` kills; what chance begins with is `seed`."""
    prepare()
    seed = random.SystemRandom().randrange(1 << 32) if seed is None else seed
    chance, left, seen = random.Random(seed), ops or NR_KILLS, Seen()
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="dpud-kills-") as scratch, Progress() as progress:
        task = progress.add_task("kill -9", total=left)
        while left:
            nr = min(left, SERIES)
            one = series(Path(scratch, str(left)), nr, chance)
            seen.nr_kills, left = seen.nr_kills + nr, left - nr
            seen.nr_done, seen.nr_checks = seen.nr_done + one.nr_done, seen.nr_checks + one.nr_checks
            seen.nr_begun, seen.nr_made = seen.nr_begun + one.nr_begun, seen.nr_made + one.nr_made
            seen.lost += one.lost
            progress.update(task, advance=nr)
    report = Report(
        "kills",
        f"{seen.nr_kills} times kill -9 with {NR_WORKERS} clients at work, seed {seed}",
        f"A client notes what was acknowledged and looks for all of it after each kill. {SERIES} kills to a directory.",
    )
    report.figures = [
        Figure("things that were acknowledged and are lost", len(seen.lost), "", 0),
        Figure("acknowledged", seen.nr_done, ""),
        Figure("checkpoints begun meanwhile", seen.nr_begun, ""),
        Figure("checkpoints at the end", seen.nr_made, ""),
        Figure("looks at all that a client has", seen.nr_checks, ""),
        Figure("kills an hour", seen.nr_kills / (time.perf_counter() - begin) * 3600, ""),
    ]
    report.notes += seen.lost[:50]
    return report
