# SPDX-License-Identifier: GPL-2.0-only
"""`dpud exec`: run a command where the real paths show the emulated kernel.

Three processes: this one, which moves into a private namespace; the daemon in that namespace, unless a running
one is used; the command, in a copy of it that has the emulated files in their places. The daemon says over a
pipe that it is ready, and the kernel ends it should this process die. So whichever of them is killed, and
however, no mount is left in sight of anyone else.
"""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

from dpud import namespace
from dpud.errors import UserError
from fs.mountpoint import MountError, check_fuse

MOUNT_VARIABLE = "DPUD_MOUNT"
"""In the command's environment: where the emulated tree is mounted."""

PROBE = "sys/kernel/config/kernelsim/mm"
"""The directory that tells a live dpud mount; it is there in every configuration."""

_EXIT_TIMEOUT_S = 10
_PASSED_ON = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
_FROM_THE_TERMINAL = (signal.SIGINT, signal.SIGQUIT)  # the terminal sends these to the command itself


def run(
    command: Sequence[str],
    mountpoint: str | None,
    run_options: Sequence[str] = (),
    env: Mapping[str, str] | None = None,
    pass_fds: Sequence[int] = (),
) -> int:
    """Run `command` over the daemon at `mountpoint`, or over one started with `run_options` for the occasion.

    Returns the exit code as a shell would: the command's, 127 not found, 126 not executable, 128 + signal;
    2 if the daemon did not start (it has said why). `env` is added to the environment. Raises UserError.
    """
    if mountpoint is None:
        _check_fuse()
    else:
        check_live(mountpoint)
    runner = _Runner()
    namespace.enter()
    if mountpoint is not None:
        return runner.run(command, mountpoint, env or {}, pass_fds)
    with own_daemon(run_options) as own:
        if own is None:
            return 2
        namespace.step_aside()
        return runner.run(command, own, env or {}, pass_fds)


def shell(mountpoint: str | None, run_options: Sequence[str] = ()) -> int:
    """Run the user's shell as `run` runs a command, its prompt marked."""
    program = os.environ.get("SHELL") or "/bin/sh"
    if os.path.basename(program) != "bash":
        return run([program, "-i"], mountpoint, run_options, env={"PS1": "(dpud) $ "})
    startup = 'test -r ~/.bashrc && . ~/.bashrc; PS1="(dpud) $PS1"'  # .bashrc sets the prompt, so ours comes after
    reading, writing = os.pipe()
    os.write(writing, startup.encode())
    os.close(writing)
    return run([program, "--rcfile", f"/dev/fd/{reading}", "-i"], mountpoint, run_options, pass_fds=(reading,))


def check_live(mountpoint: str) -> None:
    """Raises UserError unless a daemon answers at `mountpoint`."""
    try:
        os.listdir(os.path.join(mountpoint, PROBE))  # a stat(2) might be answered from the kernel's cache
    except OSError as error:
        raise UserError(f"no dpud answers at {mountpoint}: {error.strerror}") from error


def _check_fuse() -> None:
    """The daemon's own message would name uid 0, which an ordinary user is inside the namespace."""
    try:
        check_fuse()
    except MountError as error:
        raise UserError(str(error)) from error


class _Runner:
    """Starts the command and passes signals on to it; one that comes before it is started ends this process.

    The command may run, and be heard of, before Popen() returns: a signal that comes in between is kept for it.
    """

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._starting = False
        self._kept: list[int] = []
        for signum in _PASSED_ON + _FROM_THE_TERMINAL:
            if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup stays nohup
                signal.signal(signum, self._on_signal)

    def run(self, command: Sequence[str], mountpoint: str, env: Mapping[str, str], pass_fds: Sequence[int]) -> int:
        try:
            namespace.cover(mountpoint)
        except OSError as error:
            raise UserError(f"cannot bind over {error.filename}: {error.strerror}") from error
        environment = os.environ | {MOUNT_VARIABLE: mountpoint} | dict(env)
        self._starting = True
        try:
            self._process = subprocess.Popen(command, env=environment, pass_fds=pass_fds)
        except OSError as error:
            print(f"dpud: {command[0]}: {error.strerror}", file=sys.stderr)
            return 127 if isinstance(error, FileNotFoundError) else 126
        for signum in self._kept:
            self._process.send_signal(signum)
        code = self._process.wait()
        return code if code >= 0 else 128 - code

    def _on_signal(self, signum: int, _frame: FrameType | None) -> None:
        if self._process is not None:
            if signum in _PASSED_ON:
                self._process.send_signal(signum)
        elif self._starting:
            self._kept += [signum] if signum in _PASSED_ON else []
        else:
            raise SystemExit(128 + signum)


@contextmanager
def own_daemon(run_options: Sequence[str]) -> Iterator[str | None]:
    """A daemon of our own on a temporary mount point, which is the value; None if it did not start."""
    mountpoint = tempfile.mkdtemp(prefix="dpud-", dir=os.environ.get("XDG_RUNTIME_DIR"))
    reading, writing = os.pipe()
    start = [sys.executable, "-P", "-m", "dpud", "run", "--mount", mountpoint]
    start += ["--ready-fd", str(writing), "--parent", str(os.getpid()), *run_options]
    daemon = subprocess.Popen(start, pass_fds=(writing,), stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        os.close(writing)
        yield mountpoint if os.read(reading, 1) else None  # end of file: it ended without getting ready
    finally:
        os.close(reading)
        daemon.terminate()
        try:
            daemon.wait(_EXIT_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()
        _remove(mountpoint)


def _remove(mountpoint: str) -> None:
    """The daemon takes its mount point along; this is for one that was killed."""
    with suppress(OSError):
        namespace.detach(mountpoint)
    with suppress(FileNotFoundError):
        os.rmdir(mountpoint)
