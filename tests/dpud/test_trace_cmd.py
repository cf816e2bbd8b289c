# SPDX-License-Identifier: GPL-2.0-only
"""Debian's trace-cmd, unmodified, over the emulated tracefs: `dpud exec -- trace-cmd ...`."""

import os
import re
import shutil
import subprocess
import sys

import pytest

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened"),
    pytest.mark.skipif(os.geteuid() != 0, reason="trace-cmd asks for root"),
    pytest.mark.skipif(shutil.which("trace-cmd") is None, reason="trace-cmd is not installed (make test installs it)"),
]

FRAGMENT = "echo 32M > $mm/anon; echo '50 seed=1' > $mm/holes"
SCRIPT = f"""
set -e
mm=/sys/kernel/config/kernelsim/mm/a
compact=/sys/devices/system/node/node0/compact_dpu
traditional=/sys/devices/system/node/node0/compact
data=$(mktemp)
trap 'rm -f $data' EXIT
mkdir $mm
echo == events; trace-cmd list -e
echo == tracers; trace-cmd list -t
echo == functions; trace-cmd list -f
echo == clocks; trace-cmd list -C
echo == idle; trace-cmd stat
{FRAGMENT}
trace-cmd start -e compaction -e dpu:dpu_batch_complete -f 'nr_retired > 10'
echo == started; trace-cmd stat
echo 1 > $compact
echo 1 > $traditional
trace-cmd stop
echo == stopped; trace-cmd stat
echo == shown; trace-cmd show
trace-cmd reset
echo == reset; trace-cmd show
{FRAGMENT}
trace-cmd start -p function_graph -g dpu_compact_execute 2>/dev/null
echo 1 > $compact
echo == graph; trace-cmd show
trace-cmd reset
{FRAGMENT}
trace-cmd start -p function -l 'dpu_compact_*' 2>/dev/null
echo 1 > $compact
echo == function; trace-cmd show
trace-cmd clear
echo == cleared; trace-cmd show
trace-cmd reset
{FRAGMENT}
trace-cmd record --nosplice -o $data -e compaction -e dpu -e migrate:mm_migrate_pages \\
    sh -c "echo 1 > $compact; echo 1 > $traditional; echo hello > /sys/kernel/tracing/trace_marker" >/dev/null 2>&1
echo == recorded; trace-cmd report -i $data 2>/dev/null
{FRAGMENT}
trace-cmd record --nosplice -o $data -p function_graph -g dpu_compact_execute \\
    sh -c "echo 1 > $compact" >/dev/null 2>&1
echo == recorded graph; trace-cmd report -i $data 2>/dev/null
trace-cmd reset
trace-cmd start -B mine -e kmem:mm_page_free -f 'order == 0' 2>/dev/null
trace-cmd start -e kmem:mm_page_alloc
{FRAGMENT}
echo == instances; trace-cmd list -B
echo == instance; trace-cmd show -B mine
echo == beside it; trace-cmd show
trace-cmd reset -B mine -d
trace-cmd reset
echo == no instances; ls /sys/kernel/tracing/instances
echo == end; cat /sys/kernel/tracing/current_tracer /sys/kernel/tracing/events/enable /sys/kernel/tracing/tracing_on
echo == mount; stat -f -c %T /sys/kernel/tracing
"""


@pytest.fixture(scope="module")
def output() -> dict[str, str]:
    """What trace-cmd said, by heading."""
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dpud", "exec", "--", "sh", "-c", SCRIPT],
        capture_output=True,
        text=True,
        timeout=300,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return dict(part.split("\n", 1) for part in done.stdout.split("== ")[1:])  # type: ignore[misc]


def test_it_sees_the_emulated_files_not_the_real_ones(output: dict[str, str]) -> None:
    assert output["mount"].startswith("fuse")
    assert "dpu:dpu_batch_submit" in output["events"].split()
    assert "dpu_compact_execute" in output["functions"].split()
    assert "sched:sched_switch" not in output["events"]


def test_list(output: dict[str, str]) -> None:
    assert output["tracers"].split() == ["function_graph", "function", "nop"]
    assert output["clocks"].split() == ["[local]", "global", "counter", "mono", "boot"]
    assert "compaction:mm_compaction_begin" in output["events"].split()


def test_stat(output: dict[str, str]) -> None:
    assert "All disabled" in output["idle"]
    assert "Tracing is enabled" in output["idle"]
    assert re.search(r"Individual systems:\s+compaction\s", output["started"])
    assert re.search(r"Individual events:\s+dpu\s+dpu_batch_complete\s", output["started"])
    assert 'dpu:dpu_batch_complete "(nr_retired > 10)"' in output["started"]
    assert "Tracing is disabled" in output["stopped"]


def test_start_and_show(output: dict[str, str]) -> None:
    records = [line for line in output["shown"].splitlines() if line and not line.startswith("#")]
    assert all(re.match(r" *\S+-\d+ +\[\d{3}\] \.{5} +\d+\.\d{6}: \w+: ", line) for line in records)
    assert any("mm_compaction_migratepages: nr_migrated=" in line for line in records)
    assert any(re.match(r" +sh-\d+ .* dpu_batch_complete: base=0x", line) for line in records)


def test_reset_and_clear(output: dict[str, str]) -> None:
    for heading in ("reset", "cleared"):
        assert "# entries-in-buffer/entries-written: 0/0 " in output[heading]
    assert output["end"].split() == ["nop", "0", "1"]


def test_function_tracers(output: dict[str, str]) -> None:
    assert re.search(r"^ \d\) .* us +\|  \}$", output["graph"], flags=re.M)
    assert re.search(r"^ \d\) .* us +\|    dpu_hw_compact_execute\(\);$", output["graph"], flags=re.M)
    assert ": dpu_compact_memory <-dpu_compact_node\n" in output["function"]


def test_record_and_report(output: dict[str, str]) -> None:
    """Binary pages, read by the `format` files, come out as the text that the trace file would have shown."""
    records = [line for line in output["recorded"].splitlines() if "]" in line]
    events = {match[1] for line in records if (match := re.search(r"\d: (\w+): ", line))}
    assert {"mm_compaction_begin", "mm_compaction_end", "mm_migrate_pages", "dpu_batch_complete", "print"} <= events
    assert not [line for line in records if "FAILED TO PARSE" in line or "UNKNOWN" in line]
    assert any(
        re.search(r"dpu_compact_begin: +node=0 zone=DMA32 +region_order=9 engine=upmem-v1a$", line) for line in records
    )
    assert any(re.search(r"mm_compaction_end: +zone_start=0x1 .* mode=sync status=complete$", line) for line in records)
    assert any(re.search(r"print: +tracing_mark_write: hello$", line) for line in records)
    graph = output["recorded graph"]
    assert re.search(r"funcgraph_entry: +\| +dpu_compact_execute\(\) \{$", graph, flags=re.M)
    assert re.search(r"funcgraph_entry: .* us +\| +dpu_hw_compact_execute\(\);$", graph, flags=re.M)
    assert re.search(r"funcgraph_exit: .* us +\| +\}$", graph, flags=re.M)


def test_an_instance(output: dict[str, str]) -> None:
    assert output["instances"].split() == ["mine"]
    for heading, event in (("instance", "mm_page_free"), ("beside it", "mm_page_alloc")):
        records = [line for line in output[heading].splitlines() if line and not line.startswith("#")]
        assert len(records) > 1000
        assert all(f": {event}: page=" in line for line in records)
    assert output["no instances"] == ""
