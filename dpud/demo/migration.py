# SPDX-License-Identifier: GPL-2.0-only
"""The scene `dpud demo migration`: memory moves to another GPU, and to another daemon, while it is used."""

import os
import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import track

from dpud.bench.gpu.migration import RATIOS, SENDING_PAGES_PER_S, STOP_SHARE, simulate
from dpud.demo.chart import Curve, page
from dpud.demo.second import OTHER
from dpud.demo.shell import Shell
from dpud.gpu.migration.converge import rounds

MIGRATION = "/sys/class/gpu_memvirt/gpu0/migration"
CLIENTS = "/sys/kernel/config/gpu_memvirt/gpu0/clients"
MIB = 1 << 20
_SIZE_MIB = 16
_NR_PAGES = 2048
_COLUMNS = "cut -d' ' -f2-6,8,10,13- progress | column -t"
_WAIT = "while grep -qE 'setup|active|device' state; do sleep 0.05; done"


def play(console: Console) -> None:
    console.rule("Memory that moves while it is used")
    shell = Shell(console)
    with tempfile.TemporaryDirectory(prefix="dpud-demo-") as folder:
        file = Path(folder, "weights")
        file.write_bytes(np.random.default_rng(1).bytes(_SIZE_MIB * MIB))
        _between_gpus(shell, file)
        _between_daemons(shell, Path(folder), Path(os.environ[OTHER]))
    _picture(shell)


def _between_gpus(shell: Shell, file: Path) -> None:
    shell.say(
        f"Two simulated GPUs of 32 MiB. A client of the first one has {_SIZE_MIB} MiB and goes on writing to them; no "
        "more than 20 MB/s may go over, so that there is something to see."
    )
    shell.cd(CLIENTS)
    shell.sh(
        "mkdir train train/buffers/weights; cd train/buffers/weights; "
        f"echo {_SIZE_MIB}M > size; dd if={file} of=data bs=1M 2>/dev/null; grep on_device state"
    )
    shell.sh(
        "(for i in $(seq 150); do echo step $i; sleep 0.01; done | dd of=train/buffers/weights/data bs=16 conv=notrunc "
        f"2>/dev/null) >/dev/null 2>&1 & echo $! > {file}.pid"
    )
    shell.cd(MIGRATION)
    shell.sh("echo precopy > strategy; echo 20M > bandwidth_limit; echo 'client=train device=1' > start")
    shell.sh(f"for i in 1 2 3; do sleep 0.2; {_COLUMNS}; done")
    shell.sh(f"{_WAIT}; while kill -0 $(cat {file}.pid) 2>/dev/null; do sleep 0.1; done")
    shell.sh(f"{_COLUMNS}; cat digest; grep on_device {CLIENTS}/train/buffers/weights/state")
    shell.say("The client was held for the last column's milliseconds. Every invariant holds, and the bytes are there:")
    shell.sh(
        f"cat ../address_space/verify; tail -c +65537 {file} | sha256sum; "
        f"tail -c +65537 {CLIENTS}/train/buffers/weights/data | sha256sum"
    )


def _between_daemons(shell: Shell, folder: Path, mount: Path) -> None:
    shell.say(
        "A second daemon, another machine as far as anybody can tell, listens at a socket. This time the client runs "
        "over there at once and its pages follow (post-copy): a page that it uses before its turn comes first."
    )
    other, address = mount / MIGRATION[1:], f"unix:{folder}/socket"
    shell.sh(f"sha256sum < {CLIENTS}/train/buffers/weights/data")
    shell.sh(f"echo {address} > {other}/listen")
    shell.sh(f"echo postcopy > strategy; echo 'client=train to={address}' > start")
    there = f"{mount}{CLIENTS}/train/buffers/weights"
    shell.sh(f"while ! [ -e {there} ]; do sleep 0.01; done; tail -c 4096 {there}/data | sha256sum; {_COLUMNS}")
    shell.sh(f"sha256sum < {there}/data; {_WAIT.replace('device', 'postcopy')}; {_COLUMNS}")
    shell.sh(f"cat {other}/blocktime; cat digest {other}/digest; cat {CLIENTS}/train/buffers/weights/size")
    shell.say("nr accesses waited, p50 to max ns each. Here the buffer is empty now: there is one owner.")


def _picture(shell: Shell) -> None:
    shell.say(
        "Whether pre-copy ever ends is decided by how fast pages are dirtied (D) beside how fast they go over (B). "
        "Four writers, each page sent in each round, beside the recurrence that predicts it:"
    )
    curves = []
    for ratio in track(RATIOS, "migrating", console=shell.console, transient=True):
        progress, _ = simulate(ratio, _NR_PAGES)
        ours = [(number, sent / _NR_PAGES) for number, sent in enumerate(progress.round_pages)]
        expected = rounds(_NR_PAGES, ratio * SENDING_PAGES_PER_S, SENDING_PAGES_PER_S)
        line = [(number, next(expected) / _NR_PAGES) for number in range(len(ours))]
        curves.append(Curve(f"D/B = {ratio}", ours, line))
        shell.console.print(
            f"  D/B {ratio}: "
            + ", ".join(f"{share:.1%} ({there:.1%})" for (_, share), (_, there) in zip(ours, line, strict=True)),
            highlight=False,
        )
    path = Path(tempfile.mkdtemp(prefix="dpud-demo-migration-"), "precopy.html")
    title = f"Pages sent in each round, of all; the client is held at {STOP_SHARE:.0%}, or after 6 rounds"
    path.write_text(page(title, "round", curves))
    shell.say(f"Share of all pages sent in each round, and what was predicted in brackets. The picture: {path}")
