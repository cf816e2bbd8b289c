# SPDX-License-Identifier: GPL-2.0-only
"""The kernel log: a ring of records, shown as /dev/kmsg.

A record reads `<facility*8+level>,<seq>,<usec>,-;text` (Documentation/ABI/testing/dev-kmsg). The file is a byte stream
in which each record owns the bytes [start, start + len): a read at an offset gets the record that covers it and never
more, which is what makes util-linux dmesg work on a regular file. Records are dropped from the front once the ring
holds more than `LOG_BUF_BYTES`; a reader whose record is gone is told so (EPIPE) and goes on with the oldest one. The
last record is never dropped: with an empty log dmesg would fall back to the real kernel's.
"""

import errno
from bisect import bisect_right
from collections.abc import Callable

from kernelsim.attr import Attr, Kobject, Stream, StreamOverrun
from kernelsim.operation import Operation
from kernelsim.wait import WaitQueue

LOG_BUF_BYTES = 1 << 22
LOG_LINE_MAX = 1024

KERN_EMERG, KERN_ALERT, KERN_CRIT, KERN_ERR, KERN_WARNING, KERN_NOTICE, KERN_INFO, KERN_DEBUG = range(8)
LOG_USER = 1


class Printk(Kobject):
    """The log, and its file."""

    kmsg = Attr(
        Stream(),
        mode=0o644,
        doc="The kernel log: one record a read, one line a write, `<N>` sets its priority.",
    )

    def __init__(self, now_ns: Callable[[], int], wait_queue: WaitQueue) -> None:
        self._now_ns = now_ns
        self._wait_queue = wait_queue
        self._records: list[bytes] = []
        self._starts: list[int] = []
        self._end = 0
        self._seq = 0

    def __call__(self, text: str, level: int = KERN_INFO, facility: int = 0) -> None:
        """Log one line."""
        usec = self._now_ns() // 1000
        record = f"{facility * 8 + level},{self._seq},{usec},-;".encode() + _escape(text) + b"\n"
        self._seq += 1
        self._starts.append(self._end)
        self._records.append(record)
        self._end += len(record)
        if self._end - self._starts[0] > LOG_BUF_BYTES:
            self._drop_oldest()
        self._wait_queue.wake_up()

    def _drop_oldest(self) -> None:
        """Make room for a while at once: dropping one record at a time would move the lists each time."""
        keep = bisect_right(self._starts, self._end - LOG_BUF_BYTES * 3 // 4)
        keep = min(keep, len(self._records) - 1)
        del self._records[:keep], self._starts[:keep]

    def lines(self) -> list[str]:
        """The text of all records, oldest first."""
        return [record.split(b";", 1)[1].decode("utf-8", "replace").rstrip("\n") for record in self._records]

    @kmsg.read
    def _read(self, pos: int, size: int, nonblock: bool) -> Operation[bytes]:
        while pos >= self._end:
            if nonblock:
                raise OSError(errno.EAGAIN, "no more records")
            yield self._wait_queue
        if pos < self._starts[0]:
            raise StreamOverrun(self._starts[0])
        at = bisect_right(self._starts, pos) - 1
        rest = self._records[at][pos - self._starts[at] :]
        if len(rest) > size:
            raise OSError(errno.EINVAL, "buffer smaller than the record")
        return rest

    @kmsg.write
    def _write(self, data: bytes) -> None:
        if len(data) > LOG_LINE_MAX:
            raise OSError(errno.EINVAL, "line too long")
        text = data.decode("utf-8", "surrogateescape").rstrip("\n")
        level, facility = KERN_WARNING, LOG_USER
        head, closed, tail = text.partition(">")
        if closed and head.startswith("<") and head.isascii() and head[1:].isdecimal():
            priority = int(head[1:])
            level, facility, text = priority & 7, max(priority >> 3, LOG_USER), tail
        self(text, level, facility)

    @kmsg.size
    def _size(self) -> int:
        return self._end


def _escape(text: str) -> bytes:
    r"""Control bytes, non-ASCII bytes and backslashes as \xNN."""
    raw = text.encode("utf-8", "surrogateescape")
    if raw.isascii() and text.isprintable() and b"\\" not in raw:
        return raw
    return b"".join(bytes([c]) if 0x20 <= c < 0x7F and c != 0x5C else b"\\x%02x" % c for c in raw)
