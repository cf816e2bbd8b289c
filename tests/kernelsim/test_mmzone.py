# SPDX-License-Identifier: GPL-2.0-only
"""Zones, their watermarks and reserves, against what a real kernel computed; and what a page's metadata costs."""

import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from machines import Lab

from dpud.capture import DEMO
from kernelsim.content import WORDS_FULL
from kernelsim.list_head import list_add, list_add_tail, list_del
from kernelsim.machine import MachineConfig, NodeConfig, boot_mem, zone_spans
from kernelsim.mmzone import Mem, default_min_free_kbytes, zone_names
from kernelsim.page import alloc_mem_map

SHARED = Path(__file__).parents[3] / "shared/data/host-fragmentation"
ZONEINFOS = [DEMO, *sorted(path.parent for path in SHARED.glob("*/*/zoneinfo"))]
GIB = 1 << 30


@dataclass
class RealZone:
    """What /proc/zoneinfo says of one populated zone."""

    name: str
    start: int
    spanned: int
    managed: int
    marks: list[int]
    protection: list[int]

    @classmethod
    def parse(cls, text: str) -> "RealZone":
        def number(label: str) -> int:
            found = re.search(rf"^ +{label}:? +(\d+)$", text, re.MULTILINE)
            assert found, label
            return int(found[1])

        protection = re.search(r"protection: \(([\d, ]+)\)", text)
        assert protection
        return cls(
            text.split()[0],
            number("start_pfn"),
            number("spanned"),
            number("managed"),
            [number(mark) for mark in ("min", "low", "high", "promo")],
            [int(nr) for nr in protection[1].split(",")],
        )


def real_zones(folder: Path) -> list[RealZone]:
    parts = re.split(r"^Node 0, zone +", (folder / "zoneinfo").read_text(), flags=re.MULTILINE)[1:]
    return [RealZone.parse(part) for part in parts if "managed  0" not in part and "start_pfn" in part]


def possible_min_free_kbytes(zones: list[RealZone]) -> list[int]:
    """Each zone's min is its share of min_free_kbytes / 4 pages, rounded down: what the sum can have been."""
    total = sum(zone.marks[0] for zone in zones)
    return list(range(4 * total, 4 * (total + len(zones))))


@pytest.mark.slow
@pytest.mark.parametrize("folder", ZONEINFOS, ids=lambda folder: "-".join(folder.parts[-2:]))
def test_watermarks_and_reserves_are_the_real_kernels(folder: Path) -> None:
    real = real_zones(folder)
    assert [zone.name for zone in real] == ["DMA", "DMA32", "Normal"]
    spans = [(0, zone_names.index(zone.name), zone.start, zone.start + zone.spanned) for zone in real]
    mem = Mem(spans, np.array([[10]]))
    mem.zones["managed"] = [zone.managed for zone in real]
    fitting = []
    for kbytes in possible_min_free_kbytes(real):
        assert mem.setup_watermarks(kbytes) == kbytes
        fitting += [kbytes] * (mem.zones["watermark"].tolist() == [zone.marks for zone in real])
    assert fitting
    assert mem.zones["reserve"].tolist() == [zone.protection[:4] for zone in real]


@pytest.mark.parametrize(
    ("lowmem_kbytes", "expected"),
    [
        (0, 128),
        (512, 128),
        (1 << 10, 128),
        (16 << 10, 512),
        (1 << 20, 4096),
        (4 << 20, 8192),
        (16 << 20, 16384),
        (1 << 40, 262144),
    ],
)
def test_min_free_kbytes_of_common_machines(lowmem_kbytes: int, expected: int) -> None:
    """int_sqrt(16 * lowmem) between 128 and 262144; 1 GiB makes 4096, 16 GiB 16384."""
    assert default_min_free_kbytes(lowmem_kbytes) == expected


def test_a_movable_zones_min_is_its_own() -> None:
    """clamp(managed / 1024, 32, 128) pages (kernel-abi.md 1.4)."""
    mem = Mem([(0, 2, 0, 262144), (0, 3, 262144, 524288)], np.array([[10]]))
    for managed, least in ((4096, 32), (65536, 64), (262144, 128)):
        mem.zones["managed"] = [262144, managed]
        mem.setup_watermarks()
        assert mem.zones["watermark"][1][0] == least


def test_zones_of_the_default_machine() -> None:
    """Two nodes of 4 GiB: DMA up to 16 MiB and DMA32 up to 4 GiB on the first, Normal on the second."""
    assert zone_spans(MachineConfig()) == [
        (0, 0, 1, 4096),
        (0, 1, 4096, 1048576),
        (1, 2, 1048576, 2097152),
    ]


def test_a_node_that_straddles_4_gib_has_two_zones() -> None:
    spans = zone_spans(MachineConfig(nodes=(NodeConfig(6 * GIB), NodeConfig(GIB))))
    assert spans[1:] == [(0, 1, 4096, 1048576), (0, 2, 1048576, 1572864), (1, 2, 1572864, 1835008)]


def test_zonelists_go_to_the_nearest_node_and_its_highest_zone_first() -> None:
    config = MachineConfig(
        nodes=(NodeConfig(32 << 20), NodeConfig(32 << 20), NodeConfig(32 << 20)),
        distance=((10, 30, 20), (30, 10, 20), (20, 20, 10)),
    )
    mem = boot_mem(config)
    nodes = [[int(mem.zones["node"][zone]) for zone in zonelist] for zonelist in mem.zonelist]
    assert nodes == [[0, 0, 2, 1], [1, 2, 0, 0], [2, 0, 0, 1]]
    assert [int(mem.zones["type"][zone]) for zone in mem.zonelist[0][:2]] == [1, 0]


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"nodes": ()}, "1 to 64 nodes"),
        ({"nodes": (NodeConfig(31 << 20),)}, "node 0: memory"),
        ({"nodes": (NodeConfig((64 << 20) + 4096),)}, "node 0: memory"),
        ({"nodes": (NodeConfig(), NodeConfig(nr_cpus=-1))}, "node 1: 0 to 1024 CPUs"),
        ({"nodes": (NodeConfig(nr_cpus=0),)}, "at least one CPU"),
        ({"bytes": "some"}, '"full", "stamp" or "none"'),
        ({"distance": ((10,),)}, "square matrix"),
    ],
)
def test_impossible_machines_are_refused_in_one_line(config: dict[str, object], words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        MachineConfig(**config)
    assert "\n" not in str(caught.value)


# Metadata.


def per_page_bytes(lab: Lab) -> int:
    """Of every array of the machine that grows with its memory, what one page costs (page contents aside)."""
    nr_pages = lab.mem.nr_pages
    arrays = [value for part in (lab.mem, lab.vm) for value in vars(part).values() if isinstance(value, np.ndarray)]
    contents = [lab.vm.memory, lab.vm.pt]
    grown = [array for array in arrays if len(array) * 512 >= nr_pages and not any(array is each for each in contents)]
    assert any(len(array) >= nr_pages for array in grown)
    return -(-sum(array.nbytes for array in grown) // nr_pages)


@pytest.mark.parametrize("words", ["full", "stamp"])
def test_metadata_is_at_most_64_bytes_a_page(words: str) -> None:
    lab = Lab((128,), words)
    assert lab.mem.pages.itemsize == 32
    assert per_page_bytes(lab) <= 64


def test_with_real_bytes_page_tables_lie_in_memory_itself() -> None:
    """Nothing else is per page: the tables' array is another view of the machine's memory."""
    lab = Lab((32,), "full")
    assert lab.vm.memory.shape == (lab.mem.nr_pages, WORDS_FULL)
    assert np.shares_memory(lab.vm.pt, lab.vm.memory)
    process = lab.spawn("a", anon="4K")
    assert lab.vm.memory[process.mm.root].any()


def test_lists_behave_like_list_head() -> None:
    """Against a Python list."""
    pages = alloc_mem_map(8, 1)
    head, model = 8, []
    for entry, front in ((3, True), (5, False), (1, True), (7, False), (0, True)):
        (list_add if front else list_add_tail)(pages, entry, head)
        model.insert(0 if front else len(model), entry)
    for gone in (3, 0, 7):
        list_del(pages, gone)
        list_del(pages, gone)
        model.remove(gone)
        assert walk(pages, head, "next") == model == walk(pages, head, "prev")[::-1]
    assert pages["next"][3] == pages["prev"][3] == 3


def walk(pages: np.ndarray, head: int, link: str) -> list[int]:
    found, at = [], int(pages[link][head])
    while at != head:
        found.append(at)
        at = int(pages[link][at])
    return found
