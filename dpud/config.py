# SPDX-License-Identifier: GPL-2.0-only
"""The daemon's one configuration file: TOML in, checked structs out.

    [machine]
    cpus = 4                 # shared out over the nodes
    debug_vm = false         # check every invariant after each step, and log what is violated (slow)
    [[machine.nodes]]        # one table per NUMA node
    memory = "4G"
    cma = "0"                # of it, for a CMA area (contiguous memory that movable pages may use meanwhile)
    distance = [10, 20]      # to each node, as in node*/distance; for all nodes or none
    [memory]
    bytes = "full"           # 4096 real bytes a page; "stamp": 8 that travel with it (always so with --from);
                             # "none": contents are not kept
    [kconfig]                # how the kernel was built: "y" or "n"; what is left out has its default
    CONFIG_DPU_COMPACTION = "y"
    [dpu]
    ranks = 1                # 0: a machine without a DPU
    dpus_per_rank = 64
    profile = "upmem-v1a"    # the engine at first, and with it where modelled times come from
    [gpu]
    devices = 1              # simulated GPUs; 0: none
    memory = "256M"          # of each
    host_memory = "1G"       # for host and pinned memory, and managed memory that is used there
    pool = "512M"            # for pages that left a device; "0": none
    algorithm = "adaptive"   # how they are compressed at first: lz4, zstd, snappy, adaptive; "none": not at all
    quality = "balanced"     # how much time that may take: fast, balanced, best
    swap_memory = "0"        # swap tiers behind the pool, in temporary files (which take room as they are used);
    swap_nvme = "1G"         # "0": no such tier
    swap_ssd = "2G"
    swap_hdd = "4G"
    swap_folder = ""         # where these files are; "": the system's folder for temporary files
    [mount]
    path = "/run/dpud"
    allow_other = true       # other users may look (needs user_allow_other in /etc/fuse.conf unless root)
    server = "dev"           # speak FUSE to /dev/fuse directly; "libfuse": through mfusepy or fusepy

Whatever is left out has the value shown (two nodes of 4G). A wrong file is refused whole, with one line
that names file, line and key.
"""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from dpud.errors import UserError
from kernelsim.kconfig import Kconfig


def _about(text: str) -> Meta:
    """What a key means, for the manual page."""
    return Meta(description=text)


_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,15})([KMGT]?)")
_METADATA_BYTES_PER_PAGE = 32  # kernelsim.page.page_dtype
_PAGE_SIZE = 4096
_MIN_NODE = 32 << 20
_BLOCK = 2 << 20  # a pageblock: a node ends at the end of one
_MIN_GPU = 8 << 20  # four of the largest pages
_ADDRESS_SPACE = 64 << 40  # half of what a process has: more than this cannot be mapped, sparse or not


class ConfigError(UserError):
    """The configuration cannot be used; the text is one line."""


class Size(int):
    """Bytes; in the file an integer or a text with a suffix: "512M"."""

    def __str__(self) -> str:
        unit = max((unit for unit, factor in _UNITS.items() if self % factor == 0), key=_UNITS.__getitem__)
        return f"{self // _UNITS[unit]}{unit}"


class Node(Struct, frozen=True, forbid_unknown_fields=True):
    """One NUMA node."""

    memory: Annotated[Size, _about("Memory of the node: at least 32M, a multiple of 2M.")] = Size(4 << 30)
    cma: Annotated[Size, _about("How much of it is a CMA area: contiguous memory, lent to movable pages.")] = Size(0)
    distance: Annotated[
        tuple[Annotated[int, Meta(ge=10, le=255)], ...],
        _about("Distance to each node, as node*/distance shows it; for all nodes or for none (10 and 20 then)."),
    ] = ()

    def __post_init__(self) -> None:
        if self.memory < _MIN_NODE:
            raise ValueError(f"a node of {self.memory} is too small: at least {Size(_MIN_NODE)}")
        if self.memory % _BLOCK:
            raise ValueError(f"a node of {self.memory} does not end on a {Size(_BLOCK)} boundary")
        if self.cma % _BLOCK or self.cma >= self.memory:
            raise ValueError(f"cma = {self.cma} is not a multiple of {Size(_BLOCK)} below the node's {self.memory}")


class Machine(Struct, frozen=True, forbid_unknown_fields=True):
    cpus: Annotated[int, Meta(ge=1, le=4096), _about("CPUs, shared out over the nodes.")] = 4
    debug_vm: Annotated[bool, _about("Check every invariant after each step, and log what is violated: slow.")] = False
    nodes: Annotated[
        tuple[Node, ...], Meta(min_length=1, max_length=64), _about("The NUMA nodes, a table for each.")
    ] = (Node(), Node())

    def __post_init__(self) -> None:
        lengths = {len(node.distance) for node in self.nodes}
        if lengths not in ({0}, {len(self.nodes)}):
            raise ValueError(f"distance has {len(self.nodes)} numbers for each node, or is left out for all")


class Memory(Struct, frozen=True, forbid_unknown_fields=True):
    bytes: Annotated[
        Literal["full", "stamp", "none"] | None,
        _about(
            'What is kept of each page: its 4096 bytes, 8 bytes that travel with it, or nothing. "full" if left out, '
            'and always "stamp" with `--from`.'
        ),
    ] = None


class Dpu(Struct, frozen=True, forbid_unknown_fields=True):
    ranks: Annotated[int, Meta(ge=0, le=40), _about("DPU ranks; with 0, a machine without a DPU.")] = 1
    dpus_per_rank: Annotated[int, Meta(ge=1, le=64), _about("DPUs of each rank.")] = 64
    profile: Annotated[str, _about("The engine at first, and with it where modelled times come from.")] = "upmem-v1a"
    properties: Annotated[str, _about("A profile string of the UPMEM SDK.")] = ""
    backend: Annotated[
        Literal["emulated", "dpu"], _about("Who runs the batches: this program, or the SDK's Python package.")
    ] = "emulated"
    binary: Annotated[str, _about('The DPU program for backend = "dpu".')] = ""

    def __post_init__(self) -> None:
        if (self.backend == "dpu") != bool(self.binary):
            raise ValueError('binary is a DPU program for backend = "dpu", and only for that')


class Gpu(Struct, frozen=True, forbid_unknown_fields=True):
    devices: Annotated[int, Meta(ge=0, le=8), _about("Simulated GPUs; 0: none.")] = 1
    memory: Annotated[Size, _about("Memory of each.")] = Size(256 << 20)
    host_memory: Annotated[Size, _about("For host and pinned memory, and managed memory used there.")] = Size(1 << 30)
    pool: Annotated[Size, _about('For pages that left a device; "0": none.')] = Size(512 << 20)
    algorithm: Annotated[
        Literal["lz4", "zstd", "snappy", "adaptive", "none"],
        _about('How they are compressed at first, as compression/algorithm has it; "none": not at all.'),
    ] = "adaptive"
    quality: Annotated[
        Literal["fast", "balanced", "best"], _about("How much time that may take, as compression/quality has it.")
    ] = "balanced"
    swap_memory: Annotated[Size, _about('Swap in system memory, for what the pool has no room for; "0": none.')] = Size(
        0
    )
    swap_nvme: Annotated[Size, _about("Swap in a temporary file that is as fast as an NVMe drive.")] = Size(1 << 30)
    swap_ssd: Annotated[Size, _about("Swap as fast as a SATA SSD.")] = Size(2 << 30)
    swap_hdd: Annotated[Size, _about("Swap as fast as a hard disk.")] = Size(4 << 30)
    swap_folder: Annotated[str, _about("Folder of these files; empty: the system's for temporary files.")] = ""

    def __post_init__(self) -> None:
        for name, size in (("memory", self.memory), ("host_memory", self.host_memory)):
            if size < _MIN_GPU or size % _BLOCK:
                raise ValueError(f"{name} = {size} is not a multiple of {Size(_BLOCK)}, at least {Size(_MIN_GPU)}")
        for name, size in self.tiers.items():
            if size % _BLOCK:
                raise ValueError(f"swap_{name} = {size} is not a multiple of {Size(_BLOCK)}")

    @property
    def tiers(self) -> dict[str, Size]:
        """Swap tiers by kind, fastest first."""
        return {"memory": self.swap_memory, "nvme": self.swap_nvme, "ssd": self.swap_ssd, "hdd": self.swap_hdd}


class Mount(Struct, frozen=True, forbid_unknown_fields=True):
    path: Annotated[str | None, _about("Mount point; what `--mount` says goes before it.")] = None
    allow_other: Annotated[
        bool | None, _about("Other users may look; unless you are root, needs user_allow_other in /etc/fuse.conf.")
    ] = None
    server: Annotated[
        Literal["dev", "libfuse"],
        _about("Speak FUSE to /dev/fuse directly, or through mfusepy or fusepy, which is several times slower."),
    ] = "dev"


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file; `Config()` is the default machine."""

    machine: Machine = Machine()
    memory: Memory = Memory()
    kconfig: Annotated[
        Mapping[str, Any], _about('How the kernel was built: CONFIG_* options, "y" or "n"; the others have defaults.')
    ] = {}
    dpu: Dpu = Dpu()
    gpu: Gpu = Gpu()
    mount: Mount = Mount()

    def __post_init__(self) -> None:
        try:
            self.kernel.for_machine(len(self.machine.nodes), any(node.cma for node in self.machine.nodes))
        except ValueError as error:
            raise ValueError(f"kconfig.{error}") from error

    @property
    def kernel(self) -> Kconfig:
        """The kernel configuration; `machine.debug_vm` is another name for CONFIG_DEBUG_VM."""
        debug_vm = {"CONFIG_DEBUG_VM": "y"} if self.machine.debug_vm else {}
        return Kconfig(dict(self.kconfig) | debug_vm)

    @property
    def memory_bytes(self) -> Size:
        return Size(sum(node.memory for node in self.machine.nodes))

    def check_host(self, host_bytes: int) -> None:
        """Raises ConfigError for a machine that a host with `host_bytes` of memory cannot emulate.

        Contents and page tables are sparse and only count against the address space; the memory map is all touched.
        """
        if self.memory_bytes > _ADDRESS_SPACE:
            raise ConfigError(f"machine.nodes: {self.memory_bytes} of memory is more than can be mapped")
        metadata = Size(self.memory_bytes // _PAGE_SIZE * _METADATA_BYTES_PER_PAGE)
        if metadata > host_bytes:
            raise ConfigError(
                f"machine.nodes: {self.memory_bytes} needs {metadata >> 20}M of page metadata, "
                f"this host has {host_bytes >> 20}M"
            )


def load(path: Path) -> Config:
    """Read and check a file. Raises ConfigError, its text starting with the file's name and line."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None
    return parse(text, str(path))


def parse(text: str, name: str = "config") -> Config:
    """Check a configuration given as text. Raises ConfigError."""
    try:
        config = msgspec.convert(tomllib.loads(text), Config, dec_hook=_decode)
        config.check_host(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{name}: {error}") from None
    except (msgspec.ValidationError, ConfigError) as error:
        key, problem = _locate(str(error))
        line = _line_of(text, key)
        where = f"{name}:{line}" if line else name
        raise ConfigError(f"{where}: {key}: {problem}") from None
    return config


def parse_size(value: object) -> Size:
    """4096, "4096", "4K" ... "1T". Raises ValueError."""
    match = _SIZE.fullmatch(value.upper()) if isinstance(value, str) else None
    if match:
        return Size(int(match[1]) * _UNITS[match[2]])
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return Size(value)
    raise ValueError(f'{value!r} is not a size such as "4G"')


def _decode(kind: type, value: Any) -> Any:
    if kind is Size:
        return parse_size(value)
    raise NotImplementedError(f"no decoder for {kind}")


def _locate(message: str) -> tuple[str, str]:
    """("machine.seed", "Expected int, got str") from msgspec's text, or ours ("machine.nodes: ...")."""
    problem, _, path = message.partition(" - at `$")
    key = path.rstrip("`").lstrip(".")
    if unknown := re.fullmatch(r"Object contains unknown field `(.*)`", problem):
        return f"{key}.{unknown[1]}".lstrip("."), "unknown key"
    if not key:
        key, _, problem = message.partition(": ")
    return key, problem.replace("`", "")


def _line_of(text: str, key: str) -> int | None:
    """The line that sets `key` ("machine.nodes[1].memory") or opens its table; None if none looks like it."""
    table, _, name = key.rpartition(".")
    name = name.partition("[")[0]  # of an array, any element
    here, nth, best = "", dict[str, int](), None
    for number, line in enumerate(text.splitlines(), 1):
        if header := re.match(r"\s*\[(\[?)\s*([\w.-]+)\s*\]", line):
            here = header[2]
            if header[1]:
                nth[here] = nth.get(here, -1) + 1
                here = f"{here}[{nth[here]}]"
            if here == key:
                best = number
        elif here == table and re.match(rf'\s*"?{re.escape(name)}"?\s*=', line):
            return number
    return best
