# SPDX-License-Identifier: GPL-2.0-only
"""A checkpoint: the whole machine between two turns, as a file, and a machine that comes up from one.

Theory of operation
    What the machine comes to from here on follows from its objects, from the bytes that they own, from a handful of
    numbers that are in none (the last readings of the clock, the number of the next operation, the key of tracepoints
    in compiled code), and from where operations wait that run in the background. The first is the graph
    (checkpoint_graph.py), the second follows it apart, the others are in the head.

    Operations are generators, which cannot be written down. At rest (flights.py) each waits at the one yield of its own
    loop. So the next start begins each anew and takes it there, before anything is put back; the head says where they
    stood, and a machine whose operations stand elsewhere is refused.

    Files of swap tiers are part of the state, and so are clients' checkpoints in the folder that comes with the state
    directory. Others belong to the host: where `gpu.checkpoint_folder` is set, its files are left as they are.
"""

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from dpud import checkpoint_file
from dpud.checkpoint_born import Born
from dpud.checkpoint_file import BULK, FILE, GRAPH, Head, Unusable, Writer
from dpud.checkpoint_graph import Section, dump, load
from dpud.checkpoint_memory import PIECE_BYTES, address_of, clear, pieces, raw
from dpud.dpu.driver import DpuDriver
from dpud.flights import position
from dpud.gpu.memory import GpuMemory
from dpud.gpu.swap.blockfile import BLOCK_BYTES, BlockFile
from dpud.inject import NotedClock
from dpud.owner import Owner
from fs.performer import Performer
from kernelsim import trace_key
from kernelsim.machine import Machine

Beside = list[tuple[str, int]]
"""Files that are written with it: name, and a descriptor."""


@dataclass
class Whole:
    """All that a machine consists of. To be made at the end of its boot."""

    machine: Machine
    owner: Owner
    performer: Performer
    driver: DpuDriver
    gpu: GpuMemory | None
    clock: NotedClock

    def __post_init__(self) -> None:
        operations = [operation for _, (operation, _) in sorted((self.owner.parked or {}).items())]
        self.born = Born([*self._roots, operations])
        self.owner.flights.last()

    @property
    def _roots(self) -> list[Any]:
        return [self.machine, self.driver, self.gpu, self.performer, self.owner.after_slice]

    def in_the_way(self) -> str | None:
        """What keeps it from being written down just now."""
        flight = self.owner.flights.in_the_way()
        if flight is not None:
            return str(flight)
        return None if all(rank.worker.idle for rank in self.driver.pool.ranks) else "a DPU rank is at work"

    # Writing.

    def head(self, number: int, version: str, config: dict[str, Any], folder: str) -> Head:
        """For whoever holds the machine at rest."""
        self.machine.tracing.trace.drain()
        lasting = [(nr, [list(at) for at in where]) for nr, where in sorted(self.owner.flights.lasting().items())]
        return Head(
            checkpoint_file.FORMAT,
            number,
            version,
            config,
            self.born.fingerprint,
            self.owner.nr_operations,
            *self.clock.readings(),
            trace_key.key(),
            folder,
            lasting,
        )

    def block_files(self) -> list[BlockFile]:
        return [obj for obj in self.born.objects if isinstance(obj, BlockFile)]

    def write(self, writer: Writer, head: Head, beside: Beside) -> list[int]:
        """All but the end -> the section of each of `block_files`, -1 for none. Raises OSError, PicklingError."""
        writer.head(head)
        sections = dump(self.born, self._roots, writer)
        writer.end_graph()
        for number, section in enumerate(sections):
            for offset, data in _bytes_of(section):
                writer.bulk(number, offset, data)
        for name, fd in beside:
            for offset, data in _pieces_of_file(fd):
                writer.file(name, offset, data)
        of_files = {id(section.target): number for number, section in enumerate(sections)}
        return [of_files.get(id(file), -1) for file in self.block_files()]

    # Coming up.

    def come_up(self, path: Path, head: Head, folder: Path) -> None:
        """Be the machine of a file that was checked. Raises Unusable, and then this one is none any more.

        `folder`: where the files beside belong now, for the directory may have been moved.
        """
        if self.born.fingerprint != head.fingerprint:
            raise Unusable(f"it is of a machine that was built of other objects ({head.fingerprint})")
        self._begin_lasting(head)
        try:
            self._put(path, folder, partial(_moved, Path(head.folder), folder))
        except (OSError, MemoryError, Unusable):
            raise
        except Exception as error:  # a graph of another program may fail in any way
            raise Unusable(f"its objects do not fit: {type(error).__name__}: {error}") from error
        self.owner.nr_operations = head.nr_operations
        self.clock.put((head.now_ns, head.wall_ns))
        trace_key.set_key(head.trace_key)

    def _begin_lasting(self, head: Head) -> None:
        """Take what runs in the background to where it waits."""
        parked, flights = self.owner.parked, self.owner.flights
        assert parked is not None
        lasting = dict(head.lasting)
        for number in list(parked):
            operation, _ = parked[number]
            if number not in lasting:  # it had failed, and ended
                del parked[number]
                flights.end(number)
                continue
            flights.went_on(number, next(operation, None))
            if [list(at) for at in position(operation)] != lasting[number]:
                raise Unusable(f"operation {number} waits elsewhere now")

    def _put(self, path: Path, folder: Path, moved: Callable[[Path], Path]) -> None:
        graph, sections = BytesIO(), None
        for piece in checkpoint_file.pieces_of(path):
            if piece.tag == GRAPH:
                graph.write(piece.data)
                continue
            if sections is None:
                sections = self._put_graph(graph, moved)
            if piece.tag == BULK:
                _put_bytes(sections[piece.section], piece.offset, piece.data)
            elif piece.tag == FILE:
                _put_file(folder / piece.name, piece.offset, piece.data)
        if sections is None:
            self._put_graph(graph, moved)

    def _put_graph(self, graph: BytesIO, moved: Callable[[Path], Path]) -> list[Section]:
        graph.seek(0)
        _, sections = load(self.born, graph, moved)
        for section in sections:
            _clear(section)
        return sections


def _moved(before: Path, folder: Path, path: Path) -> Path:
    """Where a path leads, now that `before` is `folder`."""
    return folder / path.relative_to(before) if path.is_relative_to(before) else path


def _bytes_of(section: Section) -> Iterator[tuple[int, bytes]]:
    target = section.target
    if isinstance(target, BlockFile):
        return _pieces_of_blocks(target)
    return pieces(address_of(target), section.nr_bytes)


def _put_bytes(section: Section, offset: int, data: bytes) -> None:
    target = section.target
    if isinstance(target, BlockFile):
        view = target.buffer(len(data))
        view[: len(data)] = data
        target.write(offset // BLOCK_BYTES, view)
    else:
        raw(address_of(target), section.nr_bytes)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)


def _clear(section: Section) -> None:
    if isinstance(section.target, BlockFile):
        section.target.clear()
    else:
        clear(address_of(section.target), section.nr_bytes)


def _pieces_of_blocks(file: BlockFile) -> Iterator[tuple[int, bytes]]:
    """What is in a tier's file, by its extents; blocks of zeros are none."""
    for begin, end in file.extents():
        for offset in range(begin, end, PIECE_BYTES):
            data = file.peek(offset // BLOCK_BYTES, min(PIECE_BYTES, end - offset) // BLOCK_BYTES)
            if any(data):
                yield offset, data


def _pieces_of_file(fd: int) -> Iterator[tuple[int, bytes]]:
    size, offset = os.fstat(fd).st_size, 0
    while offset < size or offset == 0:
        data = os.pread(fd, PIECE_BYTES, offset)
        yield offset, data
        offset += max(len(data), 1)


def _put_file(path: Path, offset: int, data: bytes) -> None:
    path.parent.mkdir(mode=0o700, exist_ok=True)
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        os.pwrite(fd, data, offset)
    finally:
        os.close(fd)


def emptied(folder: Path) -> Path:
    """The folder, with nothing left in it. Raises OSError."""
    if folder.is_dir():
        shutil.rmtree(folder)
    return folder
