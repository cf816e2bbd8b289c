# SPDX-License-Identifier: GPL-2.0-only
"""Scenarios: named machines with something going on in them, as configuration files that come with dpud.

`dpud run --scenario NAME` takes the file of that name in dpud/scenarios, or any other file by its path. What
`--config` says goes above it, key by key.
"""

from collections.abc import Iterator
from pathlib import Path

from dpud import config
from dpud.config import Config, ConfigError, Source

FOLDER = Path(__file__).parent / "scenarios"


def names() -> list[str]:
    """Of those that come with dpud."""
    return sorted(path.stem for path in FOLDER.glob("*.toml"))


def listed() -> Iterator[tuple[str, str]]:
    """(name, one line on it) of each."""
    for name in names():
        yield name, config.load(FOLDER / f"{name}.toml").scenario.about


def sources(config_file: str | None, scenario: str | None) -> list[Source]:
    """What was read for the two options. Raises ConfigError."""
    files = [*([_file(scenario)] if scenario is not None else []), *([Path(config_file)] if config_file else [])]
    return [config.read(path) for path in files]


def load(config_file: str | None, scenario: str | None) -> Config:
    """The configuration that the two options ask for. Raises ConfigError."""
    return config.combine(sources(config_file, scenario))


def _file(scenario: str) -> Path:
    """Of a name, or of a path, which has a slash or ends with .toml."""
    if "/" in scenario or scenario.endswith(".toml"):
        return Path(scenario)
    if scenario not in names():
        raise ConfigError(f"no scenario {scenario}: there are {', '.join(names())}, or give the path of a file")
    return FOLDER / f"{scenario}.toml"
