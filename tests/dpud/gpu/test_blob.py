# SPDX-License-Identifier: GPL-2.0-only
"""Pages as blobs: what went in comes out, or an error does."""

import errno

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from dpud.gpu.blob import (
    HEADER_BYTES,
    RAW,
    SAME_FILLED,
    Blob,
    PlainCodec,
    checksum,
    pack_header,
    same_filled_word,
    unpack_header,
)
from dpud.gpu.errors import CorruptPage, GpuError


def decoded(blob: Blob) -> bytes:
    out = bytearray(blob.raw_bytes)
    PlainCodec().decode([blob], [memoryview(out)])
    return bytes(out)


@given(st.binary(min_size=8, max_size=8), st.integers(0, 2**32))
def test_pages_come_back(word: bytes, seed: int) -> None:
    for raw in (word * 512, np.random.default_rng(seed).bytes(4096)):
        (blob,) = PlainCodec().encode([memoryview(raw)])
        assert decoded(blob) == raw
        assert blob.checksum == xxhash.xxh3_64(raw).intdigest()


def test_a_filled_page_is_one_word() -> None:
    (blob,) = PlainCodec().encode([memoryview(b"GPU page" * 256)])
    assert (blob.codec, bytes(blob.data), blob.raw_bytes) == (SAME_FILLED, b"GPU page", 2048)


@given(st.integers(0, 4095), st.integers(0, 7))
def test_one_other_bit_is_seen(at: int, bit: int) -> None:
    page = bytearray(4096)
    page[at] ^= 1 << bit
    assert same_filled_word(bytes(page)) is None
    assert same_filled_word(bytes(4096)) == bytes(8)


@given(st.integers(0, 4095), st.integers(0, 7))
def test_a_flipped_bit_is_found(at: int, bit: int) -> None:
    raw = np.random.default_rng(1).bytes(4096)
    (blob,) = PlainCodec().encode([memoryview(raw)])
    wrong = bytearray(blob.data)
    wrong[at] ^= 1 << bit
    with pytest.raises(CorruptPage) as caught:
        decoded(Blob(bytes(wrong), RAW, 4096, blob.checksum))
    assert caught.value.errno == errno.EIO


@pytest.mark.parametrize("blob", [Blob(b"", RAW, 4096, 0), Blob(b"abc", SAME_FILLED, 4096, 0), Blob(b"x", 99, 1, 0)])
def test_a_blob_of_another_shape_is_corrupt(blob: Blob) -> None:
    with pytest.raises(CorruptPage):
        decoded(blob)


def test_headers_come_back() -> None:
    blob = Blob(b"12345", 7, 1 << 21, checksum(b"abc"), 3)
    header = pack_header(blob)
    assert len(header) == HEADER_BYTES
    nr_data, found = unpack_header(header)
    assert (nr_data, found) == (5, Blob(b"", 7, 1 << 21, checksum(b"abc"), 3))
    with pytest.raises(CorruptPage):
        unpack_header(header[:-1])


def test_errors_are_oserrors() -> None:
    error = GpuError(errno.ENOSPC, "the pool is full")
    assert isinstance(error, OSError)
    assert (error.errno, error.strerror) == (errno.ENOSPC, "the pool is full")
