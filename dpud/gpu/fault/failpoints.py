# SPDX-License-Identifier: MIT
"""Faults by chance, in the kernel's manner (Documentation/fault-injection): a directory of knobs for each kind.

A call is one span of an access (1 MiB at most), its size the bytes of the pages in it; the fault strikes one of them.
"""

from dataclasses import replace

from dpud.gpu.address_space.regions import PageState, Region
from dpud.gpu.address_space.space import Pages
from dpud.gpu.fault.injector import Injector, Request
from kernelsim.fault_inject import FaultAttr

REQUESTS = {
    "fail_bit": Request("bit"),
    "fail_word": Request("bit", nr_bits=2),
    "fail_row": Request("row"),
    "fail_bank": Request("bank"),
    "fail_device": Request("device"),
}


class FailPoints:
    """`host`: number of the first location that is no device."""

    def __init__(self, injector: Injector, host: int) -> None:
        self.points = {name: FaultAttr(name) for name in REQUESTS}
        self._injector, self._host = injector, host
        self._values = [point.__dict__ for point in self.points.values()]

    @property
    def armed(self) -> bool:
        """As FaultAttr.armed of any; every access asks."""
        for values in self._values:  # noqa: SIM110  half the time of any()
            if values.get("probability") or values.get("nth"):
                return True
        return False

    def called(self, region: Region, pages: Pages) -> None:
        """Pages are about to be accessed. What is in no memory cannot break."""
        nr_bytes = len(pages) << region.page_shift
        for name, point in self.points.items():
            resident = pages[region.state[pages] == PageState.RESIDENT]
            if not len(resident) or not point.armed or not point.should_fail(nr_bytes):
                continue
            page = int(resident[point.nr_injected % len(resident)])
            home = int(region.home[page])
            if name != "fail_device" or home < self._host:
                va = region.va + (page << region.page_shift)
                self._injector.inject(replace(REQUESTS[name], location=home, va=va))
