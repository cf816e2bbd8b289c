# SPDX-License-Identifier: GPL-2.0-only
"""Who may do what with a file or a directory: modes, owners and groups as the kernel has them, for each request anew.

Theory of operation
    The mount has `default_permissions`, so the kernel goes by mode, owner and group of a node before it asks us, with
    all that it knows of the caller. Here is the rest, by the credentials that come with a request:

    - what the kernel lets root do with any file, and its own file systems do not: sysctl knows no CAP_DAC_OVERRIDE, and
      sysfs opens a file only in directions for which it has a mode bit and a method;
    - sysctl asks at each read and write, so a descriptor that was handed to somebody else does not work there;
    - files of /proc/PID for which ptrace_may_access() is asked, whatever their mode says (Guard.PTRACE). Emulated
      processes are root's, so others may not open them;
    - changes of the tree and of modes are checked again. They are few, and a mount that lacks the option (some other
      program can make it) does not let everybody in.

    The owner is whoever runs the emulated kernel: its root. The host's root may do the same.

    A control group, where there is one, gets what a udev rule with GROUP= and MODE= would give it: each file that its
    owner may write, with the owner's rights; directories that take items of users; and the way into debugfs and
    tracefs, as their mount options gid= and mode=0750. Unlike on a kernel that includes sysctls. It leaves out what
    would make the daemon open files or sockets of its host (Guard.HOST): members would get what the daemon may. The
    bits are there from the first on, so a later chmod(2) takes them away.
"""

import errno

from fs.configfs import error
from fs.requests import Cred
from fs.rules import DIR_MODES, RULES
from kernelsim.attr import Attr, ConfigGroup, Dir, File, Flavour, Guard, Node, Registry

READ, WRITE, SEARCH = 4, 2, 1  # permission bits of one class
_OWNER, _GROUP = 0o700, 0o070


class Access:
    """Of one tree.

    uid, gid        owner of all nodes, and their group
    control_gid     group of what its members control; None: there is no such group
    """

    def __init__(self, registry: Registry, uid: int, gid: int, control_gid: int | None = None) -> None:
        self.uid = uid
        self._gid = gid
        self._control_gid = control_gid
        if control_gid is not None:
            registry.mode_of = mode_for_controllers
            for node in registry.nodes.values():
                if isinstance(node, File):
                    node.mode = mode_for_controllers(node.attr)

    def is_owner(self, cred: Cred) -> bool:
        return cred.uid in (0, self.uid)

    def gid(self, node: Node) -> int:
        """Its group."""
        if self._control_gid is not None and _is_controlled(node):
            return self._control_gid
        return self._gid

    def dir_mode(self, directory: Dir) -> int:
        """Permission bits of a directory."""
        mode = DIR_MODES.get(directory.path, RULES[directory.flavour].dir_mode)
        if self._control_gid is None or not _is_controlled(directory):
            return mode
        return mode | (WRITE << 3 if _takes_items(directory) else (READ | SEARCH) << 3)

    def rights(self, file: File) -> tuple[int, int]:
        """What the owner and root may open a file for, and what everybody may: READ and WRITE."""
        openable = self.openable(file)
        by_owner = file.mode >> 6 if file.flavour is Flavour.SYSCTL else READ | WRITE
        by_anyone = 0 if file.attr.guard is Guard.PTRACE else file.mode & file.mode >> 3 & file.mode >> 6
        return openable & by_owner, openable & by_anyone

    def openable(self, file: File) -> int:
        """Directions that open(2) lets anybody have."""
        if not RULES[file.flavour].open_needs_method:
            return READ | WRITE
        readable = READ if file.mode & 0o444 and file.attr.readable else 0
        return readable | (WRITE if file.mode & 0o222 and file.attr.writable else 0)

    def may_open(self, file: File, cred: Cred, access: int) -> bool:
        """The mode bits for `cred`, and what else open(2) asks."""
        if file.attr.guard is Guard.PTRACE and not self.is_owner(cred):
            return False
        return self.permits(file, cred, access)

    def permits(self, file: File, cred: Cred, access: int) -> bool:
        """The mode bits for `cred`. In /proc/sys root has just the owner's bits, no CAP_DAC_OVERRIDE."""
        is_owner = self.is_owner(cred)
        if is_owner and file.flavour is not Flavour.SYSCTL:
            return True
        bits = file.mode >> 6 if is_owner else self._bits_of_others(file, file.mode, cred, access)
        return not access & ~bits

    def check_items(self, directory: Node | None, cred: Cred) -> None:
        """May items of a directory be made and removed? Raises EACCES."""
        if not isinstance(directory, Dir) or not _takes_items(directory) or self.is_owner(cred):
            return
        access = WRITE | SEARCH
        if access & ~self._bits_of_others(directory, self.dir_mode(directory), cred, access):
            raise error(errno.EACCES, directory.path)

    def check_owner(self, node: Node, cred: Cred) -> None:
        """Only the owner changes modes. Raises EPERM."""
        if not self.is_owner(cred):
            raise error(errno.EPERM, node.path)

    def _bits_of_others(self, node: Node, mode: int, cred: Cred, access: int) -> int:
        """The class that somebody who is not the owner is in; groups are asked for only if that matters."""
        if (mode >> 3 ^ mode) & access and cred.in_group(self.gid(node)):
            return mode >> 3
        return mode


def mode_for_controllers(attr: Attr[object]) -> int:
    """A file's mode where there is a control group."""
    return attr.mode | (attr.mode & _OWNER) >> 3 if _is_control(attr) else attr.mode


def _is_control(attr: Attr[object]) -> bool:
    return attr.writable and bool(attr.mode & 0o200) and attr.guard is not Guard.HOST


def _is_controlled(node: Node) -> bool:
    """Is it something for the control group?"""
    if isinstance(node, File):
        return _is_control(node.attr)
    return isinstance(node, Dir) and (_takes_items(node) or DIR_MODES.get(node.path, _GROUP) & _GROUP == 0)


def _takes_items(directory: Dir) -> bool:
    return any(isinstance(kobj, ConfigGroup) for kobj in directory.kobjs)
