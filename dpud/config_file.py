# SPDX-License-Identifier: GPL-2.0-only
"""/proc/dpud_config: what this machine was started with, as /proc/config.gz says what the kernel was built with."""

from dpud import config_text
from dpud.config import Config
from kernelsim.attr import Attr, Kobject, Text

NAME = "dpud_config"


class ConfigFile(Kobject):
    """One file, whose text does not change."""

    dpud_config = Attr(Text(), doc="The configuration that the daemon was started with: TOML, every key.", mode=0o444)

    def __init__(self, config: Config) -> None:
        self._text = config_text.toml(config)

    @dpud_config.show
    def _show(self) -> str:
        return self._text
