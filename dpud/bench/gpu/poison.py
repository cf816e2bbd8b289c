# SPDX-License-Identifier: GPL-2.0-only
"""A page of a real process that the kernel has poisoned (UFFDIO_POISON, Linux 6.6): SIGBUS, and back from a checkpoint.

`python -m dpud.bench.gpu.poison FILE [PAGE]` is the process: its memory is what the checkpoint says, whose digest it
prints; with PAGE it has that page poisoned and then reads it, which kills it, as a memory error does.

Source of the numbers: include/uapi/linux/userfaultfd.h.
"""

import ctypes
import fcntl
import hashlib
import mmap
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np

from dpud.gpu.blob import PlainCodec
from dpud.gpu.fault.checkpoint_file import Label, RegionLabel, Writer, read, read_blob

PAGE = mmap.PAGESIZE
NR_PAGES = 256
_SYS_USERFAULTFD = {"x86_64": 323, "aarch64": 282}
_UFFD_USER_MODE_ONLY = 1
_API, _FEATURE_POISON = 0xAA, 1 << 14
_UFFDIO_API, _UFFDIO_REGISTER, _UFFDIO_POISON = 0xC018AA3F, 0xC020AA00, 0xC020AA08
_MODE_MISSING = 1


class NotSupported(Exception):
    """This kernel does not let us."""


def open_userfaultfd() -> int:
    """A descriptor with the poison feature. Raises NotSupported."""
    number = _SYS_USERFAULTFD.get(os.uname().machine)
    libc = ctypes.CDLL(None, use_errno=True)
    fd = -1 if number is None else libc.syscall(number, os.O_CLOEXEC | _UFFD_USER_MODE_ONLY)
    if fd < 0:
        raise NotSupported(f"userfaultfd: {os.strerror(ctypes.get_errno())}")
    try:
        fcntl.ioctl(fd, _UFFDIO_API, struct.pack("<QQQ", _API, _FEATURE_POISON, 0))
    except OSError as error:
        os.close(fd)
        raise NotSupported(f"UFFD_FEATURE_POISON: {error.strerror}") from error
    return fd


def poison(memory: mmap.mmap, page: int) -> None:
    """Whoever touches the page gets SIGBUS from now on."""
    fd = open_userfaultfd()
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    fcntl.ioctl(fd, _UFFDIO_REGISTER, struct.pack("<QQQQ", start, len(memory), _MODE_MISSING, 0))
    memory.madvise(mmap.MADV_DONTNEED, page * PAGE, PAGE)
    fcntl.ioctl(fd, _UFFDIO_POISON, struct.pack("<QQQq", start + page * PAGE, PAGE, 0, 0))


def save(path: Path, data: bytes) -> None:
    """A checkpoint of one region."""
    region = RegionLabel(1, len(data), PAGE, "host", 0, 0)
    writer = Writer(path, Label("process", 1, 0, 0, 0, (region,)))
    pages = [memoryview(data)[at : at + PAGE] for at in range(0, len(data), PAGE)]
    for page, blob in enumerate(PlainCodec().encode(pages)):
        writer.add(0, page, blob)
    writer.finish()


def load(path: Path) -> mmap.mmap:
    """Anonymous memory as the checkpoint says; each page against its checksum."""
    contents = read(path)
    memory = mmap.mmap(-1, contents.label.regions[0].nr_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with memoryview(memory) as view:
        for (_, page), at in contents.places.items():
            PlainCodec().decode([read_blob(path, at)], [view[page * PAGE : (page + 1) * PAGE]])
    return memory


def process(path: Path, page: int | None = None) -> tuple[int, str]:
    """Run the process -> (exit code, what it printed)."""
    arguments = [str(path), *([] if page is None else [str(page)])]
    command = [sys.executable, "-m", "dpud.bench.gpu.poison", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout.strip()


def crash_and_restore(folder: Path) -> tuple[bool, bool]:
    """(whether the poisoned page killed its process with SIGBUS, whether the next one had every byte back).

    Raises NotSupported.
    """
    os.close(open_userfaultfd())
    data = np.random.default_rng(1).bytes(NR_PAGES * PAGE)
    path = folder / "process.ckpt"
    save(path, data)
    digest = hashlib.sha256(data).hexdigest()
    code, said = process(path, NR_PAGES // 2)
    killed = (code, said) == (-signal.SIGBUS, digest)
    return killed, process(path) == (0, digest)


def main(path: str, page: str = "") -> None:
    memory = load(Path(path))
    print(hashlib.sha256(memory).hexdigest(), flush=True)
    if page:
        poison(memory, int(page))
        memory[int(page) * PAGE]


if __name__ == "__main__":
    main(*sys.argv[1:])
