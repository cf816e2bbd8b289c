# SPDX-License-Identifier: MIT
"""What each side has promised, on disk before it is said: so that after a crash both know who owns the pages.

An append-only file, one record a line:  xxh3_64 of what follows in hex, a space, JSON.  A line is written at once and
synced. A crash can only tear the last line, which then was never said to anybody: it is dropped, with all behind it.
"""

import json
import os
from pathlib import Path
from typing import Any

import xxhash

Record = dict[str, Any]


class Journal:
    """Of one side. Without a path it is kept in memory only."""

    def __init__(self, path: Path | None = None) -> None:
        """Raises OSError where the file cannot be had."""
        self.path = path
        self.records: list[Record] = []
        self._fd: int | None = None
        if path is not None:
            self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
            self._load()

    def append(self, id: str, step: str, **more: Any) -> None:
        """Promise something. Returns when it is on disk. Raises OSError."""
        record = {"id": id, "step": step, **more}
        if self._fd is not None:
            _write_all(self._fd, _line(record))
            os.fdatasync(self._fd)
        self.records.append(record)

    def last(self) -> dict[str, Record]:
        """The last record of each migration, oldest migration first."""
        return {record["id"]: record for record in self.records}

    def of(self, id: str, step: str) -> list[Record]:
        """Records of one step of a migration."""
        return [record for record in self.records if (record["id"], record["step"]) == (id, step)]

    def close(self) -> None:
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None

    def _load(self) -> None:
        assert self.path is not None
        assert self._fd is not None
        data, good = self.path.read_bytes(), 0
        for line in data.splitlines(keepends=True):
            record = _record(line)
            if record is None:
                break
            self.records.append(record)
            good += len(line)
        if good < len(data):
            os.ftruncate(self._fd, good)


def _line(record: Record) -> bytes:
    text = json.dumps(record, separators=(",", ":"), sort_keys=True).encode()
    return b"%016x %s\n" % (xxhash.xxh3_64_intdigest(text), text)


def _record(line: bytes) -> Record | None:
    check, _, text = line.partition(b" ")
    if not text.endswith(b"\n") or check != b"%016x" % xxhash.xxh3_64_intdigest(text[:-1]):
        return None
    try:
        record = json.loads(text)
    except (ValueError, RecursionError):  # somebody else's file, with a checksum like ours
        return None
    known = isinstance(record, dict) and all(isinstance(record.get(key), str) for key in ("id", "step"))
    return record if known else None


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]
