# SPDX-License-Identifier: MIT
"""A hash of each page, kept up while pages go over, so that at the switch only hashes are compared, not all bytes.

Theory of operation
    The source hashes the bytes that it sends; the destination those that it finds where it has put them. A page that is
    written to again is sent again, and hashed again. So at the switch, when nothing changes any more, both sides know a
    hash of every page as it is, and have had to read only those that the last round left. The digest is the hash of
    these hashes, in the order of the pages.

    What a side never read counts as a page of zeros: that is what nobody has sent, or received, is.

xxh3_128 guards against mistakes, not against a forger: who could forge pages could forge the digest too.
"""

from collections.abc import Sequence

import numpy as np
import xxhash
from numpy.typing import NDArray

from dpud.gpu.hal.interface import Bytes
from dpud.gpu.migration.pages import Area, Mask, Pages

HASH_BYTES = 16
_LOST = 0xFF
"""Each byte of what stands for the hash of a page that has no bytes."""


class PageHashes:
    """Of all areas. Kept as the difference (xor) from the hash of zeros, so that pages never seen cost no memory."""

    def __init__(self, areas: Sequence[Area]) -> None:
        self._hashes = [np.zeros((area.nr_pages, HASH_BYTES), dtype=np.uint8) for area in areas]
        self._zeros = [_hashes(np.zeros((1, area.page_bytes), dtype=np.uint8)) for area in areas]

    def put(self, area: int, pages: Pages, rows: Bytes, lost: Mask) -> None:
        """Pages have these bytes from now on; rows[page, byte]."""
        if len(pages):
            found = _hashes(rows) ^ self._zeros[area]
            found[lost] = _LOST
            self._hashes[area][pages] = found

    def lose(self, area: int, lost: Mask) -> None:
        """These pages have no bytes any more."""
        self._hashes[area][lost] = _LOST

    def digest(self, left_out: Sequence[Mask] | None = None) -> bytes:
        """Of all pages but those left out; HASH_BYTES."""
        digest = xxhash.xxh3_128()
        for number, hashes in enumerate(self._hashes):
            digest.update(hashes.data if left_out is None else hashes[~left_out[number]].data)
        return digest.digest()


def _hashes(rows: Bytes) -> NDArray[np.uint8]:
    """[page, byte of its hash]"""
    joined = b"".join(xxhash.xxh3_128_digest(row.data) for row in np.ascontiguousarray(rows))
    return np.frombuffer(joined, dtype=np.uint8).reshape(len(rows), HASH_BYTES)
