# SPDX-License-Identifier: GPL-2.0-only
"""Compressed memory: how much memory it takes, beside the kernel's zram, and how fast it is, beside bare libraries.

Ratios are exact. Speeds are of the fastest of several rounds, in which ours and the peer take turns: what other
processes do to a round can only slow it down. What one thread does is measured in its CPU time, for the same reason.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter, process_time

import lz4.block

from dpud.bench.gpu.corpora import CORPORA
from dpud.bench.gpu.zram import Stored, ZramBusy, zram
from dpud.bench.report import Figure, Line, Report
from dpud.gpu.compression.codec import CODECS, Quality
from dpud.gpu.compression.dictionary import Dictionaries
from dpud.gpu.compression.encoder import best_of_all
from dpud.gpu.compression.pool import CompressedPool
from dpud.gpu.compression.system import CompressionSystem

CORPUS_BYTES = 8 << 20
SMALL, LARGE = 4 << 10, 64 << 10
BATCH_BYTES = 4 << 20  # what eviction hands over at once
NR_ROUNDS = 5
_SPEED_BYTES = 2 << 20  # of each corpus
_ORACLE_BYTES = 1 << 20

MIN_STORE_SHARE = 0.8
MIN_BF16_RATIO = 1.4
MAX_REGRET_PERCENT = 2
MIN_SPEED_UP = 3.0
MIN_SCALING = 1.6
MIN_ZSTD_SHARE = 0.85
"""Figures of the issue and of reference/gpu.md section 1(f)."""

RATIO_HEADINGS = ("Corpus", "zram mem_used", "4 KiB pages", "64 KiB pages", "Ours / zram", "Verdict")


def cut(data: bytes, page_bytes: int) -> list[memoryview]:
    view = memoryview(data)
    return [view[begin : begin + page_bytes] for begin in range(0, len(data), page_bytes)]


def run() -> Report:
    data = {name: make(CORPUS_BYTES) for name, make in CORPORA.items()}
    report = _memory(data)
    report.parts = [_speed(data)]
    return report


# Memory.


def _memory(data: Mapping[str, bytes]) -> Report:
    report = Report(
        "gpu compression",
        "raw bytes by all memory taken",
        f"{CORPUS_BYTES >> 20} MiB of each of ten corpora. zram stores pages of 4 KiB with lz4, and counts what "
        "zsmalloc takes. Ours is the adaptive algorithm and the packed pool, and counts metadata too; the verdict is "
        "on 64 KiB pages.",
        headings=RATIO_HEADINGS,
    )
    peers = _zram_ratios(data, report.notes)
    rows = []
    for name, corpus in data.items():
        rows.append(_ratio_row(name, peers.get(name), effective_ratio(corpus, SMALL), effective_ratio(corpus, LARGE)))
    report.figures = rows
    return report


def _zram_ratios(data: Mapping[str, bytes], notes: list[str]) -> dict[str, float]:
    try:
        with zram(CORPUS_BYTES, "lz4") as device:
            stored: dict[str, Stored] = {name: device.store(corpus) for name, corpus in data.items()}
    except ZramBusy as error:
        notes.append(f"no zram to compare with: {error}")
        return {}
    total = sum(one.raw_bytes for one in stored.values()) / sum(one.seconds for one in stored.values())
    notes.append(f"zram wrote the ten corpora at {total / 1e6:.0f} MB/s")
    return {name: one.ratio for name, one in stored.items()}


def effective_ratio(corpus: bytes, page_bytes: int) -> float:
    """Raw bytes by the pool's used_bytes."""
    system = CompressionSystem(regret_every=0)
    pool = CompressedPool(0, system)
    pages = cut(corpus, page_bytes)
    step = BATCH_BYTES // page_bytes
    for begin in range(0, len(pages), step):
        batch = pages[begin : begin + step]
        pool.put(range(begin, begin + len(batch)), system.encode(batch, "corpus"))
    system.close()
    return pool.stored_bytes / pool.used_bytes


def _ratio_row(name: str, peer: float | None, small: float, large: float) -> Line:
    floor = max(peer or 0, MIN_BF16_RATIO if name == "bf16 weights" else 0)
    verdict = "" if not floor else "met" if large >= floor else "missed"
    texts = f"{peer:.2f}" if peer else "", f"{small:.2f}", f"{large:.2f}", f"{large / peer:.2f}" if peer else ""
    return Line((name, *texts, verdict), verdict)


# Speed.


def _speed(data: Mapping[str, bytes]) -> Report:
    report = Report(
        "gpu compression",
        "speed at 64 KiB pages",
        f"All corpora in turn, MB/s of raw bytes; the fastest of {NR_ROUNDS} rounds; one thread by CPU time, two by "
        "the clock. Storing is encoding, checksum and putting into the pool, over pages that were there before. "
        "Best of all encodes each page with every codec.",
    )
    pages = [page for corpus in data.values() for page in cut(corpus[:_SPEED_BYTES], LARGE)]
    report.figures = [*_store(pages), *_adaptive(data), *_scaling(pages), *_zstd(data["stdlib .py"], report.notes)]
    return report


def fastest(
    pages: Sequence[memoryview], *works: Callable[[], object], clock: Callable[[], float] = process_time
) -> list[float]:
    """MB/s of each, which take turns."""
    times: list[list[float]] = [[] for _ in works]
    for _ in range(1 + NR_ROUNDS):
        for work, samples in zip(works, times, strict=True):
            begin = clock()
            work()
            samples.append(clock() - begin)
    return [sum(map(len, pages)) / min(samples[1:]) / 1e6 for samples in times]


def _store(pages: Sequence[memoryview]) -> Iterator[Figure]:
    kept: dict[int, bytes] = {}

    def bare() -> None:
        for key, page in enumerate(pages):
            kept[key] = lz4.block.compress(page, store_size=False)

    name = f"{MIN_STORE_SHARE} of a bare python-lz4 loop"
    for workers, clock in ((1, process_time), (2, perf_counter)):
        system = _system("lz4", workers)
        peer, ours = fastest(pages, bare, Store(system, pages).all, clock=clock)
        yield Figure(f"store with lz4, threads: {workers}", ours, "MB/s", MIN_STORE_SHARE * peer, name, more=True)
        system.close()


class Store:
    """Pages that are stored again and again."""

    def __init__(self, system: CompressionSystem, pages: Sequence[memoryview]) -> None:
        self.system, self.pages = system, pages
        self.pool = CompressedPool(0, system)

    def all(self) -> None:
        step = BATCH_BYTES // LARGE
        for begin in range(0, len(self.pages), step):
            batch = self.pages[begin : begin + step]
            self.pool.store(range(begin, begin + len(batch)), batch)


def _adaptive(data: Mapping[str, bytes]) -> Iterator[Figure]:
    """Nobody tells whose pages they are."""
    pages = [page for corpus in data.values() for page in cut(corpus[:_ORACLE_BYTES], LARGE)]
    encode = Encode(_system("adaptive", 1), pages)
    best: list[int] = []

    def oracle() -> None:
        best[:] = [best_of_all(page, Quality.BALANCED) for page in pages]

    slow, fast = fastest(pages, oracle, encode.all)
    loss = 100 * (encode.nr_bytes / sum(best) - 1)
    yield Figure("adaptive: longer than the best of all", loss, "%", MAX_REGRET_PERCENT, f"of {len(CODECS)} codecs")
    yield Figure(
        "adaptive, threads: 1", fast, "MB/s", MIN_SPEED_UP * slow, f"{MIN_SPEED_UP:.0f} x best of all", more=True
    )


def _scaling(pages: Sequence[memoryview]) -> Iterator[Figure]:
    yield Figure("a bare python-lz4 loop, threads: 2 by 1", _bare_scaling(pages), "x")
    for algorithm in ("lz4", "zstd", "adaptive"):
        systems = [_system(algorithm, workers) for workers in (1, 2)]
        one, two = fastest(pages, *(Encode(system, pages).all for system in systems), clock=perf_counter)
        yield Figure(f"encode with {algorithm}, threads: 2 by 1", two / one, "x", MIN_SCALING, more=True)
        _close(systems)


def _bare_scaling(pages: Sequence[memoryview]) -> float:
    """What two threads gain on this machine now, if they do nothing but compress."""

    def compress(pages: Sequence[memoryview]) -> list[bytes]:
        return [lz4.block.compress(page, store_size=False) for page in pages]

    halves = [pages[::2], pages[1::2]]
    with ThreadPoolExecutor(len(halves)) as threads:
        one, two = fastest(
            pages, lambda: compress(pages), lambda: list(threads.map(compress, halves)), clock=perf_counter
        )
    return two / one


class Encode:
    """Pages that are encoded in batches and not kept."""

    def __init__(self, system: CompressionSystem, pages: Sequence[memoryview]) -> None:
        self.system, self.pages = system, pages
        self.nr_bytes = 0
        """That came out last time."""

    def all(self) -> None:
        self.nr_bytes, step = 0, BATCH_BYTES // LARGE
        for begin in range(0, len(self.pages), step):
            blobs = self.system.encode(self.pages[begin : begin + step], copy=False)
            self.nr_bytes += sum(len(blob.data) for blob in blobs)


def _zstd(corpus: bytes, notes: list[str]) -> Iterator[Figure]:
    """Against the tool's own benchmark, on the same file and blocks."""
    if shutil.which("zstd") is None:
        notes.append("no zstd program to compare with")
        return
    pages = cut(corpus, LARGE)
    system = _system("zstd", 1)
    ours = peer = 0.0
    with tempfile.NamedTemporaryFile() as file:
        file.write(corpus)
        file.flush()
        command = ["zstd", "-b1", f"-B{LARGE}", "-i1", file.name]
        for _ in range(NR_ROUNDS):
            peer = max(peer, zstd_mbps(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
            ours = max(ours, *fastest(pages, Encode(system, pages).all, clock=perf_counter))
    name = f"{MIN_ZSTD_SHARE} of zstd -b1"
    yield Figure("encode stdlib with zstd, threads: 1", ours, "MB/s", MIN_ZSTD_SHARE * peer, name, more=True)


def zstd_mbps(text: str) -> float:
    """Compression speed in the last line of `zstd -b` that has one. Raises ValueError."""
    found = re.findall(r"\(x?[\d.]+\),\s*([\d.]+) MB/s", text)
    if not found:
        raise ValueError(f"no speed in {text!r}")
    return float(found[-1])


def _system(algorithm: str, workers: int) -> CompressionSystem:
    return CompressionSystem(algorithm, workers=workers, dictionaries=Dictionaries(enabled=False), regret_every=0)


def _close(systems: Sequence[CompressionSystem]) -> None:
    for system in systems:
        system.close()
