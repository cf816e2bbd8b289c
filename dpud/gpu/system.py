# SPDX-License-Identifier: MIT
"""All of it put together: devices, their memory, and where everything is shown.

/sys/class/gpu_memvirt/gpuN/memory            each device's memory
/sys/class/gpu_memvirt/gpuN/MODULE            the modules; they are shared by all devices
/sys/class/gpu_memvirt/host/memory            the host's; with NUMA nodeN/memory
/sys/kernel/config/gpu_memvirt/gpuN/clients   who uses it
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dpud.gpu.blob import PageCodec
from dpud.gpu.clock import Clock, ManualClock, PacedClock
from dpud.gpu.compression import CompressedPool, CompressionFiles, CompressionSystem
from dpud.gpu.compression.dictionary import Dictionaries
from dpud.gpu.configfs import ClientGroup, show_client
from dpud.gpu.defrag.files import DefragFiles
from dpud.gpu.defrag.module import DefragModule
from dpud.gpu.fault.files import CheckpointFiles, FaultFiles
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.files import AddressSpaceFiles, MemoryFiles, settle
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice
from dpud.gpu.memory import HOST_PROFILE, GpuMemory
from dpud.gpu.migration import MigrationFiles, MigrationModule
from dpud.gpu.numa import sysfs
from dpud.gpu.numa.files import NodeFiles, NumaFiles, WeightFiles, weight_file
from dpud.gpu.numa.module import NumaModule, host_nodes, one_node
from dpud.gpu.numa.topology import Topology, load
from dpud.gpu.overcommit import Admission
from dpud.gpu.overcommit.files import OvercommitFiles
from dpud.gpu.overcommit.predictor import SAMPLE_NS
from dpud.gpu.qos.files import LevelFiles, QosFiles
from dpud.gpu.qos.flow import NR_LEVELS
from dpud.gpu.qos.module import QosModule
from dpud.gpu.store import HostPool, Pool
from dpud.gpu.swap.blockfile import BLOCK_BYTES
from dpud.gpu.swap.files import SwapFiles, TierFiles
from dpud.gpu.swap.module import SwapModule
from kernelsim.attr import Kobject, Operation, Registry
from kernelsim.operation import Waitable
from kernelsim.wait import WaitQueue

CLASS_PATH = "/sys/class/gpu_memvirt"
CONFIG_PATH = "/sys/kernel/config/gpu_memvirt"

REAL = "real"
"""The topology of the machine that this runs on."""

_SLICE_BYTES = 1 << 20
_SCRUB_NS = 250_000_000
_LOOK_NS = 500_000_000
"""How often somebody looks whether a checkpoint is due."""

log = logging.getLogger("dpud.gpu.fault")


@dataclass(frozen=True)
class GpuConfig:
    """What there is. Sizes in bytes."""

    nr_devices: int = 1
    device_bytes: int = 256 << 20
    host_bytes: int = 1 << 30
    pool_bytes: int = 512 << 20
    compression: bool = True
    algorithm: str = "adaptive"
    quality: str = "balanced"
    tiers: Mapping[str, int] = field(default_factory=dict)
    """Of swap: kind -> size, fastest first."""
    swap_folder: Path | None = None
    """Where the tiers' temporary files are; the system's folder for such if None."""
    checkpoint_folder: Path | None = None
    """Where checkpoints are, and stay; a temporary one if None."""
    numa: str = ""
    """Which nodes host memory is divided into: a topology file, the name of a shipped one, or REAL; "" for one node."""


def build(
    config: GpuConfig,
    clock: Clock | None = None,
    waiters: WaitQueue | None = None,
    migration: MigrationModule | None = None,
) -> GpuMemory:
    """Simulated devices with a pool and tiers behind them. Raises GpuError, OSError where a tier has no file.

    waiters     where requests for memory wait; without, they let time pass
    migration   what migrates clients; without, one for the library
    """
    clock = clock or ManualClock()
    profile = DeviceProfile(memory_bytes=config.device_bytes)
    devices = [SimulatedDevice(profile, clock, number) for number in range(config.nr_devices)]
    topology = topology_of(config)
    host = SimulatedDevice(HOST_PROFILE.sized(config.host_bytes), clock, config.nr_devices)
    nodes = host_nodes(topology, config.host_bytes, clock, config.nr_devices)
    codec, pool = _compression(config)
    tiers = _tiers(config, topology)
    swap = SwapModule.with_tiers(tiers, clock, config.swap_folder) if any(tiers.values()) else None
    admission = Admission(config.nr_devices * config.device_bytes, clock, waiters=waiters)
    memory = GpuMemory(
        devices,
        host=nodes if len(nodes) > 1 else host,
        clock=clock,
        codec=codec,
        pool=pool,
        swap=swap.space if swap else None,
        admission=admission,
        pressure=admission.pressure,
    )
    QosModule(clock).attach(memory)
    if swap is not None:
        swap.attach(memory)
    (migration or MigrationModule()).attach(memory)
    NumaModule(topology).attach(memory)
    FaultModule(memory, _checkpoint_codec(config), config.checkpoint_folder)
    DefragModule().attach(memory)
    return memory


def topology_of(config: GpuConfig) -> Topology:
    """Raises GpuError, OSError for a file that is none."""
    if config.numa == REAL:
        return sysfs.read()
    if config.numa:
        return load(config.numa)
    return one_node(config.host_bytes, HOST_PROFILE.local_bytes_per_s, HOST_PROFILE.local_latency_ns)


def _tiers(config: GpuConfig, topology: Topology) -> dict[str, int]:
    """Name -> size; where several nodes have a tier of a kind, each has its share."""
    found: dict[str, int] = {}
    for kind, size in config.tiers.items():
        names = topology.tiers_of(kind)
        found |= dict.fromkeys(names, size // len(names) // BLOCK_BYTES * BLOCK_BYTES)
    return found


def _checkpoint_codec(config: GpuConfig) -> PageCodec | None:
    """One without dictionaries: a file has to be readable in another program."""
    if not config.compression:
        return None
    return CompressionSystem(dictionaries=Dictionaries(enabled=False), regret_every=0)


def _compression(config: GpuConfig) -> tuple[PageCodec | None, Pool | None]:
    """Who encodes pages, and where they are kept."""
    if not config.pool_bytes:
        return None, None
    if not config.compression:
        return None, HostPool(config.pool_bytes)
    system = CompressionSystem(config.algorithm, config.quality)
    return system, CompressedPool(config.pool_bytes, system)


def modules(memory: GpuMemory) -> Iterator[tuple[str, Kobject]]:
    """(folder, its files) of the parts that all devices share."""
    yield "address_space", AddressSpaceFiles(memory)
    pool = memory.store.pool
    if isinstance(pool, CompressedPool):
        yield "compression", CompressionFiles(pool.system, pool)
    admission = memory.accounting.admission
    if isinstance(admission, Admission):
        yield "overcommit", OvercommitFiles(admission, memory.accounting.tell)
    qos = memory.residency.traffic
    if isinstance(qos, QosModule):
        yield "qos", QosFiles(qos, memory.clients)
        for number in range(NR_LEVELS):
            yield f"qos/levels/{number}", LevelFiles(qos, number)
    swap = memory.watcher
    if isinstance(swap, SwapModule):
        yield "swap", SwapFiles(swap)
        for tier in swap.space.tiers:
            yield f"swap/tiers/{tier.name}", TierFiles(swap, tier)
    if memory.migration is not None:
        yield "migration", MigrationFiles(memory.migration)
    numa = memory.numa
    if isinstance(numa, NumaModule):
        yield "numa", NumaFiles(numa)
        yield "numa/weighted_interleave", WeightFiles(numa)
        for at, node in enumerate(numa.topology.nodes):
            yield f"numa/nodes/node{node.nid}", NodeFiles(numa, at)
            yield "numa/weighted_interleave", weight_file(numa, at)
    fault = memory.fault
    if isinstance(fault, FaultModule):
        yield "fault", FaultFiles(fault)
        yield "fault/checkpoint", CheckpointFiles(fault)
        for name, point in fault.fail_points.points.items():
            yield f"fault/{name}", point
    if isinstance(memory.defrag, DefragModule):
        yield "defrag", DefragFiles(memory.defrag)


def add_files(registry: Registry, memory: GpuMemory) -> None:
    """Show devices, modules and clients."""
    for location in memory.locations:
        folder = location.name if location.number >= memory.nr_devices else f"gpu{location.number}"
        registry.add(f"{CLASS_PATH}/{folder}/memory", MemoryFiles(memory, location))
    for name, kobj in modules(memory):
        registry.add(f"{CLASS_PATH}/gpu0/{name}", kobj)
        for number in range(1, memory.nr_devices) if "/" not in name else ():
            registry.link(f"{CLASS_PATH}/gpu{number}/{name}", f"../gpu0/{name}")
    for number in range(memory.nr_devices):
        registry.add(f"{CONFIG_PATH}/gpu{number}/clients", ClientGroup(memory, number))
    if memory.migration is not None:
        memory.migration.on_arrival = lambda client: show_client(registry, CONFIG_PATH, memory, client)


def reclaimer(memory: GpuMemory, short: Waitable, wake_up: Callable[[], None]) -> Operation[None]:
    """What runs in the background as long as there is a daemon: keeps free memory above the watermarks."""
    memory.on_short = wake_up
    while True:
        if memory.background(_SLICE_BYTES):
            yield from settle(memory)
            yield None
        else:
            yield short


def sampler(memory: GpuMemory, clock: PacedClock, arrival: Waitable, wake_up: Callable[[], None]) -> Operation[None]:
    """The same: tells admission what each client uses, once in each of its sample periods, if there is one."""
    if isinstance(memory.accounting.admission, Admission):
        memory.accounting.admission.on_client = wake_up
    while True:
        memory.accounting.tell()
        yield clock.until(clock.now_ns() + SAMPLE_NS) if memory.clients else arrival


def scrubber(fault: FaultModule, clock: PacedClock) -> Operation[None]:
    """The same: scrubs memory, as fast as `scrub_rate` says."""
    is_idle = True
    while True:
        yield clock.until(clock.now_ns() + _SCRUB_NS, is_idle=is_idle)
        is_idle = fault.scrubber.is_quiet
        fault.scrubber.scrub(fault.scrubber.bytes_per_s * _SCRUB_NS // 1_000_000_000)


def checkpointer(fault: FaultModule, clock: PacedClock) -> Operation[None]:
    """The same: makes checkpoints of all clients, where that is asked for, as often as it is worth it."""
    is_idle = True
    while True:
        yield clock.until(clock.now_ns() + _LOOK_NS, is_idle=is_idle)
        is_idle = not fault.checkpoints.automatic
        for client in fault.checkpoints.due():
            try:
                yield from fault.checkpoints.creation(client)
            except OSError as error:
                log.warning("no checkpoint of %s: %s", client, error)
