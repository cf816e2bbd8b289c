# SPDX-License-Identifier: GPL-2.0-only
"""A machine that comes up from a checkpoint is the one that was written down: the same hash, and the same from then on.

What comes after a checkpoint is done again on the machine that came up from it, and each turn has to come to what it
came to on the one that never stopped: else `still` fails.
"""

import os
import random
import shutil
import threading
import tomllib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import GeneratorType

import pytest
from kept import CLIENTS, MM, VM, alive, cat, configured, echo, hash_of, keeper_of, killed, nr_records, still

from dpud import state_kobject
from dpud.checkpoint import Whole
from dpud.checkpoint_born import is_state
from dpud.checkpoint_keeper import STEPS
from dpud.config import Config
from dpud.daemon import Live
from dpud.journal_turns import Recorder
from dpud.state import State
from dpud.state_hash import state_hash
from fs.kernfs import Cred

pytestmark = pytest.mark.slow

TIMEOUT_S = 30
KSM = "/sys/kernel/mm/ksm"
TRACING = "/sys/kernel/tracing"
DPU = "/sys/kernel/debug/dpu_compact"
FAULT = "/sys/class/gpu_memvirt/gpu0/fault"


class Client:
    """What one user does, by chance; any of it may fail."""

    def __init__(self, live: Live, name: str, seed: int) -> None:
        self.live, self.name, self.chance = live, name, random.Random(seed)
        self.cred = Cred(pid=seed + 100, comm=lambda: name)
        self.work: list[Callable[[], object]] = [
            lambda: live.tree.mkdir(f"{MM}/{name}", self.cred),
            lambda: live.tree.rmdir(f"{MM}/{name}", self.cred),
            lambda: self.echo(f"{MM}/{name}/anon", f"{self.chance.randrange(1, 5)}M"),
            lambda: self.echo(f"{MM}/{name}/file", f"{self.chance.randrange(1, 3)}M"),
            lambda: self.echo(f"{MM}/{name}/holes", f"{self.chance.randrange(100)} seed={seed}"),
            lambda: self.echo(f"{MM}/{name}/fork", f"{name}-child{self.chance.randrange(2)}"),
            lambda: self.echo(f"{MM}/{name}/mergeable", str(self.chance.randrange(2))),
            lambda: self.echo(f"{MM}/{name}/same", f"{self.chance.randrange(100)} kinds=20"),
            lambda: self.echo(f"{KSM}/run", str(self.chance.randrange(3))),
            lambda: self.echo(f"{VM}/compaction_proactiveness", str(self.chance.randrange(100))),
            lambda: self.echo(f"{VM}/nr_hugepages", str(self.chance.randrange(3))),
            lambda: self.echo(f"/sys/devices/system/node/node{self.chance.randrange(2)}/compact_dpu", "1"),
            lambda: self.echo(f"{DPU}/engine", self.chance.choice(["host", "cpu", "upmem-v1a"])),
            lambda: self.echo("/dev/kmsg", f"<4>{name}"),
            self.use_gpu,
            self.use_gpu,
        ]

    def echo(self, path: str, text: str) -> None:
        echo(self.live, path, text, self.cred)

    def use_gpu(self) -> None:
        live, chance = self.live, self.chance
        buffer = f"{CLIENTS}/{self.name}/buffers/{chance.randrange(2)}"
        if f"{CLIENTS}/{self.name}" not in live.machine.registry.nodes:
            live.tree.mkdir(f"{CLIENTS}/{self.name}")
        if buffer not in live.machine.registry.nodes:
            live.tree.mkdir(buffer)
            self.echo(f"{buffer}/size", f"{chance.randrange(1, 5)}M")
        data = live.tree.open(f"{buffer}/data", os.O_RDWR)
        pos = chance.randrange(1 << 20)
        data.write(chance.randbytes(1 << 14) * 8, pos)
        data.read(1 << 16, pos)
        data.release()
        self.echo(f"{buffer}/reclaim", "1M")

    def do(self, nr: int) -> None:
        for _ in range(nr):
            with suppress(OSError):
                self.chance.choice(self.work)()


def at_once(clients: list[Client], nr: int) -> None:
    threads = [threading.Thread(target=client.do, args=(nr,)) for client in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()


def came_up(config: Config, number: int) -> tuple[str, int]:
    """(hash, turns done again) of a machine that comes up from that checkpoint."""
    before, nr = Whole.come_up, []

    def counted(whole: Whole, path: Path, *more: object) -> None:
        nr.append(path.name)
        before(whole, path, *more)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(Whole, "come_up", counted)
        with still(config) as again:
            assert nr == ([f"checkpoint.{number}"] if number else [])
            return hash_of(again), sum(1 for _ in turns_of(config))


def turns_of(config: Config) -> list[int]:
    state = State(Path(config.state.directory), config)
    state.look()
    return [number for segment in state.segments for number, _, _ in segment.turns()]


def test_a_machine_at_rest_comes_up_without_a_turn(tmp_path: Path) -> None:
    with alive(configured(tmp_path / "a")) as live:
        Client(live, "c", 1).do(40)
        live.pacer.stop()
        keeper_of(live).make()
        before = killed(live, tmp_path / "a", tmp_path / "b")
    found, nr_turns = came_up(configured(tmp_path / "b"), 1)
    assert found == before
    assert nr_turns < 30, "what ran in the background meanwhile"


@pytest.mark.parametrize("seed", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_it_goes_on_as_if_it_had_never_stopped(tmp_path: Path, seed: int) -> None:
    """Clients work all the time; checkpoints come when they come. Then the next life does the same."""
    chance, directory = random.Random(seed), tmp_path / "0"
    for life in range(2):
        config = configured(directory)
        with alive(config) as live:
            clients = [Client(live, f"c{n}", seed * 10 + life + n) for n in range(2)]
            worker = threading.Thread(target=at_once, args=(clients, 40))
            worker.start()
            for _ in range(2):
                threading.Event().wait(chance.random() * 0.3)
                keeper_of(live).make(TIMEOUT_S)
            before = killed(live, directory, tmp_path / str(life + 1))
            worker.join(TIMEOUT_S)
            assert live.owner.call(live.machine.check) == []
        directory = tmp_path / str(life + 1)
        assert came_up(configured(directory), life * 2 + 2)[0] == before
    for file in directory.glob("checkpoint.*"):
        assert file.stat().st_size < 48 << 20, "what is empty takes no room"


def test_every_way_to_the_same_state(tmp_path: Path) -> None:
    """From the newest checkpoint, from the one before, or the boot where that is still there."""
    with alive(configured(tmp_path / "0")) as live:
        client, hashes = Client(live, "c", 5), []
        for number in (1, 2):
            client.do(15)
            keeper_of(live).make()
            client.do(15)
            hashes.append(killed(live, tmp_path / "0", tmp_path / str(number)))
    for newest, before in zip((1, 2), hashes, strict=True):
        for number in (newest, newest - 1):
            assert came_up(configured(tmp_path / str(newest)), number)[0] == before
            (tmp_path / f"{newest}/checkpoint.{number}").unlink(missing_ok=True)


def test_traced_and_broken_and_with_readers_that_wait(tmp_path: Path) -> None:
    more = "[dpu]\nranks = 2"
    with alive(configured(tmp_path / "a", more)) as live:
        echo(live, f"{TRACING}/current_tracer", "function_graph")
        echo(live, f"{TRACING}/events/kmem/enable", "1")
        echo(live, f"{TRACING}/events/compaction/mm_compaction_begin/filter", "zone_start > 4")
        with pytest.raises(OSError, match="Field not found"):  # what was wrong with it is remembered
            echo(live, f"{TRACING}/events/compaction/mm_compaction_end/filter", "zone_begin > 4")
        for kind in ("rank_lost", "corrupt", "timeout"):
            for name, text in (("move", "20"), ("times", "2"), ("probability", "60")):
                echo(live, f"{DPU}/fail_{kind}/{name}", text)
        for path in (f"{TRACING}/trace_pipe", "/dev/kmsg"):
            threading.Thread(target=read_on, args=(live, path), daemon=True).start()
        worker = threading.Thread(target=at_once, args=([Client(live, f"c{n}", n + 7) for n in range(2)], 25))
        worker.start()
        keeper_of(live).make(TIMEOUT_S)
        worker.join(TIMEOUT_S)
        before = killed(live, tmp_path / "a", tmp_path / "b")
    assert came_up(configured(tmp_path / "b", more), 1)[0] == before


def read_on(live: Live, path: str) -> None:
    file, pos = live.tree.open(path, os.O_RDONLY), 0
    with suppress(OSError):
        while True:
            pos += len(file.read(8192, pos))


def test_a_reader_that_waits_notices_nothing(tmp_path: Path) -> None:
    with alive(configured(tmp_path / "a")) as live:
        file, lines = live.tree.open("/dev/kmsg", os.O_RDONLY), []
        with suppress(BlockingIOError):
            pos = 0
            while True:
                pos += len(file.read(8192, pos, nonblock=True))
        reader = threading.Thread(target=lambda: lines.append(file.read(8192, pos)), daemon=True)
        reader.start()
        while not live.owner.flights.readers():
            threading.Event().wait(0.01)
        keeper_of(live).make()
        assert not live.owner.flights.readers()
        echo(live, "/dev/kmsg", "<4>come")
        reader.join(TIMEOUT_S)
        assert [line.endswith(b";come\n") for line in lines] == [True]
        before = killed(live, tmp_path / "a", tmp_path / "b")
    assert came_up(configured(tmp_path / "b"), 1)[0] == before


def test_what_a_kill_cut_short_is_in_the_way_until_it_is_closed(tmp_path: Path) -> None:
    """Its end is noted in the journal that it began in, or none could be done again."""
    with alive(configured(tmp_path / "a")) as live:
        threading.Thread(target=read_on, args=(live, "/dev/kmsg"), daemon=True).start()
        while not live.owner.flights.readers():
            threading.Event().wait(0.01)
        killed(live, tmp_path / "a", tmp_path / "b")
    with still(configured(tmp_path / "b")) as again:
        assert [name for _, name in again.owner.parked.values()].count("") == 1  # type: ignore[union-attr]
        assert again.owner.flights.in_the_way() is not None
        again.owner.unpark()
        assert again.owner.flights.in_the_way() is None


@pytest.mark.parametrize(
    "nrs", [(2,), pytest.param((0, 1), marks=pytest.mark.slow)], ids=["when old files go", "the first two"]
)
def test_killed_at_any_step_of_a_checkpoint(tmp_path: Path, nrs: tuple[int, ...]) -> None:
    """What was acknowledged until then is there, and since the checkpoint began."""
    found: dict[tuple[int, str], str] = {}
    with alive(configured(tmp_path / "a")) as live:
        client, keeper = Client(live, "c", 11), keeper_of(live)

        def kill(step: str) -> None:
            key = keeper.stats.nr_made, step
            if key[0] not in nrs:
                return
            found[key] = copied(live, tmp_path / "a", tmp_path / f"{key[0]}-{step}", step == "named")
            if step != "named":
                echo(live, f"{VM}/extfrag_threshold", str(len(found)))

        keeper.on_step = kill
        for _ in range(max(nrs) + 1):
            client.do(12)
            keeper.make()
    assert len(found) == len(nrs) * len(STEPS)
    for (nr, step), before in found.items():
        assert came_up_anyhow(configured(tmp_path / f"{nr}-{step}")) == before, (nr, step)


def copied(live: Live, before: Path, after: Path, is_held: bool) -> str:
    """As `killed`, for somebody who may hold the machine already."""
    if not is_held:
        return killed(live, before, after)
    assert isinstance(live.owner.turns, Recorder)
    shutil.copytree(before, after)
    return state_hash(live.machine, live.gpu)


def came_up_anyhow(config: Config) -> str:
    with still(config) as again:
        return hash_of(again)


SWAPPED = 7 << 20
"""More than the pool has room for."""


def test_swap_that_changes_while_it_is_written_down(tmp_path: Path) -> None:
    """Blocks of tiers' files that are used anew before the child has read them; and the GPUs' own memory."""
    with alive(configured(tmp_path / "a")) as live:
        buffer = f"{CLIENTS}/c/buffers/b"
        live.tree.mkdir(f"{CLIENTS}/c")
        live.tree.mkdir(buffer)
        echo(live, f"{buffer}/size", f"{SWAPPED}")
        chance, keeper = random.Random(1), keeper_of(live)

        def refill() -> None:
            data = live.tree.open(f"{buffer}/data", os.O_RDWR)
            for pos in range(0, SWAPPED, 1 << 18):
                data.write(chance.randbytes(1 << 18), pos)
            data.release()
            echo(live, f"{buffer}/reclaim", f"{SWAPPED}")

        refill()
        hashes = []

        def overwrite(step: str) -> None:
            if step == "named":
                hashes.append(state_hash(live.machine, live.gpu))
            elif step == "begun":
                refill()
                refill()

        keeper.on_step = overwrite
        keeper.make()
        before = killed(live, tmp_path / "a", tmp_path / "b")
        assert before != hashes[0]
    assert came_up(configured(tmp_path / "b"), 1)[0] == before
    for file in (tmp_path / "b").glob("journal.1"):  # as it was at that moment: nothing since
        cut_to_beginning(file)
    with still(configured(tmp_path / "b")) as again:
        assert hash_of(again) == hashes[0]
        data = again.tree.open(f"{CLIENTS}/c/buffers/b/data", os.O_RDONLY)
        chance = random.Random(1)
        for pos in range(0, SWAPPED, 1 << 18):
            assert data.read(1 << 18, pos) == chance.randbytes(1 << 18)


def cut_to_beginning(path: Path) -> None:
    """Leave the two records that a journal is made with."""
    from dpud.journal import Reader

    offsets = [offset for offset, _ in Reader(path)]
    if len(offsets) > 2:
        with open(path, "r+b") as file:
            file.truncate(offsets[2])


@pytest.mark.parametrize("where", ["a", "elsewhere"])
def test_gpu_checkpoints_of_clients_come_along(tmp_path: Path, where: str) -> None:
    """Where the directory is moved, too."""
    with alive(configured(tmp_path / "a")) as live:
        buffer = f"{CLIENTS}/c/buffers/b"
        live.tree.mkdir(f"{CLIENTS}/c")
        live.tree.mkdir(buffer)
        echo(live, f"{buffer}/size", "1M")
        data = live.tree.open(f"{buffer}/data", os.O_RDWR)
        data.write(b"then" * 1024, 0)
        echo(live, f"{FAULT}/checkpoint/create", "c")
        data.write(b"now." * 1024, 0)
        keeper_of(live).make()
        killed(live, tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/gpu-checkpoints")
    shutil.rmtree(tmp_path / "a")
    (tmp_path / "b").rename(tmp_path / where)
    with alive(configured(tmp_path / where)) as again:
        data = again.tree.open(f"{CLIENTS}/c/buffers/b/data", os.O_RDWR)
        assert data.read(8, 0) == b"now.now."
        echo(again, f"{FAULT}/checkpoint/restore", "c")
        assert data.read(8, 0) == b"thenthen"
        echo(again, f"{FAULT}/checkpoint/create", "c")
    assert [path.name for path in tmp_path.iterdir()] == [where]


def test_when_one_is_made(tmp_path: Path) -> None:
    """When the journal is long enough, when somebody asks, at the end."""
    with alive(configured(tmp_path / "a", checkpoint_bytes="16K")) as live:
        made = keeper_of(live).stats
        for number in range(300):
            echo(live, f"{VM}/extfrag_threshold", str(number))
        wait_until(lambda: made.nr_made >= 1)
        nr = made.nr_made
        echo(live, "/sys/kernel/dpud_state/checkpoint", "1")
        wait_until(lambda: made.nr_made > nr)
        stats = dict(line.split() for line in cat(live, "/sys/kernel/dpud_state/stats").splitlines())
        assert int(stats["last_bytes"]) > 0
        assert int(stats["checkpoints"]) >= 2
        assert int(stats["journal_turns"]) < 300
        echo(live, f"{VM}/extfrag_threshold", "77")
        number = made.number
    last = f"checkpoint.{number + 1}"
    assert (tmp_path / "a" / last).exists()
    with still(configured(tmp_path / "a")) as again:
        assert cat(again, f"{VM}/extfrag_threshold") == "77\n"
        assert cat(again, "/sys/kernel/dpud_state/stats") == ""


def wait_until(so: Callable[[], bool]) -> None:
    pause = threading.Event()
    for _ in range(TIMEOUT_S * 100):
        if so():
            return
        pause.wait(0.01)
    raise AssertionError("it never came")


def test_one_that_cannot_be_written_does_no_harm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with alive(configured(tmp_path / "a")) as live:
        keeper = keeper_of(live)

        def fail(*_args: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as full:
            full.setattr(Whole, "write", fail)
            echo(live, "/sys/kernel/dpud_state/checkpoint", "1")
            wait_until(lambda: keeper.stats.nr_failed == 1)
        assert "No space left on device" in cat(live, "/sys/kernel/dpud_state/problem")
        echo(live, f"{VM}/extfrag_threshold", "9")
        before = killed(live, tmp_path / "a", tmp_path / "b")
        assert sorted(path.name for path in (tmp_path / "b").iterdir()) == ["journal", "journal.1", "stores"]
        keeper.make()
        assert keeper.stats.number == 2
    assert came_up(configured(tmp_path / "b"), 0)[0] == before
    assert cat_of(configured(tmp_path / "a")) == "9\n"


def cat_of(config: Config) -> str:
    with still(config) as again:
        return cat(again, f"{VM}/extfrag_threshold")


def test_an_idle_machine_with_a_gpu_writes_next_to_nothing(tmp_path: Path) -> None:
    """Its memory is scrubbed four times a second; those rounds are counted, and done again."""
    with alive(configured(tmp_path / "a")) as live:
        nr, position = nr_records(live), f"{FAULT}/scrub_position"
        echo(live, f"{FAULT}/scrub_rate", "1234567")
        first = cat(live, position)
        wait_until(lambda: cat(live, position) != first)
        threading.Event().wait(1.5)
        assert nr_records(live) - nr < 8
        before = killed(live, tmp_path / "a", tmp_path / "b")
    with still(configured(tmp_path / "b")) as again:
        assert hash_of(again) == before
        assert cat(again, position) != first


def test_texts_of_counters_are_of_the_machine_that_came_back(tmp_path: Path) -> None:
    """What they are made of is where this process has its arrays."""
    files = ("/proc/buddyinfo", "/proc/zoneinfo", "/sys/devices/system/node/node0/numastat")
    with alive(configured(tmp_path / "a")) as live:
        before = [cat(live, path) for path in files]
        echo(live, f"{VM}/nr_hugepages", "2")
        live.pacer.stop()
        texts = [cat(live, path) for path in files]
        keeper_of(live).make()
        killed(live, tmp_path / "a", tmp_path / "b")
    assert all(text != old for text, old in zip(texts, before, strict=True))
    with alive(configured(tmp_path / "b")) as live:
        assert [cat(live, path) for path in files] == texts
        echo(live, f"{VM}/nr_hugepages", "0")
        assert all(cat(live, path) != text for path, text in zip(files[:2], texts, strict=False))


def test_what_is_the_process_s_own(tmp_path: Path) -> None:
    """Of what else the boot makes a checkpoint has the contents. A generator or an iterator would lose its place."""
    with alive(configured(tmp_path / "a")) as live:
        whole = keeper_of(live)._whole
        own = {f"{type(obj).__module__}.{type(obj).__name__}" for obj in whole.born.objects if not is_state(obj)}
        assert own == {
            *("builtins.function", "functools.partial", "_thread.lock"),
            *("dpud.inject.BlockingWaitQueue", "dpud.inject.NotedClock", "dpud.inject.Outside"),
            *("dpud.owner.Owner", "dpud.pacer.Pacer", "dpud.dpu.worker.Worker", "kernelsim.attr.Attr"),
            "builtins.generator",
        }
        generators = [obj for obj in whole.born.objects if isinstance(obj, GeneratorType)]
        assert len(generators) == len(whole.owner.flights.lasting())


def test_files(tmp_path: Path) -> None:
    facts = tomllib.loads((Path(__file__).parents[1] / "abi/state.toml").read_text())
    with alive(configured(tmp_path / "a")) as live:
        found = {
            path: attr.mode for path, _, attr in live.machine.registry.walk() if path.startswith(state_kobject.PATH)
        }
        assert found == {path: fact["mode"] for path, fact in facts.items()}
        checkpoint = facts[f"{state_kobject.PATH}/checkpoint"]
        for text in checkpoint["illegal"]:
            with pytest.raises(OSError, match="Errno 22"):
                echo(live, f"{state_kobject.PATH}/checkpoint", text)
        assert keeper_of(live).stats.nr_made == 0
        for text in checkpoint["legal"]:
            echo(live, f"{state_kobject.PATH}/checkpoint", text)
        wait_until(lambda: keeper_of(live).stats.nr_made == 1)
