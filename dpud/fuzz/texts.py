# SPDX-License-Identifier: GPL-2.0-only
"""Texts that people write or that come from elsewhere: configuration, topologies, profile strings, traces, logs, units.

A second file of the same kind, where one can be given, stands behind a line `----`.
"""

import re
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dpud import config_text, scenario
from dpud.bench.gpu import usage
from dpud.config import Config, ConfigError, Source, combine, parse_size
from dpud.daemon import gpu_config, machine_config
from dpud.dpu.errors import DpuError
from dpud.dpu.profile import load_profile, rank_chip
from dpud.dpu.properties import load_properties
from dpud.errors import UserError
from dpud.fuzz.mutate import Mutator
from dpud.fuzz.target import Parser
from dpud.gpu.address_space.permissions import parse_permissions
from dpud.gpu.fault import injector
from dpud.gpu.fault.files import _parse_seconds
from dpud.gpu.migration.channel import parse_address
from dpud.gpu.numa import topology
from dpud.gpu.qos.decisions import DecisionLog
from dpud.gpu.qos.replay import replay
from dpud.gpu.qos.scheduler import Scheduler
from dpud.gpu.traffic import Cause
from dpud.trace_text import TraceReader
from kernelsim.attr import Flavour, Int, IntVector, Size, StrictVector
from kernelsim.dynamic_debug import DynamicDebug, Site
from kernelsim.ftrace import FunctionSet
from kernelsim.gfp import parse_gfp
from kernelsim.mm_configfs import parse_amount
from kernelsim.printk import LOG_LINE_MAX, parse_priority
from kernelsim.task import Task
from kernelsim.trace import find_events
from kernelsim.trace_events import EVENTS
from kernelsim.trace_filter import compile_filter
from kernelsim.tracefs_events import parse_pids

SECOND = b"\n----\n"


# The configuration.


def _config(data: bytes) -> None:
    """Whatever is taken can be written out again, and says the same then."""
    try:
        sources = [Source(f"f{number}", part.decode()) for number, part in enumerate(data.split(SECOND))]
    except UnicodeDecodeError as error:
        raise ConfigError("not UTF-8 text") from error
    config = combine(sources)
    often = zlib.crc32(data)
    again = combine([Source("again", config_text.toml(config, often % 8 == 0))])
    assert again == config, "it reads back to another configuration"
    assert all("\0" not in text for pair in config.settings.items() for text in (pair[0], *pair[1]))
    if often % 4 == 0:
        machine_config(config)
    gpu_config(config.gpu)


def config_world(_seed: int) -> Parser:
    texts = [path.read_bytes() for path in sorted(scenario.FOLDER.glob("*.toml"))]
    texts += [config_text.toml(Config(), comments).encode() for comments in (False, True)]
    texts += [SECOND.join(texts[:2]), b"machine.nodes = [{memory = '1G'}]\n[sysctl]\nvm.swappiness = 1\n"]
    words = sorted(set(re.findall(rb"[\w.]+", texts[-3])))
    return Parser(_config, UserError, Mutator(texts, (*words, b"[", b"{a=", b"a.", b"[[a]]", b"'''", b"\\u0000")))


# Other files.


def _with_file(name: str, use: Callable[[Path], object]) -> Callable[[bytes], None]:
    """What reads a file, as a function of its bytes."""

    def parse(data: bytes) -> None:
        path = Path(name)
        path.write_bytes(data)
        use(path)

    return parse


def topology_world(_seed: int) -> Parser:
    folder = Path(topology.__file__).with_name("topologies")
    texts = [path.read_bytes() for path in sorted(folder.glob("*.toml"))]
    return Parser(_with_file("topology.toml", topology.load), OSError, Mutator(texts, (b"[[node]]", b"cpus", b"[[1]]")))


_EVENTS = b"""\
          <idle>-0     [001] ..s1.  1093.107462: mm_page_free: page=00000000b1d0ae6a pfn=0x1d5f2 order=0
 kworker/0:1-8 [000] 5.000001: kmem:mm_page_alloc: page=0x1 pfn=1024 order=3 migratetype=1 gfp_flags=GFP_USER|0x40
  cat 77 [003]  1.250000000:  kmem:mm_page_alloc: page=(nil) pfn=0x0 order=9 migratetype=0 gfp_flags=GFP_ATOMIC
 a-1 [000] 2.000001: mm_page_alloc_extfrag: page=1 pfn=0x400 alloc_order=0 fallback_order=5 pageblock_order=9 \
alloc_migratetype=0 fallback_migratetype=1 fragmenting=1 change_ownership=0
 k-2 [001] 3.000002: mm_compaction_migratepages: nr_migrated=31 nr_failed=1
CPU:2 [LOST 22 EVENTS]
CPU 1: 5 EVENTS DROPPED
# tracer: nop
"""


def _events(path: Path) -> None:
    for batch in TraceReader(path).batches():
        assert len(batch)


def trace_world(_seed: int) -> Parser:
    texts = [_EVENTS, *(line + b"\n" for line in _EVENTS.splitlines())]
    words = sorted(set(re.findall(rb"\w+=?", _EVENTS)))
    return Parser(_with_file("trace", _events), UserError, Mutator(texts, words))


def decisions_world(_seed: int) -> Parser:
    """The decision log of a scheduler at work."""
    log = DecisionLog(4)
    scheduler = Scheduler(log)
    texts = []
    for now in range(0, 20, 4):
        scheduler.set_total(1000, 500, now)
        scheduler.set_level(1, 700, 100, 5, now)
        scheduler.set_client("c1", now, reservation=100, limit=900, burst=10, share=3, level=1)
        requests = [scheduler.submit(f"c{number}", Cause.SWAP, 64, now + 1) for number in range(3)]
        scheduler.grant(now + 2)
        scheduler.cancel(requests[-1], now + 2)
        scheduler.owe("c0", Cause.ACCESS, 4096, now + 3)
        scheduler.tick(now + 3)
        texts.append(log.text().encode())
    words = b"total policy level client gone submit cancel owe tick grant R W swap access".split()
    return Parser(lambda data: replay(data.decode("latin-1")), ValueError, Mutator(texts, words))


def rmm_world(_seed: int) -> Parser:
    text = b"Thread,Time,Action,Pointer,Size,Stream\n" + b"".join(
        b"1,10:0%d:00:000001,%s,0x%d,%d,0\n" % (at % 10, [b"allocate", b"free"][at % 2], at // 2, 4096)
        for at in range(8)
    )
    use = lambda data: usage.use_of_rmm_log(data.decode("latin-1"), 100)  # noqa: E731
    return Parser(use, ValueError, Mutator([text], (b"allocate", b"free", b"allocate failure", b"23:59:59:999999")))


def properties_world(_seed: int) -> Parser:
    chip = rank_chip(load_profile("upmem-v1a"))
    texts = [b"chipId=68,clockDivision=4", b"mramSize=1024, regionMode=safe", b"backend=simulator,disabledMask=0xff"]
    use = lambda data: load_properties(data.decode("latin-1"), {}).chip(chip)  # noqa: E731
    return Parser(use, DpuError, Mutator(texts, re.findall(rb"\w+", b" ".join(texts))))


# Units: the first letter says whose.


def _text(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    """What a store gets of a write, see kinds.Text."""
    return lambda data: parse(data.partition(b"\0")[0].decode("utf-8", "surrogateescape"))


_SAMPLE = Task(7, lambda: "kcompactd0")


def _filter(text: str) -> None:
    """For the event that the first word names; then asked of a record of it."""
    name, _, source = text.partition(" ")
    event = next((event for event in EVENTS if event.name == name), EVENTS[0])
    predicate = compile_filter(event, source, nr_cpus=4)
    predicate(tuple("x" if field.is_string else 1 for field in event.fields), _SAMPLE)


def _debug(text: str) -> None:
    debug = DynamicDebug()
    debug.sites = {"a %d\n": Site("mm/compaction.c", 12, "compaction", "compact_zone", "a %d\n")}
    debug.command(text)
    debug.sites["a %d\n"].line()


def _functions(text: str) -> None:
    FunctionSet({"compact_zone": [], "dpu_compact_execute": []}).change(text.split())


_FILTERS = (
    *(f"{event.name} {event.fields[0].name} == 1 && cpu < 3 || !(common_pid & 1)" for event in EVENTS[:6]),
    'mm_page_alloc comm ~ "k*"',
)
_INJECTIONS = (
    *injector.KINDS,
    "bit gpu=0 bit=3 nr=2 seed=1",
    "--inject --gpuid 0 -f 230 -v 79",
    "bit location=host va=0x10",
)
_QUERIES = ("file compaction.c line 1-20 +pf", 'format "a %d" -p; func compact_* =_', "module x class y +p")
_UNITS: dict[str, tuple[Callable[[bytes], object], tuple[str, ...]]] = {
    "a": (_text(lambda text: parse_amount(text, flags=("runs",))), ("50 seed=7 runs", "100")),
    "g": (_text(parse_gfp), ("GFP_KERNEL|__GFP_COMP", "none", "0x40")),
    "p": (_text(parse_pids), ("1 2 3",)),
    "k": (lambda data: parse_priority(data[:LOG_LINE_MAX], 4), ("<6>text", "<165>x")),
    "r": (_text(parse_permissions), ("rw-", "---")),
    "i": (_text(lambda text: injector.parse(text, ("gpu0", "host"))), _INJECTIONS),
    "s": (_text(_parse_seconds), ("auto", "1.5", "1e3")),
    "m": (_text(parse_address), ("unix:/run/x", "tcp:127.0.0.1:80")),
    "l": (_text(topology.parse_list), ("0-3,8", "")),
    "z": (_text(parse_size), ("512M", "1T")),
    "f": (_text(_filter), _FILTERS),
    "d": (_text(_debug), _QUERIES),
    "t": (_text(_functions), ("dpu_*", "!compact_zone", ":mod:dpu_compact")),
    "e": (_text(find_events), ("kmem:mm_page_alloc", "compaction:", "*:*")),
    "I": (lambda data: Int(-5, 1000).parse(data, Flavour.SYSCTL), ("1", "-3\n", "0x10 7")),
    "J": (lambda data: Int(0, 2**64).parse(data, Flavour.DEBUGFS), ("1", "+3\n", "0x10")),
    "S": (lambda data: Size().parse(data, Flavour.CONFIGFS), ("1G", "4096\n")),
    "V": (lambda data: IntVector(4).parse(data, Flavour.SYSCTL), ("1 2 3 4", "1\t2")),
    "W": (lambda data: StrictVector(4).parse(data, Flavour.SYSCTL), ("1 2 3 4", "1\t2 x")),
}


def _unit(data: bytes) -> None:
    use, _ = _UNITS.get(chr(data[0]) if data else "a", _UNITS["a"])
    use(data[1:])


def _examples() -> Iterator[bytes]:
    for letter, (_, texts) in _UNITS.items():
        yield from (letter.encode() + text.encode() for text in texts)


def units_world(_seed: int) -> Parser:
    refusals: Any = (OSError, ValueError)
    words = sorted({word for text in _examples() for word in re.findall(rb"\w+", text[1:])})
    return Parser(_only_documented, refusals, Mutator(list(_examples()), words))


def _only_documented(data: bytes) -> None:
    """ValueError is for what says so: parse_list and parse_size."""
    try:
        _unit(data)
    except ValueError as error:
        if data[:1] not in (b"l", b"z"):
            raise RuntimeError(f"ValueError: {error}") from error
        raise
