# SPDX-License-Identifier: GPL-2.0-only
"""Completion for bash and zsh, made from the commands: plain shell scripts, so that a Tab starts no Python.

`python -m dpud.docs` writes them to completions/. What a word may be follows from its declaration: the names of a
choice; a file or a folder where the metavar says so; the demos and the benchmarks by name; any command behind `--`.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import rich_click as click

from dpud import bench, demo, scenario
from dpud.manpages import commands

_NAMES = {"demo": (*demo.SCENES, *demo.GPU_SCENES, demo.ALL), "bench": tuple(bench.BENCHMARKS)}
"""What the first arguments of a command may be, where they are names."""


@dataclass(frozen=True)
class Wanted:
    """What may stand for one word."""

    words: tuple[str, ...] = ()
    files: bool = False
    folders: bool = False
    command: bool = False
    """The first of the words of any command."""


def _wanted(command: str, param: click.Parameter) -> Wanted:
    metavar = param.metavar or ""
    places = set(re.findall(r"[A-Za-z]+", metavar))
    if "CMD" in places:
        return Wanted(command=True)
    words: tuple[str, ...] = ()
    if isinstance(param, click.Argument):
        words = _NAMES.get(command, ())
    if isinstance(param.type, click.Choice):
        words = tuple(map(str, param.type.choices))
    if "--scenario" in param.opts:
        words = tuple(scenario.names())
    if "host" in places:
        words = ("host",)
    files = bool(places & {"FILE", "TRACE"}) or isinstance(param.type, click.Path)
    return Wanted(words, files, "DIR" in places)


def _options(command: click.Command) -> list[click.Option]:
    return [param for param in command.params if isinstance(param, click.Option) and not param.hidden]


def _arguments(command: click.Command) -> list[click.Argument]:
    return [param for param in command.params if isinstance(param, click.Argument)]


def _first_line(text: str | None) -> str:
    return " ".join((text or "").strip().split("\n\n")[0].split())


# bash

_BASH_HEAD = """\
# Made by `make docs`. Do not edit.
# bash completion for dpud: source it, or put it into a folder that bash-completion reads.

_dpud_offer() {
    # kind words...: offer words, files (f), folders (d), both (b) or commands (c) that begin like the current word
    local kind=$1 reply
    shift
    case $kind in
        f | b) while IFS= read -r reply; do COMPREPLY+=("$reply"); done < <(compgen -f -- "$cur") ;;
        d) while IFS= read -r reply; do COMPREPLY+=("$reply"); done < <(compgen -d -- "$cur") ;;
        c) while IFS= read -r reply; do COMPREPLY+=("$reply"); done < <(compgen -c -- "$cur") ;;
    esac
    [[ $kind == [fbd] ]] && compopt -o filenames 2>/dev/null
    while IFS= read -r reply; do COMPREPLY+=("$reply"); done < <(compgen -W "$*" -- "$cur")
    return 0
}

_dpud() {
    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD - 1]} command='' i
    COMPREPLY=()
    for ((i = 1; i < COMP_CWORD; i++)); do
        if [[ -z $command && ${COMP_WORDS[i]} != -* ]]; then
            command=${COMP_WORDS[i]}
        elif [[ -n $command && ${COMP_WORDS[i]} == -- ]]; then
            if ((i == COMP_CWORD - 1)); then _dpud_offer c; else _dpud_offer f; fi
            return
        fi
    done
"""


def bash() -> str:
    """The script for bash."""
    return "\n".join(_bash_lines()) + "\n"


def _bash_lines() -> Iterator[str]:
    yield _BASH_HEAD.rstrip("\n")
    names = " ".join(name for name, _ in commands())
    yield "    if [[ -z $command ]]; then"
    yield f"        _dpud_offer w {names} --help --version"
    yield "        return"
    yield "    fi"
    yield "    case $command in"
    for name, command in commands():
        yield f"        {name})"
        yield from _bash_command(name, command)
        yield "            ;;"
    yield "    esac"
    yield "}"
    yield ""
    yield "complete -F _dpud dpud"


def _bash_command(name: str, command: click.Command) -> Iterator[str]:
    options = _options(command)
    valued = [option for option in options if not option.is_flag]
    if valued:
        yield "            case $prev in"
        for option in valued:
            yield f"                {' | '.join(option.opts)}) {_bash_offer(_wanted(name, option))}; return ;;"
        yield "            esac"
    flags = " ".join([*(word for option in options for word in option.opts), "--help"])
    yield "            if [[ $cur == -* ]]; then"
    yield f"                _dpud_offer w {flags}"
    yield "                return"
    yield "            fi"
    arguments = _arguments(command)
    if arguments:
        yield f"            {_bash_offer(_wanted(name, arguments[0]))}"
    else:
        yield f"            _dpud_offer w {flags}"


def _bash_offer(wanted: Wanted) -> str:
    kind = "b" if wanted.files else "d" if wanted.folders else "c" if wanted.command else "w"
    return " ".join(["_dpud_offer", kind, *wanted.words])


# zsh


_ZSH_COMMAND = """\
_dpud_command() {
    # any command and its arguments, with or without -- before it
    if [[ $words[1] == -- ]]; then
        shift words
        ((CURRENT--))
    fi
    _normal
}
"""


def zsh() -> str:
    """The function for zsh."""
    return "\n".join(_zsh_lines()) + "\n"


def _zsh_lines() -> Iterator[str]:
    yield "#compdef dpud"
    yield "# Made by `make docs`. Do not edit."
    yield "# zsh completion for dpud: put it into a folder of $fpath."
    yield ""
    yield from _ZSH_COMMAND.split("\n")
    yield "_dpud() {"
    yield "    local curcontext=$curcontext state line"
    yield "    typeset -A opt_args"
    yield "    _arguments -C '(- *)'{-h,--help}'[show help]' '(- *)--version[show the version]' \\"
    yield "        '1:command:->command' '*::argument:->argument'"
    yield "    case $state in"
    yield "        command)"
    yield "            local -a commands=("
    for name, command in commands():
        yield f"                {_quoted(f'{name}:{_first_line(command.help)}')}"
    yield "            )"
    yield "            _describe command commands"
    yield "            ;;"
    yield "        argument)"
    yield "            curcontext=${curcontext%:*:*}:dpud-$words[1]:"
    yield "            case $words[1] in"
    for name, command in commands():
        yield f"                {name})"
        yield f"                    _arguments {' '.join(_zsh_specs(name, command))}"
        yield "                    ;;"
    yield "            esac"
    yield "            ;;"
    yield "    esac"
    yield "}"
    yield ""
    yield '_dpud "$@"'


def _zsh_specs(name: str, command: click.Command) -> Iterator[str]:
    yield "'(- *)'{-h,--help}'[show help]'"
    for option in _options(command):
        yield from _zsh_option(name, option)
    for argument in _arguments(command):
        wanted = _wanted(name, argument)
        if wanted.command:
            yield "'*::command:_dpud_command'"
        else:
            number = "*" if argument.nargs == -1 else "1"
            yield _quoted(f"{number}:{argument.name}:{_zsh_action(wanted)}")


def _zsh_option(name: str, option: click.Option) -> Iterator[str]:
    text = re.sub(r"[\[\]:]", lambda found: "\\" + found[0], _first_line(option.help))
    for word in option.opts:
        star = "*" if option.multiple else ""
        value = "" if option.is_flag else f":{option.name}:{_zsh_action(_wanted(name, option))}"
        yield _quoted(f"{star}{word}[{text}]{value}")


def _zsh_action(wanted: Wanted) -> str:
    words = f"({' '.join(wanted.words)})" if wanted.words else ""
    files = "_files" if wanted.files else "_files -/" if wanted.folders else ""
    if words and files:
        return f" _alternative 'words\\:word\\:{words}' 'files\\:file\\:{files}'"  # a colon ends an action
    return words or files or " "


def _quoted(text: Any) -> str:
    """One word in single quotes."""
    return "'" + str(text).replace("'", "'\\''") + "'"
