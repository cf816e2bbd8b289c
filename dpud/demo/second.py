# SPDX-License-Identifier: GPL-2.0-only
"""A second daemon beside the one that a scene is played on, for scenes with two machines."""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dpud.errors import UserError

OTHER = "DPUD_DEMO_OTHER"
"""In the scene's environment: where the second one is mounted."""
_START_S = 60
_PROBE = "sys/class"


@contextmanager
def second_daemon(config: Path) -> Iterator[Path]:
    """Where it is mounted. Raises UserError."""
    with tempfile.TemporaryDirectory(prefix="dpud-demo-") as folder:
        mount = Path(folder, "other")
        mount.mkdir()
        command = [sys.executable, "-P", "-m", "dpud", "run", "--mount", str(mount), "--config", str(config)]
        daemon = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + _START_S
            while not (mount / _PROBE).exists():
                if time.monotonic() > deadline or daemon.poll() is not None:
                    raise UserError("the second daemon did not start")
                time.sleep(0.05)
            yield mount
        finally:
            daemon.terminate()
            daemon.wait()
