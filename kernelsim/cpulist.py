# SPDX-License-Identifier: GPL-2.0-only
"""Sets of CPUs as people write them.

Lists: `0-2,5`, `all`, `N` for the last one, `0-7:2/4` for the first two of each four. Masks: `f` or `1,ffffffff`. The
grammars are those of bitmap_parselist() and bitmap_parse() (lib/bitmap-str.c).
"""

import errno
import re

_WORD_DIGITS, _WORD_BITS = 8, 32  # of a mask
_NUMBER = r"([0-9]{1,10}|N)"
_REGION = re.compile(rf"(?:all|{_NUMBER}(?:-{_NUMBER})?)(?::([0-9]{{1,10}})/([0-9]{{1,10}}))?", re.ASCII)


def parse_cpulist(text: str, nr_cpus: int) -> frozenset[int]:
    """The CPUs that a text names. ValueError: it cannot be understood, or one of them is not there."""
    cpus: set[int] = set()
    for word in re.split(r"[\s,]+", text):
        if word:
            cpus |= _region(word, nr_cpus)
    return frozenset(cpus)


def _region(word: str, nr_cpus: int) -> set[int]:
    found = _REGION.fullmatch(word)
    if found is None:
        raise ValueError(f"not a list of CPUs: {word}")
    first, last, used, group = found.groups()
    begin = _number(first or "0", nr_cpus)
    end = _number(last or first or "N", nr_cpus)
    if begin > end or end >= nr_cpus:
        raise ValueError(f"no such CPUs: {word}")
    if group is None:
        return set(range(begin, end + 1))
    if not 0 < int(used) <= int(group):
        raise ValueError(f"no such groups: {word}")
    return {cpu for cpu in range(begin, end + 1) if (cpu - begin) % int(group) < int(used)}


def _number(text: str, nr_cpus: int) -> int:
    return nr_cpus - 1 if text == "N" else int(text)


def parse_cpumask(text: str, nr_cpus: int) -> int:
    """Bits in words of 32, the highest first. OSError(EINVAL): no mask; EOVERFLOW: of more CPUs than there are."""
    words = [word for word in re.split(r"[\s,]+", text) if word]
    mask = 0
    for word in words:
        if not re.fullmatch("[0-9a-fA-F]+", word):
            raise OSError(errno.EINVAL, "not a mask")
        if len(word) > _WORD_DIGITS:
            raise OSError(errno.EOVERFLOW, "more digits than a word has")
        mask = mask << _WORD_BITS | int(word, 16)
    if len(words) > -(-nr_cpus // _WORD_BITS) or mask >> nr_cpus:
        raise OSError(errno.EOVERFLOW, "no such CPU")
    return mask
