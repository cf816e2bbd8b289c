# SPDX-License-Identifier: GPL-2.0-only
"""Host code for the SDK's Python API, typed from reference dpu.md 1.3 to 1.5, over emulated DPUs."""

import io
import os
import struct
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from dpud.dpu import api, binaries
from dpud.dpu.api import ALLOCATE_ALL, DpuContext, DpuError, DpuSet
from dpud.dpu.system import System
from dpud.dpu.tasklet import Mram, Program, Tasklet, Wram

BUFFER_BYTES = 64 << 10
BLOCK_BYTES = 256


class Checksum(Program):
    """UPMEM's demonstration: tasklet t sums the blocks t, t + n, t + 2n, ..."""

    nr_tasklets = 16
    dpu_mram_buffer = Mram(BUFFER_BYTES)
    dpu_wram_results = Wram(16 * 8)

    def main(self, t: Tasklet) -> None:
        cache = t.mem_alloc(BLOCK_BYTES)
        if t.me() == 0:
            t.perfcounter_config()
        checksum = 0
        for at in range(t.me() * BLOCK_BYTES, BUFFER_BYTES, self.nr_tasklets * BLOCK_BYTES):
            t.mram_read(self.dpu_mram_buffer + at, cache, BLOCK_BYTES)
            checksum += int(t.wram(cache, BLOCK_BYTES).sum())
        t.wram(self.dpu_wram_results + 8 * t.me(), 8)[:] = list(struct.pack("<II", checksum, t.perfcounter_get()))
        t.printf(f"[{t.me():02}] Checksum = 0x{checksum:08x}\n")


class Toy(Program):
    """Does what its first argument says."""

    nr_tasklets = 4
    what = Wram(8)
    value = Wram(8)
    page = Mram(4096)

    def main(self, t: Tasklet) -> Any:
        what = int(t.wram(self.what, 1)[0])
        acts: dict[int, Callable[[], object]] = {
            1: lambda: [t.mem_alloc(1024) for _ in range(100)],
            2: lambda: 1 // (what - 2),
            4: t.halt,
            5: lambda: t.printf("x" * (1 << 20) + "y"),
            8: lambda: t.mram_read(self.page + 4, self.value, 8),
            20: lambda: t.mram_read(self.page, t.mem_alloc(4096), 2056),
            21: lambda: t.mram_read(self.page, self.value, 4),
            22: lambda: t.mram_write(self.value, (64 << 20) - 8, 16),
            23: lambda: t.mram_read(self.page, 65536 - 8, 16),
            30: lambda: t.wram(65536 - 4, 8),
        }
        if t.me() == 3:
            assert what != 3
            acts.get(what, lambda: t.mram_read(self.page, self.value, 8))()


class Sum(Program):
    """Tasklets write, meet, then the last one adds up what all of them wrote."""

    nr_tasklets = 3
    parts = Wram(3 * 8)
    total = Wram(8)

    def main(self, t: Tasklet) -> Iterator[None]:  # type: ignore[override]
        t.wram(self.parts + 8 * t.me(), 8).view("<u8")[0] = t.me() + 1
        yield
        if t.me() == 0:
            t.wram(self.total, 8).view("<u8")[0] = int(t.wram(self.parts, 24).view("<u8").sum())


@pytest.fixture(autouse=True)
def _machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ranks of 64 DPUs and three programs; the environment of the tests says nothing."""
    monkeypatch.setattr(api, "_system", System(2))
    monkeypatch.setattr(binaries, "_registered", dict(binaries._registered))
    for name in ("UPMEM_PROFILE", "UPMEM_PROFILE_BASE"):
        monkeypatch.delenv(name, raising=False)
    for name, program in (("build/checksum_dpu", Checksum), ("toy", Toy), ("sum", Sum)):
        api.register(name, program)


def fails(text: str, function: Callable[..., object], *args: Any, **kwargs: Any) -> None:
    with pytest.raises(DpuError) as caught:
        function(*args, **kwargs)
    assert str(caught.value) == text


def test_the_checksum_demonstration() -> None:
    data = bytearray(i * 7 % 251 for i in range(BUFFER_BYTES))
    with DpuSet(nr_dpus=3) as dpus:
        dpus.load("build/checksum_dpu")
        dpus.copy("dpu_mram_buffer", data)
        log = io.StringIO()
        dpus.exec(log=log)
        for dpu in dpus:
            checksum = cycles = 0
            for task_id in range(16):
                result = bytearray(8)
                dpu.copy(result, "dpu_wram_results", 8, task_id * 8)
                part, elapsed = struct.unpack("<II", result)
                checksum, cycles = checksum + part, max(cycles, elapsed)
            assert checksum == sum(data)
            # 256 DMAs of 256 bytes, 77 + 128 cycles each (dpu.md 2.1)
            assert cycles == 256 * (77 + 128)
    text = log.getvalue().splitlines()
    assert [line for line in text if line.startswith("===")] == [f"=== DPU#0x3000000{i} ===" for i in range(3)]
    assert text[1].startswith("[00] Checksum = 0x")
    assert len(text) == 3 * 17


def test_allocation() -> None:
    fails("cannot specify nr_dpus and nr_ranks", DpuSet, 1, 1)
    with DpuSet() as everything:
        assert (len(everything), len(everything.dpus()), len(everything.ranks())) == (128, 128, 2)
        fails("dpu allocation error", DpuSet, 1)
    with DpuSet(ALLOCATE_ALL) as everything:
        assert len(everything) == 128
    with DpuSet(nr_ranks=1) as rank, DpuSet(nr_dpus=10) as dpus:
        assert (len(rank), len(dpus)) == (64, 10)
        assert [len(each) for each in rank.ranks()] == [64]
        fails("invalid action for this dpu set", dpus.dpus()[0].free)
    fails("invalid action for this dpu set", rank.free)
    fails("dpu allocation error", DpuSet, 129)
    DpuSet(128).free()


def test_the_simulator_has_ranks_of_one_dpu() -> None:
    with DpuSet(profile="backend=simulator") as dpus:
        assert (len(dpus), len(dpus.ranks())) == (64, 64)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["argument", "UPMEM_PROFILE", "UPMEM_PROFILE_BASE"])
@pytest.mark.parametrize(
    "bad", ["nrDpusPerCi=8", "foo=1", "disabledMask", "disabledMask=x", "chipId=1", "sgXferEnable=1", "mramSize=-8"]
)
def test_a_bad_profile(monkeypatch: pytest.MonkeyPatch, where: str, bad: str) -> None:
    if where == "argument":
        fails("invalid profile", DpuSet, 1, profile=bad)
    else:
        monkeypatch.setenv(where, bad)
        fails("invalid profile", DpuSet, 1)


def test_the_environment_comes_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPMEM_PROFILE_BASE", "disabledMask=0xff,ignoreVpd=true")
    with DpuSet(nr_ranks=1) as dpus:
        assert len(dpus) == 56
    with DpuSet(nr_ranks=1, profile="disabledMask=0x1") as dpus:
        assert len(dpus) == 63
    monkeypatch.setenv("UPMEM_PROFILE", "disabledMask=0x7")
    with DpuSet(nr_ranks=1, profile="disabledMask=0x1") as dpus:
        assert len(dpus) == 61


def test_v1b_has_less_wram_and_16_tasklets() -> None:
    class Many(Program):
        nr_tasklets = 17

    class Wide(Program):
        table = Wram(63 << 10)

    class Wider(Program):
        table = Wram(64 << 10)

    for name, program in (("many", Many), ("wide", Wide), ("wider", Wider)):
        api.register(name, program)
    text = "dpu program uses more tasklets than the hardware has threads"
    fails(text, DpuSet, 1, profile="chipId=68", binary="many")
    DpuSet(1, binary="many").free()
    fails("invalid wram access", DpuSet, 1, binary="wider")
    fails("invalid wram access", DpuSet, 1, profile="chipId=68", binary="wide")
    DpuSet(1, binary="wide").free()
    fails("invalid wram access", DpuSet, 1, profile="wramSize=0x8000", binary="wide")
    fails("invalid mram access", DpuSet, 1, profile="mramSize=1048576", binary="toy")
    fails("invalid iram access", DpuSet, 1, profile="iramSize=400", binary="toy")
    DpuSet(128).free()  # what failed gave its ranks back


def test_programs(tmp_path: Path) -> None:
    with DpuSet(2) as dpus:
        fails("no such ELF file", dpus.load, "nothing_dpu")
        elf = tmp_path / "elf_dpu"
        elf.write_bytes(b"\x7fELF\x01\x01\x01")
        fails("invalid ELF file", dpus.load, str(elf))
        fails("invalid ELF file", dpus.load, b"\x7fELF")
        broken = tmp_path / "broken"
        broken.write_text("def (")
        fails("invalid ELF file", dpus.load, str(broken))
        one = "one and only one source or binary program must be defined"
        fails(one, dpus.load)
        fails(one, dpus.load, "toy", "x.c")
        for source in ({"c_source": "x.c"}, {"asm_source": io.StringIO("nop")}):
            fails("no DPU compiler is installed: load a Python program by its name as binary", dpus.load, **source)
        fails("no program has been loaded in the dpu set", dpus.exec)
        fails("no program has been loaded in the dpu set", dpus.copy, "value", bytearray(8))
        program = dpus.load("toy")
        symbol = program.get_symbol("value")
        assert symbol is not None
        assert (symbol.name, symbol.size()) == ("value", 8)
        assert program.get_symbol("nothing") is None
        assert {"what", "value", "page", "__sys_used_mram_end"} <= program.fetch_all_symbols().keys()


def test_one_dpu_with_a_program_of_its_own() -> None:
    with DpuSet(2, binary="toy") as dpus:
        dpus.dpus()[1].load("sum")
        fails("cannot access symbol on dpus with different programs", dpus.copy, "value", bytearray(8))
        dpus.exec()
        assert dpus.dpus()[1].total.uint64() == 6
        with pytest.raises(AttributeError):
            _ = dpus.dpus()[0].total


def test_symbols_are_attributes() -> None:
    with DpuSet(3, binary="toy") as dpus:
        dpus.value = bytearray(struct.pack("<q", -5))
        assert dpus.value.int64() == [-5, -5, -5]
        dpus.value = [bytearray(struct.pack("<d", x)) for x in (0.5, 1.5, 2.5)]
        assert dpus.value.double() == [0.5, 1.5, 2.5]
        single = dpus.dpus()[2]
        assert single.value.double() == 2.5
        single.value = bytearray(struct.pack("<ff", 1.0, -1.0))
        assert list(single.value.float()) == [1.0, -1.0]
        single.value = bytearray(b"\xff" * 7 + b"\x7f")
        assert (list(single.value.int8()), list(single.value.uint8())) == ([-1] * 7 + [127], [255] * 7 + [127])
        assert (list(single.value.int16()), list(single.value.uint16())) == ([-1, -1, -1, 32767], [65535] * 3 + [32767])
        assert (list(single.value.int32()), list(single.value.uint32())) == ([-1, 2**31 - 1], [2**32 - 1, 2**31 - 1])
        assert single.value.uint64() == 2**63 - 1
        assert bytes(single.value.data()) == b"\xff" * 7 + b"\x7f"
        assert dpus.dpus()[0].value.double() == 0.5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "dst", "src", "size", "offset"),
    [
        ("can only execute Host <-> DPU transfers", "value", "what", None, 0),
        ("can only execute Host <-> DPU transfers", bytearray(8), bytearray(8), None, 0),
        ("host buffer is too small", "value", bytearray(4), 8, 0),
        ("invalid number of host buffers for this DPU set", "value", [bytearray(8)], None, 0),
        ("undefined symbol", "nothing", bytearray(8), None, 0),
        ("invalid memory symbol access", "value", bytearray(16), None, 0),
        ("invalid memory symbol access", "value", bytearray(8), None, 8),
        ("invalid wram access", "value", bytearray(4), None, 2),
        ("invalid mram access", "page", bytearray(8), None, 4),
        ("invalid mram access", "page", bytearray(12), None, 0),
    ],
)
def test_illegal_copies(text: str, dst: Any, src: Any, size: int | None, offset: int) -> None:
    with DpuSet(2, binary="toy") as dpus:
        fails(text, dpus.copy, dst, src, size, offset)


def test_lists_leave_dpus_out_and_stay_usable_after_an_error() -> None:
    with DpuSet(3, binary="toy") as dpus:
        dpus.copy("page", [bytearray(b"a" * 8), None, bytearray(b"c" * 8)])
        back = [bytearray(8) for _ in range(3)]
        dpus.copy(back, "page")
        assert back == [b"a" * 8, bytes(8), b"c" * 8]
        fails("invalid memory symbol access", dpus.copy, back, "page", 8, 4096)
        dpus.copy(back, "page")  # no transfer is still set


@pytest.mark.slow
@pytest.mark.parametrize(
    ("what", "bkp", "dma", "mem"),
    [
        (1, (3, 1), None, None),
        (2, (3, 2), None, None),
        (3, (3, 3), None, None),
        (4, (3, 4), None, None),
        (5, (3, 5), None, None),
        (8, (3, 8), None, None),
        (20, None, 3, None),
        (21, None, 3, None),
        (22, None, 3, None),
        (23, None, 3, None),
        (30, None, None, 3),
    ],
)
def test_faults_of_a_program(what: int, bkp: Any, dma: Any, mem: Any) -> None:
    with DpuSet(3, binary="toy") as dpus:
        guilty = dpus.dpus()[1]
        guilty.what = bytearray([what, 0, 0, 0, 0, 0, 0, 0])
        fails("dpu is in fault", dpus.exec)
        context = guilty.checkpoint(mram=False)
        assert (context.bkp_fault(), context.dma_fault(), context.mem_fault()) == (bkp, dma, mem)
        fails("dpu is in fault", dpus.exec)
        dpus.dpus()[0].exec()  # the others are well
        again = DpuContext.from_buffer(memoryview(context.serialize()))
        assert (again.bkp_fault(), again.dma_fault(), again.mem_fault()) == (bkp, dma, mem)


@pytest.mark.slow
def test_a_checkpoint_restores() -> None:
    with DpuSet(2, binary="toy") as dpus:
        first, second = dpus.dpus()
        first.value, first.page = bytearray(b"value 01"), bytearray(b"page" * 1024)
        context = first.checkpoint()
        first.value, first.page = bytearray(8), bytearray(4096)
        first.restore(context, mram=False)
        assert bytes(first.value.data()) == b"value 01"
        assert bytes(first.page.data()) == bytes(4096)
        second.restore(context)
        assert bytes(second.page.data()) == b"page" * 1024
        assert context.iram() is None
        wram, mram = context.wram(), context.mram()
        assert wram is not None
        assert mram is not None
        assert (len(wram), len(mram)) == (16384, 64 << 20)
        fails("invalid action for this dpu set", dpus.checkpoint)
        with pytest.raises(Exception, match="internal error"):
            DpuContext.from_buffer(memoryview(b"nonsense"))


class Gate(Program):
    """Runs until the test lets it go."""

    started, go_on = threading.Event(), threading.Event()
    value = Wram(8)
    page = Mram(8)

    def main(self, t: Tasklet) -> None:
        Gate.started.set()
        assert Gate.go_on.wait(10)


def test_while_it_runs_the_bank_is_the_dpu_s() -> None:
    api.register("gate", Gate)
    for profile, busy in (("", True), ("disableMuxSwitch=true", False), ("disableSafeChecks=true", False)):
        Gate.started.clear()
        Gate.go_on.clear()
        with DpuSet(2, binary="gate", profile=profile) as dpus:
            dpus.exec(async_mode=True)
            assert Gate.started.wait(10)
            if busy:
                fails("mram is busy", dpus.copy, "page", bytearray(8))
                fails("mram is busy", dpus.load, "toy")
                fails("mram is busy", dpus.dpus()[0].checkpoint)
                fails("dpu is already running", dpus.exec)
            else:
                dpus.copy("page", bytearray(8))
            dpus.copy("value", bytearray(8))
            Gate.go_on.set()
            dpus.sync()
            dpus.copy("page", bytearray(8))


def test_mram_that_only_dpus_may_access() -> None:
    fails("mram is busy", DpuSet, 1, binary="toy", profile="mramAccessByDpuOnly=true")


def test_jobs_keep_their_order() -> None:
    seen: list[Any] = []
    with DpuSet(nr_ranks=2, binary="sum", async_mode=True) as dpus:
        dpus.copy("total", bytearray(8))
        dpus.exec()
        dpus.call(lambda rank, index, arg: seen.append((index, len(rank), arg)), "x")
        dpus.call(lambda all_, index, arg: seen.append((index, len(all_), arg)), "y", single_call=True)
        totals = [bytearray(8) for _ in dpus]
        dpus.copy(totals, "total")
        dpus.sync()
        assert {int.from_bytes(total, "little") for total in totals} == {6}
        assert sorted(seen[:2]) == [(0, 64, "x"), (1, 64, "x")]
        assert seen[2:] == [(0, 128, "y")]
        fails(
            "nonblocking and synchronous callback is invalid",
            dpus.call, print, None, async_mode=False, is_blocking=False,
        )  # fmt: skip


def test_an_asynchronous_error_comes_out_of_sync() -> None:
    with DpuSet(2, binary="toy") as dpus:
        dpus.what = bytearray([4] + [0] * 7)
        dpus.exec(async_mode=True)
        fails("asynchronous operation error (launch_dpu): dpu is in fault (0x10017)", dpus.sync)
        dpus.sync()
    with DpuSet(1, binary="toy", profile="nrThreadsPerRank=0") as dpus:
        fails("no thread to perform multiple-rank operation", dpus.exec, async_mode=True)
        dpus.exec()


def test_logs(capsys: pytest.CaptureFixture[str]) -> None:
    streams = [io.StringIO(), io.StringIO()]
    with DpuSet(2, binary="build/checksum_dpu", log=list(streams)) as dpus:
        dpus.exec()
        assert [stream.getvalue().count("Checksum") for stream in streams] == [16, 16]
        dpus.log(streams[0])
        assert streams[0].getvalue().count("===") == 6
        fails("cannot log, log list length does not match the number of DPUs in DpuSet", dpus.log, [None])
        fails("stream argument is not an object with a 'write' method", dpus.log, 7)
        only = io.StringIO()
        dpus.log({dpus.dpus()[1]: only})
        assert only.getvalue().startswith("=== DPU#0x30000001 ===\n")
    fails("log list length does not match number of DPUs in DpuSet", DpuSet, 2, log=[None])
    with DpuSet(1, binary="build/checksum_dpu") as dpus:
        dpus.exec()
        assert capsys.readouterr().out == ""
        dpus.log()
        assert capsys.readouterr().out.startswith("=== DPU#0x30000000 ===\n[00] Checksum")


HOST = """
import struct, sys
from dpu import ALLOCATE_ALL, DpuSet, driver
from dpu.driver import DpuError
with driver.allocate(2) as dpus:
    dpus.load("build/double_dpu")
    dpus.values = [bytearray(struct.pack("<Q", x)) for x in (3, 5)]
    dpus.exec()
    print(dpus.values.uint64())
    dpus.log(sys.stdout)
"""
DPU = """
from dpud.dpu.tasklet import Program, Tasklet, Wram

class Double(Program):
    nr_tasklets = 1
    values = Wram(8)

    def main(self, t: Tasklet) -> None:
        t.wram(self.values, 8).view("<u8")[0] *= 2
        t.printf("doubled\\n")
"""


@pytest.mark.slow
def test_a_host_program_of_the_sdk_runs_as_it_stands(tmp_path: Path) -> None:
    """With `PYTHONPATH=$(dpud dpu-path)`, and a Python file where the DPU binary would be."""
    (tmp_path / "build").mkdir()
    (tmp_path / "build/double_dpu").write_text(DPU)
    (tmp_path / "host.py").write_text(HOST)
    root = Path(__file__).parents[3]
    environment = os.environ | {"PYTHONPATH": str(root)}
    where = subprocess.run(
        [sys.executable, "-m", "dpud", "dpu-path"], capture_output=True, text=True, cwd="/", env=environment
    )
    assert where.returncode == 0, where.stderr
    environment["PYTHONPATH"] = f"{where.stdout.strip()}:{root}"
    done = subprocess.run(
        [sys.executable, "host.py"], capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[6, 10]\n=== DPU#0x30000000 ===\ndoubled\n=== DPU#0x30000001 ===\ndoubled\n"
