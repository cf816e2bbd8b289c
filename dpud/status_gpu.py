# SPDX-License-Identifier: GPL-2.0-only
"""The state of simulated GPUs, read from their files: memory, the pool and tiers behind it, clients."""

from dataclasses import dataclass

from dpud.status_files import GPUS, Files, pairs, text_or


@dataclass(frozen=True)
class Tier:
    """Where pages are kept: the device itself, the compressed pool, a swap tier."""

    name: str
    used_bytes: int
    size_bytes: int
    """0: no limit of its own."""


@dataclass(frozen=True)
class Client:
    """A line of overcommit/clients, in bytes."""

    name: str
    priority: int
    granted_bytes: int
    used_bytes: int
    resident_bytes: int


@dataclass(frozen=True)
class Gpu:
    """One device. `modules` is module -> counter -> value, of the module's stat file."""

    name: str
    tiers: tuple[Tier, ...]
    clients: tuple[Client, ...]
    pool_raw_bytes: int
    pool_stored_bytes: int
    traffic: dict[tuple[str, str], int]
    """(client, cause) -> bytes that were moved."""
    modules: dict[str, dict[str, int]]


def binary(nr_bytes: int) -> str:
    """Bytes for people: "12.5 MiB"."""
    step = min(max(nr_bytes.bit_length() - 1, 0) // 10, 4)
    amount = nr_bytes / (1 << 10 * step)
    return f"{amount:.{0 if step == 0 or amount >= 100 else 1}f} {('B', 'KiB', 'MiB', 'GiB', 'TiB')[step]}"


STAT_FILES = {
    "address_space": ("stat", "fault_stat"),
    "overcommit": ("stat",),
    "swap": ("stat",),
    "qos": ("stat",),
    "fault": ("stat",),
    "migration": ("stat",),
}


def gpus(files: Files) -> list[Gpu]:
    """Those that are there, by number."""
    return [_gpu(files, name) for name in files.names(GPUS) if name.startswith("gpu")]


def _gpu(files: Files, name: str) -> Gpu:
    top = f"{GPUS}/{name}"
    return Gpu(
        name,
        _tiers(files, top),
        tuple(_clients(text_or(files, f"{top}/overcommit/clients"))),
        _number(files, f"{top}/compression/orig_data_size"),
        _number(files, f"{top}/compression/mem_used_total"),
        _traffic(text_or(files, f"{top}/qos/traffic")),
        {module: _counters(files, f"{top}/{module}", names) for module, names in STAT_FILES.items()},
    )


def _tiers(files: Files, top: str) -> tuple[Tier, ...]:
    total = _number(files, f"{top}/memory/total_bytes")
    found = [Tier("device", total - _number(files, f"{top}/memory/free_bytes"), total)]
    if "compression" in files.names(top):
        used, limit = (_number(files, f"{top}/compression/{name}") for name in ("mem_used_total", "max_pool_bytes"))
        found.append(Tier("pool", used, limit))
    for name in ("memory", "nvme", "ssd", "hdd"):
        if name in files.names(f"{top}/swap/tiers"):
            used, size = (_number(files, f"{top}/swap/tiers/{name}/{what}") for what in ("used", "size"))
            found.append(Tier(f"swap {name}", used, size))
    return tuple(found)


def _clients(table: str) -> list[Client]:
    rows = [line.split() for line in table.splitlines()[1:]]
    return [
        Client(name, int(priority), int(granted), int(used), int(resident))
        for name, priority, granted, used, _expected, resident, *_ in rows
    ]


def _traffic(text: str) -> dict[tuple[str, str], int]:
    rows = [line.rsplit(maxsplit=2) for line in text.splitlines()]
    return {(client, cause): int(nr_bytes) for client, cause, nr_bytes in rows}


def _counters(files: Files, directory: str, names: tuple[str, ...]) -> dict[str, int]:
    return {key: value for name in names for key, value in pairs(files, f"{directory}/{name}").items()}


def _number(files: Files, path: str) -> int:
    """Bytes, which knobs show with the largest suffix that fits."""
    text = text_or(files, path, "0") or "0"
    exponent = "KMGTPE".find(text[-1]) + 1
    return int(text[:-1] if exponent else text) << 10 * exponent
