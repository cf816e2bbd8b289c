# SPDX-License-Identifier: MIT
"""Copy engines: how long a transfer takes, in device time.

A transfer of n bytes that may begin at t ends at  max(t, engine free) + n / bandwidth + latency.  The engine is taken
for the n / bandwidth only: latency is on the way, so transfers overlap in it, as DMA descriptors do.
"""

from dataclasses import dataclass, replace

NS_PER_S = 1_000_000_000


@dataclass
class CopyEngine:
    """One direction of DMA."""

    bandwidth_bytes_per_s: int
    latency_ns: int
    free_at_ns: int = 0
    nr_transfers: int = 0
    nr_bytes: int = 0

    def transfer(self, nr_bytes: int, earliest_ns: int) -> int:
        """Take the engine for a transfer -> when its last byte is there, in ns."""
        start_ns = max(earliest_ns, self.free_at_ns)
        self.free_at_ns = start_ns + -(-nr_bytes * NS_PER_S // self.bandwidth_bytes_per_s)
        self.nr_transfers += 1
        self.nr_bytes += nr_bytes
        return self.free_at_ns + self.latency_ns


@dataclass(frozen=True)
class DeviceProfile:
    """What a simulated device is like.

    The default's link is PCI Express 4.0 x16: 16 GT/s x 16 lanes x 128/130 / 8 = 31.5 GB/s each way (PCI-SIG); its
    memory that of an A100 40 GB (1555 GB/s, NVIDIA's data sheet). Latencies are uncalibrated.
    """

    name: str = "pcie4-x16"
    memory_bytes: int = 256 << 20
    link_bytes_per_s: int = 31_507_692_307
    link_latency_ns: int = 1_000
    local_bytes_per_s: int = 1_555_000_000_000
    local_latency_ns: int = 500

    def sized(self, memory_bytes: int) -> "DeviceProfile":
        """The same with another size of memory."""
        return replace(self, memory_bytes=memory_bytes)

    def host_to_device(self) -> CopyEngine:
        return CopyEngine(self.link_bytes_per_s, self.link_latency_ns)

    def device_to_host(self) -> CopyEngine:
        return CopyEngine(self.link_bytes_per_s, self.link_latency_ns)

    def local(self) -> CopyEngine:
        """Copies within the device's memory; each byte is read and written."""
        return CopyEngine(self.local_bytes_per_s // 2, self.local_latency_ns)
