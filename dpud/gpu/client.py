# SPDX-License-Identifier: MIT
"""A client: a program that uses GPU memory."""

from dataclasses import dataclass, field

from dpud.gpu.address_space.regions import Region


@dataclass(eq=False)
class Client:
    """Whose regions they are, and from where it works."""

    name: str
    device: int
    """Location that its accesses come from, where they do not say."""
    active_ns: int = 0
    """When it accessed anything last."""
    regions: list[Region] = field(default_factory=list)

    @property
    def nr_bytes(self) -> int:
        """Bytes allocated."""
        return sum(region.nr_bytes for region in self.regions)
