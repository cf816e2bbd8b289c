# SPDX-License-Identifier: GPL-2.0-only
"""`dpud reload`: give a running daemon what of a changed configuration can change while it runs.

Settings (the log level, sysctls, other files) are files of the daemon's tree, so they are written there, where the file
does not say the same already. A machine and its devices are built once: what differs from /proc/dpud_config in the
other tables needs a restart, and is named.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from dpud import config
from dpud.config import Config
from dpud.config_file import NAME
from dpud.errors import UserError

_LIVE = {"log", "sysctl", "files"}
_NOT_THE_MACHINE = {"scenario"}


def reload(mountpoint: str, wanted: Config) -> list[str]:
    """Write what can be -> a line for each thing that was done, or needs a restart. Raises UserError.

    Every setting is tried. What was taken stays, should another one be refused.
    """
    root = Path(mountpoint)
    report: list[str] = []
    refused: list[str] = []
    for path, (key, text) in wanted.settings.items():
        try:
            report += _set(root / path.lstrip("/"), key, text)
        except OSError as error:
            refused.append(f"{key}: {path}: {error.strerror}")
    report += [f"{key}: needs a restart" for key in differing(_running(root), wanted)]
    _log(root, [*report, *refused])
    if refused:
        raise UserError("; ".join(refused))
    return report


def _set(file: Path, key: str, text: str) -> Iterator[str]:
    """Write, and say so; nothing if the file has that value. One that cannot be read is written every time."""
    try:
        before = file.read_text().split()
    except PermissionError:
        before = []
    if before[: len(text.split())] == text.split():
        return
    with file.open("w") as opened:
        opened.write(text)
    yield f"{key}: {' '.join(before)} -> {text}" if before else f"{key}: {text}"


def _running(root: Path) -> Config:
    try:
        return config.parse((root / "proc" / NAME).read_text(), NAME)
    except OSError as error:
        raise UserError(f"no dpud answers at {root}: {error.strerror}") from error


def differing(running: Config, wanted: Config) -> list[str]:
    """Keys, of what cannot change while a machine runs, that are not the same in both."""
    tables = [name for name in Config.__struct_fields__ if name not in _LIVE | _NOT_THE_MACHINE]
    return [key for name in tables for key in _differing(name, getattr(running, name), getattr(wanted, name))]


def _differing(name: str, one: Any, other: Any) -> Iterator[str]:
    if isinstance(one, msgspec.Struct):
        for key in one.__struct_fields__:
            yield from _differing(f"{name}.{key}", getattr(one, key), getattr(other, key))
    elif one != other:
        yield name


def _log(root: Path, lines: list[str]) -> None:
    """Into the machine's own log, as a line each."""
    for line in lines or ["nothing to change"]:
        with (root / "dev/kmsg").open("w") as kmsg:
            kmsg.write(f"<6>dpud: reload: {line}")
