# SPDX-License-Identifier: GPL-2.0-only
"""The files of compression, with the data path below them."""

import errno
import os
from pathlib import Path

import compressible
import pytest
from wiring import errno_of

from dpud.gpu.compression import CompressedPool
from dpud.gpu.system import CLASS_PATH, CONFIG_PATH, GpuConfig, add_files, build
from fs.kernfs import Tree
from kernelsim.attr import Registry

MIB = 1 << 20
FOLDER = f"{CLASS_PATH}/gpu0/compression"
BUFFERS = f"{CONFIG_PATH}/gpu0/clients/web/buffers"


class Gpu:
    """A device of 8 MiB, and a client `web`."""

    def __init__(self) -> None:
        self.memory = build(GpuConfig(1, 8 * MIB, 8 * MIB, 64 * MIB))
        self.registry = Registry()
        add_files(self.registry, self.memory)
        self.tree = Tree(self.registry)
        self.tree.mkdir(BUFFERS.removesuffix("/buffers"))
        pool = self.memory.store.pool
        assert isinstance(pool, CompressedPool)
        self.pool = pool

    def read(self, name: str) -> str:
        return self.registry.read(f"{FOLDER}/{name}").decode().removesuffix("\n")

    def write(self, name: str, text: str) -> None:
        self.registry.write(f"{FOLDER}/{name}", text)

    def store(self, name: str, data: bytes, page_size: str = "4K") -> None:
        """A buffer with these bytes, all of it off the device."""
        self.tree.mkdir(f"{BUFFERS}/{name}")
        for file, text in (("page_size", page_size), ("size", str(len(data)))):
            self.registry.write(f"{BUFFERS}/{name}/{file}", text)
        file = self.tree.open(f"{BUFFERS}/{name}/data", os.O_RDWR)
        for at in range(0, len(data), MIB):
            file.write(data[at : at + MIB], at)
            self.registry.write(f"{BUFFERS}/{name}/reclaim", str(len(data[at : at + MIB])))

    def load(self, name: str, nr_bytes: int) -> bytes:
        file = self.tree.open(f"{BUFFERS}/{name}/data", os.O_RDWR)
        return b"".join(file.read(MIB, at) for at in range(0, nr_bytes, MIB))


@pytest.fixture
def gpu() -> Gpu:
    return Gpu()


@pytest.mark.slow
def test_bytes_take_less_memory_and_come_back(gpu: Gpu) -> None:
    data = compressible.text(2 * MIB) + bytes(MIB) + compressible.noise(MIB)
    gpu.store("mixed", data)
    columns = [int(column) for column in gpu.read("mm_stat").split()]
    assert len(columns) == 9
    names = "orig_data_size compr_data_size mem_used_total max_pool_bytes mem_used_max same_pages pages_compacted"
    assert columns[:7] == [int(gpu.read(name)) for name in names.split()]
    assert columns[7:] == [int(gpu.read("huge_pages")), int(gpu.read("huge_pages_since"))] == [256, 256]
    assert columns[0] == 4 * MIB
    assert columns[5] == 256
    assert MIB < columns[1] < columns[2] < 2.3 * MIB
    assert gpu.load("mixed", 4 * MIB) == data
    assert int(gpu.read("nr_pages")) < 1024


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["lz4", "zstd", "snappy"])
def test_the_algorithm_is_of_pages_to_come(gpu: Gpu, algorithm: str) -> None:
    text = compressible.text(MIB)
    gpu.store("before", text)
    gpu.write("algorithm", f"{algorithm}\n")
    assert f"[{algorithm}]" in gpu.read("algorithm")
    gpu.store("after", text)
    rows = {row.split()[0]: row.split()[1:] for row in gpu.read("codecs").splitlines()}
    assert rows["codec"] == ["pages", "raw_bytes", "stored_bytes", "ratio", "in_MBps", "out_MBps"]
    assert int(rows[algorithm][0]) >= 256
    assert gpu.load("before", MIB) == gpu.load("after", MIB) == text
    assert errno_of(gpu.write, "algorithm", "lz5") == errno.EINVAL


@pytest.mark.slow
def test_a_limit_is_kept(gpu: Gpu) -> None:
    gpu.write("max_pool_bytes", "1M")
    assert errno_of(gpu.store, "noise", compressible.noise(3 * MIB)) == errno.EAGAIN
    assert int(gpu.read("mem_used_total")) <= MIB


@pytest.mark.slow
def test_compacting_and_recompressing_by_writing(gpu: Gpu) -> None:
    gpu.write("algorithm", "lz4")
    text = compressible.text(4 * MIB)
    gpu.store("cold", text)
    before = int(gpu.read("mem_used_total"))
    gpu.write("recompress", "2M")
    assert int(gpu.read("recompressed_pages")) == 512
    assert int(gpu.read("dead_bytes")) > 0
    gpu.write("compact", "1")
    assert gpu.read("dead_bytes") == "0"
    saved = before - int(gpu.read("mem_used_total"))
    assert saved == pytest.approx(int(gpu.read("recompressed_bytes")), abs=70_000)
    assert gpu.load("cold", 4 * MIB) == text


@pytest.mark.slow
def test_mem_used_max_begins_anew(gpu: Gpu) -> None:
    gpu.store("noise", compressible.noise(2 * MIB))
    gpu.tree.rmdir(f"{BUFFERS}/noise")
    gpu.write("compact", "1")
    assert int(gpu.read("mem_used_max")) > 2 * MIB
    gpu.write("mem_used_max", "0")
    assert int(gpu.read("mem_used_max")) == int(gpu.read("mem_used_total")) < MIB


@pytest.mark.slow
def test_a_dictionary_for_the_client(gpu: Gpu) -> None:
    assert errno_of(gpu.write, "dictionary", "nobody") == errno.ENOENT
    gpu.store("few", compressible.records(64 << 10))
    assert errno_of(gpu.write, "dictionary", "web") == errno.EAGAIN
    gpu.store("records", compressible.records(MIB, seed=4))
    gpu.write("dictionary", "web")
    head, row = gpu.read("dictionary").splitlines()
    assert head.split() == ["client", "number", "bytes", "gain"]
    assert row.split()[0] == "web"
    assert float(row.split()[3]) >= 1.05
    gpu.write("dictionary_enabled", "0")
    assert gpu.read("dictionary").splitlines() == [head, row]


def test_a_flipped_bit_is_an_error_for_the_reader_and_counted(gpu: Gpu) -> None:
    text = compressible.text(64 << 10)
    gpu.store("text", text)
    region = next(iter(gpu.memory.space.regions))
    gpu.pool.flip_bit(region.first_key + 3, 100)
    file = gpu.tree.open(f"{BUFFERS}/text/data", os.O_RDWR)
    assert errno_of(file.read, 4096, 3 * 4096) == errno.EIO
    assert file.read(8192, 4096) == text[4096:12288]
    assert int(gpu.read("corrupt_pages")) >= 1


@pytest.mark.slow
def test_the_regret_is_measured_as_pages_go_by(gpu: Gpu) -> None:
    gpu.store("weights", compressible.kinds()["bf16 weights"])
    pages, chosen, best = map(int, gpu.read("regret_stat").split())
    assert pages == 4
    assert float(gpu.read("regret")) == pytest.approx(100 * (chosen / best - 1), abs=0.001)


def test_without_compression_there_is_no_folder() -> None:
    registry = Registry()
    add_files(registry, build(GpuConfig(1, 8 * MIB, 8 * MIB, 32 * MIB, compression=False)))
    assert not [path for path, _, _ in registry.walk() if "/compression/" in path]


@pytest.mark.host
@pytest.mark.skipif(not Path("/sys/block/zram0").exists(), reason="no zram")
def test_mm_stat_has_the_columns_of_the_running_kernel_s(gpu: Gpu) -> None:
    gpu.store("text", compressible.text(MIB))
    for line in (Path("/sys/block/zram0/mm_stat").read_text(), gpu.read("mm_stat") + "\n"):
        columns = [int(column) for column in line.split()]
        assert len(columns) == 9
        assert line == " ".join(f"{column:8}" for column in columns) + "\n"
