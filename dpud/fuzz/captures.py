# SPDX-License-Identifier: GPL-2.0-only
"""Captured folders. An input is all files of one, behind each other:

    ==== NAME
    what is in it; of kpageflags, kpagecount and pagemap a line for each run of words: number of them, value

A file `NAME.raw` or `NAME.zst` is written as it stands. Of those that make sense some are built, too, and looked at.
"""

import itertools
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dpud.capture import CaptureError, read_capture
from dpud.fuzz.mutate import Mutator
from dpud.fuzz.target import Parser
from dpud.lab import Lab
from dpud.rawcapture import OPTIONAL_TEXTS, TEXTS
from kernelsim.machine import Machine

_FOLDER = "capture"
_WORDS = ("kpageflags", "kpagecount", "pagemap")
_HEAD = b"==== "
_MOST_WORDS = 1 << 14
_BUILD_EVERY = 32


def _sections(data: bytes) -> Iterator[tuple[str, bytes]]:
    for part in data.split(_HEAD)[1:]:
        name, _, content = part.partition(b"\n")
        yield name.decode("latin-1"), content


def _expanded(text: bytes) -> bytes:
    """The words of runs."""
    words: list[int] = []
    for line in text.split(b"\n"):
        fields = line.split()
        if len(fields) == 2 and all(field.isalnum() and len(field) < 18 for field in fields):
            try:
                nr, value = int(fields[0]), int(fields[1], 16)
            except ValueError:
                continue
            words += [value & (1 << 64) - 1] * min(nr, _MOST_WORDS - len(words))
    return np.array(words, dtype=np.uint64).tobytes()


def _runs(words: np.ndarray) -> bytes:
    edges = [0, *(np.flatnonzero(np.diff(words)) + 1).tolist(), len(words)]
    return b"".join(b"%d %x\n" % (end - at, words[at]) for at, end in itertools.pairwise(edges))


def _capture(data: bytes) -> None:
    folder = Path(_FOLDER)
    folder.mkdir(exist_ok=True)
    for path in folder.iterdir():
        path.unlink()
    for name, content in _sections(data):
        base, _, kind = name.partition(".")
        known = name in (*TEXTS, *OPTIONAL_TEXTS) or (base in (*TEXTS, *_WORDS) and kind in ("", "raw", "zst"))
        if known:
            content = _expanded(content) if name in _WORDS else content
            (folder / name.removesuffix(".raw")).write_bytes(content)
    image = read_capture(folder)
    if zlib.crc32(data) % _BUILD_EVERY == 0:
        try:
            machine = Machine.from_image(image)
        except ValueError as error:
            raise CaptureError(str(error)) from error
        assert machine.check() == [], machine.check()[:3]


def _seed() -> bytes:
    """A small machine of ours, as a real one would show itself."""
    lab = Lab((32,))
    lab.spawn("a", anon="6M", holes="40 runs seed=3", file="1M")
    parts = [_HEAD + name.encode() + b"\n" + lab.read(f"/proc/{name}").encode() for name in TEXTS]
    for name in ("kpageflags", "kpagecount"):
        parts.append(_HEAD + name.encode() + b"\n" + _runs(lab.read_numbers(f"/proc/{name}")))
    maps = b"Task 100 3 a\n00400000-00403000 rw-p 00000000 00:00 0 \n"
    entries = np.array([0x400, 1 << 63 | 5000, 0x401, 1 << 63 | 5001, 0x402, 0], dtype=np.uint64)
    parts += [_HEAD + b"maps\n" + maps, _HEAD + b"pagemap\n" + _runs(entries)]
    return b"".join(parts)


def capture_world(_seed_number: int) -> Parser:
    words = b"DMA DMA32 Normal Movable Node zone type Unmovable Reclaimable CMA Isolate managed present spanned".split()
    words += [
        b"4096 0",
        b"1 400",
        b"512 8000",
        b"1 18000",
        b"3 10000",
        b"1 ffffffffffffffff",
        b"start_pfn:",
        b">100000",
    ]
    return Parser(_capture, CaptureError, Mutator([_seed()], words))
