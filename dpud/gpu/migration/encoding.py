# SPDX-License-Identifier: MIT
"""Pages as they go over: nothing for zeros, the difference where the version before was sent, and that compressed.

A payload is  area u16, nr u16,  then a record for each page, then their data, one behind the other:

    page u32, how u8, codec u8, 0 u16, length u32, encoded u64, whole u64

    how      ZERO  all zeros; LOST  the source itself has lost it
             FULL  the page; DELTA  its exclusive-or with the version sent before; both encoded by the codec
    encoded  checksum of what the data decode to
    whole    checksum of the page

The version before is what the sink has: pages are only changed here by what came over. The source keeps what it sent
of the pages it sent last (QEMU's xbzrle-cache-size does the same); a page that fell out of there is sent whole. That
the receiver has another version than the sender believes shows in `whole`.
"""

from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import xxhash

from dpud.gpu.blob import RAW, Blob, PageCodec, PlainCodec
from dpud.gpu.compression.codec import CODECS
from dpud.gpu.compression.dictionary import Dictionaries
from dpud.gpu.compression.encoder import decode_blob
from dpud.gpu.compression.system import CompressionSystem
from dpud.gpu.errors import CorruptPage
from dpud.gpu.hal.interface import Bytes
from dpud.gpu.migration.pages import Area, Mask, Pages, Reader
from dpud.gpu.migration.wire import ProtocolError

ZERO, FULL, DELTA, LOST = range(4)
HEAD = np.dtype([("area", "<u2"), ("nr", "<u2")])
RECORD = np.dtype(
    [
        ("page", "<u4"),
        ("how", "u1"),
        ("codec", "u1"),
        ("none", "<u2"),
        ("length", "<u4"),
        ("encoded", "<u8"),
        ("whole", "<u8"),
    ]
)
DEFAULT_CACHE_BYTES = 64 << 20
"""Of versions sent before. QEMU's xbzrle-cache-size is 64 MiB too."""

_SLACK_BYTES = 64
"""How much longer than a page its encoding may be."""


def new_codec(name: str) -> PageCodec:
    """`none`, or an algorithm of compression/; without dictionaries, which the other side does not have."""
    if name == "none":
        return PlainCodec()
    return CompressionSystem(name, "fast", workers=1, dictionaries=Dictionaries(enabled=False), regret_every=0)


class PageEncoder:
    """The source's side. `delta`: whether versions are kept."""

    def __init__(self, codec: PageCodec, cache_bytes: int = DEFAULT_CACHE_BYTES) -> None:
        self._codec = codec
        self._cache_bytes = cache_bytes
        self._cache: OrderedDict[tuple[int, int], Bytes] = OrderedDict()
        self._used_bytes = 0
        self.nr_zero = 0
        self.nr_delta = 0

    def encode(self, area: int, pages: Pages, rows: Bytes, lost: Mask) -> bytes:
        """One payload."""
        records = np.zeros(len(pages), dtype=RECORD)
        records["page"] = pages
        records["how"] = np.where(lost, LOST, np.where(rows.any(axis=1), FULL, ZERO))
        raws: list[Bytes] = []
        full = np.flatnonzero(records["how"] == FULL)
        for at in full.tolist():
            before = self._cache.get((area, int(pages[at])))
            records["whole"][at] = xxhash.xxh3_64_intdigest(rows[at])
            if before is not None:
                records["how"][at] = DELTA
            raws.append(rows[at] if before is None else rows[at] ^ before)
        blobs = self._codec.encode([np.ascontiguousarray(raw).data for raw in raws])
        for at, blob in zip(full.tolist(), blobs, strict=True):
            assert blob.dictionary == 0
            records["codec"][at], records["length"][at] = blob.codec, len(blob.data)
            records["encoded"][at] = blob.checksum
        self.nr_zero += int(np.count_nonzero(records["how"] == ZERO))
        self.nr_delta += int(np.count_nonzero(records["how"] == DELTA))
        self._remember(area, pages, rows, records["how"])
        head = np.array([(area, len(pages))], dtype=HEAD).tobytes()
        return b"".join((head, records.tobytes(), *(blob.data for blob in blobs)))

    def _remember(self, area: int, pages: Pages, rows: Bytes, how: np.ndarray) -> None:
        """What was sent now; a page that was not sent as bytes is forgotten."""
        if not self._cache_bytes:
            return
        for page, row, kind in zip(pages.tolist(), rows, how.tolist(), strict=True):
            old = self._cache.pop((area, page), None)
            self._used_bytes -= 0 if old is None else len(old)
            if kind in (FULL, DELTA):
                self._cache[area, page] = row.copy()
                self._used_bytes += len(row)
        while self._used_bytes > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._used_bytes -= len(oldest)


def decode_pages(payload: bytes, areas: Sequence[Area], current: Reader) -> tuple[int, Pages, Bytes, Mask]:
    """(area, pages, bytes, lost ones) of a payload; `current` has the versions before. Raises ProtocolError."""
    area, records, data = _parse(payload, areas)
    page_bytes = areas[area].page_bytes
    pages = records["page"].astype(np.int64)
    rows = np.zeros((len(pages), page_bytes), dtype=np.uint8)
    at = 0
    for index, (how, codec, length, check) in enumerate(
        zip(*(records[name].tolist() for name in ("how", "codec", "length", "encoded")), strict=True)
    ):
        if how in (FULL, DELTA):
            blob = Blob(data[at : at + length], codec, page_bytes, check)
            at += length
            try:
                decode_blob(index, blob, rows[index].data, _no_dictionary)
            except CorruptPage as error:
                raise ProtocolError(f"page {pages[index]} of area {area}: {error.strerror}") from error
    _apply_deltas(area, pages, rows, records["how"] == DELTA, current)
    for index in np.flatnonzero((records["how"] == FULL) | (records["how"] == DELTA)).tolist():
        if xxhash.xxh3_64_intdigest(rows[index]) != records["whole"][index]:
            raise ProtocolError(f"page {pages[index]} of area {area} is not what was sent")
    return area, pages, rows, records["how"] == LOST


def _no_dictionary(number: int) -> None:
    if number:
        raise KeyError(number)


def _apply_deltas(area: int, pages: Pages, rows: Bytes, deltas: Mask, current: Reader) -> None:
    if deltas.any():
        before, lost = current.read(area, pages[deltas])
        if lost.any():
            raise ProtocolError("a difference to a page that is lost")
        rows[deltas] ^= before


def _parse(payload: bytes, areas: Sequence[Area]) -> tuple[int, np.ndarray, memoryview]:
    """Head, records and data of a payload that makes sense."""
    _require(len(payload) >= HEAD.itemsize, "half a head")
    area, nr = (int(value) for value in np.frombuffer(payload, HEAD, 1)[0])
    _require(area < len(areas), f"area {area} of {len(areas)}")
    begin = HEAD.itemsize + nr * RECORD.itemsize
    _require(nr > 0 and len(payload) >= begin, f"{nr} pages in {len(payload)} bytes")
    records = np.frombuffer(payload, RECORD, nr, HEAD.itemsize)
    pages, lengths, how = records["page"].astype(np.int64), records["length"].astype(np.int64), records["how"]
    has_data = (how == FULL) | (how == DELTA)
    _require(bool((np.diff(pages) > 0).all()) and int(pages[-1]) < areas[area].nr_pages, "pages out of order or range")
    _require(bool((how <= LOST).all() and (records["none"] == 0).all()), "records of no kind")
    _require(bool((lengths[~has_data] == 0).all()), "data of a page that has none")
    _require(bool((lengths <= areas[area].page_bytes + _SLACK_BYTES).all()), "more data than a page")
    _require(int(lengths.sum()) == len(payload) - begin, "lengths do not add up")
    _require(nr * areas[area].page_bytes <= _MOST_BYTES or nr == 1, "more pages than a frame may have")
    codecs = set(records["codec"][has_data].tolist())
    _require(codecs <= {RAW, *_SAME, *CODECS}, f"codecs {codecs}")
    return area, records, memoryview(payload)[begin:]


_SAME = (1,)  # blob.SAME_FILLED
_MOST_BYTES = 4 << 20


def _require(holds: bool, why: str) -> None:
    if not holds:
        raise ProtocolError(why)
