# SPDX-License-Identifier: GPL-2.0-only
r"""Shell patterns as the kernel matches them (lib/glob.c): `*`, `?`, `[a-z]`, `[!a-z]`, `\` before a plain letter.

Whole strings are matched. A `[` that nothing closes is a plain letter. A pattern is taken apart once for all strings
that it is held against, and what a class says of a letter is kept as long: patterns come from whoever writes to a file,
and may be one class of thousands of letters, or thousands of `[`.
"""

from collections.abc import Callable


class Glob:
    """A pattern."""

    def __init__(self, pattern: str) -> None:
        self._parts = _parts(pattern)

    def matches(self, text: str) -> bool:
        """Does all of it fit? Goes back to the last star only, so it takes at most parts * len(text) steps."""
        parts, at, number = self._parts, 0, 0
        star, star_number = -1, 0
        while number < len(text) or at < len(parts):
            part = parts[at] if at < len(parts) else _none
            if part is None:
                star, star_number = at, number
                at += 1
            elif number < len(text) and part(text[number]):
                at, number = at + 1, number + 1
            elif star >= 0 and star_number < len(text):
                star_number += 1
                at, number = star + 1, star_number
            else:
                return False
        return True


Part = Callable[[str], bool] | None
"""Does a letter fit? None stands for a star."""


def _any(_letter: str) -> bool:
    return True


def _none(_letter: str) -> bool:
    return False


def _parts(pattern: str) -> list[Part]:
    parts: list[Part] = []
    at, closes = 0, True
    while at < len(pattern):
        first, length = pattern[at], 1
        if first == "*":
            parts.append(None)
        elif first == "?":
            parts.append(_any)
        elif first == "[" and closes and (end := _end_of_class(pattern, at)):
            parts.append(_Class(pattern[at + 1 : end - 1]))
            length = end - at
        elif first == "\\" and at + 1 < len(pattern):
            parts.append(pattern[at + 1].__eq__)
            length = 2
        else:
            closes = closes and first != "["  # if nothing closes this one, nothing closes a later one
            parts.append(first.__eq__)
        at += length
    return parts


def _end_of_class(pattern: str, at: int) -> int:
    """Behind the `]` of the class that begins at `at`; 0 if there is none. The first letter may be a `]`."""
    begin = at + 1 + (pattern[at + 1 : at + 2] == "!")
    return pattern.find("]", begin + 1) + 1


class _Class:
    """What is between the brackets, and what was found of letters."""

    def __init__(self, letters: str) -> None:
        self._inverted = letters.startswith("!")
        self._letters = letters[self._inverted :]
        self._found: dict[str, bool] = {}

    def __call__(self, letter: str) -> bool:
        if letter not in self._found:
            self._found[letter] = self._has(letter) != self._inverted
        return self._found[letter]

    def _has(self, letter: str) -> bool:
        letters, at = self._letters, 0
        while at < len(letters):
            last = at + 2 if letters[at + 1 : at + 2] == "-" and at + 2 < len(letters) else at
            if letters[at] <= letter <= letters[last]:
                return True
            at = last + 1
        return False
