# SPDX-License-Identifier: GPL-2.0-only
"""The scene `dpud demo unified`: one address space over two GPUs and the host."""

from rich.console import Console

from dpud.demo.shell import Shell

CLASS = "/sys/class/gpu_memvirt/gpu0"
CLIENTS = "/sys/kernel/config/gpu_memvirt/gpu0/clients"
_WHERE = "grep -E '^(on_|stored|copies)'"


def play(console: Console) -> None:
    console.rule("One address space over two GPUs and the host")
    shell = Shell(console)
    _move(shell)
    _copy(shell)
    _refuse(shell)
    _overfill(shell)


def _move(shell: Shell) -> None:
    shell.say(
        "Two simulated GPUs of 16 MiB. A client gets a buffer of managed memory: its pages are where they are used. "
        "`location` says who uses `data`: here the host writes, then each of the GPUs reads."
    )
    shell.cd(CLIENTS)
    shell.sh("mkdir train train/buffers/weights")
    shell.cd(f"{CLIENTS}/train/buffers/weights")
    shell.sh("echo managed > type; echo 4M > size; echo host > location")
    shell.sh(
        "head -c 4M /dev/urandom > /tmp/weights.$$; dd if=/tmp/weights.$$ of=data bs=1M 2>/dev/null; "
        "sha256sum < /tmp/weights.$$; rm /tmp/weights.$$"
    )
    shell.sh(f"cat state | {_WHERE}")
    for device in (0, 1):
        shell.sh(f"echo device{device} > location; sha256sum < data; {_WHERE} state")


def _copy(shell: Shell) -> None:
    shell.say(
        "With the advice `read-mostly`, reading makes copies instead, and the page stays where it was; a write drops "
        "all copies of its page."
    )
    shell.sh("echo read-mostly > advice; for l in device0 host; do echo $l > location; sha256sum < data; done")
    shell.sh(f"{_WHERE} state")
    shell.sh(f"printf x | dd of=data bs=1 seek=123456 conv=notrunc 2>/dev/null; {_WHERE} state")


def _refuse(shell: Shell) -> None:
    shell.say("Permissions are checked at every access, for each client. Who was refused what, and why, is in a log.")
    shell.sh("echo r-- > permissions; env echo y > data || true")
    shell.sh(f"cat {CLASS}/address_space/faults")
    shell.sh("echo rw- > permissions")


def _overfill(shell: Shell) -> None:
    shell.say(
        "A buffer of three times a GPU's memory: pages that it has no room for leave it for the compressed pool, and "
        "come back when they are read. Frames, page tables, TLBs and stores are checked against each other at the end."
    )
    shell.cd(f"{CLIENTS}/train/buffers")
    shell.sh("mkdir large; echo 48M > large/size; yes 'more than there is' | head -c 48M > large/data")
    shell.sh(f"{_WHERE} large/state")
    shell.sh("sha256sum < large/data; yes 'more than there is' | head -c 48M | sha256sum")
    shell.sh(f"cat {CLASS}/address_space/tlb_stat {CLASS}/address_space/verify")
