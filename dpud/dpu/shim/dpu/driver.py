# SPDX-License-Identifier: GPL-2.0-only
"""`from dpu import driver`, as host programs of the SDK spell it."""

from dpud.dpu.api import ALLOCATE_ALL as ALLOCATE_ALL
from dpud.dpu.api import DpuContext as DpuContext
from dpud.dpu.api import DpuError as DpuError
from dpud.dpu.api import DpuProgram as DpuProgram
from dpud.dpu.api import DpuSet as DpuSet
from dpud.dpu.api import DpuSymbol as DpuSymbol
from dpud.dpu.api import DpuVariable as DpuVariable
from dpud.dpu.api import allocate as allocate
