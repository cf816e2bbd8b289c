# SPDX-License-Identifier: GPL-2.0-only
"""A `dpu` package under the driver. The stand-in is this project's own one, which has the SDK's calls, with a program
of the test's that does what the binary is said to do: its own layout, its pages through WRAM, their sums."""

import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from machines import Lab

from dpud.config import Config
from dpud.config import Dpu as DpuTable
from dpud.daemon import dpu_config
from dpud.dpu import api, binaries
from dpud.dpu.driver import DpuConfig, DpuDriver
from dpud.dpu.package import NoPackage, PackageCompact, import_package
from dpud.dpu.system import System
from dpud.dpu.tasklet import Mram, Program, Tasklet, Wram
from dpud.errors import UserError
from kernelsim.machine import Machine, MachineConfig, NodeConfig

PAGE = 4096


class Compact(Program):
    """What the binary does, told by the document: arguments, heap of three columns and the skip runs."""

    nr_tasklets = 1
    page_words = 1
    DPU_INPUT_ARGUMENTS = Wram(40)
    DPU_RESULTS = Wram(16)
    DPU_PAGES = Mram(1 << 20)
    heap = Mram(8 << 20)
    stop_after = 1 << 30
    wrong_sum_at = -1
    shift = 0

    def word(self, t: Tasklet, address: int, value: int | None = None) -> int:
        """One 8-byte word of MRAM, read or written."""
        cell = t.wram(self._cell, 8).view("<i8")
        if value is None:
            t.mram_read(address, self._cell, 8)
        else:
            cell[0] = value
            t.mram_write(self._cell, address, 8)
        return int(cell[0])

    def main(self, t: Tasklet) -> None:
        self._cell = t.mem_alloc(8)
        heap = self.symbols["__sys_used_mram_end"].offset_bytes
        base, nr, first, nr_runs, slots = t.wram(self.DPU_INPUT_ARGUMENTS, 40).view("<i8").tolist()
        runs_at = heap + 3 * slots * 8
        runs = [(self.word(t, runs_at + 16 * r), self.word(t, runs_at + 16 * r + 8)) for r in range(nr_runs)]
        taken = {start + i * PAGE for start, nr_pages in runs for i in range(nr_pages)}
        cursor, k = base, 0
        done = 0
        while k < first + nr:
            if cursor not in taken:
                if k >= first:
                    done += self.move(t, heap, slots, k - first, cursor + self.shift)
                k += 1
            cursor += PAGE
        t.wram(self.DPU_RESULTS, 16).view("<i8")[:] = 0, done

    def move(self, t: Tasklet, heap: int, slots: int, k: int, new: int) -> int:
        self.word(t, heap + 8 * (slots + k), new)
        if k >= self.stop_after:
            return 0
        words = [self.word(t, self.DPU_PAGES + 8 * (k * self.page_words + j)) for j in range(self.page_words)]
        total = sum(words) + (k == self.wrong_sum_at)
        self.word(t, heap + 8 * (2 * slots + k), (total + 2**63) % 2**64 - 2**63)
        return 1


@pytest.fixture(autouse=True)
def _ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(api, "_system", System(1))
    monkeypatch.setattr(binaries, "_registered", dict(binaries._registered))


@pytest.fixture
def package() -> Iterator[ModuleType]:
    """`import dpu` finds the stand-in."""
    fake = ModuleType("dpu")
    fake.DpuSet, fake.DpuError = api.DpuSet, api.DpuError  # type: ignore[attr-defined]
    sys.modules["dpu"] = fake
    yield fake
    del sys.modules["dpu"]


def driver(program: type[Program] = Compact, nr_dpus: int = 4) -> DpuDriver:
    api.register("build/dpu_compact", program)
    return DpuDriver(DpuConfig(1, nr_dpus, program=PackageCompact(import_package(), "build/dpu_compact")))


def batch(hw: DpuDriver) -> tuple[np.ndarray, np.ndarray, Any]:
    """Six pages moved down over a skip run -> memory before, after, and the result."""
    memory = np.random.default_rng(1).integers(0, 2**63, (64, 1), np.uint64)
    before = memory.copy()
    hw.attach(memory)
    frags = np.array([9, 12, 13, 20, 33, 40], np.uint64) * PAGE
    return before, memory, hw.dpu_hw_compact_execute(PAGE, frags, 6, np.array([[2 * PAGE, 3]], np.uint64))


def test_a_batch_runs_on_the_package(package: ModuleType) -> None:
    before, memory, result = batch(driver())
    assert (result.nr_retired, result.error) == (6, None)
    assert (result.new_addrs // PAGE).tolist() == [1, 5, 6, 7, 8, 9]
    assert (memory[[1, 5, 6, 7, 8, 9]] == before[[9, 12, 13, 20, 33, 40]]).all()


class Halts(Compact):
    def main(self, t: Tasklet) -> None:
        t.halt()


class StopsEarly(Compact):
    stop_after = 1


class WrongSum(Compact):
    wrong_sum_at = 1


class WrongLayout(Compact):
    shift = PAGE


@pytest.mark.parametrize(
    ("program", "nr_retired", "error"),
    [
        (Halts, 0, "dpu is in fault"),
        (StopsEarly, 1, "internal error"),
        (WrongSum, 1, "corrupted memory"),
        (WrongLayout, 0, "dpu is in fault"),
    ],
)
def test_what_goes_wrong_there_loses_nothing(
    package: ModuleType, program: type[Program], nr_retired: int, error: str
) -> None:
    """Four DPUs with two pages each at most: the second page is where two of them go wrong."""
    before, memory, result = batch(driver(program))
    assert (result.nr_retired, result.error) == (nr_retired, error)
    frags, new = [9, 12, 13, 20, 33, 40], [1, 5, 6, 7, 8, 9]
    assert (memory[new[:nr_retired]] == before[frags[:nr_retired]]).all()
    assert (memory[frags[nr_retired:]] == before[frags[nr_retired:]]).all()


def test_a_timeout_there_is_one_here(package: ModuleType) -> None:
    class Silent:
        def __init__(self, **_: object) -> None:
            raise api.DpuError("result timeout")

    package.DpuSet = Silent  # type: ignore[attr-defined]
    _, _, result = batch(driver())
    assert (result.nr_retired, result.error) == (0, "result timeout")


@pytest.mark.slow
@pytest.mark.parametrize("program", [Compact, StopsEarly])
def test_a_machine_compacts_with_it(package: ModuleType, program: type[Program]) -> None:
    lab = Lab((32,))
    hw = driver(program, nr_dpus=64)
    machine = Machine(MachineConfig(nodes=(NodeConfig(32 << 20, 1),), bytes="stamp"), hw)
    lab.machine, lab.mem, lab.vm, lab.registry = machine, machine.mem, machine.vm, machine.registry
    lab._group.machine = machine
    lab.spawn("a", anon="4M", holes="50 seed=1")
    lab.compact()
    assert lab.stats()["pages_moved"] > (20 if program is Compact else 0)
    lab.assert_at_rest()


def test_config_names_the_package(package: ModuleType) -> None:
    config = dpu_config(Config(dpu=DpuTable(backend="dpu", binary="build/dpu_compact")))
    assert isinstance(config.program, PackageCompact)


def test_without_a_package_the_configuration_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "dpu", None)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r'^dpu.backend: "dpu": .*; the package comes with the UPMEM SDK$'):
        dpu_config(Config(dpu=DpuTable(backend="dpu", binary="x")))


def test_another_package_of_that_name_is_refused(package: ModuleType) -> None:
    del package.DpuSet
    with pytest.raises(NoPackage, match="the package dpu has no DpuSet"):
        import_package()


@pytest.mark.parametrize(
    ("table", "problem"),
    [
        (DpuTable(profile="none"), 'dpu.profile: "none": invalid profile'),
        (DpuTable(properties="a=1"), "dpu.properties: the profile argument: a=1: unknown property: invalid profile"),
    ],
)
def test_a_bad_profile_is_one_line(table: DpuTable, problem: str) -> None:
    with pytest.raises(UserError) as caught:
        dpu_config(Config(dpu=table))
    assert str(caught.value) == problem
