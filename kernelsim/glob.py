# SPDX-License-Identifier: GPL-2.0-only
r"""Shell patterns as the kernel matches them (lib/glob.c): `*`, `?`, `[a-z]`, `[!a-z]`, `\` before a plain letter.

Whole strings are matched. A `[` that nothing closes is a plain letter. Nothing is compiled and nothing is kept:
patterns come from whoever writes to a file, and there is no end of them.
"""


def glob_match(pattern: str, text: str) -> bool:
    """Does all of `text` fit? Goes back to the last star only, so it takes at most len(pattern) * len(text) steps."""
    at = number = 0
    star, star_number = -1, 0
    while number < len(text) or at < len(pattern):
        if at < len(pattern) and pattern[at] == "*":
            star, star_number = at, number
            at += 1
            continue
        length = _fits(pattern, at, text[number]) if number < len(text) else 0
        if length:
            at, number = at + length, number + 1
        elif star >= 0 and star_number < len(text):
            star_number += 1
            at, number = star + 1, star_number
        else:
            return False
    return True


def _fits(pattern: str, at: int, letter: str) -> int:
    """Length of the part of the pattern from `at` on that stands for one letter, if that fits; else 0."""
    first = pattern[at : at + 1]
    if first == "?":
        return 1
    if first == "[" and (end := _end_of_class(pattern, at)):
        return end - at if _in_class(pattern[at + 1 : end - 1], letter) else 0
    if first == "\\" and at + 1 < len(pattern):
        return 2 if pattern[at + 1] == letter else 0
    return 1 if first == letter else 0


def _end_of_class(pattern: str, at: int) -> int:
    """Behind the `]` of the class that begins at `at`; 0 if there is none. The first letter may be a `]`."""
    begin = at + 1 + (pattern[at + 1 : at + 2] == "!")
    return pattern.find("]", begin + 1) + 1


def _in_class(letters: str, letter: str) -> bool:
    inverted = letters.startswith("!")
    letters = letters[inverted:]
    at, found = 0, False
    while at < len(letters):
        last = at + 2 if letters[at + 1 : at + 2] == "-" and at + 2 < len(letters) else at
        found |= letters[at] <= letter <= letters[last]
        at = last + 1
    return found != inverted
