# SPDX-License-Identifier: GPL-2.0-only
"""Numbers and layouts of the FUSE protocol, version 7.31 (include/uapi/linux/fuse.h).

Every request begins with IN_HEADER, every reply with OUT_HEADER; what follows depends on the opcode. All of it is in
the byte order of the machine, without gaps that struct would not make by itself.
"""

from enum import IntEnum
from struct import Struct

VERSION = (7, 31)


class Opcode(IntEnum):
    """Requests that are answered; all others are ENOSYS."""

    LOOKUP = 1
    FORGET = 2
    GETATTR = 3
    SETATTR = 4
    READLINK = 5
    SYMLINK = 6
    MKNOD = 8
    MKDIR = 9
    UNLINK = 10
    RMDIR = 11
    RENAME = 12
    LINK = 13
    OPEN = 14
    READ = 15
    WRITE = 16
    STATFS = 17
    RELEASE = 18
    FSYNC = 20
    LISTXATTR = 23
    INIT = 26
    OPENDIR = 27
    READDIR = 28
    RELEASEDIR = 29
    FSYNCDIR = 30
    CREATE = 35
    INTERRUPT = 36
    DESTROY = 38
    POLL = 40
    BATCH_FORGET = 42
    RENAME2 = 45


IN_HEADER = Struct("=IIQQIII3xB")  # len, opcode, unique, nodeid, uid, gid, pid, and of the padding what is ours
MARK_AT = IN_HEADER.size - 1
"""The octet of the padding in which fuse_turn.py marks a request whose caller was interrupted."""
OUT_HEADER = Struct("=IiQ")  # len, -errno, unique

INIT_IN = Struct("=IIII")  # major, minor, max_readahead, flags
INIT_OUT = Struct("=IIIIHHIIHH32x")
"""major, minor, max_readahead, flags, max_background, congestion_threshold, max_write, time_gran, max_pages, padding"""
ATTR = Struct("=QQQQQQIIIIIIIIII")
"""ino, size, blocks, atime, mtime, ctime, their nanoseconds, mode, nlink, uid, gid, rdev, blksize, flags"""
ENTRY_OUT = Struct("=QQQQII")  # nodeid, generation, entry_valid, attr_valid, their nanoseconds; then ATTR
ATTR_OUT = Struct("=QII")  # attr_valid, its nanoseconds, padding; then ATTR
OPEN_IN = Struct("=II")  # flags, open_flags
OPEN_OUT = Struct("=QII")  # fh, open_flags, padding
READ_IN = Struct("=QQIIQI4x")  # fh, offset, size, read_flags, lock_owner, flags
WRITE_IN = READ_IN  # fh, offset, size, write_flags, lock_owner, flags; then the data
WRITE_OUT = Struct("=II")  # size, padding
RELEASE_IN = Struct("=Q")  # fh; what follows is of no use here
SETATTR_IN = Struct("=I64xI4xII4x")
"""valid, mode, uid, gid; times and size are of no use here"""
GETATTR_IN = Struct("=I")  # getattr_flags; what follows is of no use here
GETXATTR_IN = Struct("=II")  # size, padding
GETXATTR_OUT = Struct("=II")  # size, padding
POLL_IN = Struct("=QQII")  # fh, kh, flags, events
POLL_OUT = Struct("=II")  # revents, padding
NOTIFY_POLL_OUT = Struct("=Q")  # kh
NOTIFY_STORE_OUT = Struct("=QQII")  # nodeid, offset, size, padding; then the data
MKNOD_IN = Struct("=II")  # mode, rdev; what follows is of no use here
STATFS_OUT = Struct("=QQQQQIII28x")  # blocks, bfree, bavail, files, ffree, bsize, namelen, frsize
DIRENT = Struct("=QQII")  # ino, offset of the next, length of the name, type; then the name, up to a multiple of 8
INTERRUPT_IN = Struct("=Q")  # unique of the request
FORGET_IN = Struct("=Q")  # lookups to forget
BATCH_FORGET_IN = Struct("=II")  # count, padding; then as many FORGET_ONE
FORGET_ONE = Struct("=QQ")  # nodeid, lookups

NAME_AT = {
    Opcode.LOOKUP: 0,
    Opcode.UNLINK: 0,
    Opcode.RMDIR: 0,
    Opcode.SYMLINK: 0,
    Opcode.MKDIR: 8,
    Opcode.MKNOD: 16,
    Opcode.LINK: 8,
    Opcode.CREATE: 16,
    Opcode.RENAME: 8,
    Opcode.RENAME2: 16,
}
"""Where the name begins, behind the header."""

SHORTEST = {
    Opcode.FORGET: FORGET_IN.size,
    Opcode.GETATTR: GETATTR_IN.size,
    Opcode.SETATTR: SETATTR_IN.size,
    Opcode.OPEN: OPEN_IN.size,
    Opcode.READ: READ_IN.size,
    Opcode.WRITE: WRITE_IN.size,
    Opcode.RELEASE: RELEASE_IN.size,
    Opcode.LISTXATTR: GETXATTR_IN.size,
    Opcode.INIT: INIT_IN.size,
    Opcode.READDIR: READ_IN.size,
    Opcode.RELEASEDIR: RELEASE_IN.size,
    Opcode.INTERRUPT: INTERRUPT_IN.size,
    Opcode.POLL: POLL_IN.size,
    Opcode.BATCH_FORGET: BATCH_FORGET_IN.size,
    **NAME_AT,
}
"""Bytes behind the header that a request has at least; 0 where it is not named. The kernel never sends fewer."""

MAX_POSITION = 2**63 - 1
"""Of a file: loff_t is signed."""

# Flags of INIT.
ASYNC_READ, ATOMIC_O_TRUNC, BIG_WRITES, PARALLEL_DIROPS, MAX_PAGES = 1 << 0, 1 << 3, 1 << 5, 1 << 18, 1 << 22

# Of the reply to OPEN.
FOPEN_DIRECT_IO, FOPEN_NOFLUSH = 1 << 0, 1 << 5

# Of SETATTR.
FATTR_MODE, FATTR_UID, FATTR_GID, FATTR_SIZE = 1 << 0, 1 << 1, 1 << 2, 1 << 3

GETATTR_FH = 1 << 0
POLL_SCHEDULE_NOTIFY = 1 << 0

# Codes of messages that no request asked for; they stand where a reply has its error.
NOTIFY_POLL, NOTIFY_STORE = 1, 4

ROOT_ID = 1
"""nodeid of the root directory."""
