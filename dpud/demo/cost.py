# SPDX-License-Identifier: GPL-2.0-only
"""What moving pages costs by the model, with the DPU and without (reference: AMD's RFC, V3, on Zen 3 EPYC).

"Accelerate page migration with batch copying and hardware offload" (Garg, Day, Yan; linux-mm 2025) measured 3.73 GB/s
for migrating 4 KiB pages and 10.67 GB/s for 2 MiB ones, where nearly all is copying. The difference is what the CPU
does for each 4 KiB page besides copying: unmap, remap, LRU, flags. A DPU takes over the copy and none of that.
"""

from dataclasses import dataclass

from dpud.dpu.move import PAGE_SIZE
from dpud.dpu.profile import load_cpu

_CPU = load_cpu("zen3-2025")
CPU_COPY_US = _CPU.copy.ns(PAGE_SIZE) / 1e3
CPU_META_US = _CPU.metadata.metadata_ns.value / 1e3
LIMIT = 1.54
"""Most that any engine can gain: in the same RFC copying is 35 % of migrating 512 pages of 4 KiB."""


@dataclass(frozen=True)
class Cost:
    """Milliseconds."""

    copy_ms: float
    metadata_ms: float
    device_ms: float

    @classmethod
    def of(cls, nr_pages: int, device_ns: int) -> "Cost":
        """`device_ns` is what the profile's DPU needs for the copies."""
        return cls(nr_pages * CPU_COPY_US / 1e3, nr_pages * CPU_META_US / 1e3, device_ns / 1e6)

    @property
    def cpu_ms(self) -> float:
        """One core does it all."""
        return self.metadata_ms + self.copy_ms

    @property
    def dpu_ms(self) -> float:
        """The core waits for the DPU's copies, and does the rest."""
        return self.metadata_ms + self.device_ms

    @property
    def gain(self) -> float:
        return self.cpu_ms / self.dpu_ms
