# SPDX-License-Identifier: GPL-2.0-only
"""The scenes of `dpud demo`, played under `dpud exec`."""

import importlib
from contextlib import closing

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from dpud.demo import CAPTURE, GPU_SCENES, PROCESS
from dpud.demo.blockmap import LEGEND, BlockMap
from dpud.demo.cost import LIMIT, Cost
from dpud.demo.shell import Shell
from dpud.demo.twin import Twin

HUGE = "/sys/kernel/config/kernelsim/alloc/huge"
PROACTIVENESS = "/proc/sys/vm/compaction_proactiveness"
REGION_ORDER = "/proc/sys/vm/dpu_compact_region_order"
COMPACT_DPU = "/sys/devices/system/node/node0/compact_dpu"
STATS = "/sys/kernel/debug/dpu_compact/stats"
FAULT = "/sys/kernel/debug/dpu_compact/fail_dpu_fault"
VERIFY = "web/verify worker/verify"
MM = "/sys/kernel/config/kernelsim/mm"
BUDDYINFO = "/proc/buddyinfo"
ON_LISTS = "awk '/ count:/ { n += $2 } END { print n }' /proc/zoneinfo"

KERNEL_PAGES, KERNEL_MS = 187_502, 525  # dpud/data/captures/demo/README
ALL = 20_000
"""More 2 MiB pages than there are: the allocator gives what it has."""


def play(name: str) -> None:
    """Play one scene on stdout."""
    console = Console(highlight=False)
    if name in GPU_SCENES:
        importlib.import_module(f"dpud.demo.{name}").play(console)
    else:
        {CAPTURE: capture, PROCESS: process}[name](console)


# A captured machine.


def capture(console: Console) -> None:
    """The memory of a real machine, before and after."""
    console.rule("A real machine's memory, compacted by an emulated DPU")
    shell = Shell(console)
    shell.say(
        "The memory layout of a real machine (Linux 6.18, 25 GiB of address space), captured while a process held a "
        "random half of 4 GiB. The kernel that you see below is emulated and was built from it: the same zones and "
        "free lists, the same pages in use. The DPU, a processing-in-memory unit, is emulated as well. The commands "
        "and what they print are real. The pictures are drawn from a second copy, which is given the same writes."
    )
    with closing(Twin()) as twin:
        _compact_capture(shell, twin)


def _compact_capture(shell: Shell, twin: Twin) -> None:
    before = shell.sh(f"cat {BUDDYINFO}")
    show_map(shell.console, twin.map(before))
    shell.say(
        f"{scattered(before):.0%} of what is free lies in pieces below 2 MiB. Each CPU keeps free pages on lists of "
        "its own, too; buddyinfo leaves them out. How many pages is that, and how many 2 MiB pages can be had?"
    )
    listed_before = int(shell.sh(ON_LISTS))
    _who_asks(shell, twin)
    huge_before = _hugepages(shell, twin)
    shell.say(
        "Now the DPU. As compaction always does, it begins with having the CPUs give their lists back; then, in each "
        "region of 2^18 pages (1 GiB), it packs what can move towards the low end."
    )
    _echo(shell, twin, 18, REGION_ORDER)
    _echo(shell, twin, 1, COMPACT_DPU)
    took_s = shell.took_s
    shell.say(f"The write returned when it was done, after {took_s:.2f} s. What the kernel says, and the memory now:")
    shell.sh("dmesg | grep DPU | tail -n 3")
    stats = parse_stats(shell.sh(f"cat {STATS}"))
    after = shell.sh(f"cat {BUDDYINFO}")
    show_map(shell.console, twin.map(after))
    shell.say("The same request once more:")
    huge_after = _hugepages(shell, twin)
    listed_after = int(shell.sh(ON_LISTS))
    brought = memory_table((before, listed_before, huge_before), (after, listed_after, huge_after))
    shell.console.print("", brought, "", cost_table(stats, took_s))
    shell.say(verdict(stats, huge_after - huge_before))


def _echo(shell: Shell, twin: Twin, value: int | str, path: str) -> None:
    shell.sh(f"echo {value} > {path}")
    twin.write(path, str(value))


def _who_asks(shell: Shell, twin: Twin) -> None:
    """Somebody who allocates 2 MiB pages as a page fault does, without compacting; nor may kcompactd, meanwhile."""
    _echo(shell, twin, 0, PROACTIVENESS)
    shell.sh(f"mkdir {HUGE}")
    twin.mkdir(HUGE)
    for value, name in ((9, "order"), ("GFP_TRANSHUGE_LIGHT", "gfp"), (ALL, "count")):
        _echo(shell, twin, value, f"{HUGE}/{name}")


def _hugepages(shell: Shell, twin: Twin) -> int:
    """How many there are: take all, count them, give them back."""
    _echo(shell, twin, 1, f"{HUGE}/alloc")
    nr = int(shell.sh(f"cat {HUGE}/allocated"))
    _echo(shell, twin, 1, f"{HUGE}/free")
    return nr


# A process with real bytes.


def process(console: Console) -> None:
    """A process of our own, whose content is looked at afterwards."""
    console.rule("A process that keeps its bytes while its pages move")
    shell = Shell(console)
    shell.say(
        "Another machine, with 4096 real bytes in each page. mkdir starts a process; it gets 1 GiB, gives a random "
        "half of its pages back, and forks, so that the rest is shared copy-on-write."
    )
    shell.cd(MM)
    for command in ("mkdir web", "echo 1G > web/anon", "echo '50 seed=7' > web/holes", "echo worker > web/fork"):
        shell.sh(command)
    shell.sh(f"cat {BUDDYINFO}")
    shell.say("The DPU moves its pages. Every byte must be where the process, and its child, will look for it:")
    shell.sh(f"echo 18 > {REGION_ORDER}")
    shell.sh(f"echo 1 > {COMPACT_DPU}")
    took_s = shell.took_s
    shell.sh(f"cat {BUDDYINFO}")
    stats = parse_stats(shell.sh(f"grep -E '^(pages|ptes)' {STATS}"))
    shell.sh(f"cat {VERIFY}")
    ns = took_s * 1e9 / stats["pages_moved"]
    shell.say(
        f"{stats['pages_moved']:,} pages of real bytes in {took_s:.2f} s: {ns:.0f} ns a page on this machine.\n\n"
        "Once more, with holes in both processes and a DPU that breaks before its 5001st move:"
    )
    _break_the_device(shell)


def _break_the_device(shell: Shell) -> None:
    for command in (
        "echo '40 seed=8' | tee web/holes worker/holes",
        f"echo 5000 > {FAULT}/move",
        f"echo 1 > {FAULT}/nth",
    ):
        shell.sh(command)
    shell.sh(f"echo 1 > {COMPACT_DPU}")
    shell.sh("dmesg | grep -B 1 -A 1 failed")
    shell.sh(f"grep -E 'failures|fallbacks|cpu_pages' {STATS}")
    shell.sh(f"cat {VERIFY}")
    shell.say("What the DPU had done was kept, the rest put back, and the CPU finished the region. Nothing was lost.")


# What came of it.


def show_map(console: Console, memory: BlockMap) -> None:
    """The picture and how to read it."""
    console.print("", *memory.rows(), Text(LEGEND, style="italic"), sep="\n")


def parse_stats(text: str) -> dict[str, int]:
    """`name value` lines."""
    return {name: int(value) for name, value in map(str.split, text.splitlines())}


def free_pages(buddyinfo: str) -> list[int]:
    """Free pages of all zones by the order of the block they are in."""
    zones = [line.split()[4:] for line in buddyinfo.splitlines()]
    return [sum(map(int, counts)) << order for order, counts in enumerate(zip(*zones, strict=True))]


def scattered(buddyinfo: str) -> float:
    """The share of free memory that lies in pieces below 2 MiB."""
    pages = free_pages(buddyinfo)
    return sum(pages[:9]) / sum(pages)


def memory_table(before: tuple[str, int, int], after: tuple[str, int, int]) -> Table:
    """Text of /proc/buddyinfo, free pages on the CPUs' own lists, and the number of 2 MiB pages that could be had."""
    table = Table("What it brought", box=SIMPLE_HEAD)
    columns = []
    for heading, (buddyinfo, nr_listed, nr_huge) in (("before", before), ("after", after)):
        table.add_column(heading, justify="right")
        free_mib = sum(free_pages(buddyinfo)) >> 8
        columns.append((f"{free_mib:,} MiB", f"{scattered(buddyinfo):.1%}", f"{nr_listed >> 8:,} MiB", f"{nr_huge:,}"))
    names = ("free memory", "of it in pieces below 2 MiB", "free, on lists of CPUs", "2 MiB pages to be had")
    for name, old, new in zip(names, *columns, strict=True):
        table.add_row(name, old, new)
    return table


def cost_table(stats: dict[str, int], took_s: float) -> Table:
    """What was done for it, in time measured here and in time modelled for the device."""
    table = Table("What it took", Column("", justify="right"), box=SIMPLE_HEAD)
    table.add_row("pages moved", f"{stats['pages_moved']:,}")
    table.add_row("PTEs updated", f"{stats['ptes_updated']:,}")
    table.add_row("regions of 1 GiB", f"{stats['regions']}")
    table.add_row("time here, measured: the whole write", f"{1e3 * took_s:.0f} ms")
    table.add_row("time of a UPMEM rank, modelled: the moves", f"{stats['device_ns'] / 1e6:.0f} ms")
    table.add_row("time of a Zen 3 core, modelled: the PTEs", f"{stats['update_ns'] / 1e6:.0f} ms")
    return table


def verdict(stats: dict[str, int], nr_gained: int) -> str:
    """Whether it was worth it, in plain words."""
    nr = stats["pages_moved"]
    cost = Cost.of(nr, stats["device_ns"])
    return (
        f"{nr_gained:,} more huge pages ({nr_gained / 512:.1f} GiB), at {nr / max(nr_gained, 1):.0f} pages moved for "
        "each: packing keeps the order of pages, so nearly every page of a region moves. Free memory grew because "
        "compaction first empties the per-CPU page lists, as it does on Linux. On the machine this memory comes from, "
        f"Linux's own compaction moved {KERNEL_PAGES:,} pages in {KERNEL_MS} ms.\n\n"
        f"Would real hardware be faster? By the model, a Zen 3 core copies these pages in {cost.copy_ms:.0f} ms and a "
        f"UPMEM rank of 64 DPUs in {cost.device_ms:.0f} ms, but unmapping, remapping and LRU work take the core "
        f"{cost.metadata_ms:.0f} ms either way: {cost.cpu_ms:.0f} ms against {cost.dpu_ms:.0f} ms, a gain of "
        f"{cost.gain:.2f}x. No engine, however fast, can gain more than {LIMIT}x on 4 KiB pages. The launch overhead "
        "in this model (35 us) is an estimate, and real UPMEM DPUs reach only pages that lie whole in their own bank, "
        "which ordinary memory's do not. What offload does save is CPU time."
    )
