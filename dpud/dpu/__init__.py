# SPDX-License-Identifier: GPL-2.0-only
"""The emulated DPU, a processing-in-memory unit shaped like UPMEM's.

From the hardware up: `rank` (DPUs, memories, workers) runs `program` (`dpu_compact`, whose loops are in
`move`) under a `faults` plan; `dpu_set` is the SDK-shaped host API with the `errors` it gives; `driver`
compacts through that API; `profile` says how long a real device would have taken; `sysfs` shows the ranks.
"""
