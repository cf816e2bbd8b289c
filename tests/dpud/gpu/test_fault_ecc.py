# SPDX-License-Identifier: GPL-2.0-only
"""SECDED(72,64), exhaustively, and cells with faults between a memory and who reads it."""

from itertools import combinations

import numpy as np
import pytest
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from dpud.gpu.clock import ManualClock
from dpud.gpu.errors import UncorrectableError
from dpud.gpu.fault import secded
from dpud.gpu.fault.cells import FRAME_WORDS, Cells
from dpud.gpu.hal.engine import DeviceProfile
from dpud.gpu.hal.simulated import SimulatedDevice

FRAME = 2048
PAIRS = list(combinations(range(72), 2))


def flipped(word: int, flips: list[tuple[int, ...]]) -> tuple[secded.Words, secded.Checks]:
    """The word once for each of `flips`, with these bits of its 72 flipped."""
    words = np.full(len(flips), word, dtype=np.uint64)
    checks = secded.encode(words)
    for at, bits in enumerate(flips):
        for bit in bits:
            if bit < 64:
                words[at] ^= np.uint64(1 << bit)
            else:
                checks[at] ^= np.uint8(1 << (bit - 64))
    return words, checks


@pytest.mark.parametrize("word", [0, 2**64 - 1, 0x0123456789ABCDEF])
def test_all_72_single_flips_are_corrected(word: int) -> None:
    words, checks = flipped(word, [(bit,) for bit in range(72)])
    found = secded.positions(words, checks)
    assert found.tolist() == list(range(72))
    secded.correct(words, checks, found)
    assert (words == word).all()
    assert (checks == secded.encode(words)).all()


@pytest.mark.parametrize("word", [0, 2**64 - 1, 0x0123456789ABCDEF])
def test_all_2556_double_flips_are_detected(word: int) -> None:
    assert len(PAIRS) == 2556
    found = secded.positions(*flipped(word, PAIRS))
    assert (found == secded.UNCORRECTABLE).all()


def test_the_code_is_linear_and_no_two_columns_are_equal() -> None:
    columns = secded.columns()
    assert len(set(columns)) == 72
    assert all(column.bit_count() % 2 for column in columns)
    rng = np.random.default_rng(3)
    one, other = rng.integers(0, 2**64, (2, 1000), dtype=np.uint64)
    assert (secded.encode(one ^ other) == secded.encode(one) ^ secded.encode(other)).all()
    assert secded.encode(np.uint64(1) << np.arange(64, dtype=np.uint64)).tolist() == columns[:64]


class Bench:
    """A memory of four frames of noise, read and written past its cells."""

    def __init__(self, nr_frames: int = 4) -> None:
        self.memory = np.frombuffer(bytearray(np.random.default_rng(5).bytes(nr_frames * FRAME)), dtype=np.uint8)
        self.true = bytearray(self.memory.tobytes())
        self.cells = Cells(self.memory, 0)

    def read(self, at: int, nr_bytes: int) -> bytes | None:
        out = bytearray()
        try:
            self.cells.read(at, nr_bytes, lambda: out.extend(self.memory[at : at + nr_bytes].tobytes()))
        except UncorrectableError:
            return None
        return bytes(out)

    def write(self, at: int, data: bytes) -> None:
        def work() -> None:
            self.memory[at : at + len(data)] = np.frombuffer(data, dtype=np.uint8)

        self.cells.write(at, len(data), work)
        self.true[at : at + len(data)] = data


def test_a_flip_really_lies_in_memory_and_a_read_puts_it_right() -> None:
    bench = Bench()
    bench.cells.flip(1, 7, 63)
    assert bench.memory.tobytes() != bench.true
    assert bench.read(0, 4 * FRAME) == bench.true
    assert bench.memory.tobytes() == bench.true
    assert bench.cells.nr_corrected == 1
    assert bench.cells.is_quiet


def test_a_flipped_check_bit_is_an_error_too() -> None:
    bench = Bench()
    bench.cells.flip(0, 7, 70)
    assert not bench.cells.is_quiet
    assert bench.read(7 * 8, 8) == bench.true[56:64]
    assert bench.cells.nr_corrected == 1
    assert bench.cells.is_quiet


def test_flipping_twice_is_no_error() -> None:
    bench = Bench()
    bench.cells.flip(0, 7, 3)
    bench.cells.flip(0, 7, 3)
    assert bench.cells.is_quiet


def test_a_stuck_cell_is_corrected_at_every_read_and_stays() -> None:
    bench = Bench()
    wrong = 1 - (bench.true[FRAME] & 1)
    bench.cells.stick(1, 0, 0, wrong)
    for nr in (1, 2, 3):
        assert bench.read(FRAME, 64) == bench.true[FRAME : FRAME + 64]
        assert bench.cells.nr_corrected == nr
        assert bench.memory[FRAME] & 1 == wrong
    bench.write(FRAME, bytes([wrong]) + bytes(31))  # now it is stuck at what was written
    assert bench.read(FRAME, 64) == bench.true[FRAME : FRAME + 64]
    assert bench.cells.nr_corrected == 3


def test_two_flips_of_a_word_refuse_their_sector_and_no_other() -> None:
    bench = Bench()
    bench.cells.flip(2, 8, 1)
    bench.cells.flip(2, 8, 2)
    at = 2 * FRAME + 64
    assert bench.read(at, 8) is None
    assert bench.read(at + 24, 8) is None
    assert bench.read(at - 32, 32) == bench.true[at - 32 : at]
    assert bench.read(at + 32, 32) == bench.true[at + 32 : at + 64]
    bench.write(at, bytes(range(32)))
    assert bench.read(0, 4 * FRAME) == bench.true
    assert bench.cells.is_quiet


def test_a_partial_write_does_not_launder_a_bad_sector() -> None:
    bench = Bench()
    for bit in (1, 2):
        bench.cells.flip(0, 4, bit)
    bench.write(40, bytes(8))  # the sector's second word
    assert bench.read(32, 8) is None
    assert bench.read(40, 8) is None
    bench.write(32, bytes(32))
    assert bench.read(0, FRAME) == bench.true[:FRAME]


def test_a_partial_write_keeps_a_correctable_neighbour() -> None:
    bench = Bench()
    bench.cells.flip(0, 4, 1)
    bench.write(41, b"x")
    assert bench.read(0, FRAME) == bench.true[:FRAME]


def test_three_flips_that_look_like_one_are_found_by_the_digest() -> None:
    columns = secded.columns()
    a, b = 0, 1
    third = next(c for c in range(2, 64) if columns[a] ^ columns[b] ^ columns[c] in columns)
    bench = Bench()
    for bit in (a, b, third):
        bench.cells.flip(0, 0, bit)
    words = bench.memory[:8].view(np.uint64)
    assert secded.positions(words, secded.encode(np.frombuffer(bytes(bench.true[:8]), dtype=np.uint64)))[0] >= 0
    assert bench.read(0, 8) is None
    bench.cells.count_miscorrected(0)
    assert bench.cells.nr_miscorrected == 1


def test_a_broken_row_gives_no_wrong_byte() -> None:
    bench = Bench()
    bench.cells.break_row(1, np.random.default_rng(1))
    for at in range(FRAME, 2 * FRAME, 32):
        assert bench.read(at, 32) in (None, bytes(bench.true[at : at + 32]))
    bench.write(FRAME, bytes(FRAME))
    assert bench.read(FRAME, FRAME) is None
    bench.cells.replace(1)
    bench.write(FRAME, bytes(FRAME))
    assert bench.read(0, 4 * FRAME) == bench.true


STEPS = st.lists(
    st.tuples(
        st.sampled_from(["flip", "stick", "row", "read", "write"]),
        st.integers(0, 4 * FRAME - 1),
        st.integers(0, 71),
        st.integers(1, 300),
    ),
    max_size=40,
)


@pytest.mark.slow
@settings(deadline=None, max_examples=examples(60))
@given(STEPS)
def test_whatever_happens_a_read_is_right_or_refused(steps: list[tuple[str, int, int, int]]) -> None:
    bench, rng = Bench(), np.random.default_rng(2)
    for what, at, bit, length in steps:
        frame, word, nr = at // FRAME, at % FRAME // 8, min(length, 4 * FRAME - at)
        match what:
            case "flip":
                bench.cells.flip(frame, word, bit)
            case "stick":
                bench.cells.stick(frame, word, bit, length & 1)
            case "row":
                bench.cells.break_row(frame, rng)
            case "write":
                bench.write(at, rng.bytes(nr))
            case _:
                assert bench.read(at, nr) in (None, bytes(bench.true[at : at + nr]))


@pytest.mark.slow
def test_a_device_reads_through_its_cells() -> None:
    """Every way out: copies to the host and to another device, gather; and every way in."""
    clock = ManualClock()
    devices = [SimulatedDevice(DeviceProfile(memory_bytes=1 << 16), clock, number) for number in (0, 1)]
    stream = devices[0].create_stream()
    here, there = (device.allocate(1 << 16, stream) for device in devices)
    data = np.random.default_rng(1).bytes(1 << 16)
    here.copy_from(data, stream=stream)
    stream.sync()
    cells = Cells(devices[0].memory, 0)
    devices[0].ecc = cells

    def damage() -> None:
        for frame in range(32):
            cells.flip(frame, 9 * frame % FRAME_WORDS, 2 * frame)

    damage()
    out = bytearray(1 << 16)
    here.copy_to(out, stream=stream)
    stream.sync()
    assert out == data
    damage()
    here.copy_to(there, stream=stream)
    stream.sync()
    assert devices[1].memory.tobytes() == data
    damage()
    rows = np.empty((32, FRAME), dtype=np.uint8)
    here.gather(np.arange(32) * FRAME, FRAME, rows, stream=stream)
    stream.sync()
    assert rows.tobytes() == data
    assert cells.nr_corrected == 96
    damage()
    here.scatter(np.arange(16) * FRAME, FRAME, np.zeros((16, FRAME), dtype=np.uint8), stream=stream)
    here.view(16 * FRAME, 16 * FRAME).fill(7, stream=stream)
    stream.sync()
    assert cells.is_quiet
