# SPDX-License-Identifier: GPL-2.0-only
"""The benchmark of compression: its data, its peers and its arithmetic, without measuring anything."""

import math
from pathlib import Path

import numpy as np
import pytest

from dpud.bench import gpu
from dpud.bench.gpu import compression
from dpud.bench.gpu.corpora import CORPORA
from dpud.bench.gpu.zram import DEVICE, SYSFS, Zram, ZramBusy, _selected, zram
from dpud.errors import UserError

MIB = 1 << 20
MADE = [name for name in CORPORA if name.split()[0] not in ("stdlib", "ELF", "live")]


def entropy(values: "np.ndarray[tuple[int], np.dtype[np.uint8]]") -> float:
    """Bits a byte, of bytes as if they were independent."""
    shares = np.bincount(values, minlength=256) / len(values)
    return -float(sum(share * math.log2(share) for share in shares if share))


@pytest.mark.slow
@pytest.mark.parametrize("name", MADE)
def test_what_is_made_from_a_seed_is_always_the_same(name: str) -> None:
    made = CORPORA[name](MIB)
    assert len(made) == MIB
    assert CORPORA[name](MIB) == made


@pytest.mark.slow
@pytest.mark.parametrize("name", ["stdlib .py", "ELF programs", "live heap"])
def test_there_is_enough_of_what_this_machine_has(name: str) -> None:
    assert len(CORPORA[name](MIB)) == MIB


def test_bf16_weights_are_as_hard_to_compress_as_published() -> None:
    """ZipNN (arXiv 2411.05239): bf16 models come to 66 to 67 %; the sign and mantissa bits are noise."""
    data = np.frombuffer(CORPORA["bf16 weights"](MIB), np.uint16)
    rotated = (data << 1 | data >> 15).view(np.uint8).reshape(-1, 2)
    assert 0.64 < (entropy(rotated[:, 0].copy()) + entropy(rotated[:, 1].copy())) / 16 < 0.68


def test_half_of_the_activations_are_zero() -> None:
    values = np.frombuffer(CORPORA["fp16 ReLU"](MIB), np.float16)
    assert np.count_nonzero(values) / len(values) == pytest.approx(0.5, abs=0.01)


def test_the_speed_that_the_zstd_tool_prints() -> None:
    """As zstd 1.5.4 prints it, progress lines and all."""
    begun = " 1#file             :   8388608 ->"
    text = f"{begun}\r{begun}   2105376 (x3.984),  346.1 MB/s, 1234.5 MB/s\n"
    assert compression.zstd_mbps(text) == 346.1
    with pytest.raises(ValueError, match="no speed"):
        compression.zstd_mbps("zstd: error\n")


def test_rows_are_judged_by_zram_and_bf16_by_the_figure_too() -> None:
    assert compression._ratio_row("live heap", 2.0, 1.9, 2.5).cells()[1:] == ("2.00", "1.90", "2.50", "1.25", "met")
    assert compression._ratio_row("live heap", 2.6, 2.7, 2.5).verdict == "missed"
    assert compression._ratio_row("bf16 weights", 1.0, 1.3, 1.39).verdict == "missed"
    assert compression._ratio_row("bf16 weights", None, 1.3, 1.41).verdict == "met"
    assert compression._ratio_row("fp32 field", None, 1.3, 1.41).cells()[1:] == ("", "1.30", "1.41", "", "")


@pytest.mark.slow
def test_the_effective_ratio_counts_everything() -> None:
    assert 0.98 < compression.effective_ratio(np.random.default_rng(1).bytes(4 * MIB), 65536) < 1.0


def test_unknown_names_are_the_user_s_mistake() -> None:
    with pytest.raises(UserError, match="no benchmark gpu speed: there are address_space, compression"):
        list(gpu.each("speed"))


def test_the_algorithm_between_brackets() -> None:
    assert _selected("lzo-rle lzo [lz4] zstd\n") == "lz4"


def usable() -> bool:
    try:
        with zram(MIB, "lz4"):
            return True
    except ZramBusy:
        return False


@pytest.mark.host
@pytest.mark.skipif(not usable(), reason="no zram for us")
def test_zram_stores_measures_and_is_left_as_it_was() -> None:
    before = [(SYSFS / name).read_text() for name in ("comp_algorithm", "disksize")]
    with zram(4 * MIB, "lz4") as device:
        assert isinstance(device, Zram)
        noise = device.store(np.random.default_rng(1).bytes(4 * MIB))
        zeros = device.store(bytes(4 * MIB))
        with pytest.raises(ZramBusy, match="locked"), zram(MIB, "lz4"):
            pytest.fail("two users")
    assert (noise.raw_bytes, zeros.raw_bytes) == (4 * MIB, 4 * MIB)
    assert noise.used_bytes >= 4 * MIB
    assert zeros.used_bytes < MIB
    assert [(SYSFS / name).read_text() for name in ("comp_algorithm", "disksize")] == before
    assert Path(DEVICE).exists()
