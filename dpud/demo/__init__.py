# SPDX-License-Identifier: GPL-2.0-only
"""`dpud demo`: what the project is for, shown with the commands that a user would type.

Each scene (scenes.py) is a process of its own under `dpud exec`, so the paths it uses are the real ones.
"""

import os
import subprocess
import sys
from pathlib import Path

from dpud.demo.second import OTHER, second_daemon
from dpud.errors import UserError

CAPTURE, PROCESS = "capture", "process"
COMPRESSION, OVERCOMMIT, SWAP, UNIFIED = "compression", "overcommit", "swap", "unified"
MIGRATION = "migration"
SCENES = (CAPTURE, PROCESS)
GPU_SCENES = (COMPRESSION, OVERCOMMIT, SWAP, UNIFIED, MIGRATION)
"""Of GPU memory virtualization: only played when named."""
_CAPTURED = Path(__file__).parent.parent / "data" / "captures" / "demo"  # capture.DEMO, without loading numba
_TWO_GPUS = Path(__file__).with_name("unified.toml")
_NO_SWAP = Path(__file__).with_name("overcommit.toml")
_MIGRATION = Path(__file__).with_name("migration.toml")
_SMALL_TIERS = Path(__file__).with_name("swap.toml")


def run(name: str | None) -> int:
    """Play one scene, or all of SCENES -> exit code. Raises UserError for a name that is none."""
    if name is not None and name not in (known := (*SCENES, *GPU_SCENES)):
        raise UserError(f'there is no demo "{name}"; there are: {", ".join(known)}')
    for scene in [name] if name else SCENES:
        if code := _play(scene):
            return code
    return 0


def _play(scene: str) -> int:
    if scene != MIGRATION:
        return subprocess.run(_command(scene)).returncode
    with second_daemon(_MIGRATION) as mount:
        return subprocess.run(_command(scene), env=os.environ | {OTHER: str(mount)}).returncode


def _command(scene: str) -> list[str]:
    python = [sys.executable, "-P", "-m"]
    source = {
        CAPTURE: ["--from", str(_CAPTURED)],
        OVERCOMMIT: ["--config", str(_NO_SWAP)],
        SWAP: ["--config", str(_SMALL_TIERS)],
        MIGRATION: ["--config", str(_MIGRATION)],
        UNIFIED: ["--config", str(_TWO_GPUS)],
    }.get(scene, [])
    return [*python, "dpud", "exec", *source, "--", *python, "dpud.demo", scene]
