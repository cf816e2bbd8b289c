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
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from types import FrameType
from typing import Any

from dpud import claim, namespace, service, state, state_keeping, state_kobject, workload
from dpud.capture import CaptureError, read_capture, read_host
from dpud.checkpoint import Whole, emptied
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
from dpud.gpu.memory import GpuMemory
from dpud.gpu.migration import MigrationModule
from dpud.gpu.performance import set_log_level
from dpud.gpu.system import GpuConfig, add_files, build, checkpointer, reclaimer, sampler, scrubber, topology_of
from dpud.inject import BlockingWaitQueue, LiveClock, boot_time_s
from dpud.journal_device import NotedDriver
from dpud.owner import Owner
from dpud.pacer import Pacer
from dpud.physmem import PhysMem, alloc_tables
from dpud.state import GPU_CHECKPOINTS, State
from fs import fuse_dev, fuse_ops
from fs.configfs import Ask, ask_directly
from fs.kernfs import Cred, Tree
from fs.mountpoint import MountError
from fs.performer import RunAs
from kernelsim.hostimage import HostImage
from kernelsim.machine import Machine, MachineConfig, NodeConfig
from kernelsim.operation import Operation
from kernelsim.printk import KERN_ERR
from kernelsim.task import Task
from kernelsim.timer import Clock
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
    recover: bool = False
    """Go on from what is whole of a damaged state directory."""


def run(options: RunOptions) -> None:
    """Serve until SIGTERM or SIGINT. Raises UserError."""
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, _leave)
    if options.parent is not None:
        namespace.die_with_parent(options.parent, signal.SIGTERM)
    _go_before_others(options.config.mount.nice)
    path = options.mount or options.config.mount.path or claim.default()
    connection = service.inherited()
    if options.source and options.config.state.directory:
        raise UserError("state.directory: a machine that was captured (--from) cannot be kept")
    with (
        claim.claimed(path, remove=options.parent is not None) if connection is None else nullcontext(),
        state.opened(options.config, options.recover) as kept,
        devices(options.config, kept) as driver,
        running(assembled(options, driver, kept, connection is not None), kept) as live,
    ):
        ready = Readiness(options.ready_fd, path, _describe(options, live.machine))
        if service.in_journal():
            live.machine.printk.console = service.log_to_journal()
        elif options.ready_fd is None and sys.stderr.isatty():
            live.machine.printk.console = lambda level, text: print(f"<{level}> {text}", file=sys.stderr)
        if kept is None or kept.end is None:
            workload.apply(live.tree, options.config, ready.progress)
        serve_metrics(live, options.config.metrics.listen)
        gc.freeze()  # modules and files stay: collections that walk them all would hold requests up
        _serve(live.tree, path, options.config, ready, connection)


def _go_before_others(nice: int) -> None:
    """Have this priority, if that is allowed: else the daemon runs like everything else.

    Where the scheduler groups tasks by session (sched(7), autogroup), a nice value counts within the session only; if
    that is our own, it gets the same value.
    """
    with suppress(OSError):
        os.setpriority(os.PRIO_PROCESS, 0, nice)
        if os.getsid(0) == os.getpid():
            Path("/proc/self/autogroup").write_text(str(nice))


@dataclass(frozen=True)
class Live:
    """A machine that runs."""

    machine: Machine
    owner: Owner
    pacer: Pacer
    tree: Tree
    gpu: GpuMemory | None


@cache
def load_loops() -> None:
    """The compiled loops, into this process."""
    preload(DpuDriver())


def assembled(options: RunOptions, driver: DpuDriver, kept: State | None, for_root: bool = False) -> Live:
    """The machine and its files, as they were if there was one; its clock stands still. Raises UserError."""
    if kept is not None:
        kept.begin_boot()
    clock = LiveClock() if kept is None else kept.clock
    machine = _build(options, driver, clock)
    owner = _owner_of(machine)
    pacer = Pacer(machine, owner, clock.now_ns)
    load_loops()
    add_device_files(machine, driver)
    gpu = add_gpu(machine, owner, options.config, PacedClock(clock.now_ns, clock.cpu_ns))
    machine.registry.add("/proc", ConfigFile(options.config))
    if kept is not None:
        machine.registry.add(state_kobject.PATH, kept.files)
    tree = _tree_of(machine, owner, kept, for_root, options.config.mount.control_gid())
    owner.after()
    if kept is not None:
        kept.end_boot()
        kept.whole = Whole(machine, owner, tree.performer, driver, gpu, kept.clock)
        state_keeping.come_back(kept, machine, owner, tree.performer, driver)
    return Live(machine, owner, pacer, tree, gpu)


@contextmanager
def running(live: Live, kept: State | None) -> Iterator[Live]:
    """From here on time passes."""
    try:
        with state_keeping.noted(kept, live.machine, live.owner, live.tree.performer):
            live.machine.btime_s = boot_time_s(live.machine.clock.now_ns)
            live.owner.unpark()
            sys.setswitchinterval(SWITCH_INTERVAL_S)
            live.pacer.start()
            yield live
    finally:  # what is interrupted now is not noted: it goes on with the next start
        live.owner.close()
        live.pacer.stop()


def _tree_of(machine: Machine, owner: Owner, kept: State | None, for_root: bool, control_gid: int | None) -> Tree:
    outside = ask_directly if kept is None else kept.outside.take
    return Tree(
        machine.registry,
        owner.call,
        owner.look,
        uid=0 if for_root else os.geteuid(),
        gid=0 if for_root else os.getegid(),
        control_gid=control_gid,
        run_as=_requests_of(machine, outside),
        request=owner.request,
        outside=outside,
        settles=kept is None or kept.sync_ms != 0,  # else the disk has to be waited for
        stores_at=0 if kept is None else kept.stores.address,
    )


def _requests_of(machine: Machine, outside: Ask) -> RunAs:
    """Requests are worked on in the name of who makes them; the machine does so on its first CPU."""
    current = machine.tracing.trace.current

    def run_as(cred: Cred, operation: Operation[Any]) -> Operation[Any]:
        comm = cred.comm if outside is ask_directly else partial(outside, cred.comm)
        return current.run_as(Task(cred.pid, comm, entry="do_syscall_64"), operation)

    return run_as


def _leave(_signum: int, _frame: FrameType | None) -> None:
    """Ended while starting up; later the handlers are libfuse's, which unmount."""
    raise SystemExit(0)


@contextmanager
def devices(config: Config, kept: State | None) -> Iterator[DpuDriver]:
    """The DPUs. Raises UserError."""
    if kept is not None and config.dpu.backend != "emulated":
        raise UserError(f'state.directory: what a DPU of backend = "{config.dpu.backend}" did cannot be done again')
    ranks = dpu_config(config)
    driver = DpuDriver(ranks) if kept is None else NotedDriver(ranks, kept.outside)
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


def _build(options: RunOptions, driver: DpuDriver, clock: Clock) -> Machine:
    """The machine that the configuration describes, or the one that was captured."""
    memory = PhysMem()
    try:
        config = machine_config(options.config)
        image = _read_image(options) if options.source else None
        live: dict[str, Any] = {"clock": clock, "wait_queue": BlockingWaitQueue}
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
        numa=gpu.numa,
    )


def _kept_gpu_config(config: Config) -> GpuConfig:
    """The same for the whole file: a machine that is kept has the files of its clients' checkpoints beside it."""
    found = gpu_config(config.gpu)
    if config.state.directory and found.checkpoint_folder is None:
        found = replace(found, checkpoint_folder=emptied(Path(config.state.directory, GPU_CHECKPOINTS)))
    return found


def add_gpu(machine: Machine, owner: Owner, config: Config, clock: PacedClock) -> GpuMemory | None:
    """GPU memory virtualization: its devices, its files, and who keeps memory free in the background.

    A machine that is kept has no migration: what comes over a connection cannot be done again.
    """
    gpu = config.gpu
    if not gpu.devices:
        return None
    set_log_level()
    migration = MigrationModule(BlockingWaitQueue, lambda: secrets.token_hex(8))
    try:
        topology_of(gpu_config(gpu))
    except OSError as error:
        raise UserError(f"gpu.numa: no topology {gpu.numa!r}: {error.strerror}") from error
    try:
        memory = build(_kept_gpu_config(config), clock, BlockingWaitQueue(), migration)
    except OSError as error:
        raise UserError(f"gpu.swap_folder: no swap can be made there: {error.strerror}") from error
    if config.state.directory:
        memory.migration = None
    add_files(machine.registry, memory)
    short = BlockingWaitQueue()
    owner.background(reclaimer(memory, short, short.wake_up), "dpud-gpu-reclaim")
    arrival = BlockingWaitQueue()
    owner.background(sampler(memory, clock, arrival, arrival.wake_up), "dpud-gpu-sample")
    owner.background(scrubber(memory.fault, clock), "dpud-gpu-scrub")
    owner.background(checkpointer(memory.fault, clock), "dpud-gpu-checkpoint")
    if memory.migration is not None:
        owner.background(migration.worker(), "dpud-gpu-migrate")
        owner.background(migration.listener(), "dpud-gpu-listen")
    owner.background(memory.defrag.background(clock), "dpud-gpu-defrag")
    return memory


def serve_metrics(live: Live, listen: str) -> None:
    """Answer Prometheus, if the configuration says where. Raises UserError."""
    if not listen:
        return
    try:
        from dpud import metrics
    except ImportError as error:
        raise UserError(f"metrics.listen: {error.name} is missing: pip install 'dpud[metrics]'") from error
    metrics.serve(listen, live.machine.registry, live.tree)


def _read_image(options: RunOptions) -> HostImage:
    if options.config.memory.bytes not in (None, "stamp"):
        raise UserError('memory.bytes: an imported machine always has "stamp"')
    if options.source != "host":
        return read_capture(Path(options.source or ""))
    from rich.console import Console  # which takes long to import, and only this rare case needs it

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


def _owner_of(machine: Machine) -> Owner:
    """Its lock. What it begins in the background waits for `unpark`."""
    owner = Owner()
    owner.parked = {}
    if machine.config.kconfig.IS_ENABLED("CONFIG_DEBUG_VM"):
        owner.after_slice.append(DebugVm(machine).look)
    owner.changes = machine.registry.changes
    machine.kthreads.spawn = owner.background
    owner.charge = machine.cputime.charge
    return owner


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
        if not service.is_served(os.path.join(self._path, PROBE)):
            return
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
