# SPDX-License-Identifier: GPL-2.0-only
"""A state directory whose checkpoint of the machine was changed: found out before anything is put back.

Up to the objects' graph: who can write that with good checksums is root, and could as well change the program.
"""

import os
from pathlib import Path

from dpud import checkpoint_file, config, state, state_segments
from dpud.checkpoint_file import BULK, FILE, MAX_PIECE_BYTES, Unusable, Writer
from dpud.errors import UserError
from dpud.fuzz.binaries import BETWEEN, RAW, SIGNED
from dpud.fuzz.mutate import Mutator
from dpud.fuzz.target import Parser
from dpud.journal import Reader, frame
from dpud.journal_turns import BOOT, FORMAT, Head, Turn, encode

_NUMBER = 1


def _image(data: bytes) -> None:
    """As the daemon looks at the directory before it starts, and at the pieces that it would put back."""
    directory = Path("image")
    directory.mkdir(exist_ok=True)
    for left in directory.iterdir():
        left.unlink()
    path = state_segments.checkpoint_at(directory, _NUMBER)
    payloads = data[1:].split(BETWEEN)
    signed = b"".join(frame(number, payload) for number, payload in enumerate(payloads))
    path.write_bytes(signed if data[:1] == SIGNED else data[1:])
    state_segments.journal_at(directory, _NUMBER).write_bytes(_journal())
    kept = state.State(directory, config.Config(), recover=True)
    kept.look()
    assert kept.checkpoint is not None
    assert kept.checkpoint.number == _NUMBER
    for piece in checkpoint_file.pieces_of(path):
        assert len(piece.data) <= MAX_PIECE_BYTES
        assert (piece.tag == FILE) == bool(piece.name)
        assert os.path.basename(piece.name) == piece.name not in (".", "..") or piece.tag != FILE


def _journal() -> bytes:
    """That goes on from there, and has nothing in it yet."""
    head = Head(FORMAT, state.build_of(), state.machine_keys(config.Config()), 9)
    return frame(0, encode(head)) + frame(1, encode(Turn(BOOT, 0, None, [], None)))


def image_world(_seed: int) -> Parser:
    path = Path("made-image")
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        writer = Writer(fd)
        keys = state.machine_keys(config.Config())
        writer.head(checkpoint_file.Head(checkpoint_file.FORMAT, _NUMBER, state.build_of(), keys, "f" * 32, 5, 1, 2, 0))
        writer.write(b"\x80\x05]\x94(K\x01K\x02e." * 20)
        writer.end_graph()
        writer.bulk(0, 4096, bytes(range(256)) * 2)
        writer.bulk(1, 0, bytes(range(64)))
        writer.file("ann.ckpt", 0, b"of ann" * 9)
        writer.end()
    finally:
        os.close(fd)
    payloads = [payload for _, payload in Reader(path)]
    words = [
        *payloads,
        BETWEEN,
        bytes((FILE,)),
        bytes((BULK,)),
        b"../../x",
        b"\xff" * 8,
        b"\x28\xb5\x2f\xfd\xa0" + b"\xff" * 4,
    ]
    seeds = [RAW + path.read_bytes(), SIGNED + BETWEEN.join(payloads)]
    return Parser(_image, (UserError, Unusable), Mutator(seeds, words))
