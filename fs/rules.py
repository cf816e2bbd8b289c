# SPDX-License-Identifier: GPL-2.0-only
"""What the kernel file systems differ in: one row per flavour of pseudo-file.

Sources: reference/kernel-abi.md sections 1 and 5, and the running 6.18 kernel where it could be asked
(the tests marked `host` ask again). debugfs and configfs rows follow fs/debugfs and fs/configfs of 6.12.
"""

import errno
from dataclasses import dataclass

from kernelsim.attr import PAGE_SIZE, Flavour


@dataclass(frozen=True)
class Rules:
    """Sizes, modes and error numbers of one flavour."""

    file_size: int
    """st_size of every regular file that is not a stream."""
    blksize: int
    dir_mode: int
    write_window: int | None
    """Bytes that one write(2) can carry; a longer one is a short write."""
    open_needs_method: bool
    """open(2) for a direction without mode bits or method is EACCES, root included."""
    no_read: int
    """read(2) of a file that has nothing to show, where open let it through."""
    no_write: int
    gone: int
    """Any access through an open file whose attribute was removed."""
    create: int
    """open(2) with O_CREAT of a name that is not there."""
    make: int
    """mkdir, mknod, symlink, link and rename where nothing can be made."""
    remove: int
    """unlink, and rmdir of a directory that nobody made by mkdir."""
    has_fsync: bool = False
    """fsync(2) of a file does nothing, successfully; else it is EINVAL."""
    has_dir_fsync: bool = False
    """The same of a directory."""
    has_name_max: bool = False
    """A name of more than 255 bytes is ENAMETOOLONG (simple_lookup); else it is just not there."""
    poll_tells_changes: bool = False
    """poll(2) says POLLERR and POLLPRI until the file was read (kernfs_generic_poll)."""
    counts_subdirs: bool = True
    """nlink of a directory is 2 and one per subdirectory; else 1."""


RULES = {
    Flavour.SYSCTL: Rules(
        file_size=0,
        blksize=1024,
        dir_mode=0o555,
        write_window=None,
        open_needs_method=False,
        no_read=errno.EIO,
        no_write=errno.EIO,
        gone=errno.ENOENT,
        create=errno.ENOENT,
        make=errno.ENOENT,
        remove=errno.EACCES,
        counts_subdirs=False,
    ),
    Flavour.PROC: Rules(
        file_size=0,
        blksize=1024,
        dir_mode=0o555,
        write_window=None,
        open_needs_method=False,
        no_read=errno.EIO,
        no_write=errno.EIO,
        gone=errno.ESRCH,
        create=errno.ENOENT,
        make=errno.ENOENT,
        remove=errno.EPERM,
    ),
    Flavour.SYSFS: Rules(
        file_size=PAGE_SIZE,
        blksize=PAGE_SIZE,
        dir_mode=0o755,
        write_window=PAGE_SIZE,
        open_needs_method=True,
        no_read=errno.EIO,
        no_write=errno.EIO,
        gone=errno.ENODEV,
        create=errno.EACCES,
        make=errno.EPERM,
        remove=errno.EPERM,
        has_fsync=True,
        poll_tells_changes=True,
    ),
    Flavour.CONFIGFS: Rules(
        file_size=PAGE_SIZE,
        blksize=PAGE_SIZE,
        dir_mode=0o755,
        write_window=PAGE_SIZE - 1,
        open_needs_method=True,
        no_read=errno.EIO,
        no_write=errno.EIO,
        gone=errno.ENOENT,
        create=errno.EACCES,
        make=errno.EPERM,
        remove=errno.EPERM,
        has_name_max=True,
    ),
    Flavour.DEBUGFS: Rules(
        file_size=0,
        blksize=PAGE_SIZE,
        dir_mode=0o755,
        write_window=None,
        open_needs_method=False,
        no_read=errno.EACCES,
        no_write=errno.EINVAL,
        gone=errno.EIO,
        create=errno.EACCES,
        make=errno.EPERM,
        remove=errno.EPERM,
        has_dir_fsync=True,
        has_name_max=True,
    ),
    Flavour.DEV: Rules(
        file_size=0,
        blksize=PAGE_SIZE,
        dir_mode=0o755,
        write_window=None,
        open_needs_method=False,
        no_read=errno.EACCES,
        no_write=errno.EINVAL,
        gone=errno.ENODEV,
        create=errno.EACCES,
        make=errno.EPERM,
        remove=errno.EPERM,
    ),
}

DIR_MODES = {"/sys": 0o555, "/sys/kernel/debug": 0o700, "/sys/kernel/tracing": 0o700}
"""Mount points whose root differs from the directories below it."""
