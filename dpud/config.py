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
    numa = ""                # nodes of host memory: "two-socket", "four-node-cxl", "eight-node", a topology file, or
                             # "real": this machine's; "": one node
    checkpoint_folder = ""   # where checkpoints of clients are; "": a temporary folder that goes with the daemon
    [mount]
    path = "/run/dpud"
    allow_other = true       # other users may look (needs user_allow_other in /etc/fuse.conf unless root)
    control_group = ""       # a group whose members may write what root may; "": none
    nice = -10               # the daemon's priority, if it may have it
    server = "dev"           # speak FUSE to /dev/fuse directly; "libfuse": through mfusepy or fusepy
    [log]
    level = "info"           # what of the kernel log goes to stderr, and to the journal under systemd
    [metrics]
    listen = ""              # "127.0.0.1:9779": Prometheus finds /metrics there; "": nowhere
    [sysctl]                 # written to /proc/sys at the start, and anew at each reload
    vm.dpu_compact_region_order = 18
    [files]                  # the same for any other file
    "/sys/class/gpu_memvirt/gpu0/compression/enabled" = 1
    [[workload]]             # steps that are done at the start: a folder to make, files to write in it
    about = "a web server"
    directory = "/sys/kernel/config/kernelsim/mm/web"
    write = { anon = "512M", holes = "50 seed=7" }
    [state]
    directory = ""           # keep the machine there, so that it outlives the daemon; "": it does not
    sync = 1000              # how often the disk has to have it, in ms; "always": before each answer; "none": never
    checkpoint_bytes = "64M" # how long the journal gets until the machine is written down as a whole; "0": no matter

Whatever is left out has the value shown (two nodes of 4G; no level, sysctls, files or steps). A wrong file is refused
whole, with one line that names file, line and key. A scenario (see scenario.py) is such a file.
"""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from dpud import config_shape
from dpud.config_lines import key_and_problem, line_of, place_of, without_place
from dpud.config_mount import Mount as Mount
from dpud.config_mount import about as _about
from dpud.errors import UserError
from kernelsim.kconfig import Kconfig

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
_SIZE = re.compile(r"([0-9]{1,15})([KMGT]?)")
_LISTEN = re.compile(r"(?:[A-Za-z0-9.-]+|\[[0-9A-Fa-f:.]+\]):([0-9]{1,5})")
_METADATA_BYTES_PER_PAGE = 32  # kernelsim.page.page_dtype
_PAGE_SIZE = 4096
_MIN_NODE = 32 << 20
_BLOCK = 2 << 20  # a pageblock: a node ends at the end of one
_MIN_GPU = 8 << 20  # four of the largest pages
_PRINTK = "/proc/sys/kernel/printk"
_ADDRESS_SPACE = 64 << 40  # half of what a process has: more than this cannot be mapped, sparse or not


class ConfigError(UserError):
    """The configuration cannot be used; the text is one line."""


class Size(int):
    """Bytes; in the file an integer or a text with a suffix: "512M"."""

    def __str__(self) -> str:
        if not self:
            return "0"
        unit = max((unit for unit, factor in _UNITS.items() if self % factor == 0), key=_UNITS.__getitem__)
        return f"{self // _UNITS[unit]}{unit}"


class Node(Struct, frozen=True, forbid_unknown_fields=True):
    """One NUMA node."""

    memory: Annotated[Size, _about("Memory of the node: at least 32M, a multiple of 2M.")] = Size(4 << 30)
    cma: Annotated[
        Size, _about("How much of it is a CMA area, which is lent to movable pages: a multiple of 2M, less than all.")
    ] = Size(0)
    distance: Annotated[
        tuple[Annotated[int, Meta(ge=10, le=255)], ...],
        _about("Distance to each node, as node*/distance shows it; for all nodes or for none (10 and 20 then)."),
    ] = ()

    def __post_init__(self) -> None:
        if self.memory < _MIN_NODE:
            raise ValueError(f"memory = {self.memory} is too small: at least {Size(_MIN_NODE)}")
        if self.memory % _BLOCK:
            raise ValueError(f"memory = {self.memory} does not end on a {Size(_BLOCK)} boundary")
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
    memory: Annotated[Size, _about("Memory of each: at least 8M, a multiple of 2M.")] = Size(256 << 20)
    host_memory: Annotated[Size, _about("For host and pinned memory, and managed memory used there; as above.")] = Size(
        1 << 30
    )
    pool: Annotated[Size, _about('For pages that left a device; any size, "0": none.')] = Size(512 << 20)
    algorithm: Annotated[
        Literal["lz4", "zstd", "snappy", "adaptive", "none"],
        _about('How they are compressed at first, as compression/algorithm has it; "none": not at all.'),
    ] = "adaptive"
    quality: Annotated[
        Literal["fast", "balanced", "best"], _about("How much time that may take, as compression/quality has it.")
    ] = "balanced"
    swap_memory: Annotated[
        Size, _about('Swap in system memory, for what the pool has no room for; a multiple of 2M, "0": none.')
    ] = Size(0)
    swap_nvme: Annotated[
        Size, _about("Swap in a temporary file that is as fast as an NVMe drive; a multiple of 2M.")
    ] = Size(1 << 30)
    swap_ssd: Annotated[Size, _about("Swap as fast as a SATA SSD; a multiple of 2M.")] = Size(2 << 30)
    swap_hdd: Annotated[Size, _about("Swap as fast as a hard disk; a multiple of 2M.")] = Size(4 << 30)
    swap_folder: Annotated[str, _about("Folder of these files; empty: the system's for temporary files.")] = ""
    checkpoint_folder: Annotated[
        str, _about("Folder of clients' checkpoints; empty: one that goes with the daemon.")
    ] = ""
    numa: Annotated[
        str,
        _about(
            'Nodes of host memory: a topology file, a shipped one ("two-socket", "four-node-cxl", "eight-node"), or '
            '"real", this machine\'s; empty: one node.'
        ),
    ] = ""

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


LEVELS = ("emerg", "alert", "crit", "err", "warning", "notice", "info", "debug")
"""Of the kernel log, by their numbers."""


class Log(Struct, frozen=True, forbid_unknown_fields=True):
    level: Annotated[
        Literal["emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"] | None,
        _about(
            "Lines of the kernel log up to this level also go to stderr, under systemd to the journal; it sets the "
            'first number of /proc/sys/kernel/printk, which is "err" if left out. Can be reloaded.'
        ),
    ] = None


class Metrics(Struct, frozen=True, forbid_unknown_fields=True):
    listen: Annotated[
        str,
        _about("Address and port where Prometheus finds /metrics; empty: nowhere. Needs `pip install dpud[metrics]`."),
    ] = ""

    def __post_init__(self) -> None:
        match = _LISTEN.fullmatch(self.listen)
        if self.listen and (match is None or int(match[1]) > 65535):
            raise ValueError(f'listen = {self.listen!r} is not like "127.0.0.1:9779"')


class Step(Struct, frozen=True, forbid_unknown_fields=True):
    """One step of a workload: what a user would do with mkdir and echo."""

    directory: Annotated[str, _about("A folder of the emulated tree, made if it is not there.")] = "/"
    about: Annotated[str, _about("What the line that shows progress says.")] = ""
    write: Annotated[
        Mapping[str, Any], _about("Files in that folder and what is written to them, in this order; folders are made.")
    ] = {}
    fill: Annotated[
        Mapping[str, Size], _about("Files in that folder and how many bytes they get: noise, the same each time.")
    ] = {}
    may_fail: Annotated[
        bool, _about("Go on if a file refuses, say for lack of memory, instead of not starting at all.")
    ] = False

    def __post_init__(self) -> None:
        if not self.directory.startswith("/"):
            raise ValueError(f"directory = {self.directory!r} does not begin with /")
        texts_of(self.write)


class Scenario(Struct, frozen=True, forbid_unknown_fields=True):
    about: Annotated[str, _about("What this machine and its workload are for, in one line of `dpud scenarios`.")] = ""


class State(Struct, frozen=True, forbid_unknown_fields=True):
    directory: Annotated[
        str, _about("Folder with the machine's journal, from which the next start makes it again; empty: none is kept.")
    ] = ""
    sync: Annotated[
        Literal["none", "always"] | Annotated[int, Meta(ge=1, le=60_000)],
        _about(
            'When the disk has to have the journal: every so many ms, before each answer ("always"), or when the host '
            'likes ("none"). That is about loss of power; a killed daemon loses nothing.'
        ),
    ] = 1000
    checkpoint_bytes: Annotated[
        Size,
        _about(
            "How long the journal gets until the whole machine is written down, as at the end of the daemon; 0: it is "
            "when `/sys/kernel/dpud_state/checkpoint` is written to."
        ),
    ] = Size(64 << 20)


class Config(Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file; `Config()` is the default machine."""

    scenario: Scenario = Scenario()
    machine: Machine = Machine()
    memory: Memory = Memory()
    kconfig: Annotated[
        Mapping[str, Any], _about('How the kernel was built: CONFIG_* options, "y" or "n"; the others have defaults.')
    ] = {}
    dpu: Dpu = Dpu()
    gpu: Gpu = Gpu()
    mount: Mount = Mount()
    log: Log = Log()
    metrics: Metrics = Metrics()
    sysctl: Annotated[
        Mapping[str, Any],
        _about("Sysctls by their names in sysctl.conf(5), written as the daemon starts, and again at each reload."),
    ] = {}
    files: Annotated[
        Mapping[str, Any], _about("The same for other files of the emulated tree, by their paths there.")
    ] = {}
    workload: Annotated[
        tuple[Step, ...], _about("Steps that are done in order before the daemon is ready, a table for each.")
    ] = ()
    state: State = State()

    def __post_init__(self) -> None:
        self._check_files()
        try:
            has_cma = any(node.cma for node in self.machine.nodes)
            self.kernel.for_machine(len(self.machine.nodes), has_cma, self.memory.bytes != "none")
        except ValueError as error:
            raise ValueError(f"kconfig.{error}") from error

    def _check_files(self) -> None:
        for name, table in (("sysctl", self.sysctl), ("files", self.files)):
            try:
                texts = texts_of(table)
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
            for key in texts if name == "files" else ():
                if not key.startswith("/"):
                    raise ValueError(f"{name}.{key}: does not begin with /")

    @property
    def settings(self) -> dict[str, tuple[str, str]]:
        """Path in the tree -> (key, text) of all that is written at the start and at each reload."""
        level = {} if self.log.level is None else {_PRINTK: ("log.level", str(LEVELS.index(self.log.level) + 1))}
        sysctl = {
            f"/proc/sys/{name.replace('.', '/')}": (f"sysctl.{name}", text)
            for name, text in texts_of(self.sysctl).items()
        }
        return level | sysctl | {path: (f"files.{path}", text) for path, text in texts_of(self.files).items()}

    @property
    def kernel(self) -> Kconfig:
        """The kernel configuration; `machine.debug_vm` is another name for CONFIG_DEBUG_VM."""
        debug_vm = {"CONFIG_DEBUG_VM": "y"} if self.machine.debug_vm else {}
        return Kconfig(dict(self.kconfig) | debug_vm)

    @property
    def memory_bytes(self) -> Size:
        return Size(sum(node.memory for node in self.machine.nodes))

    def check_host(self, host_bytes: int) -> None:
        """Raises ConfigError for what a host with `host_bytes` of memory cannot emulate, and a group that it has not.

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
        try:
            self.mount.control_gid()
        except ValueError as error:
            raise ConfigError(f"mount.control_group: {error}") from error


@dataclass(frozen=True)
class Source:
    """One configuration file as it was read."""

    name: str
    text: str

    def where(self, key: str) -> str:
        """`FILE:LINE` of a key, `FILE` if no line sets it."""
        line = line_of(self.text, key)
        return f"{self.name}:{line}" if line else self.name


def with_place(problem: str, sources: Sequence[Source]) -> str:
    """A problem that was found later, and begins with a key, with FILE:LINE in front: of the last file that sets it."""
    key = problem.partition(": ")[0]
    steps = [place_of(source.text, key)[0] for source in sources]
    if not any(steps):
        return problem
    nearest = max(range(len(sources)), key=lambda number: (steps[number], number))
    return f"{sources[nearest].where(key)}: {problem}"


def load(path: Path) -> Config:
    """Read and check a file. Raises ConfigError, its text starting with the file's name and line."""
    return combine([read(path)])


def read(path: Path) -> Source:
    """Raises ConfigError if it cannot be read."""
    try:
        return Source(str(path), path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not UTF-8 text") from None


def parse(text: str, name: str = "config") -> Config:
    """Check a configuration given as text. Raises ConfigError."""
    return combine([Source(name, text)])


def combine(sources: Sequence[Source]) -> Config:
    """The configuration that they are together: what a later one says counts, key by key. Raises ConfigError.

    Each must be right by itself.
    """
    tables: dict[str, Any] = {}
    config = Config()
    for source in sources:
        table = _parsed(source)
        config = _checked(table, source)
        if tables:
            config = _checked(tables := _merged(tables, table), source)
        tables = tables or table
    return config


def _parsed(source: Source) -> dict[str, Any]:
    if endless := config_shape.endless_key(source.text):
        raise ConfigError(f"{source.name}:{endless}: a key of more than {config_shape.MAX_DOTS} dots")
    try:
        tables = tomllib.loads(source.text)
    except tomllib.TOMLDecodeError as error:
        line, problem = without_place(str(error), source.text)
        raise ConfigError(f"{source.name}:{line}: {problem}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a thousand brackets
        raise ConfigError(f"{source.name}: {error}") from None
    if shape := config_shape.problem_of(tables):
        raise ConfigError(f"{source.where(shape.partition(': ')[0])}: {shape}")
    if isinstance(sysctl := tables.get("sysctl"), dict):
        tables["sysctl"] = _flat(sysctl)
    return tables


def _checked(tables: dict[str, Any], source: Source) -> Config:
    try:
        config = msgspec.convert(tables, Config, dec_hook=_decode)
        config.check_host(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    except (msgspec.ValidationError, ConfigError) as error:
        key, problem = key_and_problem(str(error))
        raise ConfigError(f"{source.where(key)}: {key}: {problem}") from None
    return config


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    merged = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        merged[key] = _merged(below[key], value) if both else value
    return merged


def _flat(table: Mapping[str, Any]) -> dict[str, Any]:
    """`vm.x = 1` is a table in a table for TOML, and a name with a dot for sysctl.conf(5)."""
    flat: dict[str, Any] = {}
    for name, value in table.items():
        flat |= (
            {f"{name}.{key}": each for key, each in _flat(value).items()} if isinstance(value, dict) else {name: value}
        )
    return flat


def texts_of(table: Mapping[str, Any]) -> dict[str, str]:
    """Name -> what is written to the file. Raises ValueError for what is no text or number."""
    for name, value in table.items():
        if not isinstance(value, int | str):
            raise ValueError(f"{name}: {value!r} is no text or number")
    return {name: str(int(value)) if isinstance(value, bool) else str(value) for name, value in table.items()}


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
