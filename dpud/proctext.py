# SPDX-License-Identifier: GPL-2.0-only
"""Parsers of the kernel's own text: /proc/zoneinfo, buddyinfo, pagetypeinfo and maps.

They take a whole text and give plain values, or raise CaptureError with one line that names file and fault. A
line is only believed if it has the shape that the kernel prints (`reference/kernel-abi.md` 1.4; mm/vmstat.c).
"""

import itertools
import re
from collections.abc import Container, Iterator
from typing import NoReturn

from kernelsim.hostblocks import HostPageset
from kernelsim.hostimage import VM_EXEC, VM_GROWSDOWN, VM_READ, VM_SHARED, VM_WRITE, HostZone
from kernelsim.mmzone import (
    MIGRATE_MOVABLE,
    NR_PAGE_ORDERS,
    migratetype_names,
    pageblock_nr_pages,
    pageblock_order,
    zone_names,
)

MAX_PFN = 1 << 30
"""4 TiB: the largest machine taken as input, so that a garbled number cannot ask for endless memory."""
TASK_SIZE_VPN = 1 << 35
"""x86-64 user addresses end at 2^47, so vsyscall is none.
"""

ZoneKey = tuple[int, str]
Values = dict[str, int]

_ZONE = re.compile(r"Node\s+(\d{1,4}), zone\s+(\w+)(.*)")
_LABEL = re.compile(r"\s+(?:pages )?(free|min|low|high|promo|spanned|present|managed|start_pfn:)\s+(\d{1,18})")
_PAGESET = re.compile(r"\s+(cpu|count|high|high_min|high_max|batch):\s+(\d{1,9})")
_TYPE = re.compile(r", type\s+(\w+)\s+(.*)")
_VMA = re.compile(r"([0-9a-f]{1,16})-([0-9a-f]{1,16}) ([r-])([w-])([x-])([sp]) [0-9a-f]+ \S+ \d+ *(.*)")

# migratetype_names as pagetypeinfo spells them. CMA areas hold movable pages only, and the emulation has no
# such type.
_TYPE_INDEX = {name: index for index, name in enumerate(migratetype_names)} | {"CMA": MIGRATE_MOVABLE}


class CaptureError(Exception):
    """A capture, or this host, cannot be used as input. The text is one line for the user."""


def parse_zones(zoneinfo: str, buddyinfo: str, pagetypeinfo: str) -> tuple[HostZone, ...]:
    """The populated zones by start_pfn, checked to be disjoint, from the three texts together."""
    nr_free = parse_buddyinfo(buddyinfo)
    free_by_type, blocks = parse_pagetypeinfo(pagetypeinfo, nr_free)
    pagesets = parse_pagesets(zoneinfo)
    zones = []
    for key, values in parse_zoneinfo(zoneinfo).items():
        for name, rows in (("buddyinfo", nr_free), ("pagetypeinfo", blocks), ("pagetypeinfo", free_by_type)):
            if key not in rows:
                _fail(name, f"no line for zone {key[1]} of node {key[0]}, which zoneinfo has")
        zones.append(_zone(key, values, pagesets.get(key, ()), nr_free[key], blocks[key], free_by_type[key]))
    zones.sort(key=lambda zone: zone.start_pfn)
    for below, above in itertools.pairwise(zones):
        if below.end_pfn > above.start_pfn:
            _fail("zoneinfo", f"{below.label} and {above.label} overlap at pfn {above.start_pfn}")
    if not zones:
        _fail("zoneinfo", "no zone with memory")
    return tuple(zones)


def parse_zoneinfo(text: str) -> dict[ZoneKey, Values]:
    """For each zone with memory: min, low, high, promo (6.x only), spanned, present, managed, start_pfn."""
    zones: dict[ZoneKey, Values] = {}
    values: Values = {}
    for line in text.splitlines():
        if head := _ZONE.fullmatch(line):
            values = {}
            zones[_new_key(head, zones, "zoneinfo")] = values
        elif label := _LABEL.fullmatch(line):
            values[label[1].rstrip(":")] = int(label[2])  # a pageset has `high:`, which is none of these
    for (node, name), values in zones.items():
        for needed in ("present", "spanned", "managed", "min", "low", "high"):
            if needed not in values:
                _fail("zoneinfo", f"zone {name} of node {node} has no `{needed}`")
    return {key: values for key, values in zones.items() if values["present"]}


def parse_pagesets(text: str) -> dict[ZoneKey, tuple[HostPageset, ...]]:
    """The per-CPU page lists of each zone that has any, from zoneinfo."""
    found: dict[ZoneKey, list[Values]] = {}
    here: list[Values] = []
    for line in text.splitlines():
        if head := _ZONE.fullmatch(line):
            here = found.setdefault((int(head[1]), head[2]), [])
        elif label := _PAGESET.fullmatch(line):
            if label[1] == "cpu":
                here.append({})
            elif here:
                here[-1][label[1]] = int(label[2])
    return {key: tuple(_pageset(key, values) for values in sets) for key, sets in found.items()}


def _pageset(key: ZoneKey, values: Values) -> HostPageset:
    for needed in ("count", "high", "batch"):
        if needed not in values:
            _fail("zoneinfo", f"zone {key[1]} of node {key[0]}: a pageset has no `{needed}`")
    high = values["high"]
    limits = values.get("high_min", high), values.get("high_max", high)
    return HostPageset(values["count"], high, *limits, values["batch"])


def parse_buddyinfo(text: str) -> dict[ZoneKey, tuple[int, ...]]:
    """Free blocks by order of each zone."""
    rows: dict[ZoneKey, tuple[int, ...]] = {}
    for line in text.splitlines():
        head = _ZONE.fullmatch(line)
        if not head:
            _fail("buddyinfo", f"not a zone's line: {line[:60]!r}")
        rows[_new_key(head, rows, "buddyinfo")] = _numbers(head[3], NR_PAGE_ORDERS, "buddyinfo")
    return rows


def parse_pagetypeinfo(
    text: str, nr_free: dict[ZoneKey, tuple[int, ...]]
) -> tuple[dict[ZoneKey, tuple[tuple[int, ...], ...]], dict[ZoneKey, tuple[int, ...]]]:
    """Per zone: free blocks [migratetype][order], and pageblocks [migratetype]. A count the kernel cut off at
    100000 (`>100000`) becomes what buddyinfo's `nr_free` leaves for it."""
    order = re.search(r"^Page block order: +(\d{1,4})$", text, re.MULTILINE)
    if not order:
        _fail("pagetypeinfo", "no `Page block order`")
    if int(order[1]) != pageblock_order:
        _fail("pagetypeinfo", f"page block order {order[1]}; only {pageblock_order} (x86) can be emulated")
    free: dict[ZoneKey, list[list[int]]] = {}
    capped: list[tuple[ZoneKey, int, int]] = []
    blocks: dict[ZoneKey, tuple[int, ...]] = {}
    columns: list[str] = []
    for line in text.splitlines():
        if line.startswith("Number of blocks type"):
            columns = line.split()[4:]
        elif head := _ZONE.fullmatch(line):
            key = int(head[1]), head[2]
            if row := _TYPE.fullmatch(head[3]):
                table = free.setdefault(key, [[0] * NR_PAGE_ORDERS for _ in migratetype_names])
                index = _type_index(row[1])
                numbers = _numbers(row[2].replace(">", ""), NR_PAGE_ORDERS, "pagetypeinfo")
                table[index] = [a + b for a, b in zip(table[index], numbers, strict=True)]
                capped += [(key, index, o) for o, word in enumerate(row[2].split()) if word.startswith(">")]
            else:
                blocks[key] = _blocks_by_type(columns, head[3])
    for key, index, o in capped:
        others = sum(row[o] for i, row in enumerate(free[key]) if i != index)
        free[key][index][o] = max(free[key][index][o], nr_free.get(key, (0,) * NR_PAGE_ORDERS)[o] - others)
    return {key: tuple(map(tuple, table)) for key, table in free.items()}, blocks


def parse_maps(lines: list[str], where: str) -> tuple[tuple[int, int, int], ...]:
    """(start_vpn, end_vpn, VM_* flags) of the user VMAs in lines of /proc/PID/maps."""
    return tuple(_vmas(lines, where))


def _vmas(lines: list[str], where: str) -> Iterator[tuple[int, int, int]]:
    previous = 0
    for line in lines:
        vma = _VMA.fullmatch(line)
        if not vma:
            _fail(where, f"not a line of maps: {line[:60]!r}")
        start, end = int(vma[1], 16) >> 12, int(vma[2], 16) >> 12
        if start >= TASK_SIZE_VPN:
            continue
        if not previous <= start < end <= TASK_SIZE_VPN:
            _fail(where, f"VMAs out of order: {line[:60]!r}")
        previous = end
        flags = VM_READ * (vma[3] == "r") | VM_WRITE * (vma[4] == "w") | VM_EXEC * (vma[5] == "x")
        yield start, end, flags | VM_SHARED * (vma[6] == "s") | VM_GROWSDOWN * (vma[7] == "[stack]")


def _zone(
    key: ZoneKey,
    values: Values,
    pagesets: tuple[HostPageset, ...],
    nr_free: tuple[int, ...],
    nr_blocks: tuple[int, ...],
    nr_free_by_type: tuple[tuple[int, ...], ...],
) -> HostZone:
    node, name = key
    if name not in zone_names:
        _fail("zoneinfo", f"zone {name} of node {node} has memory; only {', '.join(zone_names)} can be emulated")
    if "start_pfn" not in values:
        _fail("zoneinfo", f"zone {name} of node {node} has no `start_pfn`")
    start, spanned = values["start_pfn"], values["spanned"]
    if not values["managed"] <= values["present"] <= spanned or start + spanned > MAX_PFN:
        _fail("zoneinfo", f"zone {name} of node {node}: impossible size")
    if sum(nr_blocks) > spanned // pageblock_nr_pages + 2 or max(map(max, nr_free_by_type)) > spanned:
        _fail("pagetypeinfo", f"zone {name} of node {node}: more blocks than pages")
    return HostZone(
        node=node,
        name=name,
        start_pfn=start,
        spanned=spanned,
        present=values["present"],
        managed=values["managed"],
        min=values["min"],
        low=values["low"],
        high=values["high"],
        promo=values.get("promo", values["high"]),
        pagesets=pagesets,
        nr_free=nr_free,
        nr_blocks=nr_blocks,
        nr_free_by_type=nr_free_by_type,
    )


def _new_key(head: re.Match[str], seen: Container[ZoneKey], where: str) -> ZoneKey:
    key = int(head[1]), head[2]
    if key in seen:
        _fail(where, f"zone {key[1]} of node {key[0]} appears twice")
    return key


def _numbers(text: str, nr: int, where: str) -> tuple[int, ...]:
    words = text.split()
    if len(words) != nr or not all(re.fullmatch(r"[0-9]{1,15}", word) for word in words):
        _fail(where, f"not {nr} counts: {text.strip()[:60]!r}")
    return tuple(map(int, words))


def _blocks_by_type(columns: list[str], text: str) -> tuple[int, ...]:
    if not columns:
        _fail("pagetypeinfo", "pageblock counts without a heading")
    blocks = [0] * len(migratetype_names)
    for name, nr in zip(columns, _numbers(text, len(columns), "pagetypeinfo"), strict=True):
        blocks[_type_index(name)] += nr
    return tuple(blocks)


def _type_index(name: str) -> int:
    if name not in _TYPE_INDEX:
        _fail("pagetypeinfo", f"unknown migratetype {name!r}")
    return _TYPE_INDEX[name]


def _fail(where: str, fault: str) -> NoReturn:
    raise CaptureError(f"{where}: {fault}")
