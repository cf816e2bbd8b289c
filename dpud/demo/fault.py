# SPDX-License-Identifier: GPL-2.0-only
"""The scene `dpud demo fault`: a GPU whose memory breaks bit by bit, row by row, and then as a whole."""

import tempfile
from pathlib import Path

import numpy as np
from rich.console import Console

from dpud.demo.fault_picture import page
from dpud.demo.shell import Shell

FAULT = "/sys/class/gpu_memvirt/gpu0/fault"
CLIENTS = "/sys/kernel/config/gpu_memvirt/gpu0/clients"
MIB = 1 << 20
_SIZE_MIB = 8
_POLICIES = ("retry", "remap", "migrate")


def play(console: Console) -> None:
    console.rule("A GPU whose memory breaks")
    shell = Shell(console)
    with tempfile.TemporaryDirectory(prefix="dpud-demo-") as folder:
        file = Path(folder, "weights")
        file.write_bytes(np.random.default_rng(1).bytes(_SIZE_MIB * MIB))
        _flip(shell, file)
        _double(shell, file)
        _row(shell, file)
        _tell(shell)
        picture = _draw()
        _lose(shell, file)
        _go_back(shell, file)
    _predict(shell)
    shell.say(f"Where the first GPU's memory was broken, before it was lost: {picture}")


def _flip(shell: Shell, file: Path) -> None:
    shell.say(
        f"Two simulated GPUs of 16 MiB. A client writes {_SIZE_MIB} MiB to the first. Then 200 bits of it "
        "flip, really: the bytes there are others now. ECC puts every word right on its way to the reader."
    )
    shell.cd(CLIENTS)
    shell.sh("mkdir train train/buffers/weights")
    shell.cd(f"{CLIENTS}/train/buffers/weights")
    shell.sh(f"echo {_SIZE_MIB}M > size; dd if={file} of=data bs=1M 2>/dev/null")
    shell.sh(f"echo 'bit nr=200 client=train seed=1' > {FAULT}/inject; cmp data {file} && echo the same")
    shell.sh(f"grep -E '^(corrected|uncorrectable)' {FAULT}/stat")


def _double(shell: Shell, file: Path) -> None:
    shell.say(
        "Two flips in one word cannot be corrected, but never go unseen. With a copy elsewhere, in the pool, nobody "
        "notices. How a page is made good is the policy's choice: in place, in a spare row, in another frame."
    )
    for policy in _POLICIES:
        shell.sh(
            f"echo {policy} > {FAULT}/policy; echo 1 > sync; echo 'bit bits=2 nr=3 client=train' > {FAULT}/inject; "
            f"cmp data {file} && echo the same"
        )
    shell.sh(f"grep -E '^(uncorrectable|repaired_from_store|retried|remapped|moved|retired)' {FAULT}/stat")
    shell.sh(f"cat {FAULT}/remapped_rows {FAULT}/retired_pages")


def _row(shell: Shell, file: Path) -> None:
    shell.say("A row breaks for good, and where there is no copy its bytes are lost: an I/O error, never other bytes.")
    shell.sh("dd if=/dev/zero of=data bs=1M count=1 conv=notrunc 2>/dev/null")
    shell.sh(f"va=$(cat va); echo row va=$va > {FAULT}/inject; env dd if=data of=/dev/null bs=4K count=1 || true")
    shell.say("Who writes the page anew has it back, in cells that work. A reset remaps the rows that wait for it.")
    shell.sh(f"dd if={file} of=data bs=1M 2>/dev/null; cmp data {file} && echo the same")
    shell.say("Then all rows of a bank, behind pages that the pool has. Beyond eight there is no spare row: XID 64.")
    shell.sh("echo 1 > sync")
    shell.sh(f"echo bank gpu=0 > {FAULT}/inject; cmp data {file} && echo the same; cat {FAULT}/remap_histogram")


def _tell(shell: Shell) -> None:
    shell.say("An event has a number as NVIDIA's driver has it, is counted, and stays open until somebody says `ack`.")
    shell.sh(f"cat {FAULT}/counters; head -n 3 {FAULT}/events")
    shell.sh(f"cat {FAULT}/unacknowledged; echo all > {FAULT}/ack; cat {FAULT}/unacknowledged")


def _lose(shell: Shell, file: Path) -> None:
    shell.say(
        "A checkpoint, and what was written after it. Then the GPU falls off the bus. Its client goes on with the "
        "other one: back at the checkpoint as a whole, because its bytes have to fit together."
    )
    shell.sh(f"echo train > {FAULT}/checkpoint/create; cat {FAULT}/checkpoint/list")
    shell.sh("head -c 64K /dev/zero | dd of=data bs=64K conv=notrunc 2>/dev/null")
    shell.sh(f"echo device gpu=0 > {FAULT}/inject; cat location {FAULT}/failovers; tail -n 2 {FAULT}/events")
    shell.sh(f"cmp data {file} && echo the same; grep -E '^(rollbacks|lost_work_ns)' {FAULT}/stat")
    shell.sh(f"cat {FAULT}/recovery_action; echo device0 > {FAULT}/reset; cat {FAULT}/recovery_action")


def _go_back(shell: Shell, file: Path) -> None:
    shell.say(
        "How often to make checkpoints follows from their cost and how often something fails (Young, Daly). The rate "
        "is the field's at first, 3.4e-6 an hour and GPU, and what was seen here is added to that."
    )
    shell.sh(f"cd {FAULT}/checkpoint; grep . cost mtbf_now interval_now")
    shell.sh(f"cd {FAULT}/checkpoint; echo 3600 > mtbf; grep . mtbf_now interval_now; cat ../../address_space/verify")


def _predict(shell: Shell) -> None:
    shell.say(
        "Which bank will fail is predicted at each corrected error, and what came of it stands beside: alarms, hits, "
        "false ones, misses, precision, recall, median lead in seconds. Below it the rule of 50 errors in a day."
    )
    shell.sh(f"grep device0 {FAULT}/prediction")


def _draw() -> Path:
    """The picture, in a folder of its own."""
    lines = Path(FAULT, "retired_pages").read_text().splitlines()
    retired = [(int(address, 16), cause) for name, address, cause, *_ in map(str.split, lines) if name == "device0"]
    counters = [line.split() for line in Path(FAULT, "counters").read_text().splitlines()]
    stat = dict(line.split() for line in Path(FAULT, "stat").read_text().splitlines())
    total_bytes = int(Path(FAULT, "..", "memory", "total_bytes").read_text())
    file = Path(tempfile.mkdtemp(prefix="dpud-demo-fault-")) / "fault.html"
    file.write_text(page(total_bytes, retired, counters, stat))
    return file
