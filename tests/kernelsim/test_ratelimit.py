# SPDX-License-Identifier: GPL-2.0-only
"""What may be logged, how much of it, and the sysctls that say so."""

import errno
import os

import pytest
from wiring import errno_of

from fs.kernfs import Cred, Tree
from kernelsim.attr import Registry
from kernelsim.printk import KERN_DEBUG, KERN_ERR, Printk
from kernelsim.printk_sysctl import PrintkSysctl
from kernelsim.ratelimit import Ratelimit
from kernelsim.timer import ManualClock
from kernelsim.wait import WaitQueue

SECOND = 1_000_000_000


class Log:
    """A log with its files."""

    def __init__(self) -> None:
        self.clock = ManualClock()
        self.queue = WaitQueue()
        self.printk = Printk(self.clock.now_ns, self.queue)
        registry = Registry()
        registry.add("/dev", self.printk)
        registry.add("/proc/sys/kernel", PrintkSysctl(self.printk))
        self.tree = Tree(registry)

    def write(self, name: str, text: str) -> int:
        return self.tree.open(f"/proc/sys/kernel/{name}", os.O_WRONLY).write(text.encode(), 0)

    def read(self, name: str) -> str:
        return self.tree.open(f"/proc/sys/kernel/{name}", os.O_RDONLY).read(4096, 0).decode()


def test_a_burst_then_nothing_then_the_next_interval() -> None:
    clock, missed = ManualClock(), []
    limit = Ratelimit(clock.now_ns, 5 * SECOND, 3, missed.append)
    assert [limit() for _ in range(5)] == [True, True, True, False, False]
    clock.advance(5 * SECOND)
    assert limit()
    assert missed == [2]


@pytest.mark.parametrize(("interval_ns", "burst", "passes"), [(0, 10, True), (-1, 10, True), (SECOND, 0, False)])
def test_limits_that_are_none_or_all(interval_ns: int, burst: int, passes: bool) -> None:
    limit = Ratelimit(ManualClock().now_ns, interval_ns, burst)
    assert [limit() for _ in range(20)] == [passes] * 20


def test_each_open_file_has_ten_lines_and_its_end_says_how_many_were_dropped() -> None:
    log = Log()
    who = Cred(comm=lambda: "talker")
    one, two = (log.tree.open("/dev/kmsg", os.O_WRONLY, who) for _ in range(2))
    for i in range(13):
        assert one.write(b"one %d\n" % i, 0) == len(b"one %d\n" % i)
    two.write(b"two\n", 0)
    one.release()
    two.release()
    assert log.printk.lines() == [*(f"one {i}" for i in range(10)), "two", TALKER]


TALKER = "printk: talker: 3 output lines suppressed due to ratelimiting"


def test_devkmsg_on_and_off() -> None:
    log = Log()
    log.write("printk_devkmsg", "on\n")
    file = log.tree.open("/dev/kmsg", os.O_WRONLY)
    for _ in range(20):
        file.write(b"x\n", 0)
    assert len(log.printk.lines()) == 20
    log.write("printk_devkmsg", "off\n")
    assert file.write(b"y\n", 0) == 2
    assert len(log.printk.lines()) == 20
    assert errno_of(log.tree.open, "/dev/kmsg", os.O_RDONLY) == errno.EPERM


def test_dmesg_restrict_is_for_readers_who_are_not_root() -> None:
    log = Log()
    nobody = Cred(65534, 65534)
    log.tree.open("/dev/kmsg", os.O_RDONLY, nobody)
    log.write("dmesg_restrict", "1")
    assert errno_of(log.tree.open, "/dev/kmsg", os.O_RDONLY, nobody) == errno.EPERM
    log.tree.open("/dev/kmsg", os.O_RDONLY)


def test_the_console_gets_what_is_below_its_level() -> None:
    log, console = Log(), []
    log.printk.console = lambda level, text: console.append((level, text))
    log.printk("bad", KERN_ERR)
    log.printk("detail", KERN_DEBUG)
    log.write("printk", "8")
    log.printk("detail", KERN_DEBUG)
    assert console == [(KERN_ERR, "bad"), (KERN_DEBUG, "detail")]
    assert log.read("printk") == "8\t4\t1\t7\n"


def test_a_vector_keeps_what_came_before_a_bad_number() -> None:
    log = Log()
    assert errno_of(log.write, "printk", "3 x") == errno.EINVAL
    assert log.read("printk") == "3\t4\t1\t7\n"
    assert log.write("printk", "1 2 3 4 5") == len("1 2 3 4 ")
    assert log.read("printk") == "1\t2\t3\t4\n"


def test_recurring_messages_follow_the_sysctls() -> None:
    log = Log()
    log.write("printk_ratelimit_burst", "2")
    for _ in range(5):
        log.printk.ratelimited("again")
    log.clock.advance(5 * SECOND)
    log.printk.ratelimited("again")
    assert log.printk.lines() == ["again", "again", "printk_ratelimit: 3 callbacks suppressed", "again"]
    log.write("printk_ratelimit", "0")
    for _ in range(5):
        log.printk.ratelimited("more")
    assert log.printk.lines().count("more") == 5


def test_polling_the_log_waits_for_the_next_record() -> None:
    log, woken = Log(), []
    log.printk("one")
    file = log.tree.open("/dev/kmsg", os.O_RDONLY)
    assert file.poll() != 0
    end = len(file.read(8192, 0, nonblock=True))
    assert file.poll(lambda: woken.append(1)) == 0
    assert errno_of(lambda: file.read(8192, end, nonblock=True)) == errno.EAGAIN
    log.printk("two")
    assert woken == [1]
    assert file.poll() != 0
    log.printk("three")
    assert woken == [1], "once"


def test_a_reader_who_also_writes_loses_nothing() -> None:
    """write(2) moves the file position, which is not the reader's place in the log."""
    log = Log()
    log.printk("one")
    file = log.tree.open("/dev/kmsg", os.O_RDWR)
    position = len(file.read(8192, 0))
    position += file.write(b"mine\n", position)
    assert file.read(8192, position, nonblock=True).endswith(b";mine\n")
