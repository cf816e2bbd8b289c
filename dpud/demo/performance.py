# SPDX-License-Identifier: GPL-2.0-only
"""The scene `dpud demo performance`: what each stage of the data path costs here, beside a plain file in memory."""

import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Table

from dpud.bench.gpu import corpora
from dpud.demo.document import bars, document
from dpud.demo.shell import Shell

GPU = "/sys/class/gpu_memvirt/gpu0"
BUFFERS = "/sys/kernel/config/gpu_memvirt/gpu0/clients/train/buffers"
MIB = 1 << 20
NR_MIB = 48
PIECE = 1 * MIB


@dataclass(frozen=True)
class Figure:
    """One stage, timed."""

    name: str
    mb_per_s: float


def play(console: Console) -> None:
    console.rule("What each stage of the data path costs")
    shell = Shell(console)
    shell.say(
        f"{NR_MIB} MiB of bfloat16 weights go through the stages of a simulated GPU's memory, in pieces of 1 MiB; a "
        "plain file in memory (tmpfs) is what to compare with. Times are those of this program on this machine, the "
        "larger part of them Python's. What a device would take is modelled, and not what is shown here."
    )
    data = corpora.CORPORA["bf16 weights"](NR_MIB * MIB)
    shell.cd(BUFFERS.removesuffix("/train/buffers"))
    shell.sh(
        f"mkdir train train/buffers/b; echo 64K > train/buffers/b/page_size; echo {NR_MIB}M > train/buffers/b/size"
    )
    figures = list(_timed(console, data))
    _show(console, figures)
    shell.say("Bytes by what they moved for, and how pages came to where they were needed:")
    shell.sh(f"cat {GPU}/qos/traffic; grep -v ' 0$' {GPU}/address_space/fault_stat; cat {GPU}/compression/codecs")
    shell.sh(f"cat {GPU}/address_space/verify")
    file = Path(tempfile.mkdtemp(prefix="dpud-demo-performance-")) / "performance.html"
    file.write_text(picture(figures))
    shell.say(f"The same as a picture: {file}")


def _timed(console: Console, data: bytes) -> list[Figure]:
    """Every stage once, with a bar on a terminal."""
    buffer = f"{BUFFERS}/b"
    figures: list[Figure] = []
    with tempfile.TemporaryDirectory(prefix="dpud-demo-", dir="/dev/shm") as folder:
        plain = f"{folder}/plain"
        Path(plain).touch()
        stages: list[tuple[str, Callable[[], None]]] = [
            ("plain file: write", lambda: _write(plain, data)),
            ("plain file: read", lambda: _read(plain, data)),
            ("first write: zeroed frames", lambda: _write(f"{buffer}/data", data)),
            ("write again", lambda: _write(f"{buffer}/data", data)),
            ("read", lambda: _read(f"{buffer}/data", data)),
            ("leave the device: compress", lambda: _echo(f"{buffer}/reclaim", f"{NR_MIB}M")),
            ("read back: decompress", lambda: _read(f"{buffer}/data", data)),
        ]
        columns = TextColumn("{task.description}"), BarColumn()
        with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
            task = progress.add_task("", total=len(stages))
            for name, stage in stages:
                progress.update(task, description=name)
                begin = time.perf_counter()
                stage()
                figures.append(Figure(name, len(data) / 1e6 / (time.perf_counter() - begin)))
                progress.advance(task)
    return figures


def _echo(path: str, text: str) -> None:
    Path(path).write_text(text)


def _write(path: str, data: bytes) -> None:
    fd = os.open(path, os.O_WRONLY)
    try:
        for at in range(0, len(data), PIECE):
            assert os.pwrite(fd, data[at : at + PIECE], at) == PIECE
    finally:
        os.close(fd)


def _read(path: str, data: bytes) -> None:
    """Raises OSError where a byte is not the one that was written."""
    fd = os.open(path, os.O_RDONLY)
    try:
        for at in range(0, len(data), PIECE):
            if os.pread(fd, PIECE, at) != data[at : at + PIECE]:
                raise OSError(f"{path} has other bytes at {at}")
    finally:
        os.close(fd)


def _show(console: Console, figures: list[Figure]) -> None:
    table = Table("Stage", title="Throughput, one client, one thread", title_justify="left")
    table.add_column("MB/s", justify="right")
    table.add_column("of a plain file", justify="right")
    for figure, peer in _beside(figures):
        table.add_row(figure.name, f"{figure.mb_per_s:,.0f}", f"{100 * figure.mb_per_s / peer.mb_per_s:.0f} %")
    console.print(table)


def _beside(figures: list[Figure]) -> list[tuple[Figure, Figure]]:
    """Each stage and the plain file's that does the same."""
    write, read = figures[:2]
    return [(figure, read if "read" in figure.name else write) for figure in figures]


def picture(figures: list[Figure]) -> str:
    """Bars, as one HTML file."""
    rows = [(figure.name, [(figure.mb_per_s, "#2563eb", figure.name)], f"{figure.mb_per_s:,.0f}") for figure in figures]
    return document("Throughput of each stage, MB/s", bars(rows))
