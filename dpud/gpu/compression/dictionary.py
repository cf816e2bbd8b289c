# SPDX-License-Identifier: MIT
"""zstd dictionaries, trained online for each client.

Theory of operation
    A page of 4 KiB is too short for a coder to learn from; what the pages of one client have in common has to be told
    to it beforehand. So small pages of each client are sampled as they pass by. Once SAMPLES are there, a dictionary is
    trained on three quarters of them and tried on the rest. It is used only if it makes those MIN_GAIN shorter than
    what was used until then. Later it is tried again with new samples, after ever longer pauses: data changes, and
    training costs a tenth of a second or so.

    A blob may lie in a pool or on a disk for long, so a dictionary is never taken away once it was used; MAX_PER_CLIENT
    bounds them. They count as overhead of the compressed store (`nr_bytes`), and whoever keeps the store may say how
    much that may be (`limit`).

    Numbers are those in the zstd frames, from the range that is free for private use, so that `zstd -D` finds its own.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import zstandard

from dpud.gpu.compression.codec import Dictionary

MAX_PAGE_BYTES = 16 << 10
"""Larger pages hold enough to learn from by themselves."""
SAMPLES = 256
SAMPLE_BYTES = 1 << 20
"""Whichever is reached first: training on more takes longer than an access should have to wait."""
SAMPLE_EVERY = 2
DICTIONARY_BYTES = 32 << 10
MIN_GAIN = 1.05
MAX_PER_CLIENT = 4
FIRST_NUMBER = 1 << 15
_K, _D = 512, 8  # segment and d-mer length of ZDICT's fast cover algorithm; fixed, so that it does not search for them
_LEVEL = 1
_NO_LIMIT = 1 << 62


@dataclass(frozen=True, slots=True, eq=False)
class Trained(Dictionary):
    """A dictionary in use."""

    number: int
    data: bytes
    client: str
    gain: float
    """Bytes of held-out samples without it by bytes with it."""


@dataclass(slots=True)
class _Client:
    samples: list[bytes] = field(default_factory=list)
    nr_seen: int = 0
    pause: int = 0
    """Pages to let pass before sampling again."""
    nr_trained: int = 0
    current: Trained | None = None


class Dictionaries:
    """Every client's dictionaries."""

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self._clients: dict[str, _Client] = {}
        self._by_number: dict[int, Trained] = {}
        self._nr_bytes = 0
        self.limit: Callable[[], int] = lambda: _NO_LIMIT
        """What all of them together may take; none is made that would be more."""

    def __iter__(self) -> Iterator[Trained]:
        return iter(self._by_number.values())

    def get(self, number: int) -> Dictionary | None:
        """The dictionary a blob names; None for 0. Raises KeyError if there is no such one."""
        return self._by_number[number] if number else None

    def current(self, client: str, page_bytes: int) -> Dictionary | None:
        """What pages of that size are to be encoded with."""
        if not self.enabled or page_bytes > MAX_PAGE_BYTES or client not in self._clients:
            return None
        return self._clients[client].current

    @property
    def nr_bytes(self) -> int:
        """Of all dictionaries that blobs may name."""
        return self._nr_bytes

    def pending(self, client: str) -> int:
        """Samples that are waiting for more."""
        return len(self._clients[client].samples) if client in self._clients else 0

    def observe(self, client: str, page: memoryview) -> None:
        """A page was encoded with a coder that takes dictionaries, or might have been."""
        if not self.enabled or len(page) > MAX_PAGE_BYTES:
            return
        state = self._clients.setdefault(client, _Client())
        state.nr_seen += 1
        if state.pause:
            state.pause -= 1
        elif self._may_train(state) and state.nr_seen % SAMPLE_EVERY == 0:
            state.samples.append(bytes(page))
            if len(state.samples) == SAMPLES or len(state.samples) * len(page) >= SAMPLE_BYTES:
                self.train(client)

    def _may_train(self, state: _Client) -> bool:
        return state.nr_trained < MAX_PER_CLIENT and self._nr_bytes + DICTIONARY_BYTES <= self.limit()

    def train(self, client: str) -> Trained | None:
        """Train on the samples there are; the new dictionary if it is good enough to be used from now on.

        Raises KeyError for a client that was never seen, ValueError if there are too few samples, or no room for it.
        """
        state = self._clients[client]
        if self._nr_bytes + DICTIONARY_BYTES > self.limit():
            raise ValueError(f"dictionaries take {self._nr_bytes} of {self.limit()} bytes")
        if len(state.samples) < 16:
            raise ValueError(f"{len(state.samples)} samples of {client!r} are too few")
        held_out = state.samples[::4]
        learnt = [sample for index, sample in enumerate(state.samples) if index % 4]
        state.samples = []
        state.nr_trained += 1
        state.pause = SAMPLES * SAMPLE_EVERY << 2 * state.nr_trained
        trained = _train(learnt, held_out, client, FIRST_NUMBER + len(self._by_number), state.current)
        if trained is not None:
            self._by_number[trained.number] = state.current = trained
            self._nr_bytes += len(trained.data)
        return trained


def _train(
    learnt: list[bytes], held_out: list[bytes], client: str, number: int, old: Dictionary | None
) -> Trained | None:
    try:
        data = zstandard.train_dictionary(DICTIONARY_BYTES, [*learnt], k=_K, d=_D, dict_id=number).as_bytes()
    except zstandard.ZstdError:  # nothing in common
        return None
    gain = _compressed_bytes(held_out, old.data if old else None) / _compressed_bytes(held_out, data)
    return Trained(number, data, client, gain) if gain >= MIN_GAIN else None


def _compressed_bytes(pages: list[bytes], dictionary: bytes | None) -> int:
    words = zstandard.ZstdCompressionDict(dictionary) if dictionary else None
    compressor = zstandard.ZstdCompressor(level=_LEVEL, dict_data=words)
    return sum(len(compressor.compress(page)) for page in pages)
