# SPDX-License-Identifier: GPL-2.0-only
"""Commands that look at a machine: status, top, report, diag, journal."""

import os
import sys
from pathlib import Path

import rich_click as click

from dpud.cli_options import machine_options, mount_option, run_options
from dpud.errors import UserError


@click.command()
@mount_option("Where the daemon is mounted; default as for `run`.")
@click.option("--json", "as_json", is_flag=True, help="For programs; docs/status.schema.json has the keys.")
def status(mountpoint: str | None, as_json: bool) -> None:
    """Show free memory, the DPU's work, GPUs and the settings of a running daemon."""
    import json

    from rich.console import Console

    from dpud import status as reports

    path = _live(mountpoint)
    if as_json:
        click.echo(json.dumps(reports.as_data(path), indent=2))
    else:
        Console().print(reports.report(path))


@click.command()
@mount_option("Where the daemon is mounted; default as for `run`.")
@click.option("--once", is_flag=True, help="Print it once, as is done where stdout is no terminal.")
@click.option(
    "--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds between two looks."
)
def top(mountpoint: str | None, once: bool, interval: float) -> None:
    """Watch a running daemon: pageblocks, free blocks, engine, GPUs; keys compact the node shown.

    It reads the daemon's files, as any program could. The map is made of /proc/kpageflags, which only the user who runs
    the daemon can read.
    """
    from dpud import top as live

    path = _live(mountpoint)
    if once or not (sys.stdin.isatty() and sys.stdout.isatty()):
        live.once(path)
    else:
        live.live(path, interval)


@click.command()
@click.argument("out", metavar="OUT.html", type=click.Path(dir_okay=False, path_type=Path))
@mount_option("Report on the daemon running there, instead of on one started for it.")
@click.option("--compact", is_flag=True, help="With --mount: compact its nodes with the DPU first.")
@machine_options
def report(
    out: Path, mountpoint: str | None, compact: bool, config: str | None, scenario: str | None, source: str | None
) -> None:
    """Write an HTML file about a machine: pageblocks before and after, contiguity, latencies, engines, GPUs.

    Without --mount a machine is started, compacted with the DPU, and ended: the one described by --config,
    --scenario or --from, else a small one with a fragmented process and a GPU that has more clients than memory.
    """
    from dpud import report as reports

    if compact and mountpoint is None:
        raise UserError("--compact is for --mount: a machine started for the report is always compacted")
    options = run_options(mountpoint, config, scenario, source)
    if mountpoint is not None:
        reports.of_mount(out, _live(mountpoint), compact)
    else:
        sys.exit(reports.of_own(out, options))


def _live(mountpoint: str | None) -> str:
    """Where the daemon is that a command is about. Raises UserError if none answers there."""
    from dpud import claim
    from dpud import exec as execution

    path = mountpoint or os.environ.get(execution.MOUNT_VARIABLE) or claim.default()
    execution.check_live(path)
    return path


@click.command()
@mount_option("Where the daemon is mounted; default as for `run`.")
def diag(mountpoint: str | None) -> None:
    """Show the DPU ranks of a running daemon, who has them, and which of their batches failed."""
    from rich.console import Console

    from dpud import diag as reports

    Console().print(reports.report(_live(mountpoint)))


@click.group()
def journal() -> None:
    """Look into a state directory: what a daemon with `state.directory` has written down."""


@journal.command("show")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def journal_show(directory: Path) -> None:
    """Print its records, one a line: number, kind, operation, request, `->` what it came to.

    `...` says that the operation goes on in a later record. In brackets is how many values were read from outside.
    """
    from dpud import journal_show as shown

    for path in shown.files_of(directory):
        for line in shown.lines(shown.reader_of(path)):
            click.echo(line)
    for line in shown.stored_lines(directory):
        click.echo(line)


@journal.command("verify")
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
def journal_verify(directory: Path) -> None:
    """Check every record, of checkpoints too. The exit code is 1 if one is torn or damaged."""
    from dpud import journal_show as shown

    found = list(shown.verdicts(directory))
    for text, _ in found:
        click.echo(text)
    sys.exit(0 if all(is_whole for _, is_whole in found) else 1)
