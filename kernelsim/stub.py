# SPDX-License-Identifier: GPL-2.0-only
"""Files that readers expect and that are not simulated, and say so."""

from kernelsim.attr import Attr, Text


class Stub(Attr[str]):
    """Fixed text, and the reason why."""

    def __init__(self, text: str, *, reason: str, name: str | None = None, mode: int = 0o444) -> None:
        super().__init__(Text(), doc=f"Not simulated: {reason}", name=name, mode=mode)
        self.reason = reason
        self._show = lambda _kobj: text
