# SPDX-License-Identifier: GPL-2.0-only
"""The page of `dpud report`: HTML, CSS and SVG in one file, no script. Bars are table cells, so they print.

Each figure has its unit, and a word for where it comes from: counted (by the emulated kernel), modelled (by an engine's
profile) or measured (the clock of the machine that ran this).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from html import escape
from itertools import groupby
from operator import attrgetter

from dpud import __version__, report_map
from dpud.report import COMPARED, EngineRow, Facts, Moment
from dpud.status_files import PAGE_SIZE, Bucket
from dpud.status_gpu import Gpu, binary

_HUGE_ORDER = 9
_MANY = 6
"""Columns; a table of more drops its bars on a narrow screen."""
_MIB_PER_PAGE = PAGE_SIZE / (1 << 20)
_SHOWN = {
    ("latency", "modelled"): ("A region, from isolation to remapping", "modelled"),
    ("latency", "wall"): ("A region, from isolation to remapping", "measured"),
    ("unavailable", "modelled"): ("A page, from being unmapped to being mapped again", "modelled"),
    ("unavailable", "wall"): ("A page, from being unmapped to being mapped again", "measured"),
    ("batch_size", "pages"): ("Pages of a batch", "counted"),
}
CSS = """
:root{--ink:#1b2530;--dim:#5b6875;--line:#d6dde4;--bar:#3a6ea5;--was:#a9b8c7}
*{box-sizing:border-box}
body{font:15px/1.5 system-ui,sans-serif;color:var(--ink);max-width:60rem;margin:0 auto;padding:1.2rem;background:#fff}
h1{font-size:1.6rem;margin:0 0 .3rem}h2{font-size:1.2rem;margin:2rem 0 .4rem;border-bottom:1px solid var(--line)}
h3{font-size:1rem;margin:1.1rem 0 .3rem}p{margin:.4rem 0}.dim{color:var(--dim)}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th,td{padding:.15rem .5rem;text-align:right;white-space:nowrap;border-bottom:1px solid var(--line)}
th{font-weight:600;color:var(--dim);white-space:normal;vertical-align:bottom}
th:first-child,td:first-child{text-align:left}
td.bar{width:45%;min-width:5rem;text-align:left;padding-right:0}
.bar span{display:block;height:.75em;min-width:1px;background:var(--bar);margin:1px 0}
.bar span.was{background:var(--was)}
.src{font-size:.75rem;border:1px solid var(--line);border-radius:3px;padding:0 .3em;color:var(--dim);font-weight:400}
.maps{display:grid;grid-template-columns:1fr 1fr;gap:0 1.5rem}.maps.one{grid-template-columns:1fr}
svg.map{display:block;width:100%;height:auto}
.key{display:inline-block;width:.8em;height:.8em;margin:0 .3em 0 .6em;border:1px solid var(--line)}
@media(max-width:40rem){.maps{grid-template-columns:1fr}body{padding:.7rem}
th,td{padding:.15rem .25rem;font-size:13px}td.bar{min-width:2.5rem}
td:first-child{white-space:normal}.many .bar{display:none}}
@media print{body{max-width:none;padding:0;font-size:10pt}h2,h3{break-after:avoid}tr,svg,.block{break-inside:avoid}
.scroll{overflow:visible}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}}
"""


def page(facts: Facts) -> str:
    """The whole file."""
    parts = [
        _summary(facts),
        _maps(facts),
        _contiguity(facts),
        _latency(facts),
        _engines(facts.engines),
        _gpus(facts.gpus),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>dpud report</title><style>{CSS}</style></head><body>\n" + "\n".join(parts) + "\n</body></html>\n"
    )


def source(name: str) -> str:
    return f'<span class="src">{name}</span>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Cells are HTML; those that begin with <td are taken as they are."""
    top = "".join(f"<th>{cell}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(cell if cell.startswith("<td") else f"<td>{cell}</td>" for cell in row) + "</tr>"
        for row in rows
    )
    many = " class=many" if len(head) > _MANY else ""
    return f'<div class="scroll"><table{many}><thead><tr>{top}</tr></thead><tbody>{body}</tbody></table></div>'


def bar(*shares: float) -> str:
    """One bar, or what was above what is."""
    spans = [
        f'<span{" class=was" if len(shares) > at + 1 else ""} style="width:{100 * share:.1f}%"></span>'
        for at, share in enumerate(shares)
        if share > 0
    ]
    return f'<td class="bar">{"".join(spans)}</td>'


def _free_mib(moment: Moment, from_order: int = 0) -> float:
    return sum(sum(zone.pages_by_order[from_order:]) for zone in moment.zones) * _MIB_PER_PAGE


def _summary(facts: Facts) -> str:
    stats = facts.stats
    made = f"dpud {__version__}, {facts.at:%Y-%m-%d %H:%M %Z}"
    rows = [("free memory", *_both(facts, lambda moment: f"{_free_mib(moment):,.0f} MiB"), source("counted"))]
    huge = _both(facts, lambda moment: f"{_free_mib(moment, _HUGE_ORDER):,.0f} MiB")
    rows.append(("of it in blocks of 2 MiB or more", *huge, source("counted")))
    text = f"<h1>dpud report</h1><p>{escape(facts.what)}; engine {escape(facts.engine or 'none')}.</p>"
    text += f"<p class=dim>{made}</p>"
    text += table(["", *(["before"] if facts.before else []), "after" if facts.before else "now", ""], rows)
    if facts.took_s is not None:
        text += f"<p>The compaction was over after {facts.took_s:.2f} s {source('measured')}.</p>"
    return text + (_totals(stats) if stats else "")


def _totals(stats: dict[str, int]) -> str:
    moved, failed = stats["pages_moved"] + stats["cpu_pages_moved"], stats["fallbacks"] + stats["failures"]
    return (
        f"<p>Since boot {moved:,} pages were moved in {stats['regions']:,} regions {source('counted')}: "
        f"{stats['modelled_ns'] / 1e6:,.1f} ms by the engine's model {source('modelled')}, "
        f"{stats['wall_ns'] / 1e6:,.1f} ms here {source('measured')}. "
        f"{stats['skipped_pinned']:,} pinned pages were left "
        f"where they are; {failed:,} batches failed or fell back.</p>"
    )


def _both(facts: Facts, show: Callable[[Moment], str]) -> list[str]:
    return [show(moment) for moment in (facts.before, facts.after) if moment is not None]


def _maps(facts: Facts) -> str:
    text = "<h2>Pageblocks</h2>"
    if facts.after.maps is None:
        return text + "<p>/proc/kpageflags may be read only by the user who runs the daemon: no map.</p>"
    text += f"<p class=dim>{report_map.legend()}; the stronger, the more is in use. {source('counted')}</p>"
    for zone, now in facts.after.maps.items():
        each = report_map.blocks_per_square(len(now)) * 2
        title = f"Node {zone[0]}, zone {escape(zone[1])}"
        moments = [("before", facts.before), ("after", facts.after)] if facts.before else [("now", facts.after)]
        pictures = [
            f"<div><p class=dim>{when}</p>{report_map.svg(moment.maps[zone], f'{title} {when}')}</div>"
            for when, moment in moments
            if moment is not None and moment.maps is not None
        ]
        one = " one" if len(pictures) == 1 else ""
        text += f"<div class=block><h3>{title}, {len(now) * 2:,} MiB; a square is {each} MiB</h3>"
        text += f'<div class="maps{one}">{"".join(pictures)}</div></div>'
    return text


def _contiguity(facts: Facts) -> str:
    """Free memory by order, and the unusable index, summed over zones."""
    moments = [moment for moment in (facts.before, facts.after) if moment is not None]
    by_order = [
        [sum(pages) * _MIB_PER_PAGE for pages in zip(*(z.pages_by_order for z in m.zones), strict=True)]
        for m in moments
    ]
    most = max(max(sizes) for sizes in by_order) or 1.0
    rows = []
    for order in range(len(by_order[0])):
        sizes = [sizes[order] for sizes in by_order]
        indexes = [_unusable(moment, order) for moment in moments]
        rows.append(
            (
                f"{order}",
                binary(PAGE_SIZE << order),
                *(f"{size:,.1f}" for size in sizes),
                *indexes,
                bar(*(size / most for size in sizes)),
            )
        )
    when = ["before", "after"] if facts.before else ["now"]
    head = ["order", "block", *(f"free, MiB, {name}" for name in when), *(f"unusable, {name}" for name in when), ""]
    return (
        f"<div class=block><h2>Contiguity {source('counted')}</h2><p class=dim>Unusable: share of all free "
        "memory in blocks too small for the order, 0 to 1 (the kernel's unusable index, over all zones).</p>"
        + table(head, rows)
        + "</div>"
    )


def _unusable(moment: Moment, order: int) -> str:
    """The formula of mm/vmstat.c unusable_free_index(), over all zones."""
    total = sum(zone.free_pages for zone in moment.zones)
    suitable = sum(sum(zone.pages_by_order[order:]) for zone in moment.zones)
    return f"{(total - suitable) / total:.3f}" if total else "-"


def _latency(facts: Facts) -> str:
    text = "<h2>Latency</h2>"
    shown = [bucket for bucket in facts.histograms if (bucket.of, bucket.what) in _SHOWN]
    if not shown:
        return text + "<p>Nothing was compacted yet, or debugfs may not be read.</p>"
    for (engine, of, what), group in groupby(shown, key=attrgetter("engine", "of", "what")):
        title, where = _SHOWN[of, what]
        text += f"<div class=block><h3>{title}, {escape(engine)} {source(where)}</h3>"
        text += table(["from", "to", "count", ""], _bucket_rows(list(group), what == "pages")) + "</div>"
    return text


def _bucket_rows(buckets: list[Bucket], are_pages: bool) -> Iterator[Sequence[str]]:
    show = (lambda value: f"{value:,}&nbsp;pages") if are_pages else duration
    most = max(bucket.count for bucket in buckets) or 1
    for bucket in buckets:
        yield show(bucket.low), show(bucket.high), f"{bucket.count:,}", bar(bucket.count / most)


def duration(ns: float) -> str:
    """With the unit that fits."""
    for unit, factor in (("s", 1e9), ("ms", 1e6), ("µs", 1e3)):
        if ns >= factor:
            return f"{ns / factor:.3g} {unit}"
    return f"{ns:.0f} ns"


def _engines(rows: list[EngineRow]) -> str:
    longest = max((row.total_ns for row in rows), default=1) or 1
    body = [
        (
            f"{escape(row.name)} {source(row.source)}",
            f"{row.pages_moved:,}",
            duration(row.total_ns),
            duration(row.region_p50_ns),
            duration(row.region_max_ns),
            duration(row.unavailable_p50_ns),
            bar(row.total_ns / longest),
        )
        for row in rows
    ]
    head = ["engine", "pages", "time in all", "region, median", "longest", "page away, median", ""]
    about = (
        f"<p class=dim>The same {COMPARED.replace('M', ' MiB')} of a machine of 1 GiB, half of it freed at random, "
        "compacted by each engine; not the memory above. Profiles: debugfs dpu_compact/profile.</p>"
    )
    return f"<div class=block><h2>Engines</h2>{about}{table(head, body)}</div>"


def _gpus(devices: list[Gpu]) -> str:
    return "".join(_gpu(gpu) for gpu in devices) or "<h2>GPU memory</h2><p>This machine has no GPU.</p>"


def _gpu(gpu: Gpu) -> str:
    tiers = [
        (
            tier.name,
            binary(tier.used_bytes),
            binary(tier.size_bytes) if tier.size_bytes else "no limit",
            bar(min(tier.used_bytes / tier.size_bytes, 1) if tier.size_bytes else 0),
        )
        for tier in gpu.tiers
    ]
    clients = [
        (
            escape(each.name),
            str(each.priority),
            *map(binary, (each.granted_bytes, each.used_bytes, each.resident_bytes)),
        )
        for each in gpu.clients
    ]
    moved = [(escape(client), escape(cause), binary(size)) for (client, cause), size in sorted(gpu.traffic.items())]
    counters = [
        (f"{module}: {name.replace('_', ' ')}", f"{value:,}")
        for module, values in gpu.modules.items()
        for name, value in values.items()
        if value
    ]
    text = f"<h2>GPU memory: {escape(gpu.name)} {source('counted')}</h2>"
    text += table(["where pages are", "used", "of", ""], tiers)
    if gpu.pool_raw_bytes:
        ratio = gpu.pool_raw_bytes / gpu.pool_stored_bytes
        raw, stored = binary(gpu.pool_raw_bytes), binary(gpu.pool_stored_bytes)
        text += f"<p>The pool holds {raw} of pages in {stored}: {ratio:.2f} to 1.</p>"
    for title, head, rows in (
        ("Clients", ["client", "priority", "granted", "used", "resident"], clients),
        ("Traffic", ["client", "cause", "bytes"], moved),
        ("Modules (counters that are not 0)", ["counter", "count"], counters),
    ):
        text += f"<div class=block><h3>{title}</h3>{table(head, rows)}</div>" if rows else ""
    return text
