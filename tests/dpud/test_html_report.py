# SPDX-License-Identifier: GPL-2.0-only
"""`dpud report`: the page holds what the files say, with unit and source, and needs nothing else."""

import re
import subprocess
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
from emulated import DPUD, Emulated, emulated, has_fuse

TIMEOUT_S = 120
CONFIG = """
[[machine.nodes]]
memory = "128M"
[gpu]
memory = "16M"
host_memory = "16M"
pool = "16M"
[sysctl]
vm.dpu_compact_region_order = 14
vm.compaction_proactiveness = 0
"""

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(not has_fuse(), reason="needs /dev/fuse"),
]
VOID = {"meta", "path"}


class Page(HTMLParser):
    """Tables by the heading above them, and whether each tag is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.heading = ""
        self.tables: dict[str, list[list[str]]] = {}
        self.text = text
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        if tag in ("h1", "h2", "h3"):
            self.heading = ""
        if tag == "tr":
            self.tables.setdefault(self.heading, []).append([])
        if tag in ("td", "th"):
            self.tables[self.heading][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and {"h1", "h2", "h3"} & set(self.open):
            self.heading += data
        elif {"td", "th"} & set(self.open):
            self.tables[self.heading][-1][-1] += data


@pytest.fixture(scope="module")
def daemon() -> Iterator[Emulated]:
    with emulated(CONFIG) as found:
        config = found.mnt / "sys/kernel/config"
        web, buffer = config / "kernelsim/mm/web", config / "gpu_memvirt/gpu0/clients/train/buffers/x"
        web.mkdir()
        buffer.mkdir(parents=True)
        for file, text in ((web / "anon", "64M"), (web / "holes", "50 seed=7"), (buffer / "size", "4M")):
            file.write_text(text)
        yield found


def report(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*DPUD, "report", *words], capture_output=True, text=True, timeout=TIMEOUT_S)


@pytest.fixture(scope="module")
def compacted(daemon: Emulated, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page, str]:
    """(/proc/buddyinfo before, the page, and after)"""
    out, before = tmp_path_factory.mktemp("report") / "out.html", daemon.text("/proc/buddyinfo")
    done = report(str(out), "--mount", str(daemon.mnt), "--compact")
    assert done.returncode == 0, done.stderr
    return before, Page(out.read_text()), daemon.text("/proc/buddyinfo")


def free_mib(buddyinfo: str) -> list[str]:
    counts = zip(*(map(int, line.split()[4:]) for line in buddyinfo.splitlines()), strict=True)
    return [f"{sum(of_order) * (4096 << order) / (1 << 20):,.1f}" for order, of_order in enumerate(counts)]


def test_free_memory_is_what_buddyinfo_said_before_and_after(compacted: tuple[str, Page, str]) -> None:
    before, page, after = compacted
    assert before != after
    _, *rows = page.tables["Contiguity counted"]
    assert [row[2] for row in rows] == free_mib(before)
    assert [row[3] for row in rows] == free_mib(after)
    assert float(rows[9][5]) < float(rows[9][4]), "less of it is unusable for 2 MiB pages"


def test_each_pageblock_is_a_square_before_and_after(compacted: tuple[str, Page, str]) -> None:
    """The machine has 64 of them: 8 in DMA, 56 in DMA32. What is half used lies over a free one."""
    maps = re.findall(r'<svg class="map".*?aria-label="([^"]*)">(.*?)</svg>', compacted[1].text)
    squares = {label: set(re.findall(r"M(\d+ \d+)h9v9h-9z", body)) for label, body in maps}
    assert {label: len(found) for label, found in squares.items()} == {
        "Node 0, zone DMA before": 8,
        "Node 0, zone DMA after": 8,
        "Node 0, zone DMA32 before": 56,
        "Node 0, zone DMA32 after": 56,
    }


def test_histograms_and_engines_have_units_and_sources(compacted: tuple[str, Page, str], daemon: Emulated) -> None:
    page = compacted[1]
    assert daemon.text("/sys/kernel/debug/dpu_compact/engine").split("[")[1].startswith("upmem-v1a]")
    stats = dict(line.split() for line in daemon.text("/sys/kernel/debug/dpu_compact/stats").splitlines())
    for source in ("modelled", "measured"):
        _, *rows = page.tables[f"A region, from isolation to remapping, upmem-v1a {source}"]
        assert sum(int(row[2]) for row in rows) == int(stats["regions"]) > 0
        assert all(re.fullmatch(r"[0-9.]+ (ns|µs|ms|s)", cell) for row in rows for cell in row[:2])
    _, *engines = page.tables["Engines"]
    sources = dict(row[0].split() for row in engines)
    assert sources.pop("host") == "measured"
    assert len(sources) >= 8
    assert set(sources.values()) == {"modelled"}
    assert len({row[1] for row in engines}) == 1, "each moved the same pages"


def test_nothing_is_fetched_and_every_tag_is_closed(compacted: tuple[str, Page, str]) -> None:
    page = compacted[1]
    assert page.open == []
    assert not re.search(r"<script|<link|<img|@import|url\(|https?://", page.text)
    assert "<td>train</td>" in page.text
    assert "@media print" in page.text


def test_a_running_daemon_is_only_looked_at(daemon: Emulated, tmp_path: Path) -> None:
    before = daemon.text("/sys/kernel/debug/dpu_compact/stats"), daemon.text("/proc/buddyinfo")
    assert report(str(tmp_path / "out.html"), "--mount", str(daemon.mnt)).returncode == 0
    assert (daemon.text("/sys/kernel/debug/dpu_compact/stats"), daemon.text("/proc/buddyinfo")) == before
    page = Page((tmp_path / "out.html").read_text())
    assert "free, MiB, now" in page.tables["Contiguity counted"][0]


def test_a_machine_of_its_own_is_compacted_and_gone(tmp_path: Path) -> None:
    config = tmp_path / "a<b>.toml"
    config.write_text('[[machine.nodes]]\nmemory = "64M"\n[gpu]\ndevices = 0\n')
    done = report(str(tmp_path / "out.html"), "--config", str(config))
    assert done.returncode == 0, done.stderr
    page = Page((tmp_path / "out.html").read_text())
    assert "before" in page.tables["dpud report"][0]
    assert "This machine has no GPU" in page.text
    assert "/a&lt;b&gt;.toml; engine" in page.text
    assert page.open == []
    assert str(tmp_path) not in Path("/proc/mounts").read_text()


def test_what_cannot_be_is_one_line(daemon: Emulated, tmp_path: Path) -> None:
    done = report(str(tmp_path / "out.html"), "--compact")
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    done = report(str(tmp_path / "no" / "out.html"), "--mount", str(daemon.mnt))
    assert (done.returncode, done.stderr) == (2, f"dpud: {tmp_path}/no/out.html: No such file or directory\n")
