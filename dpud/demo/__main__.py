# SPDX-License-Identifier: GPL-2.0-only
"""Plays one scene: `python -m dpud.demo SCENE`, started by `dpud.demo.run` under `dpud exec`."""

import sys

from dpud.demo import scenes
from dpud.demo.shell import CommandError

try:
    scenes.play(sys.argv[1])
except CommandError as error:
    sys.exit(f"dpud: {error}")
except KeyboardInterrupt:
    sys.exit(130)
