# SPDX-License-Identifier: GPL-2.0-only
"""What fuzzing, and reading with it in mind, found: each as what its user sees."""

import errno
import json
import struct
from dataclasses import asdict
from pathlib import Path

import msgspec
import pytest
import xxhash
from machines import Lab
from wiring import errno_of

from dpud import config
from dpud.config import ConfigError
from dpud.gpu.errors import CorruptPage
from dpud.gpu.fault import archive, injector
from dpud.gpu.fault.checkpoint_file import Label, RegionLabel, Writer, read
from dpud.gpu.migration import MigrationModule
from dpud.gpu.migration.pages import Manifest
from dpud.gpu.numa import topology
from dpud.gpu.system import GpuConfig, build
from dpud.journal import frame
from dpud.state import State
from kernelsim.glob import Glob

TRACING = "/sys/kernel/tracing"
MIB = 1 << 20


@pytest.mark.slow
@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("a = " + "[" * 5000, "recursion"),
        ("machine.cpus = " + "9" * 5000, "digits"),
        ("machine.nodes = [{ memory = 0x" + "f" * 5000 + " }]", "64 bits"),
        ("sysctl." + "a." * 30 + "b = 1", "inside each other"),
        ("x = 1\nsysctl." + "a." * 20_000 + "b = 1", "config:2: .* dots"),
        ("x = {" + "'a' . " * 20_000 + "b = 1}", "config:1: .* dots"),
        ('mount.path = "/run/\\u0000"', "NUL"),
        ('files."/proc/\\u0000" = 1', "NUL"),
    ],
)
def test_toml_that_no_configuration_is(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as refused:
        config.parse(text)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 5000


@pytest.mark.parametrize("text", ["bit 'x", 'bit "', "bit seed=-1", "bit va=-1", "bit address=-4", "bit\\"])
def test_an_injection_that_makes_no_sense_is_einval(text: str) -> None:
    assert errno_of(injector.parse, text, ("gpu0", "host")) == errno.EINVAL


def test_a_pid_of_thousands_of_digits_is_einval() -> None:
    lab = Lab((32,))
    for path in ("set_event_pid", "set_ftrace_pid"):
        assert errno_of(lab.write, f"{TRACING}/{path}", "9" * 5000) == errno.EINVAL


def test_names_longer_than_any_are_einval() -> None:
    lab = Lab((32,))
    assert errno_of(lab.write, f"{TRACING}/set_event", "*" * 128) == errno.EINVAL
    assert errno_of(lab.write, f"{TRACING}/set_ftrace_filter", "*" * 1000) == errno.EINVAL


def test_filters_are_bounded_and_what_is_taken_can_be_asked() -> None:
    """Found by reading: both a deep and a long filter ended in RecursionError, the long one at the next event."""
    lab = Lab((32,))
    path = f"{TRACING}/events/kmem/mm_page_alloc/filter"
    assert errno_of(lab.write, path, "(" * 1000 + "order == 1" + ")" * 1000) == errno.E2BIG
    assert errno_of(lab.write, path, "order == 1 ||" * 400) == errno.EINVAL
    lab.write(path, "||".join(["cpu == 9"] * 400))
    lab.write(f"{TRACING}/events/kmem/mm_page_alloc/enable", "1")
    lab.spawn("a", anon="64K")
    assert "mm_page_alloc" not in lab.read(f"{TRACING}/trace").replace("tracer:", "")
    lab.write(path, "(" * 60 + "order >= 0" + ")" * 60)
    lab.spawn("b", anon="64K")
    assert "mm_page_alloc" in lab.read(f"{TRACING}/trace")


@pytest.mark.parametrize(
    ("pattern", "text", "fits"),
    [
        # From lib/globtest.c's idea of what has to be looked at, typed in by hand.
        ("", "", True),
        ("a", "", False),
        ("", "a", False),
        ("?", "a", True),
        ("??", "a", False),
        ("*", "", True),
        ("*ab", "aab", True),
        ("a*b*c", "axxbyybzc", True),
        ("a*b*c", "axxbyybz", False),
        ("*" * 20 + "b", "a" * 50, False),
        ("[a-c]x", "bx", True),
        ("[!a-c]x", "bx", False),
        ("[!a-c]x", "zx", True),
        ("[]]", "]", True),
        ("[]-a]", "_", True),
        ("[!]a-]", "b", True),
        ("[!]a-]", "-", False),
        ("[ab", "[ab", True),
        ("\\*", "*", True),
        ("\\*", "a", False),
        ("a*", "ba", False),
        ("*a", "ab", False),
    ],
)
def test_glob_match_is_the_kernel_s(pattern: str, text: str, fits: bool) -> None:
    assert Glob(pattern).matches(text) is fits


@pytest.mark.parametrize(
    "pattern", ["e*" + "[" * 5000 + "]" * 3, "*" + "[" * 5000, "*[" + "a-b" * 5000 + "]x", "*[x]" * 900]
)
def test_a_pattern_is_taken_apart_once(pattern: str) -> None:
    """A write of a page took seconds; so many strings would take longer than anybody waits."""
    glob = Glob(pattern)
    assert not any(glob.matches(f"mm_compaction_{number}") for number in range(300))


@pytest.mark.parametrize(
    "text",
    [
        'source = "x"\nnode = 5\n',
        'source = "x"\n[[node]]\nid = 0\ncpus = 3\nmemory_MiB = 1\n',
        'source = "x"\n[[node]]\nid = 0\ncpus = "0-99999999999"\nmemory_MiB = 1\n',
        'source = "x"\nlatency_ns = [[inf]]\nbandwidth_MBps = [[1]]\n[[node]]\nid = 0\ncpus = "0"\nmemory_MiB = 1\n',
        'source = "x"\nlatency_ns = [[1]]\nbandwidth_MBps = [[9223372036854]]\n[[node]]\nid=0\ncpus=""\nmemory_MiB=1\n',
        "a = " + "[" * 3000,
    ],
)
def test_a_topology_that_is_none_is_einval(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.toml"
    path.write_text(text)
    assert errno_of(topology.load, path) == errno.EINVAL


@pytest.mark.parametrize("text", ["0-99999999999", "3-1", "-1", "8192"])
def test_lists_of_cpus_are_of_cpus_that_there_could_be(text: str) -> None:
    with pytest.raises(ValueError, match=r".+"):
        topology.parse_list(text)
    assert topology.parse_list("0-3,8191") == [0, 1, 2, 3, 8191]


def test_a_client_s_name_does_not_end_in_a_newline() -> None:
    """`$` also matches before one: it would have been two lines in every table."""
    manifest = {"client": "c\n", "areas": [{"nr_bytes": 1, "page_bytes": 4096}]}
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(manifest, Manifest)
    with pytest.raises(msgspec.ValidationError):
        msgspec.convert(
            manifest | {"client": "c", "areas": [{"nr_bytes": 1, "page_bytes": 4096, "name": "a\n"}]}, Manifest
        )


# Files of ours, changed by somebody who knows their checksums.


LABEL = Label("c", 1, 0, 0, 5, (RegionLabel(0, 8192, 4096, "device", 0, 0),))


def written(folder: Path, label: Label, **changes: object) -> Path:
    """A checkpoint without pages, its label changed after it was made."""
    path = archive.path_of(folder, "c", label.sequence)
    writer = Writer(path, label)
    writer.finish()
    data = path.read_bytes()
    old = json.dumps(asdict(label)).encode()
    new = json.dumps(asdict(label) | changes).encode()
    rest = data[12 + len(old) + 8 : -8]
    whole = data[:8] + struct.pack("<I", len(new)) + new + struct.pack("<Q", xxhash.xxh3_64_intdigest(new)) + rest
    path.write_bytes(whole + struct.pack("<Q", xxhash.xxh3_64_intdigest(whole)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {"parent": 1, "parent_digest": None},
        {"parent": 1},
        {"sequence": 7},
        {"regions": [{}]},
        {"regions": [5]},
        {"regions": [asdict(LABEL.regions[0]) | {"nr_bytes": 1 << 60}]},
        {"regions": [asdict(LABEL.regions[0]) | {"page_bytes": 3}]},
        {"regions": [asdict(LABEL.regions[0]) | {"type": "nothing"}]},
    ],
)
def test_a_checkpoint_with_a_label_that_lies_is_damaged(tmp_path: Path, changes: dict[str, object]) -> None:
    """One that was an increment to itself was read for ever."""
    written(tmp_path, LABEL, **changes)
    assert errno_of(archive.read_chain, tmp_path, "c", 1) == errno.EIO


def test_a_checkpoint_of_a_region_that_is_not_there_is_damaged(tmp_path: Path) -> None:
    path = archive.path_of(tmp_path, "c", 1)
    Writer(path, LABEL).finish()
    data = path.read_bytes()[:-20] + struct.pack("<IQ", 5, 0) + struct.pack("<IIIQI", 0, 0, 4096, 0, 0)
    data += struct.pack("<IQ", 0xFFFFFFFF, 1)
    path.write_bytes(data + struct.pack("<Q", xxhash.xxh3_64_intdigest(data)))
    with pytest.raises(CorruptPage, match="does not have"):
        read(path)


def promise(text: bytes) -> bytes:
    return b"%016x %s\n" % (xxhash.xxh3_64_intdigest(text), text)


def migration() -> MigrationModule:
    module = build(GpuConfig(1, 8 * MIB, 8 * MIB, MIB)).migration
    assert isinstance(module, MigrationModule)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    "text",
    [
        b'{"id":"m","step":"owner"}',
        b'{"id":"m","step":"receiving"}',
        b'{"id":"m","step":"receiving","manifest":5}',
        b'{"id":"m","step":"receiving","manifest":{"client":"../x","areas":[]}}',
    ],
)
def test_promises_that_make_no_sense_are_einval(tmp_path: Path, text: bytes) -> None:
    module = migration()
    (tmp_path / "in.journal").write_bytes(promise(text))
    assert errno_of(module.use_journal, tmp_path) == errno.EINVAL
    assert module.journal_folder == ""


@pytest.mark.slow
@pytest.mark.parametrize("text", [b"[" * 5000, b"\xff", b"5", b'{"id":[],"step":"begun"}', b'{"id":"m"}'])
def test_lines_that_are_no_promises_are_cut_off(tmp_path: Path, text: bytes) -> None:
    good = promise(b'{"id":"m","step":"abandoned"}')
    (tmp_path / "in.journal").write_bytes(good + promise(text) + good)
    migration().use_journal(tmp_path)
    assert (tmp_path / "in.journal").read_bytes() == good


def test_a_journal_can_be_chosen_again_and_again_and_be_none(tmp_path: Path) -> None:
    """Each choice left two files open; an empty text took the folder that the daemon was started in."""
    module = migration()
    nr_open = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(20):
        module.use_journal(tmp_path)
    module.use_journal(None)
    assert module.journal_folder == ""
    assert len(list(Path("/proc/self/fd").iterdir())) == nr_open
    assert errno_of(module.use_journal, Path("/".join("x" * 1500))) == errno.ENAMETOOLONG


def test_a_journal_that_is_nested_without_end_is_refused(tmp_path: Path) -> None:
    head = b"\x93\x01\xa1x\x81\xa1a" + b"\x91" * 5000 + b"\x01"
    (tmp_path / "journal").write_bytes(frame(0, head) + frame(1, b"\x95\x00\x00\xc0\x90\xc0"))
    with pytest.raises(config.UserError, match="no beginning"):
        State(tmp_path, config.Config()).look()
