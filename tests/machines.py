# SPDX-License-Identifier: GPL-2.0-only
"""Small emulated machines for tests, and shorthand for what a shell would do to them: all of it is dpud/lab.py."""

from dpud.lab import MIB as MIB
from dpud.lab import MM_CONFIGFS as MM_CONFIGFS
from dpud.lab import NODES_SYSFS as NODES_SYSFS
from dpud.lab import STATS as STATS
from dpud.lab import VM as VM
from dpud.lab import Lab as Lab
from dpud.lab import LateBatch as LateBatch
from dpud.lab import LateDevice as LateDevice
from dpud.lab import SmallSlices
from dpud.lab import advance as advance
from dpud.lab import settle as settle

small_slices = SmallSlices
