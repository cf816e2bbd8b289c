# SPDX-License-Identifier: GPL-2.0-only
"""The scene `dpud demo compression`: what leaves a GPU's memory is compressed, and comes back."""

import tempfile
from pathlib import Path

from rich.console import Console

from dpud.bench.gpu import corpora
from dpud.demo.shell import Shell

FOLDER = "/sys/class/gpu_memvirt/gpu0/compression"
CLIENTS = "/sys/kernel/config/gpu_memvirt/gpu0/clients"
MIB = 1 << 20
BUFFERS = (
    ("weights", "64K", "bf16 weights"),
    ("tokens", "64K", "int64 indices"),
    ("source", "4K", "stdlib .py"),
    ("field", "2M", "fp32 field"),
)
"""Buffer, its page size, and what is in it."""
_SIZE_MIB = 4


def play(console: Console) -> None:
    console.rule("GPU memory that is compressed when it leaves the device")
    shell = Shell(console)
    with tempfile.TemporaryDirectory(prefix="dpud-demo-") as folder:
        for name, _, corpus in BUFFERS:
            Path(folder, name).write_bytes(corpora.CORPORA[corpus](_SIZE_MIB * MIB))
        _fill(shell, folder)
        _press(shell, folder)
        _strengthen(shell, folder)


def _fill(shell: Shell, folder: str) -> None:
    shell.say(
        "A simulated GPU of 256 MiB with real bytes in it. A client is made with mkdir and gets a buffer for each of "
        "four files: bfloat16 weights, token numbers, Python's own source code, and a smooth field of floats. dd "
        "writes them to the device."
    )
    shell.cd(CLIENTS)
    shell.sh("mkdir train")
    shell.cd(f"{CLIENTS}/train/buffers")
    for name, page_size, _ in BUFFERS:
        shell.sh(
            f"mkdir {name}; echo {page_size} > {name}/page_size; echo {_SIZE_MIB}M > {name}/size; "
            f"dd if={folder}/{name} of={name}/data bs=1M 2>/dev/null"
        )


def _press(shell: Shell, folder: str) -> None:
    shell.say("Memory pressure, by hand: all pages have to leave the device. They go to the compressed pool.")
    names = " ".join(name for name, _, _ in BUFFERS)
    shell.sh(f"for b in {names}; do echo {_SIZE_MIB}M > $b/reclaim; done")
    shell.say(
        "For each page a codec was chosen by trying all of them on a sample of it. Byte planes are for arrays of "
        "numbers: the n-th bytes of all elements together. MB/s are those of one thread on this machine."
    )
    shell.sh(f"cat {FOLDER}/codecs")
    shell.say("What it took, in the columns of zram's mm_stat; the third is all memory used, metadata included:")
    orig, _, used = map(int, shell.sh(f"cat {FOLDER}/mm_stat").split()[:3])
    regret = shell.sh(f"cat {FOLDER}/regret").strip()
    shell.say(
        f"{orig / MIB:.0f} MiB in {used / MIB:.1f} MiB: {orig / used:.2f} to 1. One page in 64 was encoded with every "
        f"codec there is: on those, the choices were {regret} % longer than the best. Every byte comes back:"
    )
    _compare(shell, folder)


def _strengthen(shell: Shell, folder: str) -> None:
    shell.say("The same once more with lz4 alone. Then, as if the pages had grown cold, with a stronger codec.")
    shell.sh(f"echo lz4 > {FOLDER}/algorithm; cat {FOLDER}/algorithm")
    names = " ".join(name for name, _, _ in BUFFERS)
    shell.sh(
        f"for b in {names}; do dd if={folder}/$b of=$b/data bs=1M conv=notrunc 2>/dev/null; "
        f"echo {_SIZE_MIB}M > $b/reclaim; done"
    )
    before = int(shell.sh(f"cat {FOLDER}/mem_used_total"))
    shell.sh(f"echo 1G > {FOLDER}/recompress")
    took_s = shell.took_s
    shell.sh(f"echo 1 > {FOLDER}/compact")
    after = int(shell.sh(f"cat {FOLDER}/mem_used_total"))
    shell.say(f"{before / MIB:.1f} MiB became {after / MIB:.1f} MiB in {took_s:.1f} s. And every byte is there still:")
    _compare(shell, folder)


def _compare(shell: Shell, folder: str) -> None:
    for name, _, _ in BUFFERS:
        shell.sh(f"cmp {name}/data {folder}/{name} && echo {name}: the same")
