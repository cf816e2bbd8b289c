# SPDX-License-Identifier: GPL-2.0-only
"""What journald gets, seen from its end of the socket: parsed here as its documentation describes the protocol."""

import array
import logging
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from dpud import service
from dpud.journald import Journal, JournalHandler
from kernelsim.printk import KERN_ERR, Printk
from kernelsim.wait import WaitQueue


def fields_of(data: bytes) -> dict[str, str]:
    """A reader of its own."""
    found = {}
    while data:
        line, _, rest = data.partition(b"\n")
        name, equals, value = line.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", rest[:8])
            value, rest = rest[8 : 8 + length], rest[8 + length :]
            assert rest[:1] == b"\n"
            rest = rest[1:]
        found[name.decode()] = value.decode()
        data = rest
    return found


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ours:
        ours.bind(str(tmp_path / "socket"))
        ours.settimeout(20)
        yield ours


@pytest.fixture
def journal(journald: socket.socket, tmp_path: Path) -> Iterator[Journal]:
    journal = Journal(str(tmp_path / "socket"))
    yield journal
    journal.close()


def test_a_line_of_the_kernel_is_an_entry_with_its_level(journald: socket.socket, journal: Journal) -> None:
    printk = Printk(lambda: 0, WaitQueue())
    printk.console = journal.kernel(lambda level, text: pytest.fail(text))
    printk("dpu: a device that failed", KERN_ERR)
    printk("of no interest")
    assert fields_of(journald.recv(4096)) == {
        "MESSAGE": "dpu: a device that failed",
        "PRIORITY": "3",
        "SYSLOG_IDENTIFIER": "dpud-kernel",
        "SYSLOG_FACILITY": "0",
    }
    journald.setblocking(False)
    with pytest.raises(BlockingIOError):
        journald.recv(4096)


def test_a_traceback_is_one_entry(journald: socket.socket, journal: Journal) -> None:
    logger = logging.Logger("dpud.x")
    logger.addHandler(JournalHandler(journal, logging.NullHandler()))
    try:
        raise ValueError("what")
    except ValueError:
        logger.exception("it failed")
    got = fields_of(journald.recv(65536))
    assert got["MESSAGE"].startswith("dpud.x: it failed\nTraceback")
    assert got["MESSAGE"].endswith("ValueError: what")
    assert (got["PRIORITY"], got["SYSLOG_IDENTIFIER"], got["LOGGER"]) == ("3", "dpud", "dpud.x")
    assert Path(got["CODE_FILE"]).name == Path(__file__).name
    assert got["CODE_FUNC"] == "test_a_traceback_is_one_entry"


def test_an_entry_too_large_for_a_datagram_comes_as_a_sealed_file(journald: socket.socket, journal: Journal) -> None:
    text = "x" * (8 << 20)
    assert journal.send(6, text, "dpud")
    data, ancillary, _, _ = journald.recvmsg(4096, socket.CMSG_SPACE(16))
    assert data == b""
    ((_, _, packed),) = ancillary
    (fd,) = array.array("i", packed)
    with open(fd, "rb") as file:
        file.seek(0)  # journald maps it
        assert fields_of(file.read())["MESSAGE"] == text
        with pytest.raises(OSError):  # noqa: PT011  # EPERM, sealed, or EBADF, read-only: either way not writable
            os.write(fd, b"y")


def test_without_a_journal_levels_stand_in_front_of_lines(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.Logger("root")
    monkeypatch.setattr(service.logging, "getLogger", lambda: logger)
    console = service.log_to_journal(Journal(str(tmp_path / "nobody")))
    console(4, "from the kernel")
    logger.warning("from %s", "dpud")
    assert capfd.readouterr().err == "<4>from the kernel\n<4>root: from dpud\n"
