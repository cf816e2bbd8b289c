# SPDX-License-Identifier: GPL-2.0-only
"""The kernel log: a ring of records, shown as /dev/kmsg.

A record reads `<facility*8+level>,<seq>,<usec>,-;text` (Documentation/ABI/testing/dev-kmsg). The file is a byte stream
in which each record owns the bytes [start, start + len): a read at an offset gets the record that covers it and never
more, which is what makes util-linux dmesg work on a regular file. Records are dropped from the front once the ring
holds more than `LOG_BUF_BYTES`; a reader whose record is gone is told so (EPIPE) and goes on with the oldest one. The
last record is never dropped: with an empty log dmesg would fall back to the real kernel's.

What users write is limited as devkmsg_write() limits it: `printk_devkmsg` says whether at all, and by default 10 lines
in 5 s for each open file; how many were dropped is logged when it is closed. What the emulated kernel says over and
over goes through `ratelimited`, which is printk_ratelimit() with its sysctls. The sysctls are in printk_sysctl.py.

Differences from Linux: there is no syslog(2), so `dmesg -c`, `-C`, `-S` and `-n` reach the host's kernel; the console
is a function that the daemon may give; a line without its newline is a record at once, and no later one continues it.
"""

import errno
import re
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from kernelsim.attr import Attr, Kobject, Opener, Stream, StreamOverrun
from kernelsim.operation import Operation
from kernelsim.ratelimit import Ratelimit
from kernelsim.wait import WaitQueue

LOG_BUF_BYTES = 1 << 22
LOG_LINE_MAX = 1024

KERN_EMERG, KERN_ALERT, KERN_CRIT, KERN_ERR, KERN_WARNING, KERN_NOTICE, KERN_INFO, KERN_DEBUG = range(8)
LOG_USER = 1
_PRIORITY = re.compile(rb"<([0-9]*)>")

_O_ACCMODE, _O_WRONLY = 0o3, 0o1  # uapi/asm-generic/fcntl.h

DEVKMSG_ON, DEVKMSG_OFF, DEVKMSG_RATELIMIT = "on", "off", "ratelimit"


@dataclass
class KmsgUser:
    """One open file of /dev/kmsg (struct devkmsg_user)."""

    comm: str
    rs: Ratelimit


class Printk(Kobject):
    """The log, and its file.

    levels      console, default message, minimum console and default console log level (console_printk[])
    console     where records below the console log level go too: (level, text)
    """

    apart = True

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
        self.levels = [KERN_WARNING, KERN_WARNING, 1, KERN_DEBUG]
        self.console: Callable[[int, str], object] | None = None
        self.devkmsg_log = DEVKMSG_RATELIMIT
        self.dmesg_restrict = False
        self.printk_ratelimit = Ratelimit(now_ns, missed=self._callbacks_suppressed)

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
        if self.console is not None and level < self.levels[0]:
            self.console(level, text)
        self._wait_queue.wake_up()

    def ratelimited(self, text: str, level: int = KERN_INFO) -> None:
        """Log a line of a sort that may come thick and fast (`if (printk_ratelimit()) printk(...)`)."""
        if self.printk_ratelimit():
            self(text, level)

    def _callbacks_suppressed(self, nr_missed: int) -> None:
        self(f"printk_ratelimit: {nr_missed} callbacks suppressed", KERN_WARNING)

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

    @kmsg.open
    def _open(self, opener: Opener) -> KmsgUser:
        """devkmsg_open(): no permission is needed for just writing."""
        if self.devkmsg_log == DEVKMSG_OFF or (
            self.dmesg_restrict and not opener.privileged and opener.flags & _O_ACCMODE != _O_WRONLY
        ):
            raise OSError(errno.EPERM, "not permitted")
        return KmsgUser(opener.comm, Ratelimit(self._now_ns))

    @kmsg.release
    def _release(self, user: KmsgUser) -> None:
        if nr_missed := user.rs.take_missed():
            self(f"printk: {user.comm}: {nr_missed} output lines suppressed due to ratelimiting", KERN_WARNING)

    @kmsg.poll
    def _poll(self, pos: int) -> WaitQueue | None:
        return self._wait_queue if pos >= self._end else None

    @kmsg.write
    def _write(self, data: bytes, user: KmsgUser | None = None) -> None:
        if len(data) > LOG_LINE_MAX:
            raise OSError(errno.EINVAL, "line too long")
        if self.devkmsg_log == DEVKMSG_OFF:
            return
        if user is not None and self.devkmsg_log == DEVKMSG_RATELIMIT and not user.rs():
            return
        level, facility, line = parse_priority(data, self.levels[1])
        text = line.partition(b"\0")[0][: LOG_LINE_MAX - 1].removesuffix(b"\n")  # a record has room for the NUL
        self(text.decode("utf-8", "surrogateescape"), level, facility)

    @kmsg.size
    def _size(self) -> int:
        return self._end


def parse_priority(data: bytes, level: int) -> tuple[int, int, bytes]:
    """`<N>text` -> (level, facility, text); `level` where there is no prefix. Users cannot speak as facility 0.

    N is read into an unsigned int, of which 3 bits are the level and 8 the facility (devkmsg_write, LOG_FACILITY).
    """
    match = _PRIORITY.match(data)
    if match is None:
        return level, LOG_USER, data
    priority = int(match[1] or b"0") & 0xFFFF_FFFF
    return priority & 7, priority >> 3 & 0xFF or LOG_USER, data[match.end() :]


def _escape(text: str) -> bytes:
    r"""Control bytes, non-ASCII bytes and backslashes as \xNN."""
    raw = text.encode("utf-8", "surrogateescape")
    if raw.isascii() and text.isprintable() and b"\\" not in raw:
        return raw
    return b"".join(bytes([c]) if 0x20 <= c < 0x7F and c != 0x5C else b"\\x%02x" % c for c in raw)
