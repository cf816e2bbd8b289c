# SPDX-License-Identifier: GPL-2.0-only
"""Pages for the tests of compression: the kinds of data that can be made from a seed, and text."""

import random
from collections.abc import Iterator
from functools import cache

import numpy as np

from dpud.bench.gpu import corpora

KIB = 1 << 10
WORDS = ["page", "zone", "node", "order", "slab", "buddy", "folio", "pfn", "rmap", "lru", "swap", "zram"]


NUMBERED = [f"{word}{number} " for word in WORDS for number in range(1000)]


@cache
def text(nr_bytes: int, seed: int = 1) -> bytes:
    nr_words = nr_bytes // min(map(len, NUMBERED)) + 1
    which = np.random.default_rng(seed).integers(len(NUMBERED), size=nr_words).tolist()
    return "".join([NUMBERED[index] for index in which]).encode()[:nr_bytes]


@cache
def records(nr_bytes: int, seed: int = 3) -> bytes:
    """Lines of a few hundred forms, each seen rarely within one page and often within many."""
    rng = random.Random(seed)
    forms = [rng.randbytes(30).hex() for _ in range(300)]
    lines = (f"{rng.choice(forms)}={rng.randrange(1000)}\n" for _ in range(nr_bytes // 60))
    return "".join(lines).encode()[:nr_bytes]


def noise(nr_bytes: int, seed: int = 2) -> bytes:
    return random.Random(seed).randbytes(nr_bytes)


@cache
def kinds(nr_bytes: int = 1 << 20) -> dict[str, bytes]:
    """1 MiB, or a multiple of it, of each kind."""
    makers = {name: make for name, make in corpora.CORPORA.items() if name.split()[0] not in ("stdlib", "ELF", "live")}
    return {name: make(nr_bytes) for name, make in makers.items()} | {"text": text(nr_bytes), "noise": noise(nr_bytes)}


def cut(data: bytes, page_bytes: int) -> list[memoryview]:
    view = memoryview(data)
    return [view[begin : begin + page_bytes] for begin in range(0, len(data), page_bytes)]


def mixed(page_bytes: int, nr_each: int) -> list[memoryview]:
    """Some pages of each kind, kind after kind."""
    return [page for data in kinds().values() for page in cut(data[: page_bytes * nr_each], page_bytes)]


def small_pages() -> Iterator[bytes]:
    """Pages of 512 bytes."""
    made = kinds()
    for name in ("bf16 weights", "fp32 field", "int64 indices", "text"):
        yield made[name][:512]
    yield bytes(range(256)) * 2
    yield bytes(504) + b"\x01" * 8
