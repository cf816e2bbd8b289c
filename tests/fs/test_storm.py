# SPDX-License-Identifier: GPL-2.0-only
"""`dpud bench storm` in short: many at once get whole texts and no odd errors. No timing decides."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from emulated import Emulated, emulated, has_fuse

from dpud.bench.storm import blocked_readers, kill_ns, storm

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not has_fuse(), reason="mounts with allow_other"),
]

NR_CHUNKED_READS = 100_000


@pytest.fixture(scope="module")
def dpud() -> Iterator[Emulated]:
    with emulated() as found:
        yield found


def test_readers_and_writers(dpud: Emulated) -> None:
    seen = storm(dpud.mnt, 4, nr_readers=20, nr_writers=6)
    assert seen.errors == ()
    assert seen.nr_torn == 0
    assert seen.nr_texts > 20


def test_blocked_readers_are_gone_when_killed_and_others_read_on(dpud: Emulated) -> None:
    """They wait in the daemon; a kill must reach them there, and none may be left in D."""
    with blocked_readers(dpud.mnt, 40) as readers:
        assert dpud.text("/proc/meminfo").startswith("MemTotal:")
        for reader in readers:
            kill_ns(reader)
        assert {reader.returncode for reader in readers} == {-signal.SIGKILL}


def test_chunked_reads_are_of_one_text(dpud: Emulated) -> None:
    """While the text changes: vmstat's pgfault moves with each touch, and no reader may see two of its values mixed."""
    mm = dpud.mnt / "sys/kernel/config/kernelsim/mm/chunks"
    mm.mkdir()
    done = threading.Event()

    def change() -> None:
        while not done.is_set():
            (mm / "anon").write_text("1M")

    changer = threading.Thread(target=change)
    changer.start()
    try:
        nr_reads, texts = _read_in_chunks(dpud.mnt / "proc/vmstat")
    finally:
        done.set()
        changer.join()
        mm.rmdir()
    assert nr_reads >= NR_CHUNKED_READS
    names = [[line.split()[0] for line in text.decode().splitlines()] for text in texts]
    assert all(found == names[0] for found in names), "each text has every counter once, in its place"
    assert all(line.split()[1].isdigit() for text in texts for line in text.decode().splitlines())
    assert len(set(texts)) > 10, "they did change"


def _read_in_chunks(path: Path) -> tuple[int, list[bytes]]:
    nr_reads, texts = 0, []
    while nr_reads < NR_CHUNKED_READS:
        fd = os.open(path, os.O_RDONLY)
        parts = [os.read(fd, 3)]
        while parts[-1]:
            parts.append(os.read(fd, 3))
        os.close(fd)
        nr_reads += len(parts)
        texts.append(b"".join(parts))
    return nr_reads, texts


def test_who_has_written_or_was_told_reads_no_older_value(dpud: Emulated) -> None:
    """Two readers of each value: the writer itself, and a process that hears of it through a pipe. Several at once."""
    knobs = ("extfrag_threshold", "dpu_compact_min_fragments", "max_map_count", "overcommit_ratio")
    script = Path(__file__).with_name("write_and_tell.py")
    pairs = [
        subprocess.Popen(
            [sys.executable, "-P", str(script), str(dpud.mnt / "proc/sys/vm" / knob)], text=True, stdout=-1
        )
        for knob in knobs
    ]
    seen = [pair.communicate()[0].split() for pair in pairs]
    assert [stale for stale, _ in seen] == ["0"] * len(knobs)
    assert all(int(nr) >= 1000 for _, nr in seen)


def test_a_reader_of_a_removed_file_is_told(dpud: Emulated) -> None:
    mm = dpud.mnt / "sys/kernel/config/kernelsim/mm/gone"
    mm.mkdir()
    with (mm / "rss").open() as file:
        mm.rmdir()
        with pytest.raises(OSError, match="No such"):
            file.read()


def test_nothing_is_left_of_a_killed_pipeline(dpud: Emulated) -> None:
    command = ["sh", "-c", f"cat {dpud.mnt}/dev/kmsg | cat >/dev/null"]
    with subprocess.Popen(command, start_new_session=True) as pipeline:
        os.killpg(pipeline.pid, signal.SIGKILL)
    assert dpud.text("/proc/meminfo")
