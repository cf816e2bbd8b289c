# SPDX-License-Identifier: GPL-2.0-only
"""Ten kinds of bytes that memory holds: three from this machine's own files and processes, seven made from a seed.

Tensors are drawn as layers, each with a standard deviation of its own, as trained networks have them. The generators
are deterministic; source code, programs and the heap of a live interpreter are what this machine has.
"""

import re
import subprocess
import sys
import sysconfig
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[Any]

LAYER_ELEMENTS = 1 << 18
SEED = 42
VOCABULARY = 50_000

_HEAP = """
import ast, pathlib, random, sys, sysconfig
folder = pathlib.Path(sysconfig.get_path("stdlib"))
trees = [ast.parse(path.read_bytes()) for path in sorted(folder.glob("*.py"))[:120]]
rng = random.Random(42)
rows = [{"id": n, "name": f"user{n}", "score": rng.random(), "tags": [rng.randrange(99)] * 3} for n in range(60_000)]
print("ready", flush=True)
sys.stdin.read()
"""


def stdlib_source(nr_bytes: int) -> bytes:
    """Python's standard library, file after file."""
    return _joined(sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py")), nr_bytes, magic=b"")


def elf_programs(nr_bytes: int) -> bytes:
    """Programs of /usr/bin, by name."""
    return _joined(sorted(Path("/usr/bin").iterdir()), nr_bytes, magic=b"\x7fELF")


def _joined(paths: list[Path], nr_bytes: int, magic: bytes) -> bytes:
    found = bytearray()
    for path in paths:
        if len(found) >= nr_bytes:
            break
        if path.is_file():
            data = path.read_bytes()
            found += data if data.startswith(magic) else b""
    return bytes(found[:nr_bytes])


def live_heap(nr_bytes: int) -> bytes:
    """Writable private memory of another Python, which holds parsed modules and 60,000 dicts."""
    command = [sys.executable, "-c", _HEAP]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdin is not None
        child.stdout.readline()
        try:
            return b"".join(_anonymous_memory(child.pid, nr_bytes))
        finally:
            child.stdin.close()


def _anonymous_memory(pid: int, nr_bytes: int) -> Iterator[bytes]:
    left = nr_bytes
    maps = Path(f"/proc/{pid}/maps").read_text()
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for begin, end in re.findall(r"^(\w+)-(\w+) rw-p \w+ 00:00 0 +(?:\[heap\])?$", maps, re.MULTILINE):
            memory.seek(int(begin, 16))
            data = memory.read(min(int(end, 16) - int(begin, 16), left))
            left -= len(data)
            yield data
            if not left:
                return


def bf16_weights(nr_bytes: int) -> bytes:
    words = _layers(nr_bytes // 2).view(np.uint32)
    return bytes(((words + 0x7FFF + ((words >> 16) & 1)) >> 16).astype(np.uint16))  # to nearest even


def fp16_weights(nr_bytes: int) -> bytes:
    return _layers(nr_bytes // 2).astype(np.float16).tobytes()


def fp32_weights(nr_bytes: int) -> bytes:
    return _layers(nr_bytes // 4).tobytes()


def fp16_activations(nr_bytes: int) -> bytes:
    """Half of them zero, behind a ReLU."""
    values = np.random.default_rng(SEED).standard_normal(nr_bytes // 2, dtype=np.float32)
    return np.maximum(values, 0).astype(np.float16).tobytes()


def int8_weights(nr_bytes: int) -> bytes:
    """Quantized symmetrically: the largest of a layer is 127."""
    layers = _layers(nr_bytes).reshape(-1, min(nr_bytes, LAYER_ELEMENTS))
    scaled: Array = layers * (127 / np.abs(layers).max(axis=1, keepdims=True))
    rounded: Array = np.rint(scaled)
    return rounded.astype(np.int8).tobytes()


def int64_indices(nr_bytes: int) -> bytes:
    """Token numbers by Zipf's law."""
    ranks = np.arange(1, VOCABULARY + 1)
    weights = 1 / ranks
    drawn = np.random.default_rng(SEED).choice(VOCABULARY, nr_bytes // 8, p=weights / weights.sum())
    return bytes(drawn.astype(np.int64))


def fp32_field(nr_bytes: int) -> bytes:
    """A smooth two-dimensional field, as simulations hold."""
    width = 1024
    x = np.linspace(0, 40, width, dtype=np.float32)
    y = np.linspace(0, 40, nr_bytes // 4 // width, dtype=np.float32)[:, None]
    field: Array = np.sin(x) * np.cos(0.7 * y) + 0.1 * np.sin(3.1 * x + y)
    return field.astype(np.float32).tobytes()


def _layers(nr: int) -> Array:
    """`nr` normally distributed values, a standard deviation of 0.01 to 0.05 for each layer."""
    rng = np.random.default_rng(SEED)
    values = rng.standard_normal(nr, dtype=np.float32)
    for begin in range(0, nr, LAYER_ELEMENTS):
        values[begin : begin + LAYER_ELEMENTS] *= np.float32(rng.uniform(0.01, 0.05))
    return values


CORPORA: Mapping[str, Callable[[int], bytes]] = {
    "stdlib .py": stdlib_source,
    "ELF programs": elf_programs,
    "live heap": live_heap,
    "bf16 weights": bf16_weights,
    "fp16 weights": fp16_weights,
    "fp32 weights": fp32_weights,
    "fp16 ReLU": fp16_activations,
    "int8 weights": int8_weights,
    "int64 indices": int64_indices,
    "fp32 field": fp32_field,
}
"""Name -> maker of that many bytes (a multiple of 1 MiB)."""
