# SPDX-License-Identifier: MIT
"""Pages to blobs and back: the compression system.

Theory of operation
    A batch of pages is cut into groups of GROUP_BYTES of neighbours of one size, the groups into tasks for the worker
    threads. Codecs let go of the interpreter's lock while they run, but a hand-over costs as much as compressing some
    KiB, so a task is never less than GROUP_BYTES. A page that one word fills becomes that word; a page that does not
    get shorter stays as it is; all others are what the codec made of them. Each blob has a checksum of the raw bytes.

Invariants
    - The blobs of a batch depend on the pages, the client and what was encoded before, not on the number of workers or
      on their order: what is learnt (`Memory`, `Regret`, dictionaries) is learnt after a batch is joined.
    - `decode` gives the bytes that were encoded, or raises CorruptPage.
    - Only the thread that owns the system calls it; its workers see bytes and frozen state.

Times in `stats` are CPU times of the worker threads, from a timer that can be replaced. They decide nothing.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from typing import TypeAlias, TypeVar

from dpud.gpu.blob import RAW, SAME_FILLED, Blob, checksum, same_filled_word
from dpud.gpu.compression import lz as lz
from dpud.gpu.compression import planes as planes
from dpud.gpu.compression.chooser import (
    GROUP_BYTES,
    SURPRISE,
    Choice,
    Memory,
    Regret,
    plan,
    probe,
    worth,
)
from dpud.gpu.compression.codec import CODECS, Codec, Dictionary, Quality, names
from dpud.gpu.compression.dictionary import Dictionaries
from dpud.gpu.compression.stats import CodecStats
from dpud.gpu.errors import CorruptPage

ADAPTIVE = "adaptive"
REGRET_EVERY = 64
_TASKS_PER_WORKER = 4
_WORD_BYTES = 8

Job: TypeAlias = tuple[int, Blob, memoryview]
"""Index in the batch, what to decode and where to."""

log = logging.getLogger("dpud.gpu.compression")
T = TypeVar("T")
R = TypeVar("R")


def algorithms() -> tuple[str, ...]:
    """What `algorithm` may be."""
    return (*(codec.name for codec in CODECS.values() if codec.selectable), ADAPTIVE)


@dataclass(frozen=True, slots=True)
class Group:
    """Neighbouring pages of one size, and what is known before they are encoded."""

    pages: Sequence[memoryview]
    ordinal: int
    first_page: int
    memory: Memory
    dictionary: Dictionary | None


@dataclass(slots=True)
class Encoded:
    """One page's blob and what there is to learn from it."""

    blob: Blob
    surprised: bool = False
    ns: int = 0
    """The group's time, spread evenly over its pages."""
    best_bytes: int = 0
    """Shortest of all codecs, where that was tried."""


class CompressionSystem:
    """`algorithm`: a codec's name or `adaptive`; `quality`: fast, balanced, best. Both may be changed at any time."""

    def __init__(
        self,
        algorithm: str = ADAPTIVE,
        quality: str = "balanced",
        workers: int = 2,
        *,
        dictionaries: bool = True,
        regret_every: int = REGRET_EVERY,
        timer: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self.algorithm = algorithm
        self.quality = quality
        self.workers = max(workers, 1)
        self.regret_every = regret_every
        self.regret = Regret()
        self.stats: dict[int, CodecStats] = defaultdict(CodecStats)
        self.dictionaries = Dictionaries(dictionaries)
        self._timer = timer
        self._memories: dict[str, Memory] = defaultdict(Memory)
        self._nr_groups: dict[str, int] = defaultdict(int)
        self._nr_pages = 0
        self._executor: ThreadPoolExecutor | None = None

    @property
    def algorithm(self) -> str:
        return self._algorithm

    @algorithm.setter
    def algorithm(self, name: str) -> None:
        """Raises ValueError for a name that is none."""
        if name not in algorithms():
            raise ValueError(f"no algorithm {name!r}: there are {', '.join(algorithms())}")
        self._algorithm = name
        self._fixed = None if name == ADAPTIVE else names()[name]

    @property
    def quality(self) -> str:
        return self._quality.name.lower()

    @quality.setter
    def quality(self, name: str) -> None:
        """Raises ValueError for a name that is none."""
        known = {quality.name.lower(): quality for quality in Quality}
        if name not in known:
            raise ValueError(f"no quality {name!r}: there are {', '.join(known)}")
        self._quality = known[name]

    def close(self) -> None:
        """End the workers; they come back when they are needed."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None

    # Encoding.

    def encode(self, pages: Sequence[memoryview], client: str = "") -> list[Blob]:
        """One blob for each page, in order. `client` is whose they are: what is learnt is kept apart by it."""
        begin_ns = time.monotonic_ns()
        groups = list(self._groups(pages, client))
        done = list(self._parallel(self._encode_group, groups, lambda group: sum(map(len, group.pages))))
        for group, encoded in zip(groups, done, strict=True):
            self._learn(client, group, encoded)
        blobs = [one.blob for encoded in done for one in encoded]
        self._log("compress", sum(map(len, pages)), begin_ns)
        return blobs

    def _groups(self, pages: Sequence[memoryview], client: str) -> Iterator[Group]:
        memory = self._memories[client]
        frozen = Memory(memory.codec, memory.streak, memory.ratio)
        begin = 0
        for size, run in groupby(map(len, pages)):
            end = begin + sum(1 for _ in run)
            step = max(GROUP_BYTES // max(size, 1), 1)
            dictionary = self.dictionaries.current(client, size)
            for first in range(begin, end, step):
                chunk = pages[first : min(first + step, end)]
                yield Group(chunk, self._nr_groups[client], self._nr_pages, frozen, dictionary)
                self._nr_groups[client] += 1
                self._nr_pages += len(chunk)
            begin = end

    def _encode_group(self, group: Group) -> list[Encoded]:
        begin = self._timer()
        if self._fixed is not None:
            choice = Choice(self._fixed, 1.0)
        else:
            choice = plan(group.pages, group.ordinal, group.memory, self._quality, group.dictionary)
        done = [self._encode_page(page, choice, group) for page in group.pages]
        ns = (self._timer() - begin) // len(done)
        for one in done:
            one.ns = ns
        if self._fixed is None and self.regret_every:
            self._try_all(group, done)
        return done

    def _try_all(self, group: Group, done: list[Encoded]) -> None:
        """Encode one page in `regret_every` with every codec."""
        for index in range(-group.first_page % self.regret_every, len(done), self.regret_every):
            if done[index].blob.codec != SAME_FILLED:
                done[index].best_bytes = self.best_of_all(group.pages[index], group.dictionary)

    def best_of_all(self, page: memoryview, dictionary: Dictionary | None = None) -> int:
        """Bytes of the shortest encoding there is at this quality, at most the page's own."""
        lengths = [len(self._run(codec, page, dictionary)) for codec in CODECS.values() if codec.takes(len(page))]
        return min([length for length in lengths if worth(length, len(page))], default=len(page))

    def _encode_page(self, page: memoryview, choice: Choice, group: Group) -> Encoded:
        word = same_filled_word(page) if len(page) >= _WORD_BYTES else None
        if word is not None:
            return Encoded(Blob(word, SAME_FILLED, len(page), checksum(page)))
        blob = self._with_codec(page, choice.codec, group.dictionary)
        surprised = self._fixed is None and len(blob.data) > choice.ratio * len(page) * SURPRISE
        if surprised:
            other = probe([page], self._quality, group.dictionary).codec
            if other not in (choice.codec, RAW):
                blob = min(blob, self._with_codec(page, other, group.dictionary), key=lambda blob: len(blob.data))
        return Encoded(blob, surprised)

    def _run(self, codec: Codec, page: memoryview, dictionary: Dictionary | None) -> bytes:
        return codec.encode(page, codec.level(self._quality), dictionary if codec.takes_dictionary else None)

    def _with_codec(self, page: memoryview, codec_id: int, dictionary: Dictionary | None) -> Blob:
        codec = CODECS.get(codec_id)
        if codec is not None and codec.takes(len(page)):
            data = self._run(codec, page, dictionary)
            if worth(len(data), len(page)):
                number = dictionary.number if dictionary is not None and codec.takes_dictionary else 0
                return Blob(data, codec_id, len(page), checksum(page), number)
        return Blob(bytes(page), RAW, len(page), checksum(page))

    def _learn(self, client: str, group: Group, done: list[Encoded]) -> None:
        for one in done:
            blob = one.blob
            self.stats[blob.codec].encoded(blob.raw_bytes, len(blob.data), one.ns)
            if one.best_bytes:
                self.regret.add(len(blob.data), one.best_bytes)
        for page, one in zip(group.pages, done, strict=True):
            if one.blob.codec != SAME_FILLED and takes_dictionary(one.blob.codec):
                self.dictionaries.observe(client, page)
        self._remember(self._memories[client], done)

    def _remember(self, memory: Memory, done: list[Encoded]) -> None:
        """The group's most frequent codec becomes, or stays, the client's."""
        lengths: dict[int, list[int]] = defaultdict(lambda: [0, 0, 0])
        for one in done:
            if one.blob.codec != SAME_FILLED:
                entry = lengths[one.blob.codec]
                entry[0] += 1
                entry[1] += len(one.blob.data)
                entry[2] += one.blob.raw_bytes
        if lengths:
            codec, (_, stored, raw) = max(lengths.items(), key=lambda item: item[1][0])
            memory.learn(codec, stored / raw)
        if 2 * sum(one.surprised for one in done) > len(done):
            memory.streak = 0

    # Decoding.

    def decode(self, blobs: Sequence[Blob], outs: Sequence[memoryview]) -> None:
        """Fill `outs`, each of its blob's raw_bytes. Raises CorruptPage whose key is the first bad blob's index."""
        begin_ns = time.monotonic_ns()
        jobs = zip(range(len(blobs)), blobs, outs, strict=True)
        alike = (list(group) for _, group in groupby(jobs, lambda job: job[1].codec))
        runs = [run for group in alike for run in _tasks(group, lambda job: len(job[2]), GROUP_BYTES)]
        times = self._parallel(self._decode_run, runs, lambda run: sum(len(job[2]) for job in run))
        for run, ns in zip(runs, times, strict=True):
            self.stats[run[0][1].codec].decoded(len(run), sum(len(job[2]) for job in run), ns)
        self._log("decompress", sum(map(len, outs)), begin_ns)

    def _decode_run(self, run: Sequence[Job]) -> int:
        """Blobs of one codec -> how long it took."""
        begin = self._timer()
        for index, blob, out in run:
            self._decode_one(index, blob, out)
        return self._timer() - begin

    def _decode_one(self, index: int, blob: Blob, out: memoryview) -> None:
        if len(out) != blob.raw_bytes:
            raise CorruptPage(index, f"{blob.raw_bytes} bytes for a page of {len(out)}")
        codec = CODECS.get(blob.codec)
        errors: tuple[type[Exception], ...] = (ValueError, KeyError, *(codec.errors if codec else ()))
        try:
            if codec is not None:
                codec.decode(blob.data, out, self.dictionaries.get(blob.dictionary))
            else:
                _decode_plain(blob, out)
        except errors as error:
            raise CorruptPage(index, f"codec {blob.codec}: {error}") from error
        if (found := checksum(out)) != blob.checksum:
            raise CorruptPage(index, f"checksum {found:016x}, expected {blob.checksum:016x}")

    # Workers.

    def _parallel(self, work: Callable[[T], R], items: Sequence[T], nr_bytes: Callable[[T], int]) -> Iterable[R]:
        """`map(work, items)`, on the workers where there is enough of it."""
        total = sum(map(nr_bytes, items))
        if self.workers == 1 or total < 2 * GROUP_BYTES or len(items) < 2:
            return [work(item) for item in items]
        if self._executor is None:
            self._executor = ThreadPoolExecutor(self.workers, thread_name_prefix="compress")
        limit = max(GROUP_BYTES, total // (self.workers * _TASKS_PER_WORKER))
        tasks = list(_tasks(items, nr_bytes, limit))
        done = self._executor.map(lambda task: [work(item) for item in task], tasks)
        return [result for results in list(done) for result in results]

    def _log(self, what: str, nr_bytes: int, begin_ns: int) -> None:
        if log.isEnabledFor(logging.INFO) and nr_bytes:
            us = max((time.monotonic_ns() - begin_ns) // 1000, 1)
            log.info("Performance %s: %d bytes in %d us, %.0f MB/s", what, nr_bytes, us, nr_bytes / us)


def _tasks(items: Sequence[T], nr_bytes: Callable[[T], int], limit: int) -> Iterator[Sequence[T]]:
    """Runs of items of `limit` bytes or a little more each."""
    begin = size = 0
    for index, item in enumerate(items):
        size += nr_bytes(item)
        if size >= limit:
            yield items[begin : index + 1]
            begin, size = index + 1, 0
    if begin < len(items):
        yield items[begin:]


def takes_dictionary(codec_id: int) -> bool:
    """Whether pages like this one might have profited from a dictionary."""
    return codec_id in CODECS and CODECS[codec_id].takes_dictionary


def _decode_plain(blob: Blob, out: memoryview) -> None:
    if blob.dictionary:
        raise ValueError("a dictionary for a page without a codec")
    if blob.codec == SAME_FILLED and len(blob.data) == _WORD_BYTES and len(out) % _WORD_BYTES == 0:
        out[:] = bytes(blob.data) * (len(out) // _WORD_BYTES)
    elif blob.codec == RAW and len(blob.data) == len(out):
        out[:] = blob.data
    else:
        raise ValueError(f"{len(blob.data)} bytes for a page of {len(out)}")
