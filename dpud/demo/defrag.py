# SPDX-License-Identifier: GPL-2.0-only
"""The scene `dpud demo defrag`: most of a GPU is free, and few large pages fit; then pages move under their users."""

import tempfile
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dpud.demo.defrag_picture import page
from dpud.demo.shell import Shell

DEFRAG = "/sys/class/gpu_memvirt/gpu0/defrag"
CLIENTS = "/sys/kernel/config/gpu_memvirt/gpu0/clients"
MEMORY = "/sys/class/gpu_memvirt/gpu0/memory"
KIB, MIB = 1 << 10, 1 << 20
_NR_BUFFERS = 124
_BUFFER_BYTES = 512 * KIB
_KEEP_EVERY = 4


def play(console: Console) -> None:
    console.rule("A GPU is put in order")
    shell = Shell(console)
    moments = []
    with tempfile.TemporaryDirectory(prefix="dpud-demo-") as folder:
        file = Path(folder, "weights")
        _scatter(shell, file)
        _pin(shell)
        moments.append(("Before", *_map()))
        _run(shell, file)
        moments.append(("After a pass, with one buffer pinned", *_map()))
        _unpin(shell, file)
        moments.append(("After another, without", *_map()))
    _limits(shell)
    picture = Path(tempfile.mkdtemp(prefix="dpud-demo-defrag-")) / "memory.html"
    picture.write_text(page(moments))
    shell.say(f"The memory before and after: {picture}")


def _scatter(shell: Shell, file: Path) -> None:
    shell.say(
        f"A simulated GPU of 64 MiB. A client fills it with {_NR_BUFFERS} buffers of 512 KiB, then three of four go. "
        "Most memory is free, but little of it in blocks of 2 MiB."
    )
    shell.cd(CLIENTS)
    shell.sh(f"mkdir train; echo 0 > {DEFRAG}/interval")
    data = bytes(range(256)) * (_BUFFER_BYTES // 256)
    file.write_bytes(data)
    buffers = Path(CLIENTS, "train", "buffers")
    for number in track(range(_NR_BUFFERS), "buffers", console=shell.console, transient=True):
        Path(buffers, f"b{number}").mkdir()
        Path(buffers, f"b{number}", "size").write_text(str(_BUFFER_BYTES))
        Path(buffers, f"b{number}", "data").write_bytes(data)
    for number in range(_NR_BUFFERS):
        if number % _KEEP_EVERY:
            Path(buffers, f"b{number}").rmdir()
    shell.sh(f"cat {MEMORY}/free_bytes {MEMORY}/free_blocks")
    shell.sh(f"cd {DEFRAG}; grep device0 unusable_index extfrag_index scattered slack_bytes largest_hole_bytes")


def _pin(shell: Shell) -> None:
    shell.say("Somebody knows the address of one buffer, as a network card would. It is pinned: it must not move.")
    shell.sh(f'echo "$(cat train/buffers/b0/va) {_BUFFER_BYTES} nic RDMA" > {DEFRAG}/pins; cat {DEFRAG}/pins')


def _run(shell: Shell, file: Path) -> None:
    shell.say(
        "A pass. Least used blocks are emptied first, and page tables follow; addresses stay, and so do the bytes."
    )
    shell.sh(f"echo 1 > {DEFRAG}/run; cat {MEMORY}/free_blocks; grep device0 {DEFRAG}/unusable_index")
    shell.sh(f"for b in train/buffers/*; do cmp $b/data {file} || exit 1; done && echo the same")
    shell.sh(f"grep -E 'blocks_made|pages_moved|bytes_moved|gained_bytes|slices' {DEFRAG}/stat")
    shell.sh(f"grep . {DEFRAG}/cost {DEFRAG}/longest_pause_*ns; grep relocation {DEFRAG}/../qos/traffic")


def _unpin(shell: Shell, file: Path) -> None:
    shell.say("Now 13 pages of 2 MiB are wanted, and there: nothing is evicted for them. Then the pin goes.")
    shell.sh(
        "mkdir train/buffers/large; cd train/buffers/large; echo 2M > page_size; echo 26M > size; "
        "dd if=/dev/zero of=data bs=2M count=13 2>/dev/null; cat state | grep -E 'resident|stored'"
    )
    shell.sh(f"echo nic > {DEFRAG}/unpin; echo 1 > {DEFRAG}/run; cat {MEMORY}/free_blocks")
    shell.sh(f"for b in train/buffers/b*; do cmp $b/data {file} || exit 1; done && echo the same")
    shell.sh(f"cat {DEFRAG}/../address_space/verify")


def _limits(shell: Shell) -> None:
    shell.say(
        "By itself that happens every `interval` seconds where more than `threshold` percent of free memory is "
        "scattered, in `cpu_percent` of the time, for at most `pause_limit_us` at once."
    )
    shell.sh(f"cd {DEFRAG}; echo 60 > interval; grep . interval threshold cpu_percent pause_limit_us")


def _map() -> tuple[int, str]:
    """(bytes a character, characters) of the device."""
    lines = (line.split() for line in Path(DEFRAG, "map").read_text().splitlines())
    return next((int(size), cells) for name, size, cells in lines if name == "device0")
