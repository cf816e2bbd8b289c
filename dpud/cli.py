# SPDX-License-Identifier: GPL-2.0-only
"""The command line.

What a command needs is imported inside it, so that `dpud --help` does not wait for numba.
"""

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import rich_click as click

from dpud import __version__, cli_look
from dpud.cli_options import machine_options, mount_option, run_options
from dpud.errors import UserError

EXIT_USER_ERROR = 2
FRAGMENT_PATTERNS = ("random", "runs", "fork", "pinned", "files")  # of dpud.fragment


def main() -> None:
    """Entry point of the `dpud` script. A user's mistake is one line on stderr and exit code 2."""
    try:
        sys.exit(cli(prog_name="dpud", standalone_mode=False))
    except UserError as error:
        problem = str(error)
    except click.ClickException as error:
        problem = error.format_message()
    except click.Abort:
        sys.exit(128 + signal.SIGINT)
    print(f"dpud: {problem}", file=sys.stderr)
    sys.exit(EXIT_USER_ERROR)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """An emulated Linux memory-management side and a DPU (processing in memory) that compacts it.

    All of it is worked through /proc and /sys files, with cat and echo.
    """


@cli.command()
@mount_option("Mount point; default /run/dpud for root, else $XDG_RUNTIME_DIR/dpud.")
@machine_options
@click.option("--recover", is_flag=True, help="Go on from what is whole of a damaged state directory.")
@click.option("--ready-fd", type=int, hidden=True)
@click.option("--parent", type=int, hidden=True)
def run(
    mountpoint: str | None,
    config: str | None,
    scenario: str | None,
    source: str | None,
    recover: bool,
    ready_fd: int | None,
    parent: int | None,
) -> None:
    """Serve the emulated files in the foreground, until SIGTERM or Ctrl-C."""
    from dpud import startup

    with startup.quick():
        from dpud import daemon
        from dpud import scenario as scenarios
        from dpud.config import combine, with_place

    read = scenarios.sources(config, scenario)
    options = daemon.RunOptions(combine(read), source, mountpoint, ready_fd, parent, recover)
    try:
        daemon.run(options)
    except UserError as error:
        raise UserError(with_place(str(error), read)) from error


@cli.command("reload")
@mount_option("Where the daemon is mounted; default as for `run`.")
@click.option("--config", metavar="FILE", help="The daemon's configuration file, as it is now.")
@click.option("--scenario", metavar="NAME|FILE", help="The scenario it was started with.")
def reload_(mountpoint: str | None, config: str | None, scenario: str | None) -> None:
    """Give a running daemon what of a changed configuration can change while it runs.

    Log level, sysctls and [files] are written where they differ. What else differs from the configuration that the
    daemon was started with needs a restart, and is named. All of it is said here and in the daemon's log.
    """
    from dpud import claim
    from dpud import reload as reloading
    from dpud import scenario as scenarios

    wanted = scenarios.load(config, scenario)
    path = mountpoint or wanted.mount.path or claim.default()
    for line in reloading.reload(path, wanted):
        click.echo(line)


@cli.command("service-mount", hidden=True)
@click.argument("directory", metavar="DIR")
def service_mount(directory: str) -> None:
    """Mount for the service that this is part of (ExecStartPre=)."""
    from dpud import service
    from fs.mountpoint import MountError

    try:
        service.hand_over(directory)
    except MountError as error:
        raise UserError(str(error)) from error


@cli.command("config")
@click.option("--config", metavar="FILE", help="TOML file that describes the machine.")
@click.option("--scenario", metavar="NAME|FILE", help="Begin with this scenario.")
@click.option("--comments", is_flag=True, help="Say above each key what it is for and what it may be.")
def config_(config: str | None, scenario: str | None, comments: bool) -> None:
    """Print the configuration that counts: every key with its value, as a file that reads back to the same."""
    from dpud import config_text
    from dpud import scenario as scenarios

    click.echo(config_text.toml(scenarios.load(config, scenario), comments), nl=False)


@cli.command("scenarios")
def scenarios_() -> None:
    """List the scenarios that come with dpud, a line each."""
    from dpud import scenario

    listed = list(scenario.listed())
    width = max(len(name) for name, _ in listed)
    for name, about in listed:
        click.echo(f"{name:{width}}  {about}")


@cli.command("exec", context_settings={"allow_interspersed_args": False})
@mount_option("Use the daemon running there, instead of starting one for CMD.")
@machine_options
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="-- CMD...")
def exec_(
    mountpoint: str | None, config: str | None, scenario: str | None, source: str | None, command: tuple[str, ...]
) -> None:
    """Run CMD where the real /proc and /sys paths show the emulated kernel.

    Covered with emulated files are /proc/sys/vm, /proc/buddyinfo, /proc/pagetypeinfo, /proc/vmstat,
    /proc/meminfo, /sys/devices/system/node, /sys/kernel/debug, /sys/kernel/config, /sys/class/dpu_rank,
    /dev/kmsg (for dmesg), and whatever else the emulation has in common with the real kernel.

    A covered directory shows only what is emulated: sysctls that the emulation lacks are not there. The bare
    tree is mounted at $DPUD_MOUNT.

    No root is needed where user namespaces are allowed; you are uid 0 inside, as with `unshare -r`.

    The exit code is CMD's: 127 if it is not found, 126 if it cannot be executed, 128 + N after signal N.
    """
    from dpud import exec as execution

    sys.exit(execution.run(command, mountpoint, run_options(mountpoint, config, scenario, source)))


@cli.command()
@mount_option("Use the daemon running there, instead of starting one.")
@machine_options
def shell(mountpoint: str | None, config: str | None, scenario: str | None, source: str | None) -> None:
    """Start your shell where the real /proc and /sys paths show the emulated kernel."""
    from dpud import exec as execution

    sys.exit(execution.shell(mountpoint, run_options(mountpoint, config, scenario, source)))


@cli.command()
@click.argument("directory", metavar="DIR")
@click.option("--compact", is_flag=True, help="Compact this host's real memory; DIR/before, DIR/after, DIR/result.txt.")
@click.option(
    "--fragment", type=click.Choice(FRAGMENT_PATTERNS), help="With --compact: fragment memory first, this way."
)
@click.option(
    "--mb", type=click.IntRange(1), default=1024, show_default=True, help="How much memory to fragment, in MiB."
)
@click.option("--keep", type=click.IntRange(1, 99), default=50, show_default=True, help="How many percent stay in use.")
@click.option("--as-is", is_flag=True, help="With --compact: do not sync and drain first.")
def snapshot(directory: str, compact: bool, fragment: str | None, mb: int, keep: int, as_is: bool) -> None:
    """Capture this host's memory layout into DIR, for `--from DIR`. Needs root.

    With --compact, capture it before and after a compaction by the real kernel, for `bench fidelity DIR`. Dirty pages
    are written back and the per-CPU page lists drained first, because no file shows what they do to a compaction.
    """
    if (fragment or as_is) and not compact:
        raise UserError(f"{'--fragment' if fragment else '--as-is'} is for --compact")
    with _capturing() as told:
        report = _captured(Path(directory), (fragment, mb, keep, as_is) if compact else None, told)
    click.echo(report)


@contextmanager
def _capturing() -> Iterator[Callable[[str, float], None]]:
    """A progress bar; whatever this host does not let itself be read for is the user's to know."""
    from rich.progress import Progress

    from dpud.proctext import CaptureError

    try:
        with Progress(transient=True) as progress:
            task = progress.add_task("Reading memory", total=1.0)
            show = partial(progress.update, task)

            def told(what: str, done: float) -> None:
                show(description=what, completed=done)

            yield told
    except CaptureError as error:
        raise UserError(str(error)) from error


def _captured(
    directory: Path, compact: tuple[str | None, int, int, bool] | None, progress: Callable[[str, float], None]
) -> object:
    """The report of a capture, or of one around a compaction."""
    from dpud import realcompact
    from dpud.snapshot import snapshot as capture

    if compact is None:
        return capture(directory, progress=progress)
    pattern, mb, keep, as_is = compact
    how = realcompact.Fragmentation(pattern, mb, keep) if pattern else None
    return realcompact.snapshot_compact(directory, how, as_is=as_is, progress=progress)


@cli.command("record", context_settings={"allow_interspersed_args": False})
@click.argument("directory", metavar="DIR")
@click.argument("command", nargs=-1, type=click.UNPROCESSED, metavar="[-- CMD...]")
@click.option("--seconds", type=click.FloatRange(0, min_open=True), help="How long, without CMD; else until Ctrl-C.")
@click.option(
    "--buffer", "buffer_mb", type=click.IntRange(1, 4096), default=32, show_default=True, help="MiB for each CPU."
)
def record_(directory: str, command: tuple[str, ...], seconds: float | None, buffer_mb: int) -> None:
    """Record this host's page allocations into DIR, while CMD runs, for `dpud replay DIR`. Needs root.

    DIR/before and DIR/after are captures as `dpud snapshot` makes them, DIR/trace.zst is between them. It is traced in
    an instance of its own, so other tracing goes on undisturbed, and nothing is left behind.

    The exit code is CMD's. Options come before DIR.
    """
    from dpud.record import Recording, record

    command = command[command[:1] == ("--",) :]
    if command and seconds is not None:
        raise UserError("--seconds is for recording without CMD")
    signal.signal(signal.SIGTERM, lambda signum, _frame: sys.exit(128 + signum))
    with _capturing() as told:
        report = record(Path(directory), Recording(command, seconds, buffer_mb), progress=told)
    click.echo(report)
    sys.exit(report.exit_code)


@cli.command("replay")
@click.argument("trace", metavar="DIR|TRACE")
@click.option("--from", "source", metavar="DIR", help="Capture to begin with; DIR/before of a recording.")
@click.option("--after", metavar="DIR", help="Capture to compare the end with; DIR/after of a recording.")
@click.option("--traditional", "compaction", flag_value="traditional", help="Have the kernel's own compaction run.")
@click.option("--dpu", "compaction", flag_value="dpu", help="Have compaction run that asks the DPU first.")
@click.option(
    "--compact-at", type=click.FloatRange(0), multiple=True, metavar="SECONDS", help="Also compact everything then."
)
@click.option(
    "--proactiveness", type=click.IntRange(0, 100), help="vm.compaction_proactiveness; 20 if left out, as on Linux."
)
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="Write all figures to it.")
def replay_(
    trace: str,
    source: str | None,
    after: str | None,
    compaction: str | None,
    compact_at: tuple[float, ...],
    proactiveness: int | None,
    json_file: Path | None,
) -> None:
    """Do a real machine's page allocations again in the emulated kernel, and show how fragmentation develops.

    DIR is what `dpud record` made. TRACE is the text of ftrace, `trace-cmd report` or `perf script` with
    kmem:mm_page_alloc and kmem:mm_page_free events, .zst or not; it needs --from.

    Without --traditional or --dpu the emulated machine does not compact.
    """
    from rich.console import Console
    from rich.progress import Progress

    from dpud import replay_report
    from dpud.replay import ReplayOptions, replay

    if compaction is None and (compact_at or proactiveness is not None):
        raise UserError("--compact-at and --proactiveness are for --traditional or --dpu")
    before, end = (None if folder is None else Path(folder) for folder in (source, after))
    options = ReplayOptions(Path(trace), before, end, compaction, compact_at, proactiveness)
    with Progress(transient=True, console=Console(stderr=True), disable=not sys.stderr.isatty()) as progress:
        task = progress.add_task("Replaying", total=1.0)
        outcome = replay(options, lambda done: progress.update(task, completed=done))
    Console(width=None if sys.stdout.isatty() else 110).print(replay_report.report(outcome), highlight=False)
    if json_file is not None:
        json_file.write_text(replay_report.as_json(outcome))


@cli.command()
@click.argument("name", required=False)
def demo(name: str | None) -> None:
    """Show a real machine's fragmented memory being compacted by the DPU, or another demo by its name.

    \b
    Of compaction: capture, process.
    Of GPU memory: compression, defrag, fault, migration, numa, overcommit, performance, qos, swap, unified.
    All of them: all.
    """
    from dpud import demo as demos

    sys.exit(demos.run(name))


@cli.command()
@click.argument("names", metavar="[NAME [DIR]...]...", nargs=-1)
@click.option("--write", type=click.Path(dir_okay=False, path_type=Path), help="Also write the tables to this file.")
@click.option(
    "--seed",
    type=click.IntRange(0),
    help="soak, kills, fuzz: what chance begins with; another one each time if left out.",
)
@click.option("--ops", type=click.IntRange(1), help="soak: how many operations, a million if left out; kills: 1000.")
@click.option("--inputs", type=click.IntRange(1), help="fuzz: how many inputs, ten million if left out.")
@click.option("--target", help="fuzz: only what is called so.")
@click.option(
    "--trace",
    "traces",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="gpu overcommit: a CSV log of RMM's logging adaptor, one for each client, instead of generated use.",
)
def bench(
    names: tuple[str, ...],
    write: Path | None,
    seed: int | None,
    ops: int | None,
    inputs: int | None,
    target: str | None,
    traces: tuple[Path, ...],
) -> None:
    """Measure, beside something real that does the same; all if none is named.

    There are region, node, compaction, fuse, import, pages, replay, service, terabyte and journal. Three go by models:
    tables holds these against published measurements, breakeven says when an engine gains, engines compares them all
    on the same memory.
    `fidelity DIR` compares the emulated compaction with a real one, captured by `dpud snapshot --compact DIR`.
    `gpu compression` is about compressed GPU memory; `gpu` alone runs all of its kind.
    Only run when named: soak, a long random test, kills, which kills a daemon 1000 times, and fuzz, ten million inputs
    that nobody would write.
    """
    from dpud import bench as benches

    sys.exit(benches.run(names, write, seed=seed, ops=ops, inputs=inputs, target=target, traces=traces))


@cli.command()
@click.option("--threads", type=click.IntRange(1, 256), default=4, show_default=True, help="Clients at work.")
@click.option("--duration", type=click.FloatRange(0.1), default=60.0, show_default=True, help="Seconds.")
@click.option("--size", type=click.IntRange(16), default=256, show_default=True, help="MiB that the clients use.")
@click.option(
    "--device",
    type=click.IntRange(8),
    help="MiB of the device; if left out a quarter of --size.",
)
@click.option("--no-compression", is_flag=True, help="Keep pages that leave the device as they are.")
@click.option("--no-swap", is_flag=True, help="No swap tiers; with --no-compression, a device that has room for all.")
@click.option("--seed", type=click.IntRange(0), help="What chance begins with; another one each time if left out.")
def stress(
    threads: int,
    duration: float,
    size: int,
    device: int | None,
    no_compression: bool,
    no_swap: bool,
    seed: int | None,
) -> None:
    """Use GPU memory at random, more of it than there is, and check every byte. Needs no daemon.

    The exit code is 1 if a byte was wrong, an operation took more than a second, or an invariant was violated. Ctrl-C
    ends it with a verdict of what was done, and 130.
    """
    from dpud import stress as stresses

    mib = 1 << 20
    device_bytes = None if device is None else device * mib
    options = stresses.Options(threads, duration, size * mib, device_bytes, not no_compression, not no_swap, seed)
    sys.exit(stresses.run(options))


@cli.command("dpu-path")
def dpu_path() -> None:
    """Print the folder that holds the `dpu` package of the UPMEM SDK's shape, for PYTHONPATH.

    PYTHONPATH=$(dpud dpu-path) python host.py runs a host program of the SDK over emulated DPUs.
    """
    click.echo(Path(__file__).parent / "dpu" / "shim")


@cli.command(hidden=True)
def warm() -> None:
    """Compile every loop once, into numba's cache (`make install` does it)."""
    from dpud import warm as loops

    loops.warm()


for _command in (cli_look.status, cli_look.top, cli_look.report, cli_look.diag, cli_look.journal):
    cli.add_command(_command)
