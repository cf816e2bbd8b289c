# SPDX-License-Identifier: GPL-2.0-only
"""/sys/kernel/config/kernelsim/mm: emulated processes, made with mkdir and shaped with echo.

    mkdir web                       a process
    echo 1G > web/anon              maps and writes that much anonymous memory (replacing what was there)
    echo 1 > web/thp                its next anon uses 2 MiB pages where they are to be had
    echo 256M > web/file            the same with a file mapping
    echo '50 seed=7' > web/holes    gives a random half of its anonymous pages back; '50 runs' in runs
    echo worker > web/fork          forks a child; it appears as a directory of its own
    echo 10 > web/mlock             locks the first 10 percent of its anonymous memory
    echo 5 > web/pin                pins a random 5 percent of its anonymous pages, as long-term DMA does; such pages
                                    leave CMA areas first
    echo 20 > web/touch             writes a random 20 percent of its pages anew
    echo '50 kinds=4' > web/same    writes one of 4 contents, which are the same in all processes, to a random half of
                                    its anonymous pages
    echo 1 > web/mergeable          lets KSM merge its anonymous pages that are the same as others
    cat web/verify                  reads everything back: `ok`, or how many pages differ
    rmdir web                       ends it

Settings that need memory fail with ENOMEM and leave the process as it was. So does a signal that ends a write to `anon`
or `file` before all of the new memory is there; one that comes later finds the new memory whole. What is done to one
process is done one after the other: a second request waits, as for Linux's mmap_lock, and finds ESRCH once the process
has ended.
"""

import errno
import re
from collections.abc import Callable, Iterator
from functools import wraps
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from kernelsim.attr import Attr, Bool, ConfigGroup, Int, Kobject, Size, Text
from kernelsim.filemap import File
from kernelsim.mm_types import LongOp
from kernelsim.mmap import Mm, Vma
from kernelsim.operation import Mutex, Operation, complete
from kernelsim.page import PAGE_SIZE
from kernelsim.same_pages import MAX_KINDS, choose_kinds

if TYPE_CHECKING:
    from kernelsim.machine import Machine

P = ParamSpec("P")
R = TypeVar("R")

CHOICE_SLICE_PAGES = 1 << 18  # about three milliseconds of random numbers
_MAX_RUN = 63

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")


def parse_amount(
    text: str, *, flags: tuple[str, ...] = (), keys: tuple[str, ...] = ("seed",)
) -> tuple[int, dict[str, int], set[str]]:
    """`50 seed=7 runs` -> (50, {"seed": 7}, {"runs"}). Raises OSError(EINVAL)."""
    words = text.split()
    if not text.isascii() or not words or not words[0].isdecimal() or len(words[0]) > 18 or int(words[0]) > 100:
        raise OSError(errno.EINVAL, "want a percentage")
    options: dict[str, int] = {}
    found: set[str] = set()
    for word in words[1:]:
        key, equals, value = word.partition("=")
        if key in keys and equals and value.isdecimal() and len(value) < 19:
            options[key] = int(value)
        elif word in flags:
            found.add(word)
        else:
            raise OSError(errno.EINVAL, f"unknown option {word}")
    return int(words[0]), options, found


def choose(nr: int, percent: int, seed: int, in_runs: bool) -> NDArray[np.bool_]:
    """Mark about `percent` of `nr` pages: each at random, or in runs of 1 to 63 pages with gaps to match."""
    return np.concatenate([np.zeros(0, dtype=bool), *choose_slices(nr, percent, seed, in_runs)])


def choose_slices(nr: int, percent: int, seed: int, in_runs: bool) -> Iterator[NDArray[np.bool_]]:
    """The same, CHOICE_SLICE_PAGES at a time."""
    rng = np.random.default_rng(seed)
    if in_runs and percent not in (0, 100):
        yield from _choose_runs(nr, percent, rng)
        return
    for first in range(0, nr, CHOICE_SLICE_PAGES):
        yield rng.random(min(CHOICE_SLICE_PAGES, nr - first)) * 100 < percent


def _choose_runs(nr: int, percent: int, rng: np.random.Generator) -> Iterator[NDArray[np.bool_]]:
    chosen = np.zeros(CHOICE_SLICE_PAGES + _MAX_RUN, dtype=bool)
    base = at = 0
    while base < nr:
        while at < min(nr, base + CHOICE_SLICE_PAGES):
            run = int(rng.integers(1, _MAX_RUN + 1))
            chosen[at - base : at - base + run] = True
            gap = run * (100 - percent) / percent
            at += run + max(int(rng.uniform(0.5, 1.5) * gap), 1)
        yield chosen[: min(CHOICE_SLICE_PAGES, nr - base)].copy()
        chosen[:_MAX_RUN] = chosen[CHOICE_SLICE_PAGES:]
        chosen[_MAX_RUN:] = False
        base += CHOICE_SLICE_PAGES


def chosen_vpns(vma: Vma, percent: int, seed: int, in_runs: bool = False) -> Iterator[NDArray[np.int64]]:
    """Virtual pages of a mapping, chosen as by `choose`, slice by slice."""
    start = vma.start
    for chosen in choose_slices(vma.nr_pages, percent, seed, in_runs):
        yield start + np.flatnonzero(chosen)
        start += len(chosen)


def exclusive(
    hook: Callable[Concatenate["Process", P], Operation[R]],
) -> Callable[Concatenate["Process", P], Operation[R]]:
    """Make an operation on a process wait for the one before; OSError(ESRCH) if the process is exiting."""

    @wraps(hook)
    def locked(process: "Process", /, *args: P.args, **kwargs: P.kwargs) -> Operation[R]:
        yield from process.mmap_lock.acquire()
        try:
            if process.exiting:
                raise OSError(errno.ESRCH, "the process is exiting")
            return (yield from hook(process, *args, **kwargs))
        finally:
            process.mmap_lock.release()

    return locked


class Process(Kobject):
    """One emulated process."""

    pid = Attr(Text(), doc="Process id.")
    node = Attr(Int(0, 1023), 0, doc="Home node: where its memory comes from first. Set it before the memory.")
    thp = Attr(Bool(), 0, doc="1: its next anonymous memory uses transparent huge pages, as with MADV_HUGEPAGE.")
    anon = Attr(Size(), doc="Bytes of anonymous memory: mapped and written; replaces what was there.")
    file = Attr(Size(), doc="Bytes of a shared file mapping: mapped and written; replaces what was there.")
    holes = Attr(Text(), doc="`PERCENT [seed=N] [runs]`: give that part of the anonymous pages back.")
    fork = Attr(Text(), doc="Name of a child to fork.", mode=0o200)
    mlock = Attr(Text(), doc="PERCENT of anonymous memory that is locked, from its start.")
    pin = Attr(Text(), doc="`PERCENT [seed=N]` of its anonymous pages to pin for DMA; 0 drops all pins.")
    touch = Attr(Text(), doc="`PERCENT [seed=N]` of its pages to write anew.", mode=0o200)
    same = Attr(
        Text(),
        doc="`PERCENT [seed=N] [kinds=N]`: write that part of the anonymous pages, each one of `kinds` (1) contents "
        "that are the same in all processes.",
        mode=0o200,
    )
    mergeable = Attr(Bool(), 0, doc="1: KSM may merge its anonymous memory (MADV_MERGEABLE); 0: no more.")
    verify = Attr(
        Text(),
        doc="Reads back everything the process wrote: `ok`, or how many pages differ. Where no contents are kept "
        "(memory.bytes = none): whether just the pages it wrote are mapped.",
    )
    rss = Attr(Text(), doc="Resident bytes.")

    def __init__(self, machine: "Machine", name: str, mm: Mm) -> None:
        self.machine = machine
        self.name = name
        self.mm = mm
        mm.comm = name
        self.node = mm.node
        self.mmap_lock = Mutex(mm.vm.wait_queue())
        self.exiting = False
        """Nobody but `end` may touch it any more: an exit that was interrupted has taken down a part of it."""
        self.ended = False
        self.pid_nr = machine.tasks.take_pid()
        self.files: list[File] = []
        self._holes = "0"
        self._pinned = "0"

    @pid.show
    def _show_pid(self) -> str:
        return str(self.pid_nr)

    def is_busy(self) -> bool:
        """Somebody works on its memory, or waits to."""
        return self.mmap_lock.locked

    @property
    def anon_vmas(self) -> list[Vma]:
        return [vma for vma in self.mm.vma if vma.file is None]

    @property
    def file_vmas(self) -> list[Vma]:
        return [vma for vma in self.mm.vma if vma.file is not None]

    @thp.stored
    def _madvise_hugepage(self, _old: int, new: int) -> None:
        if new and not self.machine.config.kconfig.IS_ENABLED("CONFIG_TRANSPARENT_HUGEPAGE"):
            raise OSError(errno.EINVAL, "no transparent huge pages in this kernel")

    @node.stored
    def _move_home(self, _old: int, new: int) -> None:
        if new >= self.machine.mem.nr_nodes:
            raise OSError(errno.EINVAL, "no such node")
        self.mm.node = new

    @anon.show
    def _anon_bytes(self) -> int:
        return sum(vma.nr_pages for vma in self.anon_vmas) * PAGE_SIZE

    @anon.store
    @exclusive
    def _set_anon(self, size: int) -> LongOp:
        old = self.anon_vmas
        yield from self._fill(size, None)
        self._holes = "0"
        yield from self._unmap(old)

    @file.show
    def _file_bytes(self) -> int:
        return sum(vma.nr_pages for vma in self.file_vmas) * PAGE_SIZE

    @file.store
    @exclusive
    def _set_file(self, size: int) -> LongOp:
        nr_pages, old = self._pages(size), self.file_vmas
        file = File(self.machine.vm, nr_pages) if nr_pages else None
        if file:
            self.machine.share(file)
            self.files.append(file)
        try:
            yield from self._fill(size, file)
        except OSError:
            yield from self._drop_unmapped_files()
            raise
        yield from self._unmap(old)
        yield from self._drop_unmapped_files()

    def _pages(self, size: int) -> int:
        nr_pages = -(-size // PAGE_SIZE)
        if nr_pages > self.machine.mem.nr_pages:
            raise OSError(errno.ENOMEM, "more than the machine has")
        return nr_pages

    def _fill(self, size: int, file: File | None) -> LongOp:
        """Map and fill new memory, before the old goes; running out of memory, or a signal, changes nothing."""
        nr_pages = self._pages(size)
        if not nr_pages:
            return
        vma = self.mm.mmap(nr_pages, file)
        if file is None:
            yield from self._madvise(vma)
        try:
            yield from self.mm.write(vma)
        except OSError:
            yield from self._unmap([vma])
            raise
        except GeneratorExit:
            self.mm.munmap_now(vma)
            raise

    def _madvise(self, vma: Vma) -> LongOp:
        """What its switches ask for its new memory."""
        if self.thp:
            vma.madvise_hugepage()
        if self.mergeable and self.mm.vm.ksm is not None:
            yield from self.mm.vm.ksm.madvise(vma, True)

    def _unmap(self, vmas: list[Vma]) -> LongOp:
        """Take mappings down, to the end even when interrupted."""
        try:
            for vma in vmas:
                yield from self.mm.munmap(vma)
        finally:
            for vma in vmas:
                if vma in self.mm.vma:
                    self.mm.munmap_now(vma)

    def _drop_unmapped_files(self) -> LongOp:
        """With their cached pages. What an interrupted request left is dropped by the next, or at the end."""
        mapped = {id(vma.file) for vma in self.mm.vma}
        for file in [file for file in self.files if id(file) not in mapped]:
            if self.machine.nr_sharers(file) == 1:
                yield from file.evict()
            self.machine.unshare(file)
            self.files.remove(file)

    @holes.show
    def _show_holes(self) -> str:
        return self._holes

    @holes.store
    @exclusive
    def _punch(self, text: str) -> LongOp:
        percent, options, flags = parse_amount(text, flags=("runs",))
        for number, vma in enumerate(self.anon_vmas):
            for vpns in chosen_vpns(vma, percent, options.get("seed", 0) + number, "runs" in flags):
                yield from self.mm.madvise_dontneed(vma, vpns)
                yield None
        self._holes = " ".join(text.split())

    @fork.store
    @exclusive
    def _fork(self, text: str) -> LongOp:
        yield from self.machine.fork_process(self, text.strip())

    @mlock.show
    def _mlocked(self) -> str:
        total = sum(vma.nr_pages for vma in self.anon_vmas)
        locked = sum(vma.nr_pages for vma in self.anon_vmas if vma.locked)
        return str(round(100 * locked / total) if total else 0)

    @mlock.store
    @exclusive
    def _mlock(self, text: str) -> LongOp:
        percent, _, _ = parse_amount(text)
        vmas = sorted(self.anon_vmas, key=lambda vma: vma.start)
        left = sum(vma.nr_pages for vma in vmas) * percent // 100
        for vma in vmas:
            if 0 < left < vma.nr_pages:
                yield from self.machine.vm.wait_in_flight()
                upper = self.mm.split(vma, vma.start + left)
                yield from self.mm.mlock(upper, False)
            yield from self.mm.mlock(vma, left > 0)
            left -= min(left, vma.nr_pages)

    @pin.show
    def _show_pinned(self) -> str:
        return self._pinned

    @pin.store
    @exclusive
    def _pin(self, text: str) -> LongOp:
        percent, options, _ = parse_amount(text)
        self._pinned = "0"
        yield from self.mm.unpin()
        try:
            for number, vma in enumerate(self.anon_vmas if percent else ()):
                for vpns in chosen_vpns(vma, percent, options.get("seed", 0) + number):
                    yield from self.mm.pin(vma, vpns)
                    yield None
        except BaseException:  # all or nothing, whatever ends it
            complete(self.mm.unpin())
            raise
        self._pinned = " ".join(text.split())

    @touch.store
    @exclusive
    def _touch(self, text: str) -> LongOp:
        percent, options, _ = parse_amount(text)
        for number, vma in enumerate(list(self.mm.vma)):
            for vpns in chosen_vpns(vma, percent, options.get("seed", 0) + number):
                yield from self.mm.write(vma, vpns)
                yield None

    @same.store
    @exclusive
    def _same(self, text: str) -> LongOp:
        percent, options, _ = parse_amount(text, keys=("seed", "kinds"))
        kinds = options.get("kinds", 1)
        if not 1 <= kinds <= MAX_KINDS:
            raise OSError(errno.EINVAL, f"want 1 to {MAX_KINDS} kinds")
        rng = np.random.default_rng(options.get("seed", 0))
        for number, vma in enumerate(self.anon_vmas):
            for vpns in chosen_vpns(vma, percent, options.get("seed", 0) + number):
                yield from self.mm.write_same(vma, vpns, choose_kinds(len(vpns), kinds, rng))
                yield None

    @mergeable.stored
    @exclusive
    def _set_mergeable(self, _old: int, new: int) -> LongOp:
        ksm = self.mm.vm.ksm
        if ksm is None:
            if new:
                raise OSError(errno.EINVAL, "no KSM in this kernel")
            return
        for vma in self.anon_vmas:
            yield from ksm.madvise(vma, bool(new))

    @verify.show
    @exclusive
    def _verify(self) -> Operation[Any]:
        bad = 0
        for vma in list(self.mm.vma):
            bad += yield from self.mm.count_wrong(vma)
        return "ok" if bad == 0 else str(bad)

    @rss.show
    def _rss(self) -> str:
        return str(self.mm.rss_pages * PAGE_SIZE)

    def end(self) -> LongOp:
        """Exit: everything the process had is freed. To be called again if interrupted. OSError(ESRCH) if it has."""
        yield from self.mmap_lock.acquire()
        try:
            if self.ended:
                raise OSError(errno.ESRCH, "the process has ended")
            self.exiting = True
            yield from self.mm.exit()
            if self.pid_nr in self.machine.tasks.by_pid:
                self.machine.tasks.release_task(self.pid_nr)
            yield from self._drop_unmapped_files()
            self.ended = True
        finally:
            self.mmap_lock.release()


class MmGroup(ConfigGroup):
    """The directory of all emulated processes that users made."""

    def __init__(self, machine: "Machine") -> None:
        self.machine = machine

    def make_item(self, name: str) -> Operation[Kobject]:
        check_name(name)
        return self.machine.start_process(name)

    def drop_item(self, name: str, kobj: Kobject) -> LongOp:
        assert isinstance(kobj, Process)
        yield from self.machine.end_process(kobj)


def check_name(name: str) -> None:
    if not _NAME.fullmatch(name):
        raise OSError(errno.EINVAL, "bad name")
