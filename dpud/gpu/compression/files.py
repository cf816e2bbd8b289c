# SPDX-License-Identifier: MIT
"""The compression module's files.
 Where zram has a file for it, the name and the format are zram's (Documentation/admin-guide/blockdev/zram.rst):
`mm_stat` with its nine columns, and one value a file under the names zram gave them before. Sizes are in bytes.
 One thing differs: zram's `comp_algorithm` cannot change while pages are stored, because nothing says which one a page
was stored with. Here each page carries its codec, so `algorithm` and `quality` may be changed at any time. Pages keep
the codec they have.
"""

import errno

from dpud.gpu.attrs import value
from dpud.gpu.compression.codec import name_of
from dpud.gpu.compression.dictionary import Dictionaries
from dpud.gpu.compression.pool import CompressedPool
from dpud.gpu.compression.system import QUALITIES, CompressionSystem, algorithms
from dpud.gpu.errors import GpuError
from kernelsim.attr import Attr, Bool, Choice, Int, Kobject, Operation, Size, Text, Trigger

MAX_WORKERS = 64
_CODECS_HEAD = ("codec", "pages", "raw_bytes", "stored_bytes", "ratio", "in_MBps", "out_MBps")


class Algorithms(Choice):
    """The codecs that can be selected, as they are registered now, and `adaptive`."""

    def __init__(self) -> None:
        super().__init__(*algorithms())

    def check(self, value: str) -> None:
        self.names = algorithms()
        super().check(value)

    def format(self, value: str) -> str:
        self.names = algorithms()
        return super().format(value)


class CompressionFiles(Kobject):
    """The directory `compression`."""

    system: CompressionSystem
    pool: CompressedPool

    algorithm = Attr(Algorithms(), doc="Codec of pages to come; adaptive chooses one for each page.")
    quality = Attr(Choice(*QUALITIES), doc="How much time a page may take.")
    workers = Attr(Int(1, MAX_WORKERS), doc="Threads that encode and decode.")
    max_pool_bytes = Attr(Size(), doc="Limit of mem_used_total; 0 for none. Lowering it drops nothing.")
    mm_stat = Attr(Text(), doc="The nine columns of zram's mm_stat.")
    codecs = Attr(Text(), doc="What each codec has done: pages, bytes, ratio and MB/s of one thread.")
    regret_stat = Attr(Text(), doc="Pages that were tried with every codec, bytes as chosen, bytes at best.")
    compact = Attr(Trigger(), doc="Write anything: move pages together and give the host its memory back.")
    recompress = Attr(Size(), doc="Write a size: give that much of the coldest pages to a stronger codec.")
    dictionary = Attr(Text(), doc="zstd dictionaries by client; write a client's name to train one now.")
    dictionary_enabled = Attr(Bool(), doc="Whether small pages are sampled, and encoded with dictionaries.")
    mem_used_max = Attr(Int(0, 0), doc="Highest mem_used_total; write 0 to begin anew.")

    orig_data_size = value("Raw bytes of the pages in the pool.", lambda files: files.pool.stored_bytes)
    compr_data_size = value("Their encoded bytes.", lambda files: files.pool.encoded_bytes)
    mem_used_total = value("Memory the pool takes, metadata included.", lambda files: files.pool.used_bytes)
    metadata_bytes = value("What of that is metadata and dictionaries.", lambda files: files.pool.metadata_bytes)
    dead_bytes = value("What of that compacting would win.", lambda files: files.pool.dead_bytes)
    nr_pages = value("Pages in the pool.", lambda files: len(files.pool))
    same_pages = value("Pages that one word fills.", lambda files: files.pool.nr_same)
    huge_pages = value("Pages kept raw, as incompressible.", lambda files: files.pool.nr_huge)
    huge_pages_since = value("The same, ever.", lambda files: files.pool.nr_huge_ever)
    pages_compacted = value("Host pages freed by moving pages together, ever.", lambda files: files.pool.nr_compacted)
    recompressed_pages = value("Pages that a stronger codec made shorter, ever.", lambda f: f.pool.nr_recompressed)
    recompressed_bytes = value("By how much, ever.", lambda files: files.pool.recompressed_bytes)
    corrupt_pages = value("Pages that failed their checksum, ever.", lambda files: files.system.nr_corrupt)
    regret = value(
        "Percent that chosen encodings are longer than the best.",
        lambda files: f"{files.system.regret.percent:.3f}",
    )

    def __init__(self, system: CompressionSystem, pool: CompressedPool) -> None:
        self.system = system
        self.pool = pool

    @algorithm.show
    def _algorithm_show(self) -> str:
        return self.system.algorithm

    @algorithm.store
    def _algorithm_store(self, name: str) -> None:
        self.system.algorithm = name

    @quality.show
    def _quality_show(self) -> str:
        return self.system.quality

    @quality.store
    def _quality_store(self, name: str) -> None:
        self.system.quality = name

    @workers.show
    def _workers_show(self) -> int:
        return self.system.workers

    @workers.store
    def _workers_store(self, nr: int) -> None:
        self.system.workers = nr

    @max_pool_bytes.show
    def _limit_show(self) -> int:
        return self.pool.limit_bytes

    @max_pool_bytes.store
    def _limit_store(self, nr_bytes: int) -> None:
        self.pool.limit_bytes = nr_bytes

    @mem_used_max.show
    def _used_max_show(self) -> int:
        return self.pool.max_used_bytes

    @mem_used_max.store
    def _used_max_store(self, _zero: int) -> None:
        self.pool.max_used_bytes = self.pool.used_bytes

    @mm_stat.show
    def _mm_stat_show(self) -> str:
        pool = self.pool
        used, most = pool.used_bytes, pool.max_used_bytes
        sizes = f"{pool.stored_bytes:8} {pool.encoded_bytes:8} {used:8} {pool.limit_bytes:8} {most:8}"
        return f"{sizes} {pool.nr_same:8} {pool.nr_compacted:8} {pool.nr_huge:8} {pool.nr_huge_ever:8}\n"

    @codecs.show
    def _codecs_show(self) -> str:
        rows = [_CODECS_HEAD]
        for codec, stats in sorted(self.system.stats.items()):
            speeds = f"{stats.encode_mbps:.0f}", f"{stats.decode_mbps:.0f}"
            sizes = str(stats.pages), str(stats.raw_bytes), str(stats.stored_bytes)
            rows.append((name_of(codec), *sizes, f"{stats.ratio:.2f}", *speeds))
        return "".join(f"{row[0]:<13}" + " ".join(f"{cell:>12}" for cell in row[1:]) + "\n" for row in rows)

    @regret_stat.show
    def _regret_show(self) -> str:
        regret = self.system.regret
        return f"{regret.pages} {regret.chosen_bytes} {regret.best_bytes}\n"

    @compact.store
    def _compact(self, _text: str) -> Operation[None]:
        yield from self.pool.compacting()

    @recompress.store
    def _recompress(self, budget_bytes: int) -> Operation[None]:
        yield from self.pool.recompressing(budget_bytes)

    @dictionary.show
    def _dictionary_show(self) -> str:
        rows = [f"{'client':<16} {'number':>8} {'bytes':>8} {'gain':>6}\n"]
        rows += [f"{one.client:<16} {one.number:>8} {len(one.data):>8} {one.gain:>6.3f}\n" for one in self.dictionaries]
        return "".join(rows)

    @dictionary.store
    def _dictionary_store(self, client: str) -> None:
        """ENOENT for a client that stored nothing, EAGAIN while there are too few samples or they share too little."""
        try:
            trained = self.dictionaries.train(client)
        except KeyError:
            raise GpuError(errno.ENOENT, f"no client {client!r} has stored small pages") from None
        except ValueError as error:
            raise GpuError(errno.EAGAIN, str(error)) from None
        if trained is None:
            raise GpuError(errno.EAGAIN, f"a dictionary would not help {client!r}")

    @dictionary_enabled.show
    def _enabled_show(self) -> int:
        return int(self.dictionaries.enabled)

    @dictionary_enabled.store
    def _enabled_store(self, on: int) -> None:
        self.dictionaries.enabled = bool(on)

    @property
    def dictionaries(self) -> Dictionaries:
        return self.system.dictionaries
