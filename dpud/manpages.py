# SPDX-License-Identifier: GPL-2.0-only
"""The manual pages, made from the declarations: commands and options, every file of the tree, every key of the
configuration file. `python -m dpud.docs` writes them to docs/man.

A file's entry says what docs/abi.md says. The tree is cut by areas: a page each for the trees that a kernel keeps
apart, and only for those that the machine has.
"""

from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

import msgspec
import rich_click as click

from dpud import __version__, config, config_keys
from dpud.abidoc import generic_files, split
from dpud.cli import cli
from dpud.roff import page, paragraphs, prose, section, subsection, tagged, title, verbatim
from kernelsim.attr import Attr, Registry
from kernelsim.stub import Stub

DATE = "2026-11-29"
"""Of this version of the pages; changed by hand."""
SOURCE, MANUAL = f"dpud {__version__}", "dpud manual"

AREAS: Mapping[str, tuple[str, str, tuple[str, ...]]] = {
    "dpud-proc": ("files below /proc, and /dev/kmsg", "proc(5)", ("/proc", "/dev")),
    "dpud-debugfs": ("files below /sys/kernel/debug", "debugfs", ("/sys/kernel/debug",)),
    "dpud-tracefs": ("files below /sys/kernel/tracing", "tracefs", ("/sys/kernel/tracing",)),
    "dpud-configfs": ("emulated processes and allocations, by mkdir", "configfs", ("/sys/kernel/config",)),
    "dpud-sysfs": ("files below /sys", "sysfs(5)", ("/sys",)),
}
"""Page -> (what it describes, what it is like, path prefixes). The first page that fits a path has it."""


def pages(registry: Registry) -> dict[str, str]:
    """File name -> text of every page. `registry`: a machine's that has one directory of every kind."""
    by_area: dict[str, dict[str, Attr[Any]]] = {}
    for path, attr in generic_files(registry).items():
        by_area.setdefault(_area(path), {})[path] = attr
    made = {f"{name}.5": _area_page(name, files) for name, files in by_area.items()}
    return {"dpud.1": _command_page(sorted(by_area)), "dpud-config.5": _config_page(), **made}


def _area(path: str) -> str:
    """A tree that AREAS does not know gets a page by its first folder."""
    for name, (_, _, prefixes) in AREAS.items():
        if any(path.startswith(f"{prefix}/") for prefix in prefixes):
            return name
    return f"dpud-{path.split('/')[1]}"


def _head(name: str, number: int, what: str) -> Iterator[str]:
    yield '.\\" Made by `make docs`. Do not edit.'
    yield title(name, number, DATE, SOURCE, MANUAL)
    yield section("name")
    yield f"{name.replace('-', chr(92) + '-')} \\- {what}"


def _see_also(*names: str) -> Iterator[str]:
    yield section("see also")
    ordered = sorted(names, key=lambda name: (name.partition("(")[2], name))
    marked = (name.partition("(") for name in ordered)
    lines = [f".BR {name.replace('-', chr(92) + '-')} ({rest}" for name, _, rest in marked]
    yield " ,\n".join(lines)


# Files.


def _area_page(name: str, files: Mapping[str, Attr[Any]]) -> str:
    return page(_area_lines(name, files))


def _area_lines(name: str, files: Mapping[str, Attr[Any]]) -> Iterator[str]:
    folder = f"/{name.removeprefix('dpud-')}"
    what, like, _ = AREAS.get(name, (f"files below {folder}", folder, ()))
    yield from _head(name, 5, f"{what}, as dpud emulates them")
    yield section("description")
    yield prose(f"What is in the emulated tree of {like}.")
    yield prose(
        "Paths are below the mount point of `dpud run`, or as they stand under `dpud exec` and `dpud shell`. In a "
        "path, `*` is a number, `NAME` was given to mkdir, and other words in capitals stand for one of several names."
    )
    yield ".PP"
    yield prose(
        "A mode of 0200 cannot be read, not even by root. A value outside its range, or a text that is none, is "
        "refused with EINVAL and changes nothing."
    )
    yield section("files")
    for directory, paths in groupby(sorted(files, key=split), key=lambda path: split(path)[0]):
        yield subsection(directory)
        for path in paths:
            yield from _file(split(path)[1], files[path])
    yield from _see_also("dpud(1)", *(f"{other}(5)" for other in ("dpud-config",)))


def _file(name: str, attr: Attr[Any]) -> Iterator[str]:
    facts = [f"mode 0{attr.mode:03o}"]
    if not isinstance(attr, Stub):
        facts.append(f"values: {attr.kind.describe()}")
    if attr.default is not None:
        facts.append(f"default: {attr.default}")
    facts.append(f"since {attr.since}")
    yield from tagged(name, (prose(attr.doc), ".br", prose(f"({'; '.join(facts)})")))


# Commands.


def commands() -> Iterator[tuple[str, click.Command]]:
    """Those that are shown, by name."""
    for name in sorted(cli.commands):
        command = cli.commands[name]
        if not command.hidden:
            yield name, command


def _command_page(areas: list[str]) -> str:
    return page(_command_lines(areas))


def _command_lines(areas: list[str]) -> Iterator[str]:
    yield from _head("dpud", 1, "an emulated Linux memory\\-management side and a DPU that compacts it")
    yield section("synopsis")
    for number, (name, command) in enumerate(commands()):
        if number:
            yield ".br"
        yield f"\\fBdpud {name}\\fR {prose(usage(command))}".rstrip()
    yield section("description")
    yield from paragraphs(cli.help or "")
    yield section("commands")
    for name, command in commands():
        yield subsection(f"dpud {name}")
        yield from paragraphs((command.help or "").replace("\b\n", ""))
        for option in command.params:
            if isinstance(option, click.Option) and not option.hidden:
                yield from _option(option)
    yield section("exit status")
    yield from tagged("0", ["What was asked for was done."])
    yield from tagged("2", [prose("What was asked for is wrong or cannot be done here; one line on stderr says why.")])
    yield prose(
        "`exec`, `shell` and `record` exit as their command does: 127 if it is not found, 128 + N after signal N."
    )
    yield section("environment")
    yield from tagged("DPUD_MOUNT", [prose("Under `dpud exec`, where the bare tree is mounted.")])
    yield from tagged("XDG_RUNTIME_DIR", [prose("Where a user who is not root has the mount point by default.")])
    yield section("files")
    yield from tagged("/run/dpud", ["The mount point of root by default."])
    yield from _see_also("dpud-config(5)", *(f"{name}(5)" for name in areas))


def usage(command: click.Command) -> str:
    """Options and arguments as a synopsis has them."""
    has_options = any(isinstance(param, click.Option) and not param.hidden for param in command.params)
    arguments = [
        param.make_metavar(click.Context(command)) for param in command.params if isinstance(param, click.Argument)
    ]
    return " ".join([*(["[OPTIONS]"] if has_options else []), *arguments])


def _option(option: click.Option) -> Iterator[str]:
    record = option.get_help_record(click.Context(click.Command("dpud")))
    names, text = record if record else (", ".join(option.opts), option.help or "")
    yield from tagged(names, [prose(text) if text.strip() else "\\&"])


# The configuration file.


def _config_page() -> str:
    return page(_config_lines())


def _config_lines() -> Iterator[str]:
    yield from _head("dpud-config", 5, "the configuration file of dpud")
    yield section("description")
    yield prose(
        "The file that `dpud run --config` takes is TOML. Whatever is left out has its default; an unknown key, a "
        "value out of range or an impossible machine is refused with one line that names file, line and key."
    )
    yield ".PP"
    yield prose("A size is a number of bytes, or a text with a suffix K, M, G or T.")
    yield section("keys")
    yield from _table("", config.Config)
    yield section("example")
    yield from verbatim(_example())
    yield from _see_also("dpud(1)")


def _table(prefix: str, struct: type[msgspec.Struct]) -> Iterator[str]:
    """The keys of one table, then those of the tables in it."""
    below: list[tuple[str, type[msgspec.Struct]]] = []
    for key in config_keys.keys(struct):
        if key.table is not None:
            below.append((f"[{prefix}{key.name}]" if not key.repeated else f"[[{prefix}{key.name}]]", key.table))
        if key.table is None or key.repeated:
            shown = "" if key.table else _shown(key.default)
            facts = "; ".join([*([key.values] if key.values else []), *([f"default: {shown}"] if shown else [])])
            yield from tagged(key.name, (prose(key.about), *([".br", prose(f"({facts})")] if facts else [])))
    for heading, inner in below:
        yield subsection(heading)
        yield from _table(heading.strip("[]") + ".", inner)


def _shown(default: Any) -> str:
    if isinstance(default, config.Size):
        return f'"{default}"' if default else "0"
    if isinstance(default, bool):
        return str(default).lower()
    return "" if default in (None, (), {}) else f'"{default}"' if isinstance(default, str) else str(default)


def _example() -> str:
    """The one in the module that reads it."""
    text = (config.__doc__ or "").partition("out.\n\n")[2].partition("\n\nWhatever")[0]
    return "\n".join(line.removeprefix("    ") for line in text.split("\n"))
