# SPDX-License-Identifier: GPL-2.0-only
"""Text for man(7): escaping, paragraphs, sections, tagged lists."""

import re
from collections.abc import Iterable, Iterator


def escape(text: str) -> str:
    """Text as roff shows it unchanged: no escapes, hyphens that can be typed, no line that is a request."""
    escaped = (
        text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq").replace("^", "\\(ha").replace("~", "\\(ti")
    )
    return "\\&" + escaped if escaped.startswith(".") else escaped


def prose(text: str) -> str:
    """A paragraph of Markdown-like text on one line a sentence: `words` in bold."""
    words = " ".join(text.split())
    pieces = re.split(r"`([^`]+)`", words)
    marked = "".join(f"\\fB{escape(piece)}\\fR" if i % 2 else escape(piece) for i, piece in enumerate(pieces))
    lines = re.split(r"(?<=[.:;!?]) (?=[^ ])", marked)
    return "\n".join("\\&" + line if line.startswith((".", "'")) else line for line in lines)


def title(name: str, section: int, date: str, source: str, manual: str) -> str:
    """The first line of a page."""
    return f'.TH {name.upper()} {section} "{date}" "{source}" "{manual}"'


def section(name: str) -> str:
    return f".SH {name.upper()}"


def subsection(name: str) -> str:
    return f'.SS "{escape(name)}"'


def paragraphs(text: str) -> Iterator[str]:
    """Paragraphs apart from each other by empty lines."""
    for number, paragraph in enumerate(re.split(r"\n\s*\n", text.strip())):
        if number:
            yield ".PP"
        yield prose(paragraph)


def tagged(tag: str, lines: Iterable[str]) -> Iterator[str]:
    """One entry of a list: a bold tag and what it means."""
    yield ".TP"
    yield f"\\fB{escape(tag)}\\fR"
    yield from lines


def verbatim(text: str) -> Iterator[str]:
    """Lines as they are."""
    yield ".nf"
    yield from (escape(line) if line.strip() else "\\&" for line in text.rstrip("\n").split("\n"))
    yield ".fi"


def page(lines: Iterable[str]) -> str:
    return "\n".join(lines) + "\n"
