# SPDX-License-Identifier: GPL-2.0-only
"""Batches of pages: the adaptive choice, worker threads, what is learnt, dictionaries."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import compressible
import pytest

from dpud.gpu.blob import RAW, SAME_FILLED, Blob, checksum
from dpud.gpu.compression import Codec, CompressionSystem, Quality, register
from dpud.gpu.compression.chooser import PROBE_EVERY, STREAK, sample
from dpud.gpu.compression.codec import CODECS, names
from dpud.gpu.compression.dictionary import FIRST_NUMBER, MIN_GAIN, Dictionaries
from dpud.gpu.errors import CorruptPage

PAGE = 64 << 10


def decoded(system: CompressionSystem, blobs: Sequence[Blob]) -> list[bytes]:
    outs = [bytearray(blob.raw_bytes) for blob in blobs]
    system.decode(blobs, [memoryview(out) for out in outs])
    return [bytes(out) for out in outs]


def nr_bytes(blobs: Sequence[Blob]) -> int:
    return sum(len(blob.data) for blob in blobs)


def best_bytes(page: memoryview) -> int:
    """Of all codecs there are, each at its level for `balanced`: the shortest, or the page."""
    lengths = [len(codec.encode(page, codec.level(Quality.BALANCED))) for codec in CODECS.values()]
    return min(len(page), *lengths)


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["lz4", "zstd", "snappy", "adaptive"])
@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_pages_of_any_size_come_back(algorithm: str, quality: str) -> None:
    pages = [page for size in (8, 13, 2048, 4096, PAGE) for page in compressible.mixed(size, 2)]
    system = CompressionSystem(algorithm, quality)
    blobs = system.encode(pages)
    assert decoded(system, blobs) == [bytes(page) for page in pages]
    assert [blob.checksum for blob in blobs] == [checksum(page) for page in pages]


@pytest.mark.slow
def test_the_choice_loses_two_percent_at_most() -> None:
    pages = compressible.mixed(PAGE, 4)
    best = sum(map(best_bytes, pages))
    assert nr_bytes(CompressionSystem().encode(pages)) <= 1.02 * best


@pytest.mark.slow
def test_neighbouring_small_pages_are_chosen_for_together() -> None:
    pages = compressible.mixed(4096, 32)
    best = sum(map(best_bytes, pages))
    assert nr_bytes(CompressionSystem().encode(pages)) <= 1.05 * best


def test_bf16_weights_come_to_less_than_five_sevenths() -> None:
    pages = compressible.cut(compressible.kinds()["bf16 weights"], PAGE)
    assert nr_bytes(CompressionSystem().encode(pages)) * 1.4 < sum(map(len, pages))


@pytest.mark.parametrize("algorithm", ["lz4", "zstd", "snappy", "adaptive"])
def test_noise_is_kept_raw_and_a_single_word_is_kept_as_one(algorithm: str) -> None:
    noise, word = compressible.noise(4096), b"\x00\x11\x22\x33\x44\x55\x66\x77"
    same = word * 512
    almost = same[:-1] + b"\x00"
    pages = [noise, same, bytes(4096), almost]
    blobs = CompressionSystem(algorithm).encode([memoryview(page) for page in pages])
    assert [blob.codec for blob in blobs[:3]] == [RAW, SAME_FILLED, SAME_FILLED]
    assert [blob.data for blob in blobs[:3]] == [noise, word, bytes(8)]
    assert blobs[3].codec not in (RAW, SAME_FILLED)


@pytest.mark.slow
def test_blobs_do_not_depend_on_the_workers() -> None:
    pages = compressible.mixed(4096, 24) + compressible.mixed(PAGE, 2)
    batches = [pages[begin : begin + 100] for begin in range(0, len(pages), 100)]
    results = []
    for workers in (1, 2, 5):
        system = CompressionSystem(workers=workers)
        results.append([blob for batch in batches for blob in system.encode(batch)])
        system.close()
    assert results[0] == results[1] == results[2]


def test_the_sample_comes_from_all_over() -> None:
    page = bytes(index // 512 % 256 for index in range(PAGE))
    assert set(sample([memoryview(page)])) == set(range(0, 128, 16))
    pages = [memoryview(bytes([index]) * 4096) for index in range(16)]
    assert set(sample(pages)) == set(range(0, 16, 2))
    assert bytes(sample([memoryview(b"abc")])) == b"abc"


# What is learnt.


@pytest.fixture
def probed() -> Iterator[list[int]]:
    """Lengths of what a codec was tried on; the codec never wins."""
    lengths: list[int] = []

    @register
    class Never(Codec):
        id, name, levels = 201, "never", {Quality.BALANCED: 1}

        def encode(self, page: memoryview, level: int, dictionary: object = None) -> bytes:
            lengths.append(len(page))
            return bytes(page)

        def decode(self, data: bytes | memoryview, out: memoryview, dictionary: object = None) -> None:
            out[:] = data

    yield lengths
    del CODECS[201]


@pytest.mark.slow
def test_a_client_s_pages_are_probed_rarely_once_they_are_known(probed: list[int]) -> None:
    page = compressible.cut(compressible.text(PAGE), PAGE)
    system = CompressionSystem(regret_every=0)
    for _ in range(STREAK + 10 * PROBE_EVERY):
        system.encode(page, "steady")
    assert STREAK <= len(probed) <= STREAK + 10
    nr_before = len(probed)
    system.encode(page, "another")
    assert len(probed) == nr_before + 1


def test_what_tries_a_codec_tries_it_on_all_groups_of_a_task(
    probed: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two threads gain by calls that are few and long: 64 groups in 8 tasks, three of them long."""
    batches: list[int] = []

    def counted(pages: Sequence[memoryview], _level: int, _dictionary: object = None) -> list[bytes]:
        batches.append(len(pages))
        return [bytes(page) for page in pages]

    monkeypatch.setattr(CODECS[201], "encode_many", counted)
    pages = compressible.cut(compressible.text(4 << 20), PAGE)
    CompressionSystem(regret_every=0, workers=2).encode(pages, "new")
    assert sorted(batches, reverse=True) == [16, 16, 16, 8, 4, 2, 1, 1]
    assert probed == []


def test_other_data_is_noticed_though_the_client_is_known() -> None:
    text, floats = (
        compressible.cut(data, PAGE) for data in (compressible.text(1 << 20), compressible.kinds()["bf16 weights"])
    )
    system = CompressionSystem()
    for page in text:
        system.encode([page], "changing")
    blobs = [blob for page in floats for blob in system.encode([page], "changing")]
    assert {blob.codec for blob in blobs} == {names()["planes2-zstd"]}


@pytest.mark.slow
def test_regret_is_counted_on_every_64th_page() -> None:
    pages = compressible.mixed(4096, 64)
    system = CompressionSystem()
    blobs = system.encode(pages)
    tried = [(page, blob) for page, blob in zip(pages[::64], blobs[::64], strict=True) if blob.codec != SAME_FILLED]
    assert system.regret.pages == len(tried)
    assert system.regret.chosen_bytes == sum(len(blob.data) for _, blob in tried)
    assert system.regret.best_bytes <= system.regret.chosen_bytes
    fixed = CompressionSystem("lz4")
    fixed.encode(pages)
    assert fixed.regret.pages == 0


def test_counters_add_up() -> None:
    pages = [*compressible.mixed(4096, 8), memoryview(bytes(4096))]
    ticks = iter(range(10**6))
    system = CompressionSystem(workers=1, timer=lambda: next(ticks))
    blobs = system.encode(pages)
    decoded(system, blobs)
    assert sum(stats.pages for stats in system.stats.values()) == len(pages)
    assert sum(stats.decoded_bytes for stats in system.stats.values()) == 4096 * len(pages)
    for codec, stats in system.stats.items():
        assert stats.stored_bytes == nr_bytes([blob for blob in blobs if blob.codec == codec])
        assert stats.decode_ns > 0


def test_algorithm_and_quality_can_change_between_batches() -> None:
    pages = compressible.cut(compressible.text(PAGE), 4096)
    system = CompressionSystem("lz4")
    first = system.encode(pages)
    system.algorithm = "zstd"
    second = system.encode(pages)
    system.quality = "best"
    third = system.encode(pages)
    assert [{blob.codec for blob in blobs} for blobs in (first, second)] == [{names()["lz4"]}, {names()["zstd"]}]
    assert nr_bytes(third) < nr_bytes(second) < nr_bytes(first)
    assert decoded(system, first + second + third) == 3 * [bytes(page) for page in pages]
    with pytest.raises(ValueError, match="lz5"):
        system.algorithm = "lz5"
    with pytest.raises(ValueError, match="superb"):
        system.quality = "superb"
    assert (system.algorithm, system.quality) == ("zstd", "best")


def test_the_first_corrupt_page_of_a_batch_is_named() -> None:
    system = CompressionSystem()
    blobs = system.encode(compressible.mixed(PAGE, 2))
    for index in (3, 9):
        blobs[index] = blobs[index]._replace(checksum=blobs[index].checksum ^ 1)
    with pytest.raises(CorruptPage) as caught:
        decoded(system, blobs)
    assert caught.value.key == 3
    assert system.nr_corrupt == 1


# Dictionaries.


@pytest.mark.slow
def test_small_pages_get_a_dictionary_that_helps() -> None:
    pages = compressible.cut(compressible.records(3 << 20), 4096)
    learning, rest = pages[:600], pages[600:]
    system, plain = CompressionSystem(), CompressionSystem(dictionaries=Dictionaries(enabled=False))
    system.encode(learning, "web")
    blobs, without = system.encode(rest, "web"), plain.encode(rest, "web")
    assert nr_bytes(blobs) * MIN_GAIN < nr_bytes(without)
    assert decoded(system, blobs) == [bytes(page) for page in rest]
    (dictionary,) = system.dictionaries
    assert dictionary.client == "web"
    assert dictionary.gain >= MIN_GAIN
    assert {blob.dictionary for blob in blobs} == {dictionary.number}
    with pytest.raises(CorruptPage):
        decoded(plain, blobs[:1])


@pytest.mark.slow
def test_two_systems_dictionaries_of_one_number_are_not_mixed_up() -> None:
    """One thread encodes for both. Another one, which never saw the first system, decodes the second's pages."""
    one, two = CompressionSystem("zstd"), CompressionSystem("zstd")
    batches = []
    for seed, system in ((3, one), (4, two)):
        data = memoryview(compressible.records(600 * 4096, seed))
        pages = [data[at : at + 4096] for at in range(0, len(data), 4096)]
        system.encode(pages, "web")
        batches.append((system, pages[:8], system.encode(pages[:8], "web")))
    assert {blob.dictionary for _, _, blobs in batches for blob in blobs} == {FIRST_NUMBER}
    with ThreadPoolExecutor(1) as elsewhere:
        for system, pages, blobs in reversed(batches):
            assert elsewhere.submit(decoded, system, blobs).result() == [bytes(page) for page in pages]


@pytest.mark.slow
def test_a_dictionary_is_the_client_s_own() -> None:
    pages = compressible.cut(compressible.records(3 << 20), 4096)
    system = CompressionSystem("zstd")
    system.encode(pages[:600], "web")
    assert {blob.dictionary for blob in system.encode(pages[600:610], "batch")} == {0}
    large = compressible.cut(compressible.records(1 << 20), PAGE)
    assert {blob.dictionary for blob in system.encode(large, "web")} == {0}


@pytest.mark.slow
def test_data_without_anything_in_common_gets_none() -> None:
    system = CompressionSystem("zstd")
    system.encode(compressible.cut(compressible.kinds(4 << 20)["int64 indices"], 4096), "tokens")
    assert list(system.dictionaries) == []
    assert system.dictionaries.nr_bytes == 0
