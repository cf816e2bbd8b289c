# SPDX-License-Identifier: GPL-2.0-only
"""Function tracing through its files, and how calls are drawn; layouts typed from a real kernel's documentation."""

import errno
import re

import pytest
from machines import NODES_SYSFS, Lab, settle
from wiring import errno_of

from kernelsim.ftrace import Ftrace
from kernelsim.operation import Operation, complete
from kernelsim.task import Task
from kernelsim.timer import ManualClock
from kernelsim.trace import Trace
from kernelsim.trace_events import mm_compaction_kcompactd_sleep
from kernelsim.trace_hook import traced
from kernelsim.trace_output import GraphWriter, duration, header, lines
from kernelsim.wait import WaitQueue

T = "/sys/kernel/tracing"
COMPACT_DPU = f"{NODES_SYSFS}/node0/compact_dpu"


class Toy:
    """Functions that take time."""

    def __init__(self, clock: ManualClock) -> None:
        self.clock = clock

    @traced("outer")
    def outer(self, inner_ns: int) -> str:
        self.clock.advance(1_000)
        self.inner(inner_ns)
        self.inner(inner_ns)
        return "result"

    @traced("inner")
    def inner(self, ns: int) -> None:
        self.clock.advance(ns)

    @traced("sleeper")
    def sleeper(self) -> Operation[int]:
        self.inner(500)
        yield None
        self.clock.advance(2_000)
        return 7

    @traced("fails")
    def fails(self) -> None:
        raise OSError(errno.EIO, "no")


class Machine:
    """Just enough of one."""

    def __init__(self, nr_cpus: int = 2) -> None:
        self.clock = ManualClock()
        self.trace = Trace(self.clock, nr_cpus, WaitQueue())
        self.ftrace = Ftrace(self.trace)
        self.toy = Toy(self.clock)
        self.ftrace.add([self.toy])

    def graph(self) -> str:
        self.trace.drain()
        return "".join(GraphWriter(self.trace).lines(self.trace.ring_buffer.snapshot()))

    def plain(self) -> str:
        return "".join(lines(self.trace, self.trace.ring_buffer.snapshot()))


def test_durations_have_seven_digits() -> None:
    """trace_print_graph_duration(): the number, its decimals as far as there is room, and the rest blank."""
    shown = {
        0: "0.000 us    ",
        382: "0.382 us    ",
        14_722: "14.722 us   ",
        123_456: "123.456 us  ",
        1_234_567: "1234.567 us ",
        12_345_678: "12345.67 us ",
        123_456_789: "123456.7 us ",
        1_234_567_890: "1234567 us  ",
    }
    assert {ns: duration(ns) for ns in shown} == shown


@pytest.mark.slow
def test_calls_are_drawn_as_blocks() -> None:
    machine = Machine()
    machine.ftrace.select("function_graph")
    assert machine.toy.outer(20_500) == "result"
    assert header(machine.trace, "function_graph") + machine.graph() == (
        "# tracer: function_graph\n"
        "#\n"
        "# CPU  DURATION                  FUNCTION CALLS\n"
        "# |     |   |                     |   |   |   |\n"
        " 0)               |  outer() {\n"
        " 0) + 20.500 us   |    inner();\n"
        " 0) + 20.500 us   |    inner();\n"
        " 0) + 42.000 us   |  }\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("ns", "mark"),
    [
        (10_000, " "),
        (10_001, "+"),
        (100_001, "!"),
        (1_000_001, "#"),
        (10_000_001, "*"),
        (100_000_001, "@"),
        (10**9 + 1, "$"),
    ],
)
def test_long_calls_are_marked(ns: int, mark: str) -> None:
    machine = Machine()
    machine.ftrace.select("function_graph")
    machine.toy.inner(ns)
    assert machine.graph().startswith(f" 0) {mark} ")
    machine.trace.set_option("funcgraph-overhead", False)
    assert machine.graph().startswith(" 0)   ")


def test_options_of_the_graph() -> None:
    machine = Machine()
    machine.ftrace.select("function_graph")
    machine.clock.ns = 3_000_000_000
    machine.toy.outer(0)
    for name in ("funcgraph-abstime", "funcgraph-proc", "funcgraph-tail"):
        machine.trace.set_option(name, True)
    assert machine.graph().splitlines()[-1] == ("    3.000001 |   0)   kernels-1    |   1.000 us    |  } /* outer */")
    assert header(machine.trace, "function_graph").splitlines()[2:] == [
        "#     TIME        CPU  TASK/PID         DURATION                  FUNCTION CALLS",
        "#      |          |     |    |           |   |                     |   |   |   |",
    ]
    for name in ("funcgraph-cpu", "funcgraph-duration", "funcgraph-abstime", "funcgraph-proc"):
        machine.trace.set_option(name, False)
    assert machine.graph().splitlines()[-1] == "} /* outer */"


def test_events_are_comments() -> None:
    machine = Machine()
    machine.ftrace.select("function_graph")
    machine.trace.set_enabled([mm_compaction_kcompactd_sleep], True)
    _, call = machine.ftrace.enter("outer")
    _, nested = machine.ftrace.enter("inner")
    machine.trace(mm_compaction_kcompactd_sleep, 0)
    machine.ftrace.leave((machine.trace.current.task, nested))
    machine.ftrace.leave((machine.trace.current.task, call))
    assert machine.graph().splitlines()[2] == " 0)               |      /* mm_compaction_kcompactd_sleep: nid=0 */"


def test_what_sleeps_is_in_one_piece() -> None:
    """A function that gives the CPU to another task: its duration has all of it, and the change is shown."""
    machine = Machine()
    machine.ftrace.select("function_graph")
    current = machine.trace.current
    first = current.run_as(Task(7, lambda: "one"), machine.toy.sleeper())
    next(first)
    with current.as_task(Task(8, lambda: "two")):
        machine.toy.inner(500)
    assert complete(first) == 7
    rule = " ------------------------------------------"
    assert machine.graph().splitlines() == [
        " 0)               |  sleeper() {",
        " 0)   0.500 us    |    inner();",
        rule,
        " 0)     one-7      =>     two-8     ",
        rule,
        "",
        " 0)   0.500 us    |  inner();",
        rule,
        " 0)     two-8      =>     one-7     ",
        rule,
        "",
        " 0)   3.000 us    |  }",
    ]


def test_a_return_whose_call_is_lost_is_named() -> None:
    machine = Machine()
    machine.ftrace.select("function_graph")
    entered = machine.ftrace.enter("outer")
    machine.trace.reset()
    machine.ftrace.leave(entered)
    assert machine.graph() == " 0)   0.000 us    |  } /* outer */\n"


def test_functions_and_their_callers() -> None:
    machine = Machine()
    machine.ftrace.select("function")
    machine.clock.ns = 1_000_000
    with machine.trace.current.as_task(Task(42, lambda: "bash", 1, "do_syscall_64")):
        machine.toy.outer(0)
    assert machine.plain().splitlines() == [
        "            bash-42      [001] .....     0.001000: outer <-do_syscall_64",
        "            bash-42      [001] .....     0.001001: inner <-outer",
        "            bash-42      [001] .....     0.001001: inner <-outer",
    ]
    machine.trace.set_option("print-parent", False)
    assert machine.plain().splitlines()[0].endswith("0.001000: outer")


def test_nothing_stands_in_between_while_nobody_traces() -> None:
    machine = Machine()
    machine.ftrace.select("function")
    assert "outer" in vars(machine.toy)
    machine.ftrace.select("nop")
    assert "outer" not in vars(machine.toy)
    machine.toy.outer(0)
    assert machine.plain() == ""


def test_what_fails_returns() -> None:
    machine = Machine()
    machine.ftrace.select("function_graph")
    with pytest.raises(OSError, match="no"):
        machine.toy.fails()
    assert machine.graph() == " 0)   0.000 us    |  fails();\n"
    assert machine.trace.current.task.stack == []


def drawn(machine: Machine) -> list[str]:
    machine.trace.reset()
    machine.toy.outer(0)
    return re.findall(r"(\w+)\(\)", machine.graph())


def test_filters_of_the_graph() -> None:
    machine = Machine()
    machine.ftrace.select("function_graph")
    machine.ftrace.filter.change(["inner"])
    assert drawn(machine) == ["inner", "inner"]
    machine.ftrace.filter.change(["!inner", "outer"])
    assert drawn(machine) == ["outer", "inner", "inner"]  # with its callees, unlike Linux
    machine.trace.set_option("funcgraph-callees", False)
    assert drawn(machine) == ["outer"]
    machine.ftrace.filter.names = set()
    machine.ftrace.graph.change(["inner"])
    assert drawn(machine) == ["inner", "inner"]
    machine.ftrace.graph.change(["!inner", "outer"])
    assert drawn(machine) == ["outer", "inner", "inner"]
    machine.ftrace.notrace.change(["inn*"])
    assert drawn(machine) == ["outer"]
    machine.ftrace.notrace.names = set()
    machine.ftrace.max_graph_depth = 1
    assert drawn(machine) == ["outer"]
    machine.ftrace.max_graph_depth = 0
    machine.ftrace.graph_notrace.change(["outer"])
    assert drawn(machine) == []


# A whole machine.


@pytest.fixture
def lab() -> Lab:
    lab = Lab((64,))
    lab.spawn("a", anon="24M", holes="50 seed=1")
    return lab


def calls(lab: Lab) -> set[str]:
    return set(re.findall(r"(\w+)\(\)", lab.read(f"{T}/trace")))


@pytest.mark.slow
def test_the_first_recipe(lab: Lab) -> None:
    lab.write(f"{T}/events/compaction/enable", "1")
    lab.write(f"{T}/current_tracer", "function_graph\n")
    lab.write(f"{T}/set_ftrace_filter", "dpu_compact_execute\n")
    lab.write(COMPACT_DPU, "1")
    lab.write(f"{T}/events/enable", "0")
    text = lab.read(f"{T}/trace")
    blocks = re.findall(r"\|  dpu_compact_execute\(\) \{\n.*?\|  \}\n", text, flags=re.S)
    assert blocks
    assert all("us    |    dpu_hw_compact_execute();\n" in block for block in blocks)
    assert "dpu_compact_update_mappings" not in text
    lab.assert_at_rest()


def test_the_second_recipe(lab: Lab) -> None:
    lab.write(f"{T}/current_tracer", "function\n")
    lab.write(f"{T}/set_ftrace_filter", "dpu_compact_*\n")
    lab.write(COMPACT_DPU, "1")
    found = re.findall(r": (\w+) <-(\w+)$", lab.read(f"{T}/trace"), flags=re.M)
    assert ("dpu_compact_region_create", "dpu_compact_zone") in found
    assert ("dpu_compact_commit", "dpu_compact_update_mappings") in found
    assert all(name.startswith("dpu_compact_") for name, _ in found)


def test_every_function_that_can_be_traced_has_a_kernel_name(lab: Lab) -> None:
    functions = lab.read(f"{T}/available_filter_functions").split()
    assert len(functions) == len(set(functions)) > 50
    assert {"dpu_compact_execute", "compact_zone", "__alloc_pages_slowpath", "kcompactd_do_work"} < set(functions)


def test_set_ftrace_filter(lab: Lab) -> None:
    path = f"{T}/set_ftrace_filter"
    assert lab.read(path) == "#### all functions enabled ####\n"
    lab.write(path, "compact_node compact_zone\n")
    assert set(lab.read(path).split()) == {"compact_node", "compact_zone"}
    lab.write(path, "*_compact_node\n")
    lab.write(path, "!compact_*\n")
    assert set(lab.read(path).split()) == {"dpu_compact_node", "proactive_compact_node"}
    lab.registry.truncate(path)
    lab.write(path, ":mod:dpu_compact")
    assert all(name.startswith("dpu_") for name in lab.read(path).split())
    for text in ("nothing", ":mod:nothing", "!nothing", "compact_zone:traceon"):
        assert errno_of(lab.write, path, text) == errno.EINVAL


def test_the_tracer_is_one_of_those_available(lab: Lab) -> None:
    assert errno_of(lab.write, f"{T}/current_tracer", "blk") == errno.EINVAL
    lab.write(f"{T}/current_tracer", "function  \n")
    assert lab.read(f"{T}/current_tracer") == "function\n"
    lab.write("/proc/sys/kernel/ftrace_enabled", "0")
    lab.write(COMPACT_DPU, "1")
    assert " <-" not in lab.read(f"{T}/trace")


@pytest.mark.slow
def test_all_functions_at_once_while_batches_are_in_flight() -> None:
    """Every function, a device that is late, and work in slices: what goes in comes out, and it changes nothing."""
    hashes = []
    for tracer in ("nop", "function_graph"):
        lab = Lab((64,), patience=3)
        lab.spawn("a", anon="24M", holes="50 seed=1")
        lab.write(f"{T}/current_tracer", tracer)
        settle([lab.start_compact(), lab.start("/proc/sys/vm/compact_memory", "1")])
        text = lab.read(f"{T}/trace")
        lab.write(f"{T}/current_tracer", "nop")
        assert text.count("{\n") == text.count("}\n")
        lab.assert_at_rest()
        hashes.append(lab.machine.state_hash())
    assert hashes[0] == hashes[1]
    assert calls(lab) == set()
