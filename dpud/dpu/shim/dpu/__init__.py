# SPDX-License-Identifier: GPL-2.0-only
"""The SDK's package name over emulated DPUs: `PYTHONPATH=$(dpud dpu-path) python host.py`. See dpud.dpu.api."""

from dpud.dpu.api import ALLOCATE_ALL as ALLOCATE_ALL
from dpud.dpu.api import DpuError as DpuError
from dpud.dpu.api import DpuSet as DpuSet
