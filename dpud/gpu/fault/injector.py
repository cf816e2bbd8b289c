# SPDX-License-Identifier: MIT
"""Faults on purpose: bits, rows, banks, whole devices.

A request is a kind and `key=value` pairs, in any order:

    bit      flips in one word: `bits` of them (1: ECC corrects it, 2: it does not), at `bit` or anywhere. With
             `stuck` (0 or 1) the cells stay so; else they are right again once they are written.
    row      a whole row (2 KiB) breaks: half of its cells are stuck at anything
    bank     all rows of a bank
    device   falls off the bus

    gpu=N or location=NAME          whose memory; gpu=0
    address=N, va=N, client=NAME    where in it; else in some frame that is in use
    nr=N seed=N                     how many, and what chance begins with

or what `dcgmi test --inject --gpuid N -f FIELD -v N` has behind `dcgmi test`, for the fields (dcgm_fields.h) 310, 312
(single-bit errors), 311 and 313 (double-bit errors), 230 (XID errors; 79 is the one there is).
"""

import errno
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

from dpud.gpu.address_space.pagetable import FRAME_SHIFT
from dpud.gpu.address_space.regions import PageState
from dpud.gpu.errors import GpuError
from dpud.gpu.fault.cells import FRAME_WORDS, Cells
from dpud.gpu.fault.events import Xid
from dpud.gpu.fault.rows import Rows
from dpud.gpu.fault.secded import CODE_BITS
from dpud.gpu.location import Location
from dpud.gpu.memory import GpuMemory

KINDS = ("bit", "row", "bank", "device")
_SINGLE, _DOUBLE, _XID = ("310", "312"), ("311", "313"), "230"
_KEYS = {"gpu", "location", "address", "va", "client", "bit", "bits", "stuck", "nr", "seed"}


@dataclass(frozen=True)
class Request:
    """What to break."""

    kind: str
    location: int = 0
    address: int | None = None
    va: int | None = None
    client: str = ""
    bit: int | None = None
    nr_bits: int = 1
    stuck: int | None = None
    nr: int = 1
    seed: int | None = None


def parse(text: str, names: Sequence[str]) -> Request:
    """Raises GpuError(EINVAL). `names` are the locations', the host's last."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise GpuError(errno.EINVAL, str(error)) from error
    if "--inject" in words:
        return _parse_dcgmi(words, len(names) - 1)
    if not words or words[0] not in KINDS:
        raise GpuError(errno.EINVAL, f"{text!r}: a kind is one of {', '.join(KINDS)}")
    pairs = dict(word.partition("=")[::2] for word in words[1:])
    if unknown := pairs.keys() - _KEYS:
        raise GpuError(errno.EINVAL, f"unknown: {', '.join(sorted(unknown))}")
    try:
        return _request(words[0], pairs, names)
    except ValueError as error:
        raise GpuError(errno.EINVAL, str(error)) from error


def _request(kind: str, pairs: Mapping[str, str], names: Sequence[str]) -> Request:
    def number(key: str) -> int | None:
        return int(pairs[key], 0) if key in pairs else None

    location = names.index(pairs["location"]) if "location" in pairs else number("gpu") or 0
    request = Request(
        kind,
        location,
        number("address"),
        number("va"),
        pairs.get("client", ""),
        number("bit"),
        1 if "bits" not in pairs else number("bits") or 0,
        number("stuck"),
        1 if "nr" not in pairs else number("nr") or 0,
        number("seed"),
    )
    _check(request, len(names))
    return request


def _check(request: Request, nr_locations: int) -> None:
    """Raises ValueError."""
    bounds = {
        "gpu": (request.location, nr_locations),
        "bit": (request.bit, CODE_BITS),
        "bits": (request.nr_bits - 1, CODE_BITS),
        "stuck": (request.stuck, 2),
        "nr": (request.nr - 1, 1_000_000),
        "seed": (request.seed, 1 << 64),
        "address": (request.address, 1 << 63),
        "va": (request.va, 1 << 63),
    }
    for key, (value, end) in bounds.items():
        if value is not None and not 0 <= value < end:
            raise ValueError(f"{key} is out of range")


def _parse_dcgmi(words: Sequence[str], nr_devices: int) -> Request:
    """Behind `dcgmi test`."""
    options = dict(pairwise(words))
    field = options.get("-f", options.get("--fieldid", ""))
    try:
        gpu, value = int(options.get("--gpuid", "0")), int(options.get("-v", options.get("--value", "1")))
    except ValueError as error:
        raise GpuError(errno.EINVAL, str(error)) from error
    if not 0 <= gpu < nr_devices or not 1 <= value <= 1_000_000:
        raise GpuError(errno.EINVAL, f"gpu {gpu}, value {value}")
    if field in _SINGLE or field in _DOUBLE:
        return Request("bit", gpu, nr_bits=1 if field in _SINGLE else 2, nr=value)
    if field == _XID and value == Xid.OFF_THE_BUS:
        return Request("device", gpu)
    raise GpuError(errno.EINVAL, f"field {field!r} with value {value} cannot be injected")


class Injector:
    """Carries requests out."""

    def __init__(
        self, memory: GpuMemory, cells: Sequence[Cells], rows: Sequence[Rows], lose: Callable[[Location], None]
    ) -> None:
        self.nr_injected = dict.fromkeys(KINDS, 0)
        self._memory, self._cells, self._rows, self._lose = memory, cells, rows, lose
        self._rng = np.random.default_rng(0)

    def inject(self, request: Request) -> int:
        """Break it -> how many faults there are more. Raises GpuError: EINVAL, ENODEV."""
        if request.seed is not None:
            self._rng = np.random.default_rng(request.seed)
        location = self._memory.locations[request.location]
        if location.is_lost:
            raise GpuError(errno.ENODEV, f"{location.name} is lost")
        if request.kind == "device":
            if request.location >= self._memory.nr_devices:
                raise GpuError(errno.EINVAL, "the host's memory does not fall off the bus")
            self._lose(location)
            self.nr_injected["device"] += 1
            return 1
        for _ in range(request.nr):
            self._break(request)
        self.nr_injected[request.kind] += request.nr
        return request.nr

    def _break(self, request: Request) -> None:
        number, byte = self._place(request)
        cells, rows, frame = self._cells[number], self._rows[number], byte >> FRAME_SHIFT
        match request.kind:
            case "bit":
                word = (byte >> 3) % FRAME_WORDS
                for bit in self._bits(request):
                    if request.stuck is None:
                        cells.flip(frame, word, bit)
                    else:
                        cells.stick(frame, word, bit, request.stuck)
            case "row":
                cells.break_row(frame, self._rng)
            case _:
                for row in rows.rows(rows.bank(frame)):
                    cells.break_row(row, self._rng)

    def _bits(self, request: Request) -> list[int]:
        first = [] if request.bit is None else [request.bit]
        others = [bit for bit in self._rng.permutation(CODE_BITS).tolist() if bit not in first]
        return [*first, *others][: request.nr_bits]

    def _place(self, request: Request) -> tuple[int, int]:
        """(location, byte in its memory) of a fault."""
        frames = self._memory.locations[request.location].frames
        if request.va is not None or request.client:
            return self._page(request)
        if request.address is not None:
            if not 0 <= request.address < frames.nr_bytes:
                raise GpuError(errno.EINVAL, f"no address {request.address:#x}")
            return request.location, request.address
        used = np.flatnonzero(frames.owner >= 0)
        frame = int(used[self._rng.integers(len(used))]) if len(used) else int(self._rng.integers(frames.nr_frames))
        return request.location, (frame << FRAME_SHIFT) + 8 * int(self._rng.integers(FRAME_WORDS))

    def _page(self, request: Request) -> tuple[int, int]:
        """Of an address in the address space, or of any page of a client that is in memory."""
        va = request.va
        if va is None:
            regions = [each for each in self._memory.space.regions if each.client == request.client]
            vas = [each.vas(np.flatnonzero(each.state == PageState.RESIDENT)) for each in regions]
            choice = np.concatenate(vas) if vas else np.arange(0)
            va = int(self._rng.choice(choice)) + 8 * int(self._rng.integers(FRAME_WORDS)) if len(choice) else 0
        region = self._memory.space.regions.find(va)
        page = (va - region.va) >> region.page_shift if region else 0
        if region is None or region.state[page] != PageState.RESIDENT:
            raise GpuError(errno.EINVAL, "no page there is in memory")
        return int(region.home[page]), (int(region.frame[page]) << FRAME_SHIFT) + va % region.page_bytes
