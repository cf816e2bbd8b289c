# SPDX-License-Identifier: GPL-2.0-only
"""Many pages in one call of lz4, and the threads that share them out."""

import gc
import threading
import time
from collections.abc import Sequence

import compressible
import lz4.block
import pytest
import xxhash

from dpud.gpu.blob import SAME_FILLED, checksum
from dpud.gpu.compression import CompressionSystem, lz_batch
from dpud.gpu.compression.workers import Workers

PAGE = 64 << 10


@pytest.fixture
def library() -> lz_batch.Library:
    known = lz_batch.library()
    assert known is not None, "the packages of PyPI have the C functions"
    return known


def spread(data: bytes, size: int) -> list[memoryview]:
    """Some 40 pages from all over."""
    step = max(size, len(data) // 40)
    return [memoryview(data)[begin : begin + size] for begin in range(0, len(data) - size + 1, step)]


@pytest.mark.parametrize("size", [1, 100, 4096, PAGE, 2 << 20])
def test_each_stream_and_checksum_is_the_libraries_own(library: lz_batch.Library, size: int) -> None:
    data = compressible.text(2 << 20) + bytes(1 << 20) + compressible.noise(1 << 20)
    pages = spread(data, size)
    made = list(lz_batch.compress_many(library, pages))
    assert [bytes(stream) for stream, _ in made] == [lz4.block.compress(page, store_size=False) for page in pages]
    assert [found for _, found in made] == [xxhash.xxh3_64_intdigest(page) for page in pages]


def test_the_same_without_the_c_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    pages = compressible.mixed(4096, 8) + compressible.mixed(PAGE, 2)
    system = CompressionSystem("lz4", workers=1, regret_every=0)
    first = system.encode(pages)
    monkeypatch.setattr(lz_batch, "library", lambda: None)
    assert system.encode(pages) == first


def test_blobs_have_bytes_of_their_own_unless_views_will_do() -> None:
    pages = spread(compressible.text(1 << 20), PAGE)
    system = CompressionSystem("lz4", workers=1, regret_every=0)
    own, views = system.encode(pages), system.encode(pages, copy=False)
    assert {type(blob.data) for blob in own} == {bytes}
    assert {type(blob.data) for blob in views} == {memoryview}
    assert own == views


@pytest.mark.parametrize("algorithm", ["lz4", "zstd", "adaptive"])
def test_same_filled_pages_among_others(algorithm: str) -> None:
    zeros, text = memoryview(bytes(4096)), memoryview(compressible.text(4096))
    system = CompressionSystem(algorithm, workers=1)
    assert {blob.codec for blob in system.encode([zeros] * 40)} == {SAME_FILLED}
    pages = [zeros, text, zeros, zeros, text, text]
    blobs = system.encode(pages)
    assert [blob.codec == SAME_FILLED for blob in blobs] == [page is zeros for page in pages]
    assert [blob.checksum for blob in blobs] == [checksum(page) for page in pages]


def test_an_empty_page_is_a_page() -> None:
    blobs = CompressionSystem("lz4").encode([memoryview(b"")] * 2)
    assert [(blob.raw_bytes, len(blob.data)) for blob in blobs] == [(0, 0)] * 2


def square(number: int) -> int:
    if number < 0:
        raise ValueError(number)
    return number * number


@pytest.mark.parametrize("nr", [1, 2, 5])
def test_workers_do_all_tasks_and_raise_the_first_error(nr: int) -> None:
    workers = Workers(nr)
    for _ in range(50):
        assert workers.map(square, range(20)) == [number * number for number in range(20)]
    with pytest.raises(ValueError, match=r"^-3$"):
        workers.map(square, [1, -3, 2, -4])
    workers.close()


def helpers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "compress"]


def test_threads_end_and_come_back() -> None:
    before = set(helpers())
    workers = Workers(3)
    assert not set(helpers()) - before
    for _ in range(2):
        workers.map(square, [1, 2])
        assert len(set(helpers()) - before) == 2
        workers.close()
        assert not set(helpers()) - before


def test_threads_end_with_who_had_them() -> None:
    workers = Workers(3)
    before = set(helpers())
    workers.map(square, [1, 2])
    started = set(helpers()) - before
    del workers
    gc.collect()
    join_all(list(started))


def join_all(threads: Sequence[threading.Thread]) -> None:
    deadline = time.monotonic() + 30
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    assert not [thread for thread in threads if thread.is_alive()]
