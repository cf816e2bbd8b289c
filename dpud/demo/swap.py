# SPDX-License-Identifier: GPL-2.0-only
"""The scene `dpud demo swap`: four times as much as the device holds, on tiers of memory, flash and disk."""

import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from dpud.demo.shell import Shell

SWAP = "/sys/class/gpu_memvirt/gpu0/swap"
CLIENTS = "/sys/kernel/config/gpu_memvirt/gpu0/clients"
MIB = 1 << 20
_SIZE_MIB = 64
_PAGES = f"for t in {SWAP}/tiers/*; do echo $(basename $t) $(cat $t/nr_pages) pages, $(cat $t/used) bytes; done"


def play(console: Console) -> None:
    console.rule("A buffer four times the size of the GPU's memory")
    shell = Shell(console)
    with tempfile.TemporaryDirectory(prefix="dpud-demo-") as folder:
        file = Path(folder, "noise")
        file.write_bytes(np.random.default_rng(1).bytes(_SIZE_MIB * MIB))
        _fill(shell, file)
        _sink(shell, file)
        _budget(shell)
        _choose(shell)


def _fill(shell: Shell, file: Path) -> None:
    shell.say(
        f"A simulated GPU of 16 MiB, without a compressed pool, and behind it tiers: real files, as fast as the data "
        f"sheets of the drives they stand for say. A client writes {_SIZE_MIB} MiB of noise."
    )
    shell.cd(CLIENTS)
    shell.sh("mkdir train; mkdir train/buffers/weights")
    shell.cd(f"{CLIENTS}/train/buffers/weights")
    shell.sh(f"echo {_SIZE_MIB}M > size; dd if={file} of=data bs=1M 2>/dev/null; grep -E '^(on_device0|stored)' state")
    shell.sh(_PAGES)
    shell.sh(f"cd {SWAP}/tiers; grep . */profile */bandwidth */latency */direct_io")


def _sink(shell: Shell, file: Path) -> None:
    shell.say("What is cold sinks. By hand: four more MiB of the coldest move from the NVMe tier down.")
    shell.sh(f"echo 4M > {SWAP}/tiers/nvme/demote; {_PAGES}")
    shell.say("Every byte comes back, wherever it was. A checksum for each page says so, and so does cmp.")
    shell.sh(f"cmp data {file} && echo the same")
    shell.sh(f"grep -E '^(written|read|demoted|corrupt|prefetch_used)' {SWAP}/stat; cat {SWAP}/tiers/ssd/fault_latency")


def _budget(shell: Shell) -> None:
    shell.say("Flash wears out. A tier may have a budget for each day, in zram's writeback_limit (4 KiB units):")
    shell.sh(
        f"cd {SWAP}/tiers/nvme; echo 1G > daily_limit; grep . writeback_limit writeback_limit_enable wear wear_percent"
    )


def _choose(shell: Shell) -> None:
    shell.say(
        "Which pages leave the device is the policy's choice. How good was it? All accesses so far are replayed, with "
        "LRU, with the policy, and with Belady's optimum, which knows the future."
    )
    shell.sh("for i in 1 2; do dd if=data of=/dev/null bs=1M count=24 2>/dev/null; done")
    shell.sh(f"cat {SWAP}/belady")
    shell.sh(f"echo s3-fifo > {SWAP}/policy; cat {SWAP}/policy {SWAP}/belady")
    shell.say("gap_closed_percent: 0 is as good as LRU, 100 cannot be beaten.")
