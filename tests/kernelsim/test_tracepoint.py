# SPDX-License-Identifier: GPL-2.0-only
"""Event declarations against the running kernel's `format` files, and records against lines of a real trace."""

import re
import subprocess

import pytest

from kernelsim import trace_events
from kernelsim.trace_events import EVENTS, FTRACE_EVENTS
from kernelsim.tracepoint import TraceEvent

# One line for each event: the event's path, and its `format` with newlines as \n. In a mount namespace of its own.
DUMP = (
    "mount -t tracefs test /sys/kernel/tracing 2>/dev/null || mount -t tracefs test /mnt && cd /mnt; "
    '[ -d events ] || cd /sys/kernel/tracing; for f in events/*/*/format; do echo "== $f"; cat $f; done'
)


def real_formats() -> dict[str, str]:
    """`format` of every event of the running kernel, by `system/event`; skips where they cannot be read."""
    done = subprocess.run(["unshare", "-m", "sh", "-c", DUMP], capture_output=True, text=True, timeout=60)
    formats = {}
    for part in done.stdout.split("== events/")[1:]:
        path, _, text = part.partition("/format\n")
        formats[path] = text
    if done.returncode or not formats:
        pytest.skip("the real tracefs cannot be mounted here")
    return formats


def comparable(text: str) -> str:
    """Without what is declared to differ: the ID, and how flag masks are spelt in C."""
    text = re.sub(r"^ID: .*$", "", text, flags=re.M)
    return re.sub(r'(__print_flags\(REC->\w+, "\|"), .*?\) : "none"', r'\1) : "none"', text, flags=re.S)


@pytest.mark.host
def test_no_event_of_the_running_kernel_has_one_of_our_ids() -> None:
    """perf and BPF programs take the ID to the real kernel."""
    real = {int(number) for text in real_formats().values() for number in re.findall(r"^ID: (\d+)$", text, re.M)}
    assert not real & {event.id for event in EVENTS}


@pytest.mark.host
def test_formats_are_the_running_kernels() -> None:
    real = real_formats()
    ours = [event for event in (*EVENTS, *FTRACE_EVENTS) if event.path in real]
    if not any(event.system == "compaction" for event in ours):
        pytest.skip("a kernel without compaction events")
    for event in ours:
        if real[event.path].count("field:") == event.format().count("field:"):  # another version may have more fields
            assert comparable(event.format()) == comparable(real[event.path])
    assert len(ours) > 20


CAPTURED = """\
name: mm_compaction_end
ID: 669
format:
	field:unsigned short common_type;	offset:0;	size:2;	signed:0;
	field:unsigned char common_flags;	offset:2;	size:1;	signed:0;
	field:unsigned char common_preempt_count;	offset:3;	size:1;	signed:0;
	field:int common_pid;	offset:4;	size:4;	signed:1;

	field:unsigned long zone_start;	offset:8;	size:8;	signed:0;
	field:unsigned long migrate_pfn;	offset:16;	size:8;	signed:0;
	field:unsigned long free_pfn;	offset:24;	size:8;	signed:0;
	field:unsigned long zone_end;	offset:32;	size:8;	signed:0;
	field:bool sync;	offset:40;	size:1;	signed:0;
	field:int status;	offset:44;	size:4;	signed:1;

print fmt: "zone_start=0x%lx migrate_pfn=0x%lx free_pfn=0x%lx zone_end=0x%lx, mode=%s status=%s", \
REC->zone_start, REC->migrate_pfn, REC->free_pfn, REC->zone_end, REC->sync ? "sync" : "async", \
__print_symbolic(REC->status, {1, "skipped"}, {2, "deferred"}, {4, "continue"}, {8, "success"}, \
{6, "partial_skipped"}, {5, "complete"}, {3, "no_suitable_page"}, {0, "not_suitable_zone"}, {7, "contended"})
"""


def test_format_of_a_captured_event() -> None:
    """From a 6.18 kernel, for machines that have none to ask."""
    assert comparable(trace_events.mm_compaction_end.format()) == comparable(CAPTURED)


@pytest.mark.parametrize(
    ("event", "values", "text"),
    [
        (
            trace_events.mm_compaction_begin,
            (1, 1, 0xE00, 0x1000, True),
            "zone_start=0x1 migrate_pfn=0x1 free_pfn=0xe00 zone_end=0x1000, mode=sync",
        ),
        (trace_events.mm_compaction_finished, (0, 2, -1, 4), "node=0 zone=Normal   order=-1 ret=continue"),
        (
            trace_events.mm_compaction_deferred,
            (0, 0, 9, 1, 3, 4),
            "node=0 zone=DMA      order=9 order_failed=4 consider=1 limit=8",
        ),
        (trace_events.mm_compaction_try_to_compact_pages, (9, 0xCC0, 1), "order=9 gfp_mask=GFP_KERNEL priority=1"),
        (trace_events.mm_compaction_kcompactd_wake, (1, 9, 3), "nid=1 order=9 classzone_idx=Movable "),
        (
            trace_events.mm_migrate_pages,
            (104, 4, 0, 0, 0, 0, 1, 0),
            "nr_succeeded=104 nr_failed=4 nr_thp_succeeded=0 nr_thp_failed=0 nr_thp_split=0 nr_split=0 "
            "mode=MIGRATE_SYNC_LIGHT reason=compaction",
        ),
        (
            trace_events.mm_page_alloc,
            (0x10, 0, 0x100CCA, 1),
            "page=ffffea0000000400 pfn=0x10 order=0 migratetype=1 gfp_flags=GFP_HIGHUSER_MOVABLE",
        ),
        (
            trace_events.mm_page_alloc,
            (-1, 9, 0, 0),
            "page=0000000000000000 pfn=0x0 order=9 migratetype=0 gfp_flags=none",
        ),
        (
            trace_events.mm_page_alloc_extfrag,
            (0x200, 0, 9, 0, 1, 1),
            "page=ffffea0000008000 pfn=0x200 alloc_order=0 fallback_order=9 pageblock_order=9 alloc_migratetype=0 "
            "fallback_migratetype=1 fragmenting=0 change_ownership=1",
        ),
        (trace_events.set_migration_pte, (0x7F00, 0xABC, 0), "addr=7f00, pte=abc order=0"),
    ],
)
def test_text_of_a_record(event: TraceEvent, values: tuple[object, ...], text: str) -> None:
    assert event.text(values) == text


def test_every_event_of_a_compiled_loop_has_a_bit_of_its_own() -> None:
    keys = [event.key for event in EVENTS if event.key]
    assert len(set(keys)) == len(keys) == 14
    assert all(key.bit_count() == 1 for key in keys)


def test_ids_differ() -> None:
    events = (*EVENTS, *FTRACE_EVENTS)
    assert len({event.id for event in events}) == len(events)
