# SPDX-License-Identifier: MIT
"""What a client may do with a page: read, write, execute.

As on the hardware, whoever may write may read: neither x86's nor a GPU's page tables can say "write only". Execute
alone is execute alone, as with memory protection keys (pkeys(7)); processors without them let it be read too.
"""

from enum import IntFlag

from kernelsim.attr import Flavour, Kind
from kernelsim.kinds import c_string, einval


class Permission(IntFlag):
    """Bits as in a file mode."""

    NONE = 0
    EXECUTE = 1
    WRITE = 2
    READ = 4

    def effective(self) -> "Permission":
        """What the hardware makes of it."""
        return self | Permission.READ if self & Permission.WRITE else self

    def __str__(self) -> str:
        return "".join(letter if self & bit else "-" for letter, bit in _LETTERS)


_LETTERS = (("r", Permission.READ), ("w", Permission.WRITE), ("x", Permission.EXECUTE))

READ, WRITE, EXECUTE = Permission.READ, Permission.WRITE, Permission.EXECUTE
READ_WRITE = READ | WRITE


def parse_permissions(text: str) -> Permission:
    """ "rw", "r--", "rwx", "---": letters in this order, each there, left out or a dash. Raises OSError(EINVAL)."""
    letters = [letter for letter in text if letter != "-"]
    if not text or len(text) > len(_LETTERS) or letters != [x for x, _ in _LETTERS if x in letters]:
        raise einval(f"{text!r} is not like rw-")
    if len(set(letters)) != len(letters):
        raise einval(f"{text!r} is not like rw-")
    granted = Permission.NONE
    for letter, bit in _LETTERS:
        if letter in letters:
            granted |= bit
    return granted.effective()


class Permissions(Kind[Permission]):
    """rwx letters; shown as `rw-`."""

    def parse(self, data: bytes, flavour: Flavour) -> tuple[Permission, int]:
        return parse_permissions(c_string(data).decode("latin-1").removesuffix("\n")), len(data)

    def describe(self) -> str:
        return "rwx letters, such as rw-"

    def legal(self) -> tuple[str, ...]:
        return "rw-\n", "r--", "rwx\n", "---"

    def illegal(self) -> tuple[str, ...]:
        return "\n", "wr\n", "rr\n", "rw-x\n", "7\n", "r w\n"
