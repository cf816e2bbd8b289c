# SPDX-License-Identifier: GPL-2.0-only
"""Text made once per open, so that chunked reads agree.

A reader that takes a file in pieces must see one text, however the machine moves on between its reads.
The text is made at the first read, made anew whenever offset 0 is read again (lseek to the start, pread
at 0), and all other offsets are served from it. Each read works on its own reference to the text:
concurrent readers of one open file get one text or the other, never a mixture.
"""

from collections.abc import Callable


class SeqFile:
    """The text behind one open file."""

    def __init__(self, text: bytes | None = None) -> None:
        self._text = text

    @property
    def text(self) -> bytes | None:
        """The one that reads are served from."""
        return self._text

    @property
    def was_read(self) -> bool:
        """Has the text been made?"""
        return self._text is not None

    def read(self, make: Callable[[], bytes], size: int, offset: int) -> bytes:
        """At most `size` bytes at byte `offset`, b"" at and past the end; `make` renders the whole text."""
        text = self._text
        if text is None or offset == 0:
            self._text = text = make()
        return text[offset : offset + size]
