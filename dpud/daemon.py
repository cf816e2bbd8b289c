# SPDX-License-Identifier: GPL-2.0-only
"""`dpud run`: the emulated machine, its devices, its clock and its files, put together and kept going.

The main thread ends up serving the mount; requests run on threads of their own, through the owner; the
pacer has a thread, each DPU rank may have one. SIGTERM and SIGINT unmount, then everything is taken down in
the opposite order of its making.
"""

import gc
import os
import secrets
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from rich.console import Console

from dpud import claim, namespace, service, workload
from dpud.capture import CaptureError, read_capture, read_host
from dpud.config import Config, Gpu, Size
from dpud.config_file import ConfigFile
from dpud.dpu.debugfs import add_fault_files
from dpud.dpu.driver import DpuConfig, DpuDriver
from dpud.dpu.errors import DpuError
from dpud.dpu.package import NoPackage, PackageCompact, import_package
from dpud.dpu.program import DPU_COMPACT
from dpud.dpu.rank import DpuProgram
from dpud.dpu.sysfs import add_rank_files
from dpud.errors import UserError
from dpud.exec import PROBE
from dpud.gpu.clock import PacedClock
from dpud.gpu.migration import MigrationModule
from dpud.gpu.performance import set_log_level
from dpud.gpu.system import GpuConfig, add_files, build, checkpointer, reclaimer, sampler, scrubber
from dpud.inject import BlockingWaitQueue, LiveClock, boot_time_s
from dpud.owner import Owner
from dpud.pacer import Pacer
from dpud.physmem import PhysMem, alloc_tables
from fs import fuse_dev, fuse_ops
from fs.kernfs import Cred, RunAs, Tree
from fs.mountpoint import MountError
from kernelsim.hostimage import HostImage
from kernelsim.machine import Machine, MachineConfig, NodeConfig
from kernelsim.operation import Operation
from kernelsim.printk import KERN_ERR
from kernelsim.task import Task
from kernelsim.warm import preload

SWITCH_INTERVAL_S = 0.001
"""How long a computing thread keeps the interpreter while a request waits; Python's own 5 ms would show."""


HOST_ATTEMPTS = 3
"""How often to read the host in search of a moment in which its free lists hold still; about 1.3 s each."""


@dataclass(frozen=True)
class RunOptions:
    """The command line of `dpud run`."""

    config: Config
    source: str | None = None
    """None, "host", or the folder of a capture."""
    mount: str | None = None
    ready_fd: int | None = None
    """A pipe that gets one byte when the mount is up; nothing is printed then."""
    parent: int | None = None
    """Live only as long as this process, our parent, and take the mount point along."""


def run(options: RunOptions) -> None:
    """Serve until SIGTERM or SIGINT. Raises UserError."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _leave)
    if options.parent is not None:
        namespace.die_with_parent(options.parent, signal.SIGTERM)
    _go_before_others(options.config.mount.nice)
    path = options.mount or options.config.mount.path or claim.default()
    connection = service.inherited()
    with (
        claim.claimed(path, remove=options.parent is not None) if connection is None else nullcontext(),
        _devices(options.config) as driver,
        _paced(_build(options, driver)) as (machine, owner),
    ):
        preload(DpuDriver())
        add_device_files(machine, driver)
        add_gpu(machine, owner, options.config)
        machine.registry.add("/proc", ConfigFile(options.config))
        ready = Readiness(options.ready_fd, path, _describe(options, machine))
        if service.in_journal():
            service.log_to_journal()
            machine.printk.console = service.say
        elif options.ready_fd is None and sys.stderr.isatty():
            machine.printk.console = lambda level, text: print(f"<{level}> {text}", file=sys.stderr)
        uid, gid = (os.geteuid(), os.getegid()) if connection is None else (0, 0)
        tree = Tree(machine.registry, owner.call, owner.look, uid=uid, gid=gid, run_as=_requests_of(machine))
        workload.apply(tree, options.config, ready.progress)
        gc.freeze()  # modules and files stay: collections that walk them all would hold requests up
        _serve(tree, path, options.config, ready, connection)


def _go_before_others(nice: int) -> None:
    """Have this priority, if that is allowed: else the daemon runs like everything else.

    Where the scheduler groups tasks by session (sched(7), autogroup), a nice value counts within the session only; if
    that is our own, it gets the same value.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        if os.getsid(0) == os.getpid():
            Path("/proc/self/autogroup").write_text(str(nice))


def _requests_of(machine: Machine) -> RunAs:
    """Requests are worked on in the name of who makes them; the machine does so on its first CPU."""
    current = machine.tracing.trace.current

    def run_as(cred: Cred, operation: Operation[Any]) -> Operation[Any]:
        return current.run_as(Task(cred.pid, cred.comm, entry="do_syscall_64"), operation)

    return run_as


def _leave(_signum: int, _frame: FrameType | None) -> None:
    """Ended while starting up; later the handlers are libfuse's, which unmount."""
    raise SystemExit(0)


@contextmanager
def _devices(config: Config) -> Iterator[DpuDriver]:
    driver = DpuDriver(dpu_config(config))
    try:
        yield driver
    finally:
        driver.close()


def dpu_config(config: Config) -> DpuConfig:
    """The file's [dpu] table. Raises UserError for a profile, a profile string or a package that cannot be had."""
    dpu = config.dpu
    program: DpuProgram = DPU_COMPACT
    if dpu.backend == "dpu":
        try:
            program = PackageCompact(import_package(), dpu.binary, dpu.properties)
        except NoPackage as error:
            raise UserError(f'dpu.backend: "dpu": {error}') from error
    try:
        return DpuConfig(dpu.ranks, dpu.dpus_per_rank, profile=dpu.profile, properties=dpu.properties, program=program)
    except DpuError as error:
        notes = getattr(error, "__notes__", ())
        where = f"dpu.properties: {notes[0]}" if notes else f'dpu.profile: "{dpu.profile}"'
        raise UserError(f"{where}: {error}") from error


def _build(options: RunOptions, driver: DpuDriver) -> Machine:
    """The machine that the configuration describes, or the one that was captured."""
    memory = PhysMem()
    try:
        config = machine_config(options.config)
        image = _read_image(options) if options.source else None
        live: dict[str, Any] = {"clock": LiveClock(), "wait_queue": BlockingWaitQueue}
        live |= {"alloc_words": memory.alloc, "discard": memory.discard}
        if image is None:
            return Machine(config, driver, **live, alloc_tables=alloc_tables)
        machine = Machine.from_image(image, config, driver, **live)
    except (CaptureError, ValueError, OSError) as error:  # broken, impossible, too large for this host
        raise UserError(str(error)) from error
    for note in image.notes:
        machine.printk(f"import: {note}")
    return machine


def add_device_files(machine: Machine, driver: DpuDriver) -> None:
    """The driver's files; its fault injection needs a debugfs, a device, and a kernel that uses it."""
    add_rank_files(machine.registry, driver.pool)
    kconfig = machine.config.kconfig
    if kconfig.IS_ENABLED("CONFIG_DPU_COMPACTION") and kconfig.IS_ENABLED("CONFIG_DEBUG_FS") and driver.nr_present:
        add_fault_files(machine.registry, driver, machine.printk)


def gpu_config(gpu: Gpu) -> GpuConfig:
    """The file's [gpu], for who builds it."""
    is_compressed = gpu.algorithm != "none"
    return GpuConfig(
        gpu.devices,
        gpu.memory,
        gpu.host_memory,
        gpu.pool,
        compression=is_compressed,
        algorithm=gpu.algorithm if is_compressed else "adaptive",
        quality=gpu.quality,
        tiers=gpu.tiers,
        swap_folder=Path(gpu.swap_folder) if gpu.swap_folder else None,
        checkpoint_folder=Path(gpu.checkpoint_folder) if gpu.checkpoint_folder else None,
    )


def add_gpu(machine: Machine, owner: Owner, config: Config) -> None:
    """GPU memory virtualization: its devices, its files, and who keeps memory free in the background."""
    gpu = config.gpu
    if not gpu.devices:
        return
    set_log_level()
    migration = MigrationModule(BlockingWaitQueue, lambda: secrets.token_hex(8))
    try:
        memory = build(gpu_config(gpu), PacedClock(), BlockingWaitQueue(), migration)
    except OSError as error:
        raise UserError(f"gpu.swap_folder: no swap can be made there: {error.strerror}") from error
    add_files(machine.registry, memory)
    short = BlockingWaitQueue()
    owner.background(reclaimer(memory, short, short.wake_up), "dpud-gpu-reclaim")
    owner.background(sampler(memory), "dpud-gpu-sample")
    owner.background(migration.worker(), "dpud-gpu-migrate")
    owner.background(migration.listener(), "dpud-gpu-listen")
    owner.background(scrubber(memory.fault), "dpud-gpu-scrub")
    owner.background(checkpointer(memory.fault), "dpud-gpu-checkpoint")
    owner.background(memory.defrag.background(), "dpud-gpu-defrag")


def _read_image(options: RunOptions) -> HostImage:
    if options.config.memory.bytes not in (None, "stamp"):
        raise UserError('memory.bytes: an imported machine always has "stamp"')
    if options.source != "host":
        return read_capture(Path(options.source or ""))
    with Console(stderr=True).status("Reading this host's memory"):
        return read_host(HOST_ATTEMPTS)


def machine_config(config: Config) -> MachineConfig:
    """The kernel side's part of the file, CPUs shared out over the nodes from the first on."""
    machine = config.machine
    share, rest = divmod(machine.cpus, len(machine.nodes))
    return MachineConfig(
        nodes=tuple(NodeConfig(node.memory, share + (nid < rest), node.cma) for nid, node in enumerate(machine.nodes)),
        bytes=config.memory.bytes or "full",
        kconfig=config.kernel,
        distance=tuple(node.distance for node in machine.nodes if node.distance),
    )


@contextmanager
def _paced(machine: Machine) -> Iterator[tuple[Machine, Owner]]:
    """The machine with its lock and its running clock."""
    owner = Owner()
    if machine.config.kconfig.IS_ENABLED("CONFIG_DEBUG_VM"):
        owner.after_slice.append(DebugVm(machine).look)
    owner.changes = machine.registry.changes
    machine.kthreads.spawn = owner.background
    machine.btime_s = boot_time_s()
    owner.charge = machine.cputime.charge
    pacer = Pacer(machine, owner, machine.clock.now_ns)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    pacer.start()
    try:
        yield machine, owner
    finally:
        owner.close()
        pacer.stop()


class DebugVm:
    """Logs violated invariants, each time that they change."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._known: list[str] = []

    def look(self) -> None:
        violations = self._machine.check()
        if violations != self._known:
            self._known = violations
            for violation in violations:
                self._machine.printk(f"BUG: {violation}", KERN_ERR)


def _serve(tree: Tree, path: str, config: Config, ready: "Readiness", connection: int | None) -> None:
    """Mount and serve until a signal. (libfuse handles those that have their default action.)"""
    allow_other = os.geteuid() == 0 if config.mount.allow_other is None else config.mount.allow_other
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_DFL)
    if connection is not None:
        fuse_dev.serve(tree, connection, ready.watch)
        return
    try:
        server = fuse_dev if config.mount.server == "dev" else fuse_ops
        server.mount(tree, path, allow_other=allow_other, on_ready=ready.watch)
    except MountError as error:
        raise UserError(str(error)) from error


def _describe(options: RunOptions, machine: Machine) -> str:
    nr_nodes = machine.mem.nr_nodes
    size = Size(options.config.memory_bytes) if options.source is None else options.source
    return f"{nr_nodes} node{'s' * (nr_nodes > 1)}, {size}"


class Readiness:
    """Says once that the files can be used: on stderr or to a waiting parent, and to systemd."""

    def __init__(self, ready_fd: int | None, path: str, what: str) -> None:
        self._ready_fd, self._path, self._what = ready_fd, path, what

    def progress(self, what: str) -> None:
        """Something else is being done before the files can be used."""
        if self._ready_fd is None:
            print(f"dpud: {what}", file=sys.stderr, flush=True)
        service.notify(f"STATUS={what}")

    def watch(self) -> None:
        """Wait, on a thread, for the first answer that comes through the mount."""
        threading.Thread(target=self._announce, name="dpud-ready", daemon=True).start()

    def _announce(self) -> None:
        os.stat(os.path.join(self._path, PROBE))
        if self._ready_fd is not None:
            os.write(self._ready_fd, b"1")
        else:
            ready = f"dpud: ready at {self._path} ({self._what}) in {_age_s():.1f} s"
            print(ready, file=sys.stderr, flush=True)
        service.notify("READY=1", f"STATUS=serving {self._path} ({self._what})")
        service.watch(os.path.join(self._path, "proc/buddyinfo"))


def _age_s() -> float:
    """Seconds since this process was started, imports included: field 22 of proc_pid_stat(5), in ticks."""
    fields = Path("/proc/self/stat").read_text().rpartition(") ")[2].split()
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[22 - 3]) / os.sysconf("SC_CLK_TCK")
