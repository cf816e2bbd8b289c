# SPDX-License-Identifier: GPL-2.0-only
"""instances/ of tracefs, in library mode. What is expected was seen on a 6.18 kernel with the same commands."""

import errno
import os

import pytest
from machines import Lab
from test_trace import HEADER, entries, read_pipe
from wiring import errno_of

from fs.configfs import Items
from fs.kernfs import Tree
from kernelsim import trace_key
from kernelsim.attr import File
from kernelsim.operation import complete

T = "/sys/kernel/tracing"
Q = f"{T}/instances/q"
FREE = "events/kmem/mm_page_free"
COMPACT = "/sys/devices/system/node/node0/compact"
OWN_ONLY = {
    "README",
    "available_events",
    "available_filter_functions",
    "instances",
    "max_graph_depth",
    "printk_formats",
    "saved_cmdlines",
    "saved_cmdlines_size",
    "set_graph_function",
    "set_graph_notrace",
}
"""Files of ours that a real instance has not."""
OF_FUNCTIONS = {"set_ftrace_filter", "set_ftrace_notrace", "set_ftrace_pid"}
"""Files that a real instance has, and ours not: it has no function tracer."""


@pytest.fixture
def lab() -> Lab:
    return Lab((32,))


@pytest.fixture
def tree(lab: Lab) -> Tree:
    tree = Tree(lab.registry)
    tree.mkdir(Q)
    return tree


@pytest.fixture(autouse=True)
def _key_off() -> object:
    """The static key belongs to the process."""
    yield
    trace_key.set_key(0)
    trace_key.take_rows()


def names(tree: Tree, path: str) -> set[str]:
    return {entry.name for entry in tree.readdir(path)} - {".", ".."}


def test_an_instance_has_the_files_of_a_buffer(tree: Tree) -> None:
    assert names(tree, T) - names(tree, Q) == OWN_ONLY | OF_FUNCTIONS
    assert names(tree, Q) <= names(tree, T)
    for path in ("per_cpu/cpu0", "events", "events/kmem", FREE, "events/ftrace"):
        assert names(tree, f"{Q}/{path}") == names(tree, f"{T}/{path}")
    assert names(tree, f"{Q}/options") == {"print-parent", "context-info", "irq-info", "overwrite", "markers"}


def test_a_new_one_is_on_and_empty(lab: Lab, tree: Tree) -> None:
    assert lab.read(f"{Q}/trace") == HEADER.format("0/0")
    texts = [lab.read(f"{Q}/{name}") for name in ("tracing_on", "current_tracer", "set_event", "events/enable")]
    assert texts == ["1\n", "nop\n", "", "0\n"]
    assert lab.read(f"{Q}/trace_clock").startswith("[local] ")
    assert lab.read(f"{Q}/buffer_size_kb") == "1408\n"


def test_each_buffer_has_its_own_switches(lab: Lab, tree: Tree) -> None:
    lab.write(f"{Q}/events/compaction/mm_compaction_begin/enable", "1")
    assert lab.read(f"{Q}/events/enable") == lab.read(f"{Q}/events/compaction/enable") == "X\n"
    assert lab.read(f"{Q}/set_event") == "compaction:mm_compaction_begin\n"
    assert lab.read(f"{T}/set_event") == ""
    lab.write(f"{T}/tracing_on", "0")
    lab.write(COMPACT, "1")
    assert {entry.split(":")[0] for entry in entries(lab, f"{Q}/trace")} == {"mm_compaction_begin"}
    assert not entries(lab)
    lab.write(f"{Q}/trace_clock", "counter")
    lab.write(f"{Q}/buffer_size_kb", "16")
    assert lab.read(f"{T}/trace_clock").startswith("[local] ")
    assert lab.read(f"{T}/buffer_size_kb") != lab.read(f"{Q}/buffer_size_kb") == "16\n"


def test_an_event_goes_to_every_buffer_that_wants_it(lab: Lab, tree: Tree) -> None:
    tree.mkdir(f"{T}/instances/r")
    for buffer, order in ((T, "order >= 0"), (Q, "order > 10"), (f"{T}/instances/r", "0")):
        lab.write(f"{buffer}/{FREE}/filter", order)
        lab.write(f"{buffer}/{FREE}/enable", "1")
    lab.spawn("sh", anon="1M", holes="50")
    own, none, other = (entries(lab, f"{buffer}/trace") for buffer in (T, Q, f"{T}/instances/r"))
    assert len(own) >= 100
    assert own == other
    assert none == []
    assert lab.read(f"{Q}/per_cpu/cpu0/stats").startswith("entries: 0\n")
    lab.write(f"{T}/{FREE}/enable", "0")
    lab.write(f"{T}/instances/r/{FREE}/enable", "0")
    assert trace_key.key() == trace_key.MM_PAGE_FREE  # q still looks at it
    tree.rmdir(Q)
    assert trace_key.key() == 0


def test_markers_readers_and_clearing(lab: Lab, tree: Tree) -> None:
    tree.open(f"{Q}/trace_marker", os.O_WRONLY).write(b"hi", 0)
    assert entries(lab, f"{Q}/trace") == ["tracing_mark_write: hi"]
    assert not entries(lab)
    assert read_pipe(lab, file=f"{Q}/trace_pipe").endswith(b"tracing_mark_write: hi\n")
    assert errno_of(lambda: read_pipe(lab, file=f"{Q}/trace_pipe")) == errno.EAGAIN
    tree.open(f"{Q}/trace_marker", os.O_WRONLY).write(b"again", 0)
    lab.registry.truncate(f"{Q}/trace")
    assert not entries(lab, f"{Q}/trace")


def test_what_an_instance_does_not_take(lab: Lab, tree: Tree) -> None:
    for file, text in (
        ("current_tracer", "wakeup"),
        ("current_tracer", "function"),
        ("trace_options", "norecord-cmd"),
        (f"{FREE}/filter", "foo > 3"),
        ("options/markers", "3"),
    ):
        assert errno_of(lambda file=file, text=text: lab.write(f"{Q}/{file}", text)) == errno.EINVAL
    assert "Field not found" in lab.read(f"{Q}/error_log")
    assert lab.read(f"{T}/error_log") == ""


@pytest.mark.parametrize(
    ("make", "path", "number"),
    [
        (True, Q, errno.EEXIST),
        (True, f"{T}/instances/", errno.ENOENT),
        (True, f"{Q}/x", errno.EPERM),
        (True, f"{Q}/events/x", errno.EPERM),
        (True, f"{T}/x", errno.EPERM),
        (True, f"{T}/events/x", errno.EPERM),
        (False, f"{Q}/events", errno.EPERM),
        (False, f"{T}/events", errno.EPERM),
        (False, f"{T}/instances", errno.EPERM),
        (False, f"{T}/instances/none", errno.ENOENT),
    ],
)
def test_wrong_directories(tree: Tree, make: bool, path: str, number: int) -> None:
    assert errno_of(lambda: (tree.mkdir if make else tree.rmdir)(path)) == number


def test_names_and_coming_back(lab: Lab, tree: Tree) -> None:
    nr_nodes = len(lab.registry.nodes)
    for name in ("a b", ".hid", "1" * 255):
        tree.mkdir(f"{T}/instances/{name}")
        tree.rmdir(f"{T}/instances/{name}")
    assert len(lab.registry.nodes) == nr_nodes
    lab.write(f"{Q}/{FREE}/enable", "1")
    tree.rmdir(Q)
    tree.mkdir(Q)
    assert lab.read(f"{Q}/{FREE}/enable") == "0\n"


def test_busy_while_somebody_waits_at_its_pipe(lab: Lab, tree: Tree) -> None:
    items, file = Items(lab.registry), lab.registry.nodes[f"{Q}/trace_pipe"]
    assert isinstance(file, File)
    with items.inside(file):
        assert errno_of(lambda: complete(items.drop(Q))) == errno.EBUSY
    assert complete(items.drop(Q))
    assert Q not in lab.registry.nodes


@pytest.mark.parametrize(("size", "taken"), [(1, 1), (4053, 4053), (4054, 4054), (4055, 4054), (8192, 4054)])
def test_a_marker_takes_what_fits_a_record(lab: Lab, tree: Tree, size: int, taken: int) -> None:
    assert tree.open(f"{Q}/trace_marker", os.O_WRONLY).write(b"y" * size, 0) == taken
    assert entries(lab, f"{Q}/trace") == ["tracing_mark_write: " + "y" * taken]


@pytest.mark.parametrize(
    ("file", "text", "shown"),
    [
        ("current_tracer", " nop ", "nop"),
        ("set_event_pid", "0x10 010 +5 4294967297", "1 5 8 16"),
        ("tracing_cpumask", ",1", "1"),
        ("tracing_cpumask", ",", "0"),
        ("tracing_cpumask", " 1 ", "1"),
        ("tracing_on", "18446744073709551615", "1"),
    ],
)
def test_other_spellings_that_a_kernel_takes(lab: Lab, tree: Tree, file: str, text: str, shown: str) -> None:
    lab.write(f"{Q}/{file}", text)
    assert lab.read(f"{Q}/{file}").split() == shown.split()


@pytest.mark.parametrize(
    ("file", "text", "number"),
    [
        ("set_event_pid", "08", errno.EINVAL),
        ("set_event_pid", "1,2", errno.EINVAL),
        ("set_event_pid", "1073741824", errno.EPERM),
        ("tracing_cpumask", "f", errno.EOVERFLOW),
        ("tracing_cpumask", "00000000,00000001", errno.EOVERFLOW),
        ("tracing_cpumask", "123456789", errno.EOVERFLOW),
        ("tracing_cpumask", "0x1", errno.EINVAL),
        ("tracing_on", "18446744073709551616", errno.ERANGE),
        ("buffer_size_kb", "18446744073709551616", errno.ERANGE),
        ("options/markers", "99999999999999999999999", errno.ERANGE),
        ("events/kmem/enable", "99999999999999999999999", errno.ERANGE),
    ],
)
def test_other_values_that_a_kernel_refuses(lab: Lab, tree: Tree, file: str, text: str, number: int) -> None:
    before = lab.read(f"{Q}/{file}")
    assert errno_of(lambda: lab.write(f"{Q}/{file}", text)) == number
    assert lab.read(f"{Q}/{file}") == before
