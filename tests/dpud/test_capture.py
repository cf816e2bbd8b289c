# SPDX-License-Identifier: GPL-2.0-only
"""Captured folders: real ones come out as they were, broken ones as one clear line."""

import functools
import os
import re
import tempfile
from pathlib import Path

import numpy as np
import pytest
import zstandard
from captures import Machine, machine
from effort import examples
from hypothesis import given, settings
from hypothesis import strategies as st

from dpud import capture
from dpud.capture import DEMO, CaptureError, read_capture
from kernelsim.hostimage import HostImage, count_free_blocks, format_buddyinfo

SHARED = Path(__file__).parents[3] / "shared" / "data" / "host-fragmentation"
REAL = {"random50": SHARED / "random50" / "before", "runs40": SHARED / "runs40" / "before", "demo": DEMO}


def rows(buddyinfo: str) -> dict[str, list[int]]:
    return {line.split()[3]: [int(word) for word in line.split()[4:]] for line in buddyinfo.splitlines()}


@functools.cache
def read_real(name: str) -> HostImage:
    if not REAL[name].is_dir():
        pytest.skip(f"{REAL[name]} is not here")
    return read_capture(REAL[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_free_counts_of_a_real_machine(name: str) -> None:
    """DMA and DMA32 to the byte; Normal moved while it was read: each count within 3 % (or half the
    difference, if larger) of the range between buddyinfo before and after."""
    image = read_real(name)
    ours = format_buddyinfo(image.zones, count_free_blocks(image)).splitlines()
    assert ours[:2] == (REAL[name] / "buddyinfo").read_text().splitlines()[:2]
    before, after = (rows((REAL[name] / file).read_text())["Normal"] for file in ("buddyinfo", "buddyinfo.end"))
    for nr, a, b in zip(rows(ours[2] + "\n")["Normal"], before, after, strict=True):
        slack = max(0.03 * max(a, b), abs(a - b) / 2)
        assert min(a, b) - slack <= nr <= max(a, b) + slack


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_pageblock_types_of_a_real_machine(name: str) -> None:
    """Totals as in pagetypeinfo, and kernel pages lie where they belong."""
    image = read_real(name)
    text = (REAL[name] / "pagetypeinfo").read_text().split("Number of blocks type")[1]
    wanted = {zone: [int(word) for word in words.split()] for zone, words in re.findall(r"zone +(\w+) (.*)", text)}
    present = (image.flags.reshape(-1, 512) != 1 << 20).any(axis=1)
    for zone in image.zones:
        blocks = slice(zone.start_pfn // 512, zone.end_pfn // 512)
        types = image.block_migratetype[blocks][present[blocks]]
        assert np.bincount(types, minlength=5).tolist() == wanted[zone.name]
    movable = np.repeat(image.block_migratetype == 1, 512)
    slab, lru = (image.flags & 1 << 7) != 0, (image.flags & 1 << 5) != 0
    assert (slab & movable).sum() < 0.01 * slab.sum()
    assert (lru & movable).sum() > 0.99 * lru.sum()


@pytest.mark.parametrize("name", REAL)
def test_managed_pages_of_a_real_machine(name: str) -> None:
    """What is neither reserved nor without memory is what zoneinfo calls managed."""
    image = read_real(name)
    for zone in image.zones:
        flags = image.flags[zone.start_pfn : zone.end_pfn]
        managed = int((flags & (1 << 20 | 1 << 27) == 0).sum())
        assert abs(managed - zone.managed) <= 128, zone.name


@pytest.fixture(scope="module")
def built() -> Machine:
    return machine(3, nr_blocks=4)


@pytest.mark.slow
@pytest.mark.parametrize("compressed", [False, True])
def test_a_capture_comes_back(built: Machine, tmp_path: Path, compressed: bool) -> None:
    image = read_capture(built.write(tmp_path / "c", compressed))
    assert format_buddyinfo(image.zones, count_free_blocks(image)) == image.buddyinfo == built.buddyinfo()
    (task,), ((pid, comm, entries),) = image.mappings, built.tasks
    assert (task.pid, task.comm) == (pid, comm)
    assert list(zip(task.vpn.tolist(), task.pfn.tolist(), strict=True)) == entries
    assert task.vmas == ((entries[0][0], entries[-1][0] + 1, 3),)
    assert (image.zones[1].min, image.zones[1].promo, image.zones[1].nr_pcp) == (10, 16, 7)


def test_counts_that_the_kernel_cut_off_are_made_up_from_buddyinfo(built: Machine, tmp_path: Path) -> None:
    folder = built.write(tmp_path)
    text = (folder / "pagetypeinfo").read_text()
    at = text.index("zone   Normal, type      Movable") + len("zone   Normal, type      Movable ")
    whole = int(text[at : at + 6])
    assert whole > 100
    (folder / "pagetypeinfo").write_text(text[:at] + f"{'>100':>6}" + text[at + 6 :])
    assert read_capture(folder).zones[1].nr_free_by_type[1][0] == whole


def test_cma_blocks_count_as_movable(built: Machine, tmp_path: Path) -> None:
    folder = built.write(tmp_path)
    text = (folder / "pagetypeinfo").read_text()
    (folder / "pagetypeinfo").write_text(text.replace("HighAtomic", "       CMA"))
    image = read_capture(folder)
    assert image.block_migratetype.tolist() == built.types


def test_processes_are_optional(built: Machine, tmp_path: Path) -> None:
    folder = built.write(tmp_path)
    (folder / "maps.zst").unlink()
    (folder / "pagemap.zst").unlink()
    (folder / "buddyinfo.end").unlink()
    image = read_capture(folder)
    assert (image.mappings, image.buddyinfo_end) == ((), "")


def replaced(name: str, old: str, new: str):  # type: ignore[no-untyped-def]
    def change(folder: Path) -> None:
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new, 1))

    return change


def rewritten(name: str, content: bytes, old: str | None = None):  # type: ignore[no-untyped-def]
    def change(folder: Path) -> None:
        (folder / (old or name)).unlink()
        (folder / name).write_bytes(content)

    return change


BROKEN = {
    "kpageflags: missing": lambda folder: (folder / "kpageflags.zst").unlink(),
    "zoneinfo: missing": lambda folder: (folder / "zoneinfo").unlink(),
    "pagemap: missing": lambda folder: (folder / "pagemap.zst").unlink(),
    "kpagecount.zst: broken zstd": rewritten("kpagecount.zst", b"not zstd at all"),
    "kpageflags: cut short: 4097 bytes": rewritten("kpageflags", bytes(4097), "kpageflags.zst"),
    "kpageflags: cut short: 512 entries, 4096 needed": rewritten("kpageflags", bytes(4096), "kpageflags.zst"),
    "kpageflags: cut short: 0 entries": rewritten("kpageflags.zst", b""),
    "buddyinfo: not 11 counts": replaced("buddyinfo", "zone   Normal ", "zone   Normal many "),
    "buddyinfo: not a zone's line": rewritten("buddyinfo", b"<html>"),
    "buddyinfo: not text": rewritten("buddyinfo", b"\xff\xfe\x00"),
    "buddyinfo: no line for zone Normal": replaced("buddyinfo", "zone   Normal ", "zone   Norman "),
    "zoneinfo: no zone with memory": rewritten("zoneinfo", b"hello\n"),
    "zone Normal of node 0 has no `start_pfn`": replaced("zoneinfo", "start_pfn:           2048", ""),
    "zone DMA of node 0 has no `min`": replaced("zoneinfo", "min      10\n", "mini\n"),
    "overlap at pfn 2000": replaced("zoneinfo", "start_pfn:           2048", "start_pfn:           2000"),
    "impossible size": replaced("zoneinfo", "spanned  2048", "spanned  999999999999999"),
    "appears twice": replaced("zoneinfo", "zone   Normal", "zone      DMA"),
    "zone Normal of node 7": replaced("zoneinfo", "Node 0, zone   Normal", "Node 7, zone   Normal"),
    "pagetypeinfo: page block order 10": replaced("pagetypeinfo", "order: 9", "order: 10"),
    "pagetypeinfo: unknown migratetype": replaced("pagetypeinfo", "HighAtomic", "    Atomic"),
    "maps: does not begin": rewritten("maps", b"Tusk\n", "maps.zst"),
    "maps: 9999999999999 mappings are more": rewritten("maps", b"Task 1 9999999999999 x\n", "maps.zst"),
    "not a line of maps": rewritten("maps", b"Task 1 1 x\nzzz\n", "maps.zst"),
    "pagemap: the entries of process 1": rewritten("maps", b"Task 1 1 x\n", "maps.zst"),
}


@pytest.mark.slow
@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_capture_is_one_clear_line(built: Machine, tmp_path: Path, message: str) -> None:
    folder = built.write(tmp_path)
    BROKEN[message](folder)
    with pytest.raises(CaptureError) as error:
        read_capture(folder)
    assert message in str(error.value)
    assert str(error.value).startswith(f"{folder}: ")
    assert "\n" not in str(error.value)


def test_a_text_that_never_ends_is_not_read_on(built: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MAX_TEXT_BYTES", 1 << 20)
    folder = built.write(tmp_path)
    (folder / "zoneinfo").unlink()
    (folder / "zoneinfo.zst").write_bytes(zstandard.compress(bytes(16 << 20)))
    with pytest.raises(CaptureError, match="zoneinfo: more than 1 MiB"):
        read_capture(folder)


@pytest.mark.parametrize("nr_apart", [0, 4])
def test_a_flipped_bit_is_found(built: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, nr_apart: int) -> None:
    """By the checksum, also if that comes with a later read than the content."""
    folder = built.write(tmp_path)
    packed = bytearray(zstandard.ZstdCompressor(write_checksum=True).compress(built.counts.tobytes()))
    packed[-1] ^= 1
    (folder / "kpagecount.zst").write_bytes(packed)
    monkeypatch.setattr(capture, "READ_BYTES", len(packed) - nr_apart)
    with pytest.raises(CaptureError, match=r"kpagecount\.zst: broken zstd data"):
        read_capture(folder)


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(CaptureError, match="no such folder"):
        read_capture(tmp_path / "none")


def test_a_pipe_is_not_waited_for(built: Machine, tmp_path: Path) -> None:
    folder = built.write(tmp_path)
    (folder / "buddyinfo").unlink()
    os.mkfifo(folder / "buddyinfo")
    with pytest.raises(CaptureError, match="buddyinfo: missing"):
        read_capture(folder)


def test_a_file_is_read_only_as_far_as_the_zones_go(built: Machine, tmp_path: Path) -> None:
    """Offline memory above the zones is no fault; and a decompression bomb is not unpacked."""
    folder = built.write(tmp_path)
    long = built.flags.tobytes() + bytes(8 << 20)
    (folder / "kpageflags.zst").write_bytes(zstandard.compress(long))
    image = read_capture(folder)
    assert image.nr_pages == 4096
    assert format_buddyinfo(image.zones, count_free_blocks(image)) == built.buddyinfo()


NAMES = ("zoneinfo", "buddyinfo", "pagetypeinfo", "kpageflags.zst", "kpagecount.zst", "maps", "pagemap")
NUMBER = re.compile(rb"\d+")


@st.composite
def damage(draw: st.DrawFn):  # type: ignore[no-untyped-def]
    """(file, how it is changed)"""
    name = draw(st.sampled_from(NAMES))
    place, size = draw(st.floats(0, 1)), draw(st.integers(0, 64))
    junk = draw(st.one_of(st.binary(max_size=24), st.sampled_from([b"-1", b"0", b"99999999999999999", b">", b"\n"])))
    how = draw(st.sampled_from(["cut", "overwrite", "insert", "number", "drop line", "twice"]))

    def change(content: bytes) -> bytes:
        at = int(place * len(content))
        if how == "number" and (found := NUMBER.search(content, at)):
            return content[: found.start()] + junk + content[found.end() :]
        if how == "drop line" and (end := content.find(b"\n", at)) >= 0:
            return content[:at] + content[end + 1 :]
        if how == "twice":
            return content[:at] + content
        return content[:at] + (b"" if how == "cut" else junk + content[at + size * (how == "overwrite") :])

    return name, change


@pytest.fixture(scope="module")
def small_files() -> dict[str, bytes]:
    files = machine(5, nr_blocks=2).files()
    for name in ("kpageflags", "kpagecount"):
        files[f"{name}.zst"] = zstandard.compress(files.pop(name))
    return files


@pytest.mark.slow
@settings(max_examples=examples(80), deadline=None)
@given(damages=st.lists(damage(), min_size=1, max_size=3))
def test_damage_ends_in_an_image_or_a_capture_error(small_files: dict[str, bytes], damages) -> None:  # type: ignore[no-untyped-def]
    files = dict(small_files)
    for name, change in damages:
        files[name] = change(files[name])
    with tempfile.TemporaryDirectory() as folder:
        for name, content in files.items():
            Path(folder, name).write_bytes(content)
        try:
            image = read_capture(Path(folder))
        except CaptureError as error:
            assert "\n" not in str(error)  # noqa: PT017
        else:
            assert image.nr_pages == len(image.flags) == len(image.mapcount)
