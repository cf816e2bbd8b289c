# SPDX-License-Identifier: MIT
"""The fault log: every access that was refused, with who, where, what and why; and how the others were served.

A record is one line, fields in this order:

    time_ns=... client=... at=device0 va=0x... access=w error=EACCES page=RESIDENT why=...

The ring keeps the last NR_RECORDS; the counters are monotonic. (NVIDIA's driver counts so only in debug builds.)
"""

import errno
from collections import Counter, deque
from dataclasses import dataclass

from dpud.gpu.address_space.permissions import Permission

NR_RECORDS = 1024

SERVED = (
    "zero_fill",
    "from_store",
    "overwritten",
    "migrated",
    "replicated",
    "mapped_remote",
    "collapsed",
    "write_protect",
    "prefetched",
)
"""Ways to serve a fault, each counted in pages. zero_fill: a page's first write; from_store: from compressed pool or
swap; overwritten: the same, but all of it was to be written, so it was not read; write_protect: the first write since a
store got a copy."""


@dataclass(frozen=True, slots=True)
class FaultRecord:
    """One refused access."""

    time_ns: int
    client: str
    location: str
    va: int
    access: Permission
    number: int
    """The errno that the client got."""
    page: str
    """State of the page: UNTOUCHED, RESIDENT, STORED or CORRUPT; or none, where nothing is mapped."""
    why: str

    def __str__(self) -> str:
        letters = str(self.access).replace("-", "")
        name = errno.errorcode.get(self.number, str(self.number))
        return (
            f"time_ns={self.time_ns} client={self.client} at={self.location} va={self.va:#x} access={letters}"
            f" error={name} page={self.page} why={self.why}"
        )


class FaultLog:
    """Refused accesses, and counts of all faults."""

    def __init__(self) -> None:
        self.records: deque[FaultRecord] = deque(maxlen=NR_RECORDS)
        self.refused: Counter[str] = Counter()
        """By the name of the error."""
        self.served: Counter[str] = Counter(dict.fromkeys(SERVED, 0))

    def refuse(self, record: FaultRecord) -> None:
        self.records.append(record)
        self.refused[errno.errorcode.get(record.number, str(record.number))] += 1

    def serve(self, how: str, nr_pages: int = 1) -> None:
        assert how in SERVED
        self.served[how] += nr_pages
