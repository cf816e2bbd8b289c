# SPDX-License-Identifier: MIT
"""Pages to blobs and back: the compression system.

Theory of operation
    A batch of pages is cut into groups of GROUP_BYTES of neighbours of one size, the groups into tasks for the worker
    threads. Codecs, and what looks at samples, let go of the interpreter's lock while they run, but a hand-over costs
    as much as compressing some KiB. So a task is never less than GROUP_BYTES, and what is done to its groups is done to
    all of them at once. There are several tasks for each worker, the last ones the smallest, since some data take ten
    times as long as others. A page that one word fills becomes that word; a page that does not get shorter stays as it
    is; all others are what the codec made of them. Each blob has a checksum of the raw bytes.

Invariants
    - The blobs of a batch depend on the pages, the client and what was encoded before, not on the number of workers or
      on their order: what is learnt (`Memory`, `Regret`, dictionaries) is learnt after a batch is joined.
    - `decode` gives the bytes that were encoded, or raises CorruptPage.
    - Only the thread that owns the system calls it; its workers see bytes and frozen state.

Times in `stats` are CPU times of the worker threads, from a timer that can be replaced. They decide nothing.
"""

import dataclasses
import logging
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain, groupby, pairwise
from typing import TypeAlias, TypeVar

from dpud.gpu.blob import SAME_FILLED, Blob
from dpud.gpu.compression import lz as lz
from dpud.gpu.compression import planes as planes
from dpud.gpu.compression.chooser import GROUP_BYTES, Group, Memory, Regret
from dpud.gpu.compression.codec import CODECS, Quality, names
from dpud.gpu.compression.dictionary import MAX_PAGE_BYTES, Dictionaries
from dpud.gpu.compression.encoder import Encoded, Rules, decode_blob, encode_groups
from dpud.gpu.compression.stats import CodecStats
from dpud.gpu.compression.workers import Workers
from dpud.gpu.errors import CorruptPage

ADAPTIVE = "adaptive"
REGRET_EVERY = 64
MAX_TASK_BYTES = 1 << 20
_HEAP_BYTES = 16 << 20

log = logging.getLogger("dpud.gpu.compression")
Job: TypeAlias = tuple[int, Blob, memoryview]
"""Index in the batch, what to decode and where to."""
T = TypeVar("T")
R = TypeVar("R")


def algorithms() -> tuple[str, ...]:
    """What `algorithm` may be."""
    return (*(codec.name for codec in CODECS.values() if codec.selectable), ADAPTIVE)


QUALITIES = {quality.name.lower(): quality for quality in Quality}


class CompressionSystem:
    """`algorithm`: a codec's name or `adaptive`; `quality`: fast, balanced, best. Both may be changed at any time."""

    def __init__(
        self,
        algorithm: str = ADAPTIVE,
        quality: str = "balanced",
        workers: int = 2,
        *,
        dictionaries: Dictionaries | None = None,
        regret_every: int = REGRET_EVERY,
        timer: Callable[[], int] = time.thread_time_ns,
    ) -> None:
        self.algorithm = algorithm
        self.quality = quality
        self.regret_every = regret_every
        self.regret = Regret()
        self.stats: dict[int, CodecStats] = defaultdict(CodecStats)
        self.dictionaries = Dictionaries() if dictionaries is None else dictionaries
        self._timer = timer
        self._memories: dict[str, Memory] = defaultdict(Memory)
        self._nr_groups: Counter[str] = Counter()
        self._nr_pages = 0
        self.nr_corrupt = 0
        """Pages found corrupt, each time they were."""
        self._workers = Workers(workers)
        _keep_freed_memory()

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
        if name not in QUALITIES:
            raise ValueError(f"no quality {name!r}: there are {', '.join(QUALITIES)}")
        self._quality = QUALITIES[name]

    @property
    def workers(self) -> int:
        """Threads that encode and decode, the caller's included."""
        return self._workers.nr

    @workers.setter
    def workers(self, nr: int) -> None:
        self._workers.close()
        self._workers = Workers(nr)

    def close(self) -> None:
        """End the threads; they come back when they are needed."""
        self._workers.close()

    # Encoding.

    def encode(self, pages: Sequence[memoryview], client: str = "", *, copy: bool = True) -> list[Blob]:
        """One blob for each page, in order. `client` is whose they are: what is learnt is kept apart by it.

        Without `copy`, the blob of an incompressible page is a view of the page, and others' may be views of what was
        made together with them, up to MAX_TASK_BYTES: for who stores them at once.
        """
        begin_ns = time.monotonic_ns()
        rules = Rules(self._fixed, self._quality, copy, self.regret_every, self._timer)
        groups = list(self._groups(pages, client))
        sizes = [sum(map(len, group.pages)) for group in groups]
        done = self._parallel(lambda task: encode_groups(task, rules), groups, sizes)
        for group, encoded in zip(groups, done, strict=True):
            self._learn(client, group, encoded)
        self._log("compress", sum(sizes), begin_ns)
        return list(chain.from_iterable(encoded.blobs for encoded in done))

    def _groups(self, pages: Sequence[memoryview], client: str) -> Iterator[Group]:
        known = self._memories[client]
        memory = dataclasses.replace(known)
        for chunk in self._chunks(pages):
            dictionary = self.dictionaries.current(client, len(chunk[0]))
            yield Group(chunk, self._nr_groups[client], self._nr_pages, memory, dictionary)
            self._nr_groups[client] += 1
            self._nr_pages += len(chunk)

    def _chunks(self, pages: Sequence[memoryview]) -> Iterator[Sequence[memoryview]]:
        """Neighbours of one size: GROUP_BYTES of them to choose for, but as much as a task where nothing is chosen."""
        begin = 0
        for size, run in groupby(map(len, pages)):
            end = begin + sum(1 for _ in run)
            while begin < end:
                most = GROUP_BYTES if self._fixed is None else self._task_bytes((end - begin) * size)
                nr = max(most // max(size, 1), 1)
                yield pages[begin : min(begin + nr, end)]
                begin = min(begin + nr, end)

    def _task_bytes(self, left: int) -> int:
        """Of the next task, where so many bytes are left.

        The first ones are long, and the last ones, for which somebody waits, short: then nothing is lost where some
        data take ten times as long as others.
        """
        return max(GROUP_BYTES, min(MAX_TASK_BYTES, left // self.workers))

    def _learn(self, client: str, group: Group, done: Encoded) -> None:
        for codec, nr_pages, raw, stored in done.counts:
            self.stats[codec].encoded(nr_pages, raw, stored, done.ns * nr_pages // len(done.blobs))
        for chosen, best in done.regrets:
            self.regret.add(chosen, best)
        if len(group.pages[0]) <= MAX_PAGE_BYTES:
            for page, blob in zip(group.pages, done.blobs, strict=True):
                if blob.codec in CODECS and CODECS[blob.codec].takes_dictionary:
                    self.dictionaries.observe(client, page)
        if self._fixed is None:
            _remember(self._memories[client], done)

    # Decoding.

    def decode(self, blobs: Sequence[Blob], outs: Sequence[memoryview]) -> None:
        """Fill `outs`, each of its blob's raw_bytes. Raises CorruptPage whose key is the first bad blob's index."""
        begin_ns = time.monotonic_ns()
        jobs = zip(range(len(blobs)), blobs, outs, strict=True)
        alike = (list(group) for _, group in groupby(jobs, lambda job: job[1].codec))
        runs = [run for group in alike for run in _cut(group, [len(job[2]) for job in group], lambda _: GROUP_BYTES)]
        sizes = [sum(len(job[2]) for job in run) for run in runs]
        try:
            times = self._parallel(lambda task: list(map(self._decode_run, task)), runs, sizes)
        except CorruptPage as error:
            self.nr_corrupt += 1
            log.error("corrupt page: %s", error.strerror)
            raise
        for run, size, ns in zip(runs, sizes, times, strict=True):
            self.stats[run[0][1].codec].decoded(len(run), size, ns)
        self._log("decompress", sum(sizes), begin_ns)

    def _decode_run(self, run: Sequence[Job]) -> int:
        """Blobs of one codec -> how long it took."""
        begin = self._timer()
        for index, blob, out in run:
            decode_blob(index, blob, out, self.dictionaries.get)
        return self._timer() - begin

    # Workers.

    def _parallel(self, work: Callable[[Sequence[T]], list[R]], items: Sequence[T], sizes: Sequence[int]) -> list[R]:
        """`work(items)`, cut into tasks, on the workers where there is enough of it."""
        total = sum(sizes)
        tasks = _cut(items, sizes, self._task_bytes)
        is_little = self.workers == 1 or total < 2 * GROUP_BYTES or len(items) < 2
        done = map(work, tasks) if is_little else self._workers.map(work, tasks)
        return list(chain.from_iterable(done))

    def _log(self, what: str, nr_bytes: int, begin_ns: int) -> None:
        if log.isEnabledFor(logging.INFO) and nr_bytes:
            us = max((time.monotonic_ns() - begin_ns) // 1000, 1)
            log.info("Performance %s: %d bytes in %d us, %.0f MB/s", what, nr_bytes, us, nr_bytes / us)


def _cut(items: Sequence[T], sizes: Sequence[int], least: Callable[[int], int]) -> list[Sequence[T]]:
    """Runs of items that are `least(bytes that are left)` or a little more; the last one may be less."""
    cuts, size, left = [0], 0, sum(sizes)
    for index, more in enumerate(sizes):
        size += more
        if size >= least(left):
            cuts.append(index + 1)
            left, size = left - size, 0
    if cuts[-1] < len(items):
        cuts.append(len(items))
    return [items[begin:end] for begin, end in pairwise(cuts)]


def _remember(memory: Memory, done: Encoded) -> None:
    """The group's most frequent codec becomes, or stays, the client's."""
    coded = [count for count in done.counts if count[0] != SAME_FILLED]
    if coded:
        codec, _, raw, stored = max(coded, key=lambda count: (count[1], count[0]))
        memory.learn(codec, stored / raw, done.widths)
    if 2 * done.nr_surprised > len(done.blobs):
        memory.streak = 0


@cache
def _keep_freed_memory() -> None:
    """Encoded pages come and go in batches, and glibc would give them back to the host and fault them in each time.

    It keeps twice as much as the largest block that was ever freed, so free a large one: mallopt(3), M_MMAP_THRESHOLD.
    Once in a process: what it keeps by then, a second one would only fill with zeros.
    """
    bytes(_HEAP_BYTES)
