# SPDX-License-Identifier: GPL-2.0-only
"""The configuration file: what it gives, and the one line that each mistake gives."""

import grp
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dpud.config import Config, ConfigError, Gpu, Size, load, parse, parse_size
from dpud.daemon import gpu_config
from dpud.gpu.compression import CompressedPool
from dpud.gpu.compression.system import QUALITIES, algorithms
from dpud.gpu.store import HostPool
from dpud.gpu.system import build

GIB = 1024**3


def test_defaults_are_two_nodes_of_4_gib_and_one_rank() -> None:
    config = Config()
    assert [node.memory for node in config.machine.nodes] == [4 * GIB, 4 * GIB]
    assert (config.memory.bytes, config.dpu.ranks, config.dpu.dpus_per_rank) == (None, 1, 64)
    assert config.dpu.profile == "upmem-v1a"
    assert parse("") == config


def test_every_key_is_taken() -> None:
    config = parse("""
        [machine]
        cpus = 6
        debug_vm = true
        [[machine.nodes]]
        memory = "64M"
        distance = [10, 15]
        [[machine.nodes]]
        memory = 268435456
        distance = [15, 10]
        [memory]
        bytes = "stamp"
        [kconfig]
        CONFIG_DPU_COMPACTION = "y"
        CONFIG_HUGETLB_PAGE = "n"
        [dpu]
        ranks = 2
        dpus_per_rank = 8
        profile = "seed"
        properties = "disabledMask=0x3"
        backend = "dpu"
        binary = "build/dpu_compact"
        [mount]
        path = "/mnt/x"
        allow_other = false
        nice = 3
    """)
    assert (config.machine.cpus, config.machine.debug_vm) == (6, True)
    assert [int(node.memory) for node in config.machine.nodes] == [67108864, 268435456]
    assert [node.distance for node in config.machine.nodes] == [(10, 15), (15, 10)]
    assert config.memory_bytes == 335544320
    assert (config.dpu.ranks, config.dpu.dpus_per_rank, config.dpu.profile) == (2, 8, "seed")
    assert (config.dpu.properties, config.dpu.backend) == ("disabledMask=0x3", "dpu")
    assert config.dpu.binary == "build/dpu_compact"
    assert (config.mount.path, config.mount.allow_other, config.mount.nice) == ("/mnt/x", False, 3)
    assert config.memory.bytes == "stamp"
    asked = ("CONFIG_DPU_COMPACTION", "CONFIG_HUGETLB_PAGE", "CONFIG_DEBUG_VM")
    assert [config.kernel.IS_ENABLED(name) for name in asked] == [True, False, True]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("[machine]\nfoo = 1", "f.toml:2: machine.foo: unknown key"),
        ("bar = 1", "f.toml:1: bar: unknown key"),
        ('[dpu]\nbackend = "dpu"', "f.toml:1: dpu: binary is a DPU program"),
        ('[mount]\ncontrol_group = "no such"', "f.toml:2: mount.control_group: no group 'no such' on this host"),
        ("[mount]\n\ncontrol_group = -1", "f.toml:3: mount.control_group: control_group = -1 is not a group's number"),
        ("[mount]\ncontrol_group = 4294967295", "f.toml:2: mount.control_group: control_group = 4294967295 is not"),
        ("[mount]\ncontrol_group = true", "f.toml:2: mount.control_group: Expected int | str, got bool"),
        (
            '[mount]\ncontrol_group = "tty"\nallow_other = false',
            "f.toml:2: mount.control_group: control_group = 'tty' has no way in without allow_other",
        ),
        ('[dpu]\nbackend = "gpu"', "f.toml:2: dpu.backend: Invalid enum value 'gpu'"),
        ("[npu]\nx = 1", "f.toml:1: npu: unknown key"),
        ('[machine]\n\ncpus = "x"', "f.toml:3: machine.cpus: Expected int, got str"),
        ("[[machine.nodes]]\ndistance = [10, 20]", "f.toml:1: machine: distance has 1 numbers for each node"),
        ("[[machine.nodes]]\ndistance = [9]", "f.toml:2: machine.nodes[0].distance[0]: Expected int >= 10"),
        ("[machine]\ncpus = 0", "f.toml:2: machine.cpus: Expected int >= 1"),
        ("[machine]\nnodes = []", "f.toml:2: machine.nodes: Expected array of length >= 1"),
        (
            '[[machine.nodes]]\nmemory = "4G"\n[[machine.nodes]]\nmemory = "1M"',
            "f.toml:4: machine.nodes[1].memory: memory = 1M is too small: at least 32M",
        ),
        ('[[machine.nodes]]\nmemory = "33M"', "f.toml:2: machine.nodes[0].memory: memory = 33M does not end"),
        ('[[machine.nodes]]\nmemory = "4X"', "f.toml:2: machine.nodes[0].memory: '4X' is not a size"),
        ("[[machine.nodes]]\nmemory = -4", "f.toml:2: machine.nodes[0].memory: -4 is not a size"),
        ('[[machine.nodes]]\nmemory = "100T"', "f.toml:1: machine.nodes: 100T of memory is more than"),
        ('[memory]\nbytes = "some"', "f.toml:2: memory.bytes: Invalid enum value 'some'"),
        ("[dpu]\ndpus_per_rank = 65", "f.toml:2: dpu.dpus_per_rank: Expected int <= 64"),
        ('[gpu]\nmemory = "1M"', "f.toml:2: gpu.memory: memory = 1M is not a multiple of 2M, at least 8M"),
        ('[kconfig]\nCONFIG_FOO = "y"', "f.toml:2: kconfig.CONFIG_FOO: no such option here"),
        ('[kconfig]\n\nCONFIG_NUMA = "n"', "f.toml:3: kconfig.CONFIG_NUMA: is needed for 2 nodes"),
        ("[kconfig]\nCONFIG_DEBUG_FS = true", 'f.toml:2: kconfig.CONFIG_DEBUG_FS: must be "y" or "n"'),
        (
            '[kconfig]\nCONFIG_COMPACTION = "n"\nCONFIG_DPU_COMPACTION = "y"',
            "f.toml:3: kconfig.CONFIG_DPU_COMPACTION: depends on CONFIG_COMPACTION",
        ),
        ("x =", "f.toml:1: Invalid value"),
        ("[machine]\n\ncpus = = 3", "f.toml:3: Invalid value"),
        ("machine.cpus = 0", "f.toml:1: machine.cpus: Expected int >= 1"),
        ("[gpu]\n[machine]\ncpus = 2\ndebug_vm = 1", "f.toml:4: machine.debug_vm: Expected bool"),
        ("\nmachine = { cpus = 0 }", "f.toml:2: machine.cpus: Expected int >= 1"),
        ('[log]\nlevel = "loud"', "f.toml:2: log.level: Invalid enum value 'loud'"),
        ("[sysctl]\nvm.x = 1\nvm.y = [1]", "f.toml:3: sysctl.vm.y: [1] is no text or number"),
        ("[sysctl]\n'vm.x' = 1.5", "f.toml:2: sysctl.vm.x: 1.5 is no text or number"),
        ('[files]\n"proc/x" = 1', "f.toml:2: files.proc/x: does not begin with /"),
        ('[[workload]]\n[[workload]]\ndirectory = "x"', "f.toml:3: workload[1].directory: directory = 'x' does"),
        ("[[workload]]\n[[workload]]\n[workload.write]\nx = [1]", "f.toml:2: workload[1]: x: [1] is no text"),
        ("[[workload]]\nwirte = { x = 1 }", "f.toml:2: workload[0].wirte: unknown key"),
    ],
)
def test_a_mistake_is_one_line_that_names_the_key(text: str, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "f.toml")
    assert str(caught.value).startswith(line)
    assert "\n" not in str(caught.value)


def test_metadata_that_does_not_fit_the_host_is_refused() -> None:
    """8 GiB are 2^21 pages of 32 bytes of metadata: 64 MiB."""
    Config().check_host(64 << 20)
    with pytest.raises(ConfigError, match="needs 64M of page metadata, this host has 63M"):
        Config().check_host(63 << 20)


def test_the_control_group_by_name_and_by_number() -> None:
    tty = grp.getgrnam("tty")
    for text, gid in (("", None), ('""', None), ('"tty"', tty.gr_gid), (str(tty.gr_gid), tty.gr_gid), ("0", 0)):
        config = parse(f"[mount]\ncontrol_group = {text}" if text else "")
        assert config.mount.control_gid() == gid


@pytest.mark.parametrize("kind", ["stamp", "none", "full"])
def test_a_terabyte_fits_into_9_gib(kind: str) -> None:
    text = f'[[machine.nodes]]\nmemory = "1T"\n[memory]\nbytes = "{kind}"'
    assert parse(text).memory_bytes == 1 << 40
    parse(text).check_host(9 << 30)


def test_load_names_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"absent.toml: No such file or directory"):
        load(tmp_path / "absent.toml")
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="not UTF-8"):
        load(tmp_path / "binary")


@pytest.mark.parametrize(
    ("text", "size"), [("4096", 4096), ("4K", 4096), ("3m", 3145728), ("4G", 4294967296), ("1T", 2**40)]
)
def test_parse_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("bad", ["", "G", "4GB", "-1", "1.5G", " 4G", "4 G", True, None, 1.5, "9" * 16])
def test_parse_size_refuses(bad: object) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_size(bad)


@given(st.integers(0, 2**49))
def test_a_size_reads_back_what_it_prints(value: int) -> None:
    assert parse_size(str(Size(value))) == value


@pytest.mark.slow
@given(st.text(max_size=60))
def test_any_text_is_a_config_or_a_config_error(text: str) -> None:
    with suppress(ConfigError):
        parse(text)


def test_compression_of_gpu_memory_is_as_the_file_says() -> None:
    """All that compression/algorithm and compression/quality take, and `none` for no compression."""
    algorithm, quality = (get_type_hints(Gpu)[name] for name in ("algorithm", "quality"))
    assert {*get_args(algorithm)} == {*algorithms(), "none"}
    assert {*get_args(quality)} == {*QUALITIES}
    config = parse('[gpu]\nalgorithm = "zstd"\nquality = "best"\npool = "32M"\nmemory = "8M"\nhost_memory = "8M"')
    memory = build(replace(gpu_config(config.gpu), tiers={}))
    pool = memory.store.pool
    assert isinstance(pool, CompressedPool)
    assert (pool.system.algorithm, pool.system.quality, pool.limit_bytes) == ("zstd", "best", 32 << 20)
    plain = parse('[gpu]\nalgorithm = "none"\npool = "32M"\nmemory = "8M"\nhost_memory = "8M"')
    assert isinstance(build(replace(gpu_config(plain.gpu), tiers={})).store.pool, HostPool)
