# SPDX-License-Identifier: GPL-2.0-only
"""The scene `dpud demo numa`: a buffer that was loaded on the wrong socket comes to the GPU that uses it."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from dpud.demo.numa_picture import page
from dpud.demo.shell import Shell

NUMA = "/sys/class/gpu_memvirt/gpu0/numa"
CLIENTS = "/sys/kernel/config/gpu_memvirt/gpu1/clients"
BUFFER = f"{CLIENTS}/serve/buffers/kv"
PAGE, NR_PAGES = 4096, 128
_NR_SWEEPS = 40
_SHOWN = 5

Steps = list[tuple[str, dict[str, int]]]


def play(console: Console) -> None:
    console.rule("A buffer on the wrong socket")
    shell = Shell(console)
    steps: Steps = []
    _look(shell)
    _load(shell, steps)
    _balance(shell, steps)
    _interleave(shell)
    folder = Path(tempfile.mkdtemp(prefix="dpud-demo-numa-"))
    file = folder / "numa.html"
    file.write_text(page(steps, Path(NUMA, "decisions").read_text().splitlines()[-20:]))
    shell.say(f"Where the buffer's pages were: {file}")


def _look(shell: Shell) -> None:
    shell.say(
        "Two sockets with a GPU each, and behind each an expander of memory, which is a node without CPUs. All of it "
        "is simulated: the matrices are a topology file's, and what an access takes is theirs."
    )
    shell.sh(f"cat {NUMA}/topology")
    shell.sh(f"cd {NUMA}/nodes; grep . node*/devices node*/fallback")


def _load(shell: Shell, steps: Steps) -> None:
    shell.say(
        "A client of gpu1, which hangs at node1, has its cache in host memory. A loader on node0 writes it first, and "
        "first touch decides: all pages are on the wrong socket."
    )
    shell.sh(f"mkdir {CLIENTS}/serve; mkdir {BUFFER}")
    shell.cd(BUFFER)
    shell.sh(f"echo host > type; echo {NR_PAGES * PAGE >> 10}K > size; echo node0 > location")
    shell.sh(f"head -c {NR_PAGES * PAGE} /dev/urandom > data; md5sum < data; grep on_node state")
    steps.append(("loaded on node0", on_nodes()))


def _balance(shell: Shell, steps: Steps) -> None:
    shell.say(
        "Now gpu1 uses it. Pages are unmapped now and then, and who misses them tells who uses them. A page moves if "
        "what its users save within horizon_ms is more than the move costs. (The scan period is far shorter here than "
        "anybody would have it, so that nobody has to wait.)"
    )
    shell.sh(f"cd {NUMA}; echo 1 > scan_period_min_ms; echo 20 > scan_period_max_ms; echo 5 > scan_period_ms")
    shell.sh(f"cat {NUMA}/balancing; echo device1 > location")
    with _progress(shell.console) as advance:
        for number in range(_NR_SWEEPS):
            _sweep()
            advance()
            if number in (_NR_SWEEPS // 8, _NR_SWEEPS - 1):
                steps.append((f"used by gpu1, {number + 1} times", on_nodes()))
    shell.sh("grep on_node state; md5sum < data")
    shell.say("Each move is explained: ns, address, from, to, why, and the ns that it saves and costs.")
    shell.sh(f"tail -n {_SHOWN} {NUMA}/decisions; grep -v ' 0$' {NUMA}/stat")


def _interleave(shell: Shell) -> None:
    shell.say(
        "New buffers may also be spread by bandwidth, in the weights that Linux would compute; pinned ones are near "
        "their device whatever the policy."
    )
    shell.sh(f"cd {NUMA}; echo weighted:0-3 > policy; cat policy; grep . weighted_interleave/*")
    spread = f"{CLIENTS}/serve/buffers/spread"
    shell.sh(f"mkdir {spread}; cd {spread}; echo host > type; echo 240K > size; head -c 240K /dev/zero > data")
    shell.sh(f"grep on_node {spread}/state; echo local > {NUMA}/policy; cat {NUMA}/../address_space/verify")


def _sweep() -> None:
    """Read the buffer page by page."""
    with open(f"{BUFFER}/data", "rb", buffering=0) as file:
        while file.read(PAGE):
            pass


def on_nodes() -> dict[str, int]:
    """The buffer's pages by node."""
    rows = (line.split() for line in Path(BUFFER, "state").read_text().splitlines())
    return {row[0].removeprefix("on_"): int(row[1]) for row in rows if row[0].startswith("on_node")}


@contextmanager
def _progress(console: Console) -> Iterator[Callable[[], None]]:
    """A bar, on a terminal."""
    columns = TextColumn("{task.description}"), BarColumn()
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("gpu1 reads the buffer", total=_NR_SWEEPS)
        yield lambda: progress.advance(task)
