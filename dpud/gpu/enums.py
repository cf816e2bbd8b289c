# SPDX-License-Identifier: MIT
"""Enums that are asked for on each access.

Python 3.11 finds `Kind.MEMBER` by calling a method of the metaclass, which takes twenty times as long as an attribute
(later versions do not). One fault asks a dozen times.
"""

from enum import Enum
from typing import TypeVar

E = TypeVar("E", bound=type[Enum])


def plain_members(kind: E) -> E:
    """Class decorator: members are plain attributes of the class."""
    for member in kind:
        type.__setattr__(kind, member.name, member)
    return kind
