# SPDX-License-Identifier: GPL-2.0-only
"""The configuration's [mount]: where the files are, who may use them, who serves them. See config.py."""

import grp
from typing import Annotated, Literal

from msgspec import Meta, Struct


def about(text: str) -> Meta:
    """What a key means, for the manual page."""
    return Meta(description=text)


_MAX_ID = 2**32 - 2  # the last one is (gid_t)-1, which means none


class Mount(Struct, frozen=True, forbid_unknown_fields=True):
    path: Annotated[str | None, about("Mount point; what `--mount` says goes before it.")] = None
    allow_other: Annotated[
        bool | None, about("Other users may look; unless you are root, needs user_allow_other in /etc/fuse.conf.")
    ] = None
    control_group: Annotated[
        str | int,
        about(
            "Group, by name or number, whose members may do what the owner may with all files that can be written, "
            'make items in configfs, and enter debugfs and tracefs; "": none.'
        ),
    ] = ""
    server: Annotated[
        Literal["dev", "libfuse"],
        about("Speak FUSE to /dev/fuse directly, or through mfusepy or fusepy, which is several times slower."),
    ] = "dev"
    nice: Annotated[
        int,
        Meta(ge=-20, le=19),
        about("Priority of the daemon, as of nice(1), where it may have it: all who use its files wait for it."),
    ] = -10

    def __post_init__(self) -> None:
        group = self.control_group
        if isinstance(group, int) and not 0 <= group <= _MAX_ID:
            raise ValueError(f"control_group = {group} is not a group's number: 0..{_MAX_ID}")
        if group != "" and self.allow_other is False:
            raise ValueError(f"control_group = {group!r} has no way in without allow_other")

    def control_gid(self) -> int | None:
        """The number of the control group; None if there is none. Raises ValueError if this host does not know it."""
        group = self.control_group
        if isinstance(group, int) or not group:
            return None if group == "" else int(group)
        try:
            return grp.getgrnam(group).gr_gid
        except (KeyError, ValueError) as error:  # a name with NUL in it is the latter
            raise ValueError(f"no group {group!r} on this host") from error
