# SPDX-License-Identifier: GPL-2.0-only
"""Lists of CPUs as people write them: `0-2,5`, `all`, `N` for the last one, `0-7:2/4` for the first two of each four.

The grammar is that of bitmap_parselist() (lib/bitmap-str.c).
"""

import re

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
