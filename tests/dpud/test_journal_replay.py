# SPDX-License-Identifier: GPL-2.0-only
"""A machine that is killed comes back as it was: the same hash, whatever threads, clocks and devices did meanwhile."""

import errno
import os
import random
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from kept import CLIENTS, MM, VM, alive, cat, configured, echo, hash_of, killed, nr_records, still

from dpud.daemon import Live
from dpud.journal import Journal
from dpud.state_hash import state_hash
from fs.kernfs import Cred

TIMEOUT_S = 60
TRACING = "/sys/kernel/tracing"
DPU = "/sys/kernel/debug/dpu_compact"
DEFRAG = "/sys/class/gpu_memvirt/gpu0/defrag"


def a_bit_of_everything(live: Live, name: str, seed: int) -> None:
    """Requests of one client, whose outcome may be any."""
    chance = random.Random(seed)
    work = [
        lambda: echo(live, f"{MM}/{name}/anon", f"{chance.randrange(1, 5)}M"),
        lambda: echo(live, f"{MM}/{name}/file", f"{chance.randrange(1, 3)}M"),
        lambda: echo(live, f"{MM}/{name}/holes", f"{chance.randrange(100)} seed={seed}"),
        lambda: echo(live, f"{MM}/{name}/touch", "30"),
        lambda: cat(live, f"{MM}/{name}/verify"),
        lambda: cat(live, "/proc/zoneinfo"),
        lambda: echo(live, f"{VM}/dpu_compact_adaptive", str(chance.randrange(2))),
        lambda: echo(live, f"{VM}/compaction_proactiveness", str(chance.randrange(100))),
        lambda: echo(live, f"/sys/devices/system/node/node{chance.randrange(2)}/compact_dpu", "1"),
        lambda: echo(live, "/sys/kernel/debug/dpu_compact/engine", chance.choice(["host", "cpu", "upmem-v1a"])),
        lambda: echo(live, "/dev/kmsg", f"<4>{name}"),
        lambda: use_gpu(live, name, chance),
    ]
    cred = Cred(pid=seed, comm=lambda: name)
    live.tree.mkdir(f"{MM}/{name}", cred)
    live.tree.mkdir(f"{CLIENTS}/{name}", cred)
    for _ in range(25):
        with suppress(OSError):
            chance.choice(work)()
    live.tree.rmdir(f"{MM}/{name}", cred)


def use_gpu(live: Live, name: str, chance: random.Random) -> None:
    buffer = f"{CLIENTS}/{name}/buffers/{chance.randrange(2)}"
    if buffer not in live.machine.registry.nodes:
        live.tree.mkdir(buffer)
        echo(live, f"{buffer}/size", f"{chance.randrange(1, 5)}M")
    data = live.tree.open(f"{buffer}/data", os.O_RDWR)
    pos = chance.randrange(1 << 20)
    data.write(chance.randbytes(1 << 14) * 8, pos)
    data.read(1 << 16, pos)
    echo(live, f"{buffer}/reclaim", "1M")


def in_threads(live: Live, nr: int) -> None:
    threads = [threading.Thread(target=a_bit_of_everything, args=(live, f"t{n}", n)) for n in range(nr)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


@pytest.mark.slow
def test_it_comes_back_as_it_was(tmp_path: Path) -> None:
    with alive(configured(tmp_path / "a")) as live:
        in_threads(live, 3)
        before = killed(live, tmp_path / "a", tmp_path / "b")
    with still(configured(tmp_path / "b")) as again:
        assert hash_of(again) == before


@pytest.mark.slow
def test_it_comes_back_as_it_was_after_a_pass_over_a_gpu_s_memory(tmp_path: Path) -> None:
    """Which measures itself, in time and in CPU time."""
    with alive(configured(tmp_path / "a")) as live:
        live.tree.mkdir(f"{CLIENTS}/c")
        buffers = [f"{CLIENTS}/c/buffers/{n}" for n in range(12)]
        for buffer in buffers:
            live.tree.mkdir(buffer)
            echo(live, f"{buffer}/size", "300K")
            live.tree.open(f"{buffer}/data", os.O_RDWR).write(bytes(300 << 10), 0)
        for buffer in buffers[::2]:
            live.tree.rmdir(buffer)
        echo(live, f"{DEFRAG}/run", "1")
        pauses = [cat(live, f"{DEFRAG}/longest_pause_{name}") for name in ("ns", "cpu_ns")]
        before = killed(live, tmp_path / "a", tmp_path / "b")
    assert "0\n" not in pauses
    with still(configured(tmp_path / "b")) as again:
        assert hash_of(again) == before
        assert [cat(again, f"{DEFRAG}/longest_pause_{name}") for name in ("ns", "cpu_ns")] == pauses


@pytest.mark.slow
def test_it_comes_back_as_it_was_while_it_was_traced_and_broken(tmp_path: Path) -> None:
    """Requests in flight, ranks that fail, and a tracer that makes even looking leave something behind."""
    config = configured(tmp_path / "a", "[dpu]\nranks = 2")
    with alive(config) as live:
        echo(live, f"{TRACING}/current_tracer", "function_graph")
        echo(live, f"{TRACING}/events/enable", "1")
        for kind in ("rank_lost", "corrupt", "timeout"):
            for name, text in (("move", "20"), ("times", "2"), ("probability", "60")):
                echo(live, f"{DPU}/fail_{kind}/{name}", text)
        reader = threading.Thread(target=lambda: suppress_errors(cat, live, f"{TRACING}/trace_pipe"), daemon=True)
        reader.start()
        threads = [threading.Thread(target=a_bit_of_everything, args=(live, f"t{n}", n + 7)) for n in range(3)]
        for thread in threads:
            thread.start()
        threads[0].join(TIMEOUT_S)
        before = killed(live, tmp_path / "a", tmp_path / "b")
        for thread in threads:
            thread.join(TIMEOUT_S)
    with still(configured(tmp_path / "b", "[dpu]\nranks = 2")) as again:
        assert hash_of(again) == before


@pytest.mark.slow
def test_it_comes_back_after_a_look_that_was_traced(tmp_path: Path) -> None:
    """Which is noted then; who only opens the log to read it is no user of it, when that is done again either."""
    with alive(configured(tmp_path / "a")) as live:
        echo(live, f"{TRACING}/current_tracer", "function_graph")
        file = live.tree.open("/dev/kmsg", os.O_RDONLY)
        assert file.read(1 << 12, 0, nonblock=True)
        file.release()
        before = killed(live, tmp_path / "a", tmp_path / "b")
    with still(configured(tmp_path / "b")) as again:
        assert hash_of(again) == before


def suppress_errors(work: Callable[..., object], *args: object) -> None:
    with suppress(OSError):
        work(*args)


@pytest.mark.slow
def test_the_hash_is_that_of_all_there_is(tmp_path: Path) -> None:
    with alive(configured(tmp_path / "a")) as live:
        live.tree.mkdir(f"{CLIENTS}/c")
        live.tree.mkdir(f"{CLIENTS}/c/buffers/b")
        echo(live, f"{CLIENTS}/c/buffers/b/size", "1M")
        with live.owner._turn():  # nothing else happens meanwhile
            assert live.gpu is not None
            machine = live.machine
            sysctl = machine.compaction_sysctl
            before = state_hash(machine, live.gpu)
            assert state_hash(machine, live.gpu) == before
            for change in (
                lambda: setattr(sysctl, "extfrag_threshold", sysctl.extfrag_threshold ^ 1),
                lambda: live.gpu and live.gpu.locations[0].hardware.memory.__setitem__(5, 1),  # type: ignore[attr-defined]
                lambda: live.gpu and live.gpu.client("c").regions[0].__setattr__("priority", 3),
                lambda: machine.printk("a line"),
                lambda: machine.tracing.trace.event_pids.add(3),
                lambda: machine.kcompactds[0].proactive_trigger(),
            ):
                change()
                after = state_hash(machine, live.gpu)
                assert after != before
                before = after


@pytest.mark.slow
def test_looking_changes_nothing_and_is_not_written_down(tmp_path: Path) -> None:
    """Of all files but those that say that they are consumed."""
    with alive(configured(tmp_path / "a")) as live:
        a_bit_of_everything(live, "t", 5)
        live.tree.mkdir(f"{MM}/p")
        echo(live, f"{MM}/p/anon", "1M")
        live.tree.mkdir(f"{CLIENTS}/new")
        live.tree.mkdir(f"{CLIENTS}/new/buffers/new")
        files = [(path, attr) for path, _, attr in live.machine.registry.walk() if attr.readable and not attr.is_stream]
        nr = 0
        with live.owner._turn():  # nobody else does anything meanwhile
            before = state_hash(live.machine, live.gpu)
            for path, attr in files:
                if not attr.kind.consumed:
                    with suppress(OSError):
                        live.machine.registry.read(path)
                        nr += 1
            assert nr > 300
            assert state_hash(live.machine, live.gpu) == before
        nr_before = nr_records(live)
        for path in ("/proc/meminfo", "/proc/zoneinfo", f"{VM}/extfrag_threshold") * 30:
            cat(live, path)
        assert nr_records(live) - nr_before < 90, "only what goes on in the background"


def wait_until(so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(TIMEOUT_S * 100):
        if so():
            return
        pause.wait(0.01)
    raise AssertionError("it never came")


@pytest.mark.slow
def test_who_was_waiting_is_interrupted_and_what_was_acknowledged_is_there(tmp_path: Path) -> None:
    """Killed in the middle of a request that has to be undone."""
    with alive(configured(tmp_path / "a")) as live:
        live.tree.mkdir(f"{MM}/p")
        echo(live, f"{MM}/p/anon", "1M")
        nr = nr_records(live)

        def kill_in_the_middle() -> None:
            if live.owner.turns and nr_records(live) >= nr + 3 and not (tmp_path / "b").exists():
                shutil.copytree(tmp_path / "a", tmp_path / "b")

        live.owner.after_slice.append(kill_in_the_middle)
        echo(live, f"{MM}/p/anon", "40M")
    with alive(configured(tmp_path / "b")) as again:
        assert cat(again, f"{MM}/p/anon") == f"{1 << 20}\n"
        assert cat(again, f"{MM}/p/verify") == "ok\n"
        assert again.machine.check() == []
        echo(again, f"{MM}/p/anon", "2M")
    with still(configured(tmp_path / "b")) as third:
        assert cat(third, f"{MM}/p/anon") == f"{2 << 20}\n"


@pytest.mark.slow
def test_what_runs_in_the_background_goes_on_after_a_clean_end_too(tmp_path: Path) -> None:
    with alive(configured(tmp_path / "a")) as live:
        live.tree.mkdir(f"{CLIENTS}/c")
    for _ in range(2):
        with still(configured(tmp_path / "a")) as again:
            assert again.owner.parked is not None
            names = sorted(name for _, name in again.owner.parked.values())
            assert names == [f"dpud-gpu-{name}" for name in ("checkpoint", "defrag", "reclaim", "sample", "scrub")]
        with alive(configured(tmp_path / "a")):
            pass


def test_the_clock_goes_on_from_where_it_was(tmp_path: Path) -> None:
    with alive(configured(tmp_path / "a")) as live:
        echo(live, "/dev/kmsg", "before")
        before_ns = live.machine.clock.now_ns()
    with alive(configured(tmp_path / "a")) as again:
        echo(again, "/dev/kmsg", "after")
        stamps = [int(line.split(",")[2]) for line in log_of(again)]
        assert stamps == sorted(stamps)
        lines = log_of(again)
        at = next(nr for nr, line in enumerate(lines) if line.endswith(";before"))
        assert abs(stamps[at] - before_ns / 1e3) < 60e6
        assert stamps[-1] >= stamps[at]


def log_of(live: Live) -> list[str]:
    file, lines, pos = live.tree.open("/dev/kmsg", os.O_RDONLY), [], 0
    with suppress(BlockingIOError):
        while True:
            line = file.read(8192, pos, nonblock=True)
            lines.append(line.decode().rstrip("\n"))
            pos += len(line)
    file.release()
    return lines


@pytest.mark.slow
def test_without_room_requests_fail_and_change_nothing_and_time_stands_still(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with alive(configured(tmp_path / "a")) as live:
        echo(live, f"{VM}/extfrag_threshold", "400")
        live.tree.mkdir(f"{MM}/p")
        with monkeypatch.context() as full:
            full.setattr(Journal, "reserve", lambda *_: False)
            before, nr = hash_of(live), nr_records(live)
            for work in (
                lambda: echo(live, f"{VM}/extfrag_threshold", "300"),
                lambda: live.tree.mkdir(f"{MM}/q"),
                lambda: live.tree.rmdir(f"{MM}/p"),
                lambda: echo(live, "/dev/kmsg", "x"),
                lambda: live.tree.chmod("/sys/kernel/mm/transparent_hugepage/enabled", 0o600),
            ):
                with pytest.raises(OSError, match="the journal cannot grow") as caught:
                    work()
                assert caught.value.errno == errno.ENOSPC
            assert cat(live, f"{VM}/extfrag_threshold") == "400\n"
            assert cat(live, f"{MM}/p/verify") == "ok\n"
            threading.Event().wait(1.2)  # more than a period of kcompactd and of the GPU's sampler
            assert (hash_of(live), nr_records(live)) == (before, nr)
        echo(live, f"{VM}/extfrag_threshold", "300")
        live.tree.mkdir(f"{MM}/q")
        before = killed(live, tmp_path / "a", tmp_path / "b")
    with still(configured(tmp_path / "b")) as again:
        assert hash_of(again) == before


@pytest.mark.slow
def test_an_idle_machine_writes_next_to_nothing(tmp_path: Path) -> None:
    """And comes back as it was all the same. With a timer that was due 40 times, on a clock of the test's."""
    with alive(configured(tmp_path / "a")) as live:
        live.pacer.stop()
        now_ns, owner = live.machine.clock.now_ns(), live.owner
        nr = nr_records(live)
        for number in range(40):
            owner.request(live.machine.step, now_ns + (number + 10) * 500_000_000)
        assert nr_records(live) - nr < 8
        before = killed(live, tmp_path / "a", tmp_path / "b")
    with still(configured(tmp_path / "b")) as again:
        assert hash_of(again) == before
        due_ns = again.machine.kthreads.peek(now_ns)
        assert due_ns == now_ns + (39 + 11) * 500_000_000, "the last look counted"


@pytest.mark.slow
def test_a_turn_that_cannot_be_noted_ends_the_daemon(tmp_path: Path) -> None:
    """In a process of its own: before anybody else can see what is not noted."""
    code = f"""
import os
from pathlib import Path
from kept import VM, alive, configured, echo
from dpud.journal import Journal
with alive(configured(Path({str(tmp_path / "a")!r}))) as live:
    echo(live, f"{{VM}}/extfrag_threshold", "400")
    def fail(*_): raise OSError(5, "Input/output error")
    Journal.append = fail
    echo(live, f"{{VM}}/extfrag_threshold", "300")
    print("went on")
"""
    env = os.environ | {"PYTHONPATH": ":".join([*sys.path, str(Path(__file__).parent)])}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (74, "")
    assert "Input/output error: the daemon ends" in done.stderr
    with still(configured(tmp_path / "a")) as again:
        assert cat(again, f"{VM}/extfrag_threshold") == "400\n"
