# SPDX-License-Identifier: MIT
"""What was encoded and decoded, by codec. All counters only grow."""

from dataclasses import dataclass


@dataclass(slots=True)
class CodecStats:
    """One codec's work. Times are of the threads that did it, added up."""

    pages: int = 0
    raw_bytes: int = 0
    stored_bytes: int = 0
    encode_ns: int = 0
    decoded_pages: int = 0
    decoded_bytes: int = 0
    decode_ns: int = 0

    @property
    def ratio(self) -> float:
        """Raw by encoded bytes; 0 if there were none."""
        return self.raw_bytes / self.stored_bytes if self.stored_bytes else 0.0

    @property
    def encode_mbps(self) -> float:
        """Raw megabytes (10^6) a second of one thread."""
        return self.raw_bytes * 1e3 / self.encode_ns if self.encode_ns else 0.0

    @property
    def decode_mbps(self) -> float:
        return self.decoded_bytes * 1e3 / self.decode_ns if self.decode_ns else 0.0

    def encoded(self, nr_pages: int, raw_bytes: int, stored_bytes: int, ns: int) -> None:
        self.pages += nr_pages
        self.raw_bytes += raw_bytes
        self.stored_bytes += stored_bytes
        self.encode_ns += ns

    def decoded(self, nr_pages: int, raw_bytes: int, ns: int) -> None:
        self.decoded_pages += nr_pages
        self.decoded_bytes += raw_bytes
        self.decode_ns += ns
