# SPDX-License-Identifier: GPL-2.0-only
"""`dpud demo`: what the project is for, shown with the commands that a user would type.

Each scene is a process of its own under `dpud exec`, so the paths it uses are the real ones. The scenes of GPU memory
virtualization are modules of their names here, each with a function `play(console)`, and with the machine that it needs
in a NAME.toml beside it if that is not the default.
"""

import os
import subprocess
import sys
from pathlib import Path

from dpud.demo.second import OTHER, second_daemon
from dpud.errors import UserError

CAPTURE, PROCESS = "capture", "process"
SCENES = (CAPTURE, PROCESS)
MIGRATION = "migration"
GPU_SCENES = (
    "compression",
    "defrag",
    "fault",
    MIGRATION,
    "numa",
    "overcommit",
    "performance",
    "qos",
    "swap",
    "unified",
)
"""Only played when named."""
ALL = "all"
_CAPTURED = Path(__file__).parent.parent / "data" / "captures" / "demo"  # capture.DEMO, without loading numba


def run(name: str | None) -> int:
    """Play one scene, all of SCENES, or really ALL -> exit code. Raises UserError for a name that is none."""
    if name is not None and name not in (known := (*SCENES, *GPU_SCENES, ALL)):
        raise UserError(f'there is no demo "{name}"; there are: {", ".join(known)}')
    scenes = {None: SCENES, ALL: SCENES + GPU_SCENES}.get(name, (name,))
    for scene in scenes:
        if code := _play(str(scene)):
            return code
    return 0


def _play(scene: str) -> int:
    if scene != MIGRATION:
        return subprocess.run(_command(scene)).returncode
    with second_daemon(Path(__file__).with_name("migration.toml")) as mount:
        return subprocess.run(_command(scene), env=os.environ | {OTHER: str(mount)}).returncode


def _command(scene: str) -> list[str]:
    python = [sys.executable, "-P", "-m"]
    config = Path(__file__).with_name(f"{scene}.toml")
    source = ["--from", str(_CAPTURED)] if scene == CAPTURE else ["--config", str(config)] if config.exists() else []
    return [*python, "dpud", "exec", *source, "--", *python, "dpud.demo", scene]
