# SPDX-License-Identifier: GPL-2.0-only
"""What a configuration has written to files: its settings, and the steps of its workload.

It goes through the tree as requests of root do, so it means what the same mkdir and echo would in a shell, and what
records requests has these too.
"""

import os
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import PurePosixPath

import numpy as np

from dpud.config import Config, Step, texts_of
from dpud.errors import UserError
from fs.kernfs import Tree

Say = Callable[[str], object]

_CHUNK = 1 << 20


def apply(tree: Tree, config: Config, say: Say) -> None:
    """Settings, then steps; `say` is told of each step. Raises UserError that begins with the key."""
    for path, (key, text) in config.settings.items():
        _try(key, path, partial(_put, tree, path, (text.encode(),)))
    for number, step in enumerate(config.workload):
        say(f"{number + 1}/{len(config.workload)} {step.about or step.directory}")
        for path, data in _writes(step):
            try:
                _try(f"workload[{number}]", path, partial(_step, tree, path, data))
            except UserError as error:
                if not step.may_fail:
                    raise
                say(str(error))


def _try(key: str, path: str, write: Callable[[], None]) -> None:
    try:
        write()
    except OSError as error:
        raise UserError(f"{key}: {path}: {error.strerror}") from error


def _step(tree: Tree, path: str, data: Iterator[bytes] | tuple[bytes, ...] | None) -> None:
    folder = PurePosixPath(path)
    _make_folders(tree, folder if data is None else folder.parent)
    if data is not None:
        _put(tree, path, data)


def _writes(step: Step) -> Iterator[tuple[str, Iterator[bytes] | tuple[bytes, ...] | None]]:
    """(path, what is written there); None for the folder itself."""
    folder = PurePosixPath(step.directory)
    yield str(folder), None
    for name, text in texts_of(step.write).items():
        yield str(folder / name), (text.encode(),)
    for name, size in step.fill.items():
        yield str(folder / name), _noise(size, seed=len(name))


def _noise(nr_bytes: int, seed: int) -> Iterator[bytes]:
    """Half of each 2 KiB is random, the rest zeros: it compresses by two, as weights and activations roughly do."""
    rng = np.random.default_rng(seed)
    for at in range(0, nr_bytes, _CHUNK):
        words = rng.integers(0, 1 << 63, (_CHUNK // 2048, 256), dtype=np.int64)
        words[:, 128:] = 0
        yield words.tobytes()[: nr_bytes - at]


def _make_folders(tree: Tree, folder: PurePosixPath) -> None:
    """mkdir -p."""
    for each in [*reversed(folder.parents), folder]:
        try:
            tree.getattr(str(each))
        except FileNotFoundError:
            tree.mkdir(str(each))


def _put(tree: Tree, path: str, chunks: Iterator[bytes] | tuple[bytes, ...]) -> None:
    file = tree.open(path, os.O_WRONLY)
    try:
        at = 0
        for chunk in chunks:
            at += file.write(chunk, at)
    finally:
        file.release()
