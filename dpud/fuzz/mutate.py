# SPDX-License-Identifier: GPL-2.0-only
"""How an input becomes another one: bytes, numbers, words and lines are changed, in the places where they stand.

Bits that flip find little in a text of numbers and names. So half of the mutations know these: a number becomes one at
the edge of some range, a word becomes another one of the dictionary, a line changes places, a piece is said a thousand
times over.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from random import Random

MAX_BYTES = 1 << 16
_MAX_KEPT = 512
_MANY = (2, 3, 17, 300, 5000)
_RUNS, _LETTERS = (20, 300, 30_000), b" \ta0.\"'[({=:,-\\"

_NUMBERS = """
    0 1 -1 2 7 9 10 64 100 101 255 256 1000 1001 1023 1024 4095 4096 65535 65536 00 -0 +1 010 08 0x 0x10 1.5
    0xffffffff 0xffffffffffffffff 1e9 1e999 nan inf -inf 1K 1M 16E 1k 0-3 3-0 0-99999999999 1,2,3 \u00b2 \u0663 \uff11
"""
_EDGES = (str(sign * 2**bits + more) for bits in (31, 32, 53, 63, 64) for sign in (1, -1) for more in (-1, 0, 1))
NUMBERS = tuple(text.encode() for text in (*_NUMBERS.split(), *_EDGES, "9" * 30, "9" * 5000, "0x" + "f" * 5000))
_MARKS = """
    % %s {} {0} $ ` .. ../ // / \\ ' " ( ) [ ] { } < > * ? ! & && || | ~ ^ = == , ; : # @ - -- + +p
    \x1b[2J \x7f \udc80 \U0001f980 \ufeff
"""
ODD = (
    *(text.encode("utf-8", "surrogatepass") for text in _MARKS.split()),
    *(
        b"\0",
        b"\n",
        b"\r",
        b"\t",
        b"\v",
        b" ",
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xa0",
        b"\xc2\xa0",
        b"\xe2\x80\xa8",
    ),
)
_NUMBER = re.compile(rb"-?(?:0[xX][0-9a-fA-F]+|[0-9]+)")
_WORD = re.compile(rb"[A-Za-z_][A-Za-z0-9_]*")


def below(chance: Random, stop: int) -> int:
    """0 .. stop-1, several times faster than randrange()."""
    return int(chance.random() * stop)


class Mutator:
    """Draws inputs from a pool of them, and `words` to put in."""

    def __init__(self, pool: Iterable[bytes], words: Iterable[bytes] = (), max_bytes: int = MAX_BYTES) -> None:
        self.pool = [data[:max_bytes] for data in pool] or [b""]
        self.words = (*words, *NUMBERS, *ODD)
        self.max_bytes = max_bytes
        self._nr_seeds = len(self.pool)

    def keep(self, data: bytes) -> None:
        """Draw from this, too; the oldest that was kept goes where there are too many."""
        if len(self.pool) >= self._nr_seeds + _MAX_KEPT:
            del self.pool[self._nr_seeds]
        self.pool.append(data)

    def draw(self, chance: Random) -> bytes:
        """One of the pool, changed in one place or a few."""
        return self.mutated(self.pool[below(chance, len(self.pool))], chance)

    def mutated(self, data: bytes, chance: Random) -> bytes:
        for _ in range(1 + below(chance, 4) * below(chance, 2)):
            data = _MUTATIONS[below(chance, len(_MUTATIONS))](self, data, chance)
        return data[: self.max_bytes]

    def word(self, chance: Random) -> bytes:
        return self.words[below(chance, len(self.words))]


Mutation = Callable[[Mutator, bytes, Random], bytes]


def _flip(_mutator: Mutator, data: bytes, chance: Random) -> bytes:
    if not data:
        return b"\0"
    at = below(chance, len(data))
    return data[:at] + bytes([data[at] ^ 1 << below(chance, 8)]) + data[at + 1 :]


def _set(_mutator: Mutator, data: bytes, chance: Random) -> bytes:
    at = below(chance, len(data) + 1)
    return data[:at] + bytes([below(chance, 256)]) + data[at + 1 :]


def _cut(_mutator: Mutator, data: bytes, chance: Random) -> bytes:
    first, last = _span(data, chance)
    return data[:first] + data[last:]


def _end(_mutator: Mutator, data: bytes, chance: Random) -> bytes:
    return data[: below(chance, len(data) + 1)]


def _insert(mutator: Mutator, data: bytes, chance: Random) -> bytes:
    at = below(chance, len(data) + 1)
    return data[:at] + mutator.word(chance) + data[at:]


def _repeat(_mutator: Mutator, data: bytes, chance: Random) -> bytes:
    """A short piece, many times."""
    first = below(chance, len(data) + 1)
    piece = data[first : first + 1 + below(chance, 12)] or b"("
    return data[:first] + piece * _MANY[below(chance, len(_MANY))] + data[first:]


def _run(_mutator: Mutator, data: bytes, chance: Random) -> bytes:
    """A long run of one letter: what looks for the end of it from each place takes time for its square."""
    at, letter = below(chance, len(data) + 1), below(chance, len(_LETTERS))
    return data[:at] + _LETTERS[letter : letter + 1] * _RUNS[below(chance, len(_RUNS))] + data[at:]


def _splice(mutator: Mutator, data: bytes, chance: Random) -> bytes:
    other = mutator.pool[below(chance, len(mutator.pool))]
    return data[: below(chance, len(data) + 1)] + other[below(chance, len(other) + 1) :]


def _number(mutator: Mutator, data: bytes, chance: Random) -> bytes:
    return _replace(_NUMBER, NUMBERS, data, chance)


def _name(mutator: Mutator, data: bytes, chance: Random) -> bytes:
    return _replace(_WORD, mutator.words, data, chance)


def _lines(_mutator: Mutator, data: bytes, chance: Random) -> bytes:
    """A line goes elsewhere, or is there twice."""
    lines = data.split(b"\n")
    line = lines[below(chance, len(lines))]
    if chance.random() < 0.5:
        lines.remove(line)
    lines.insert(below(chance, len(lines) + 1), line)
    return b"\n".join(lines)


def _words(_mutator: Mutator, data: bytes, chance: Random) -> bytes:
    """Two words change places."""
    words = data.split(b" ")
    one, other = below(chance, len(words)), below(chance, len(words))
    words[one], words[other] = words[other], words[one]
    return b" ".join(words)


def _replace(pattern: re.Pattern[bytes], choices: Sequence[bytes], data: bytes, chance: Random) -> bytes:
    """The first match behind some place."""
    found = pattern.search(data, below(chance, len(data) + 1)) or pattern.search(data)
    if found is None:
        return data + choices[below(chance, len(choices))]
    return data[: found.start()] + choices[below(chance, len(choices))] + data[found.end() :]


def _span(data: bytes, chance: Random) -> tuple[int, int]:
    first = below(chance, len(data) + 1)
    return first, min(len(data), first + 1 + below(chance, 1 << below(chance, 10)))


_MUTATIONS: tuple[Mutation, ...] = (
    _flip, _set, _cut, _end, _insert, _insert, _repeat, _run, _splice, _number, _number, _name, _lines, _words
)  # fmt: skip
