# SPDX-License-Identifier: GPL-2.0-only
"""Every codec: what goes in comes out, and what was damaged is noticed."""

import shutil
import subprocess
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import compressible
import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from dpud.gpu.blob import RAW, SAME_FILLED, Blob, checksum
from dpud.gpu.compression import Codec, CompressionSystem, Quality, register
from dpud.gpu.compression.codec import CODECS, Dictionary
from dpud.gpu.compression.dictionary import Dictionaries
from dpud.gpu.compression.encoder import decode_blob
from dpud.gpu.compression.lz import preamble
from dpud.gpu.errors import CorruptPage

CASES = [
    pytest.param(codec, quality, id=f"{codec.name}-{quality.name}") for codec in CODECS.values() for quality in Quality
]
NO_DICTIONARIES = Dictionaries(enabled=False)


def decoded(blob: Blob) -> bytes:
    out = bytearray(blob.raw_bytes)
    decode_blob(0, blob, memoryview(out), NO_DICTIONARIES.get)
    return bytes(out)


def encoded(codec: Codec, page: bytes, quality: Quality = Quality.BALANCED) -> Blob:
    """Whether it pays or not."""
    data = codec.encode(memoryview(page), codec.level(quality))
    return Blob(data, codec.id, len(page), checksum(page))


pages = st.one_of(
    st.binary(min_size=8, max_size=2048),
    st.lists(st.floats(width=32, allow_nan=True), min_size=2, max_size=600).map(lambda v: np.float32(v).tobytes()),
    st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=300).map(lambda v: np.int64(v).tobytes()),
    st.tuples(st.binary(min_size=8, max_size=16), st.integers(1, 200)).map(lambda v: v[0] * v[1]),
).map(lambda data: data[: len(data) & ~7])


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
@given(page=pages, quality=st.sampled_from(Quality))
@settings(max_examples=examples(50))
@pytest.mark.slow
def test_round_trip_of_anything(codec: Codec, page: bytes, quality: Quality) -> None:
    assert decoded(encoded(codec, page, quality)) == page


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "quality"), CASES)
def test_round_trip_of_each_kind_of_data(codec: Codec, quality: Quality) -> None:
    for size in (2 << 10, 64 << 10):
        for page in compressible.mixed(size, 1):
            assert decoded(encoded(codec, bytes(page), quality)) == page


@pytest.mark.slow
@pytest.mark.parametrize(("codec", "quality"), CASES)
def test_many_pages_at_once_are_coded_as_one_by_one(codec: Codec, quality: Quality) -> None:
    pages, level = compressible.mixed(4 << 10, 2), codec.level(quality)
    assert list(codec.encode_many(pages, level)) == [codec.encode(page, level) for page in pages]


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
def test_planes_of_two_mebibytes_need_longer_lengths(codec: Codec) -> None:
    page = compressible.kinds(2 << 20)["bf16 weights"]
    assert decoded(encoded(codec, page)) == page


# Damage.


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
@pytest.mark.slow
def test_a_flipped_bit_is_never_silent(codec: Codec) -> None:
    """Bits all over each encoded page: the page comes out right all the same, or CorruptPage does."""
    nr_noticed = 0
    for page in compressible.small_pages():
        blob = encoded(codec, page)
        for bit in range(0, 8 * len(blob.data), 5):
            data = bytearray(blob.data)
            data[bit // 8] ^= 1 << bit % 8
            try:
                assert decoded(blob._replace(data=bytes(data))) == page
            except CorruptPage:
                nr_noticed += 1
    assert nr_noticed > 500


@pytest.mark.slow
@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
def test_a_truncated_stream_is_noticed(codec: Codec) -> None:
    for page in compressible.small_pages():
        blob = encoded(codec, page)
        for length in range(0, len(blob.data), 3):
            with pytest.raises(CorruptPage):
                decoded(blob._replace(data=blob.data[:length]))


@pytest.mark.parametrize("codec", CODECS.values(), ids=lambda codec: codec.name)
def test_bytes_behind_a_stream_are_noticed_or_harmless(codec: Codec) -> None:
    for page in compressible.small_pages():
        blob = encoded(codec, page)
        with suppress(CorruptPage):
            assert decoded(blob._replace(data=bytes(blob.data) + b"\x5a" * 9)) == page


def blobs_of_every_codec() -> list[Blob]:
    page = compressible.text(512)
    same = Blob(b"12345678", SAME_FILLED, 512, checksum(b"12345678" * 64))
    return [*(encoded(codec, page) for codec in CODECS.values()), Blob(page, RAW, 512, checksum(page)), same]


@pytest.mark.slow
@pytest.mark.parametrize("blob", blobs_of_every_codec(), ids=lambda blob: str(blob.codec))
@pytest.mark.parametrize(("field", "bits"), [("codec", 8), ("checksum", 64), ("dictionary", 16)])
def test_a_flipped_bit_beside_the_data_is_noticed(blob: Blob, field: str, bits: int) -> None:
    for bit in range(bits):
        with pytest.raises(CorruptPage):
            decoded(blob._replace(**{field: getattr(blob, field) ^ 1 << bit}))


@pytest.mark.parametrize("blob", blobs_of_every_codec(), ids=lambda blob: str(blob.codec))
def test_a_wrong_size_is_noticed(blob: Blob) -> None:
    for size in (0, 8, 504, 520, 1 << 16):
        with pytest.raises(CorruptPage):
            decoded(blob._replace(raw_bytes=size))
        with pytest.raises(CorruptPage):
            decode_blob(0, blob, memoryview(bytearray(size)), NO_DICTIONARIES.get)


SNAPPY_4_GIB = b"\xff\xff\xff\xff\x0f"
ZSTD_1_GIB = bytes.fromhex("28b52ffd a0 00000040 010000".replace(" ", ""))


@pytest.mark.parametrize(("name", "data"), [("snappy", SNAPPY_4_GIB), ("zstd", ZSTD_1_GIB)])
def test_a_stream_that_promises_too_much_is_not_believed(name: str, data: bytes) -> None:
    (codec,) = [codec for codec in CODECS.values() if codec.name == name]
    tracemalloc.start()
    try:
        with pytest.raises(CorruptPage):
            decoded(Blob(data, codec.id, 4096, 0))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_preamble() -> None:
    """Values from snappy's format_description.txt."""
    assert preamble(b"\x40") == 64
    assert preamble(b"\xfe\xff\x7f") == 2097150
    with pytest.raises(ValueError, match="length"):
        preamble(b"\xff\xff\xff\xff\xff\x01")


# Formats that others read.


@pytest.mark.skipif(shutil.which("zstd") is None, reason="no zstd program")
@pytest.mark.parametrize("quality", ["fast", "balanced", "best"])
def test_the_zstd_program_reads_our_frames(quality: str) -> None:
    pages = compressible.cut(compressible.text(64 << 10), 4096)
    blobs = CompressionSystem("zstd", quality, dictionaries=NO_DICTIONARIES).encode(pages)
    frames = b"".join(blob.data for blob in blobs)
    done = subprocess.run(["zstd", "-dc"], input=frames, capture_output=True, check=True)
    assert done.stdout == compressible.text(64 << 10)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("zstd") is None, reason="no zstd program")
def test_the_zstd_program_reads_frames_with_a_dictionary(tmp_path: Path) -> None:
    system = CompressionSystem("zstd")
    pages = compressible.cut(compressible.records(3 << 20), 4096)
    system.encode(pages)
    blobs = system.encode(pages[:8])
    (dictionary,) = system.dictionaries
    assert {blob.dictionary for blob in blobs} == {dictionary.number}
    file = tmp_path / "dictionary"
    file.write_bytes(dictionary.data)
    frames = b"".join(blob.data for blob in blobs)
    done = subprocess.run(["zstd", "-dc", "-D", file], input=frames, capture_output=True, check=True)
    assert done.stdout == b"".join(pages[:8])


@pytest.mark.skipif(shutil.which("lz4") is None, reason="no lz4 program")
def test_the_lz4_program_reads_our_blocks() -> None:
    """Wrapped as a legacy frame: magic number, then each block behind its length (lz4_Frame_format.md)."""
    page = compressible.text(64 << 10)
    (blob,) = CompressionSystem("lz4").encode([memoryview(page)])
    frame = bytes.fromhex("02214c18") + len(blob.data).to_bytes(4, "little") + blob.data
    assert subprocess.run(["lz4", "-dc"], input=frame, capture_output=True, check=True).stdout == page


# The registry.


@pytest.fixture
def slope() -> Iterator[Codec]:
    """A new codec is one class: for 8-bit samples that change slowly."""

    @register
    class Slope(Codec):
        id, name, levels, selectable = 200, "slope", dict.fromkeys(Quality, 6), True
        errors = (zlib.error,)

        def encode(self, page: memoryview, level: int, dictionary: Dictionary | None = None) -> bytes:
            return zlib.compress(np.diff(np.frombuffer(page, np.uint8), prepend=np.uint8(0)).tobytes(), level)

        def decode(self, data: bytes | memoryview, out: memoryview, dictionary: Dictionary | None = None) -> None:
            out[:] = np.frombuffer(zlib.decompress(data), np.uint8).cumsum(dtype=np.uint8).tobytes()

    yield CODECS[200]
    del CODECS[200]


SAMPLES = np.random.default_rng(5).integers(-2, 3, 4096).astype(np.uint8).cumsum(dtype=np.uint8).tobytes()


def test_a_registered_codec_is_chosen_by_name_and_by_itself(slope: Codec) -> None:
    for algorithm in ("slope", "adaptive"):
        system = CompressionSystem(algorithm)
        (blob,) = system.encode([memoryview(SAMPLES)])
        assert blob.codec == slope.id
        out = bytearray(4096)
        system.decode([blob], [memoryview(out)])
        assert out == SAMPLES
        assert system.stats[slope.id].pages == system.stats[slope.id].decoded_pages == 1
    with pytest.raises(CorruptPage):
        system.decode([blob._replace(data=b"no zlib stream")], [memoryview(out)])


def test_an_id_or_a_name_is_given_once(slope: Codec) -> None:
    for codec_id, name in ((200, "other"), (201, "slope"), (0, "third"), (202, "raw")):
        kind = type("Again", (type(slope),), {"id": codec_id, "name": name})
        with pytest.raises(ValueError, match="there already"):
            register(kind)
