# SPDX-License-Identifier: GPL-2.0-only
"""Files that this program wrote itself, and finds changed: journals, checkpoints, swap slots, compressed pages.

Most of what happens to them is noticed by a checksum, and nothing behind it is ever reached. So the first byte of an
input says whether it is the file as it is, or what is in it, which is given good checksums then.
"""

import errno
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from dpud import config, state, state_segments
from dpud.errors import UserError
from dpud.fuzz.mutate import Mutator
from dpud.fuzz.target import Parser
from dpud.gpu.blob import SAME_FILLED, Blob, checksum
from dpud.gpu.compression import CompressionSystem
from dpud.gpu.compression.codec import CODECS, Quality
from dpud.gpu.compression.encoder import decode_blob
from dpud.gpu.errors import CorruptPage, GpuError
from dpud.gpu.fault import archive
from dpud.gpu.fault.checkpoint_file import Label, RegionLabel, Writer, read_blob
from dpud.gpu.migration.journal import _line
from dpud.gpu.swap.blockfile import BLOCK_BYTES, BlockFile
from dpud.gpu.swap.slots import open_label, put_record, scan
from dpud.gpu.system import GpuConfig, build
from dpud.journal import frame
from dpud.journal_turns import BOOT, CLOSE, FORMAT, REQUEST, RESUME, STEP, Head, Row, Turn, encode

RAW, SIGNED = b"r", b"s"
BETWEEN = b"\xc1\xc1\xc1"
"""0xc1 is never used by MessagePack, and is no UTF-8."""

# The journal of the machine.


def _journal(data: bytes) -> None:
    """As the daemon looks at it before it starts, up to doing its turns again."""
    path = state_segments.journal_at(Path("state"), 0)
    path.parent.mkdir(exist_ok=True)
    for left in path.parent.iterdir():
        left.unlink()
    payloads = data[1:].split(BETWEEN)
    signed = b"".join(frame(number, payload) for number, payload in enumerate(payloads))
    path.write_bytes(data[1:] if data[:1] == RAW else signed)
    kept = state.State(path.parent, config.Config(), recover=data[:1] not in (RAW, SIGNED))
    kept.look()
    for segment in kept.segments:
        assert segment.end.offset <= len(path.read_bytes())
        for _, _, turn in segment.turns():
            if isinstance(turn.what, Row):
                assert turn.what.request.verb == turn.what.verb


def journal_world(_seed: int) -> Parser:
    head = Head(FORMAT, state.build_of(), state.machine_keys(config.Config()))
    row = Row("write", b"/proc/sys/vm/extfrag_threshold", 12, b"500\n", 0, 0, 0, 0, 7)
    turns = [
        Turn(BOOT, 0, None, [1, "x"], None),
        Turn(REQUEST, 1, row, [5], 4),
        Turn(STEP, 2, 1_000_000, [], None),
        Turn(RESUME, 1, None, [7], "-ENOMEM"),
        Turn(CLOSE, 2, None, [], None),
    ]
    payloads = [encode(head), *map(encode, turns)]
    whole = b"".join(frame(number, payload) for number, payload in enumerate(payloads))
    seeds = [
        RAW + whole,
        RAW + whole + bytes(200),
        SIGNED + BETWEEN.join(payloads),
        b"R" + whole,
        b"S" + BETWEEN.join(payloads),
    ]
    words = [
        *payloads,
        frame(6, payloads[1]),
        b"dpJr",
        struct.pack("<I", 1 << 28),
        b"\x91" * 2000,
        b"\xdd\xff\xff\xff\xff",
        BETWEEN,
    ]
    return Parser(_journal, UserError, Mutator(seeds, words))


# Promises of migrations.


def promises_world(_seed: int) -> Parser:
    """Also what a daemon does that finds them."""
    manifest = {"client": "c", "areas": [{"nr_bytes": 8192, "page_bytes": 4096}]}
    records: list[dict[str, Any]] = [
        {"id": "m1", "step": "receiving", "manifest": manifest},
        {"id": "m1", "step": "prepared", "digest": "0" * 32, "missing": None},
        {"id": "m2", "step": "begun", "client": "c", "target": "x"},
        {"id": "m2", "step": "handed-over", "postcopy": False},
        {"id": "m1", "step": "got", "area": 0, "runs": [[0, 1]]},
    ]
    lines = [_line(record) for record in records]
    memory = build(GpuConfig(1, 8 << 20, 8 << 20, 1 << 20))
    migration = memory.migration

    def use(data: bytes) -> None:
        folder = Path("promises")
        folder.mkdir(exist_ok=True)
        content = data[1:] if data[:1] == RAW else b"".join(map(_signed, data[1:].split(b"\n")))
        for name in ("in.journal", "out.journal"):
            (folder / name).write_bytes(content)
        migration.use_journal(folder)
        for journal in migration._journals:
            journal.close()
        migration.history.clear()

    texts = [line.partition(b" ")[2] for line in lines]
    seeds = [RAW + b"".join(lines), SIGNED + b"".join(texts), *(SIGNED + text for text in texts)]
    words = b'"id" "step" "missing" [] {} null true "abandoned" "owner" "running" "done" [[[[ {"a":'.split()
    return Parser(use, OSError, Mutator(seeds, words))


def _signed(text: bytes) -> bytes:
    return b"%016x %s\n" % (xxhash.xxh3_64_intdigest(text), text)


# Checkpoints of GPU clients.


_LABEL = Label("c", 1, 0, 0, 5, (RegionLabel(0, 8192, 4096, "device", 0, 0),))


def _checkpoint(data: bytes) -> None:
    """Read as if its client were to be restored."""
    folder = Path("checkpoints")
    folder.mkdir(exist_ok=True)
    content = data[1:]
    if data[:1] == SIGNED:
        content += struct.pack("<Q", xxhash.xxh3_64_intdigest(content))
    archive.path_of(folder, "c", 1).write_bytes(content)
    files = archive.read_chain(folder, "c", None)
    for places in archive.merged(files).values():
        for path, at in places.values():
            blob = read_blob(path, at)
            _decoded(blob, memoryview(bytearray(4096)))


def checkpoint_world(_seed: int) -> Parser:
    folder = Path("made")
    folder.mkdir(exist_ok=True)
    writer = Writer(folder / "c.ckpt", _LABEL)
    for page, blob in enumerate(_blobs()):
        writer.add(0, page % 2, blob)
    writer.finish()
    whole = (folder / "c.ckpt").read_bytes()
    label = whole[12 : 12 + struct.unpack_from("<I", whole, 8)[0]]
    seeds = [RAW + whole, SIGNED + whole[:-8]]
    words = [
        label,
        b"null",
        b"[]",
        b'"parent": 1',
        b'"parent_digest": null',
        b"[" * 3000,
        struct.pack("<I", 1),
        b"\xff" * 4,
    ]
    return Parser(_checkpoint, OSError, Mutator(seeds, words))


# Compressed pages.


def _decoded(blob: Blob, out: memoryview) -> bool:
    """Whether it was an encoding of something; of what, its checksum says."""
    try:
        decode_blob(0, blob, out, lambda _number: None)
    except CorruptPage as error:
        return ": checksum " in str(error.strerror)
    return True


def _pages() -> Iterator[np.ndarray]:
    rng = np.random.default_rng(1)
    yield np.zeros(4096, np.uint8)
    yield np.arange(4096, dtype=np.uint32).astype(np.uint8)
    yield np.repeat(rng.integers(0, 9, 256, dtype=np.uint8), 16)
    yield rng.standard_normal(1024).astype(np.float32).view(np.uint8)


def _blobs() -> list[Blob]:
    """Pages as every codec encodes them."""
    blobs = [Blob(b"\x07" * 8, SAME_FILLED, 4096, checksum(b"\x07" * 4096))]
    for page in _pages():
        view = memoryview(page.tobytes())
        blobs += [
            Blob(codec.encode(view, codec.level(Quality.FAST)), codec.id, 4096, checksum(view))
            for codec in CODECS.values()
        ]
    return blobs


def blob_world(_seed: int) -> Parser:
    """A codec's number, then what it is to decode, into a page of 4 KiB or of 2 MiB."""
    outs = [memoryview(bytearray(size)) for size in (4096, 2 << 20)]

    def use(data: bytes) -> None:
        number, large = (data[0] & 127, data[0] >> 7) if data else (0, 0)
        blob = Blob(data[1:], number, len(outs[large]), 0)
        if not _decoded(blob, outs[large]):
            raise GpuError(errno.EIO, "no encoding of a page")

    seeds = [bytes([blob.codec & 127]) + blob.data for blob in _blobs()]
    return Parser(use, OSError, Mutator(seeds, [bytes([codec & 127]) for codec in CODECS]))


# Swap slots.

_BLOCKS, _SALT_AT = 8, 20
_FIELDS = struct.Struct("<8sQQIIIIQ")
_RECORD_BYTES = 64


def _resigned(content: bytearray, salt: int) -> None:
    """Every record that begins at a multiple of 64 bytes gets good checksums, whatever it says."""
    for at in range(BLOCK_BYTES, len(content) - _RECORD_BYTES, _RECORD_BYTES):
        if content[at : at + 8] == b"dpudSLOT":
            nr_data = struct.unpack_from("<I", content, at + 24)[0]
            data = bytes(content[at + _RECORD_BYTES : at + _RECORD_BYTES + nr_data])
            struct.pack_into("<Q", content, at + 48, xxhash.xxh3_64_intdigest(data))
            struct.pack_into("<Q", content, at + 56, xxhash.xxh3_64_intdigest(bytes(content[at : at + 56]), salt))
    struct.pack_into("<Q", content, 28, xxhash.xxh3_64_intdigest(bytes(content[:28])))


def slots_world(_seed: int) -> Parser:
    file = BlockFile.in_memory("fuzz", _BLOCKS)
    salt = open_label(file)
    whole = bytearray(file.read(0, BLOCK_BYTES)) + bytearray((_BLOCKS - 1) * BLOCK_BYTES)
    at = BLOCK_BYTES
    for key, blob in enumerate(_short(_blobs(), len(whole) - at)):
        at = put_record(memoryview(whole), at, key, key + 1, blob, salt)
    system = CompressionSystem("adaptive", "fast", workers=1)

    def use(data: bytes) -> None:
        content = bytearray(data[1:].ljust(_BLOCKS * BLOCK_BYTES, b"\0")[: _BLOCKS * BLOCK_BYTES])
        if data[:1] == SIGNED:
            _resigned(content, struct.unpack_from("<Q", content, _SALT_AT)[0])
        view = file.buffer(len(content))
        view[:] = bytes(content)
        file.write(0, view)
        found = [each.blob for each in scan(file, open_label(file)) if each.blob is not None]
        for blob in found:
            system.decode([blob], [memoryview(bytearray(4096))])

    seeds = [RAW + bytes(whole), SIGNED + bytes(whole)]
    return Parser(use, OSError, Mutator(seeds, [b"dpudSLOT", b"dpudSWAP", struct.pack("<I", 4096), b"\xff" * 8]))


def _short(blobs: Sequence[Blob], room: int) -> Iterator[Blob]:
    for blob in blobs:
        room -= len(blob.data) + 2 * _RECORD_BYTES
        if room > 0:
            yield blob
