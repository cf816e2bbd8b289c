# SPDX-License-Identifier: GPL-2.0-only
"""Options that several commands have."""

from collections.abc import Callable
from typing import Any

import rich_click as click

from dpud.errors import UserError


def machine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """What machine to emulate: shared by every command that may start a daemon."""
    config = click.option("--config", metavar="FILE", help="TOML file that describes the machine.")
    scenario = click.option(
        "--scenario", metavar="NAME|FILE", help="A machine with something going on; `dpud scenarios` lists them."
    )
    source = click.option(
        "--from", "source", metavar="host|DIR", help="Emulate this host, or one captured by `dpud snapshot`."
    )
    return config(scenario(source(command)))


def mount_option(text: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    return click.option("--mount", "mountpoint", metavar="DIR", help=text)


def run_options(mountpoint: str | None, config: str | None, scenario: str | None, source: str | None) -> list[str]:
    """The options to start a daemon with, checked before anything is started."""
    from dpud import scenario as scenarios

    given = {"--config": config, "--scenario": scenario, "--from": source}
    if mountpoint is not None and any(given.values()):
        raise UserError("--mount uses a daemon that is running: --config, --scenario and --from are for a new one")
    scenarios.load(config, scenario)
    return [word for option, value in given.items() if value is not None for word in (option, value)]
