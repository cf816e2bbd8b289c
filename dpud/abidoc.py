# SPDX-License-Identifier: GPL-2.0-only
"""docs/abi.md, made from the declarations: `python -m dpud.abidoc > docs/abi.md`, or with all others by `make docs`."""

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from dpud import state_kobject
from dpud.config import Config
from dpud.config_file import ConfigFile
from dpud.dpu.debugfs import add_fault_files
from dpud.dpu.driver import DpuConfig, DpuDriver
from dpud.dpu.faults import FaultKind
from dpud.dpu.sysfs import add_rank_files
from dpud.gpu.configfs import BufferGroup, ClientGroup
from dpud.gpu.system import CONFIG_PATH, GpuConfig, add_files, build
from kernelsim.alloc_configfs import AllocGroup
from kernelsim.attr import Attr, Registry
from kernelsim.dpu_compact_inject import KINDS
from kernelsim.machine import ALLOC_CONFIGFS, MM_CONFIGFS, Machine, MachineConfig, NodeConfig
from kernelsim.stub import Stub
from kernelsim.trace_events import SYSTEMS

HEAD = """\
# Files

<!-- Made by `python -m dpud.abidoc > docs/abi.md`. Do not edit. -->

Every file of the emulated tree, from its declaration. Paths are below the mount point (`dpud run`), or as they stand
(`dpud exec`, `dpud shell`). `*` is a number: one directory for each node, CPU, memory block, rank or level. `NAME` is
what was given to mkdir, `PID` the number of an emulated process. `KIND` is one of {kinds}. `SYSTEM` and `EVENT` are
listed in `/sys/kernel/tracing/available_events`; events of `ftrace` cannot be switched. `/sys/kernel/debug/tracing` is
a link to `/sys/kernel/tracing`.

A mode of 0200 cannot be read, not even by root. A value outside its range, or a text that is none, is refused with
`Invalid argument` and changes nothing. Where there is no default, the file shows a state or starts something.
"""

_KINDS = [kind.value for kind in FaultKind if kind is not FaultKind.CORRUPT] + list(KINDS)
_ALIKE = {
    r"/(node|memory)0/": r"/\1*/",
    r"/cpu/cpu0/": "/cpu/cpu*/",
    r"/dpu_rank0/": "/dpu_rank*/",
    r"/gpu0/": "/gpu*/",
    r"/swap/tiers/nvme/": "/swap/tiers/NAME/",
    r"/qos/levels/\d/": "/qos/levels/*/",
    r"/gpu0/numa/weighted_interleave/node0$": "/gpu0/numa/weighted_interleave/node*",
    r"/fault/fail_\w+/": "/fault/fail_NAME/",
    r"/proc/\d+/": "/proc/PID/",
    rf"/fail_({'|'.join(_KINDS)})/": "/fail_KIND/",
    r"/per_cpu/cpu0/": "/per_cpu/cpu*/",
    rf"/events/({'|'.join(SYSTEMS)})/(?=[^/]+$)": "/events/SYSTEM/",
    rf"/events/({'|'.join(SYSTEMS)})/[^/]+/": "/events/SYSTEM/EVENT/",
    r"/events/ftrace/[^/]+/": "/events/ftrace/EVENT/",
}
_ROW = "| {} | {} | {} | {} | {} | {} |"


def main() -> None:
    print(page(), end="")


def page() -> str:
    """The whole page."""
    driver = DpuDriver(DpuConfig(nr_ranks=1))
    try:
        kinds = ", ".join(f"`{kind}`" for kind in _KINDS)
        return "\n".join([HEAD.format(kinds=kinds), *_tables(example(driver))])
    finally:
        driver.close()


def example(driver: DpuDriver) -> Registry:
    """A small machine's tree that has one directory of every kind."""
    machine = Machine(MachineConfig(nodes=(NodeConfig(32 << 20, 1),), bytes="stamp"), driver)
    add_rank_files(machine.registry, driver.pool)
    add_fault_files(machine.registry, driver)
    machine.registry.add(f"{MM_CONFIGFS}/NAME", machine.new_process("NAME"))
    _add_gpu(machine.registry)
    machine.registry.add("/proc", ConfigFile(Config()))
    machine.registry.add(state_kobject.PATH, state_kobject.StateFiles())
    machine.registry.add(f"{ALLOC_CONFIGFS}/NAME", AllocGroup(machine).make_item("NAME"))
    return machine.registry


def _add_gpu(registry: Registry) -> None:
    """A small device with a client that has a buffer."""
    memory = build(GpuConfig(device_bytes=8 << 20, host_bytes=8 << 20, tiers={"nvme": 1 << 20}))
    add_files(registry, memory)
    clients = f"{CONFIG_PATH}/gpu0/clients"
    registry.add(f"{clients}/NAME", ClientGroup(memory, 0).make_item("NAME"))
    registry.add(f"{clients}/NAME/buffers/NAME", BufferGroup(memory, "NAME").make_item("NAME"))


def _tables(registry: Registry) -> Iterator[str]:
    """One table a directory, by name."""
    files = generic_files(registry)
    for directory, paths in groupby(sorted(files, key=split), key=lambda path: split(path)[0]):
        yield f"## {directory}\n"
        yield _ROW.format("file", "mode", "values", "default", "what", "since")
        yield _ROW.format(*["---"] * 6)
        yield from (_row(split(path)[1], files[path]) for path in paths)
        yield ""


def _row(name: str, attr: Attr[Any]) -> str:
    default = "" if attr.default is None else f"`{attr.default}`"
    values = attr.kind.describe() if not isinstance(attr, Stub) else "fixed text"
    return _ROW.format(f"`{name}`", f"0{attr.mode:03o}", values.replace("|", "\\|"), default, attr.doc, attr.since)


def generic_files(registry: Registry) -> dict[str, Attr[Any]]:
    """Every file's declaration by its path, one directory standing for all of its kind."""
    return {_generic(path): attr for path, _kobj, attr in registry.walk()}


def split(path: str) -> tuple[str, str]:
    """(directory, name)"""
    directory, _, name = path.rpartition("/")
    return directory, name


def _generic(path: str) -> str:
    """One directory stands for all of its kind."""
    for pattern, name in _ALIKE.items():
        path = re.sub(pattern, name, path)
    return path


if __name__ == "__main__":
    main()
