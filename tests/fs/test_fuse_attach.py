# SPDX-License-Identifier: GPL-2.0-only
"""Connections that are let go of. (Mounts are tested by all who mount.)"""

import os
import socket

from fs.fuse_attach import let_go


def test_the_number_of_one_is_not_used_again() -> None:
    """A thread that answers late writes into nothing."""
    ours, theirs = socket.socketpair()
    fd = theirs.detach()
    let_go(fd)
    assert ours.recv(1) == b"", "the other end hears of it"
    assert os.fstat(fd).st_rdev == os.stat(os.devnull).st_rdev
    assert not os.get_inheritable(fd)
    os.close(fd)
    ours.close()
