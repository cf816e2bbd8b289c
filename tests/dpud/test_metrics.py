# SPDX-License-Identifier: GPL-2.0-only
"""The metrics as promtool, a real Prometheus and the dashboard see them."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from emulated import Emulated, emulated, has_fuse
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import Dashboard
from prometheus_client.parser import text_string_to_metric_families

from dpud import config

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "docs" / "grafana" / "dpud.json"
WEB = "sys/kernel/config/kernelsim/mm/web"
CLIENT = "sys/kernel/config/gpu_memvirt/gpu0/clients/train"

CONFIG = """
[[machine.nodes]]
memory = "128M"
[gpu]
memory = "16M"
host_memory = "16M"
pool = "16M"
[sysctl]
vm.dpu_compact_region_order = 14
[metrics]
listen = "127.0.0.1:{port}"
"""

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(not has_fuse(), reason="needs /dev/fuse"),
]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def get(port: int, path: str) -> str:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=20) as answer:
        return str(answer.read().decode())


@pytest.fixture(scope="module")
def scraped() -> Iterator[tuple[Emulated, int]]:
    """A daemon in which something was compacted and a GPU client is at work, and its port."""
    port = free_port()
    with emulated(CONFIG.format(port=port)) as daemon:
        (daemon.mnt / WEB).mkdir()
        (daemon.mnt / CLIENT / "buffers/x").mkdir(parents=True)
        for path, text in (
            (f"{WEB}/anon", "48M"),
            (f"{WEB}/holes", "50 seed=7"),
            ("sys/devices/system/node/node0/compact_dpu", "1"),
            (f"{CLIENT}/buffers/x/size", "4M"),
        ):
            (daemon.mnt / path).write_text(text)
        (daemon.mnt / CLIENT / "buffers/x/data").write_bytes(bytes(1 << 20))
        yield daemon, port


def samples(port: int) -> dict[str, dict[tuple[tuple[str, str], ...], float]]:
    """name -> labels -> value."""
    found: dict[str, dict[tuple[tuple[str, str], ...], float]] = {}
    for family in text_string_to_metric_families(get(port, "/metrics")):
        for sample in family.samples:
            found.setdefault(sample.name, {})[tuple(sorted(sample.labels.items()))] = sample.value
    return found


def test_promtool_has_nothing_to_say(scraped: tuple[Emulated, int]) -> None:
    need("promtool")
    text = get(scraped[1], "/metrics")
    done = subprocess.run(["promtool", "check", "metrics"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")


def test_values_are_those_of_the_files(scraped: tuple[Emulated, int]) -> None:
    daemon, port = scraped
    found = samples(port)
    for line in daemon.text("/proc/buddyinfo").splitlines():
        node, zone, counts = re.fullmatch(r"Node (\d+), zone +(\S+) +(.*)", line).groups()  # type: ignore[union-attr]
        got = [found["dpud_buddy_free_blocks"][("node", node), ("order", str(n)), ("zone", zone)] for n in range(11)]
        assert got == list(map(float, counts.split()))
    stats = dict(line.split() for line in daemon.text("/sys/kernel/debug/dpu_compact/stats").splitlines())
    assert int(stats["pages_moved"]) > 1000
    assert found["dpud_compaction_pages_moved_total"][(("by", "engine"),)] == int(stats["pages_moved"])
    assert found["dpud_compaction_wall_seconds_total"][()] == pytest.approx(int(stats["wall_ns"]) / 1e9)
    used = int(daemon.text("/sys/class/gpu_memvirt/gpu0/memory/total_bytes")) - int(
        daemon.text("/sys/class/gpu_memvirt/gpu0/memory/free_bytes")
    )
    assert used >= 1 << 20
    assert found["dpud_gpu_tier_used_bytes"][("gpu", "gpu0"), ("tier", "device")] == used
    assert found["dpud_gpu_client_granted_bytes"][("client", "train"), ("gpu", "gpu0")] == 4 << 20


def test_histograms_count_every_region_up_to_the_bound_that_the_file_has(scraped: tuple[Emulated, int]) -> None:
    daemon, port = scraped
    found = samples(port)
    lines = [line.split() for line in daemon.text("/sys/kernel/debug/dpu_compact/histograms").splitlines()[1:]]
    rows = [(int(high), int(count)) for _, of, what, _, high, count, *_ in lines if (of, what) == ("latency", "wall")]
    assert rows
    buckets = {
        float(dict(labels)["le"]): value
        for labels, value in found["dpud_compaction_region_seconds_bucket"].items()
        if dict(labels)["phase"] == "wall"
    }
    for high, _ in rows:
        assert buckets[(high + 1) / 1e9] == sum(count for bound, count in rows if bound <= high)
    assert buckets[float("inf")] == sum(count for _, count in rows)
    counts = found["dpud_compaction_region_seconds_count"]
    assert [value for labels, value in counts.items() if ("phase", "wall") in labels] == [buckets[float("inf")]]


def test_help_is_what_the_file_s_declaration_says(scraped: tuple[Emulated, int]) -> None:
    text = get(scraped[1], "/metrics")
    assert "# HELP dpud_buddy_free_blocks /proc/buddyinfo: Free blocks of each zone by order.\n" in text


def test_a_real_prometheus_scrapes_it(scraped: tuple[Emulated, int], tmp_path: Path) -> None:
    need("prometheus")
    with prometheus(tmp_path, scraped[1]) as port:
        up = wait_for(lambda: value_of(port, "up"))
        moved = wait_for(lambda: value_of(port, 'dpud_compaction_pages_moved_total{by="engine"}'))
        assert (up, moved > 1000) == (1, True)
        for panel in json.loads(DASHBOARD.read_text())["panels"]:
            for target in panel["targets"]:
                assert query(port, substituted(target["expr"]))["status"] == "success", target["expr"]


def test_the_dashboard_asks_only_for_what_there_is(scraped: tuple[Emulated, int]) -> None:
    names = set(samples(scraped[1]))
    dashboard = json.loads(DASHBOARD.read_text())
    asked = {
        name
        for panel in dashboard["panels"]
        for each in panel["targets"]
        for name in re.findall(r"\bdpud_\w+", each["expr"])
    }
    assert len(asked) > 10
    assert asked <= names
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])


def test_the_dashboard_is_one_of_grafana_s() -> None:
    """Its own library, made from its schemas, reads it and loses nothing."""
    text = DASHBOARD.read_text()
    read = Dashboard.from_json(json.loads(text))
    assert lost(json.loads(text), json.loads(JSONEncoder().encode(read))) == []
    assert lost({"panels": [{"tpye": "stat"}]}, {"panels": [{}]}) == [".panels[0].tpye"]


def lost(before: object, after: object, path: str = "") -> list[str]:
    """What one has and the other has not, or otherwise."""
    if isinstance(before, dict) and isinstance(after, dict):
        return [name for key, value in before.items() for name in lost(value, after.get(key), f"{path}.{key}")]
    if isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        pairs = enumerate(zip(before, after, strict=True))
        return [name for number, pair in pairs for name in lost(*pair, f"{path}[{number}]")]
    return [path] if before != after else []


@pytest.mark.parametrize("listen", ["9779", "localhost", "localhost:70000", "a b:1"])
def test_an_impossible_address_is_refused(listen: str) -> None:
    with pytest.raises(config.ConfigError, match=r"config:2: metrics.listen: listen = .* is not like"):
        config.parse(f'[metrics]\nlisten = "{listen}"\n')


# A Prometheus of our own.


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed; `make test` does it")


@contextmanager
def prometheus(folder: Path, target: int) -> Iterator[int]:
    settings = folder / "prometheus.yml"
    settings.write_text(
        "global: {scrape_interval: 1s}\n"
        f"scrape_configs: [{{job_name: dpud, static_configs: [{{targets: ['127.0.0.1:{target}']}}]}}]\n"
    )
    port = free_port()
    command = ["prometheus", f"--config.file={settings}", f"--storage.tsdb.path={folder / 'data'}"]
    command += [f"--web.listen-address=127.0.0.1:{port}"]
    with open(folder / "log", "wb") as log, subprocess.Popen(command, stdout=log, stderr=log) as process:
        try:
            yield port
        finally:
            process.terminate()
            process.wait(60)


def query(port: int, expression: str) -> dict[str, object]:
    return dict(json.loads(get(port, "/api/v1/query?" + urllib.parse.urlencode({"query": expression}))))


def value_of(port: int, expression: str) -> float | None:
    """Of the one series; None while it is not there, or nobody listens yet."""
    try:
        result = query(port, expression)["data"]["result"]  # type: ignore[index]
    except OSError:
        return None
    return float(result[0]["value"][1]) if result else None


def wait_for(look: Callable[[], float | None]) -> float:
    deadline = time.monotonic() + 120
    while (value := look()) is None:
        assert time.monotonic() < deadline, "it was never scraped"
        time.sleep(0.2)
    return float(value)


def substituted(expression: str) -> str:
    """With values for what Grafana puts in."""
    return expression.replace("$__rate_interval", "1m").replace("$instance", ".*")
