# SPDX-License-Identifier: GPL-2.0-only
"""Where numba keeps its compiled loops.

numba notices a change in the file of a cached function, not in the files of the functions it calls: after
an edit of a callee, the caller's stale machine code would still be loaded. So the cache folder's own name
carries a hash of every source file that holds compiled loops: changed sources mean another, empty folder,
never stale code.

The folder is the first of `$XDG_CACHE_HOME`, `/var/cache`, `~/.cache` that can be written to, else a
temporary one that lives as long as the process. A user's new folder starts as a copy of the one in
`/var/cache`, where root's `make install` compiled everything once.
"""

import atexit
import hashlib
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("kernelsim", "dpud/dpu")
_SHARED = Path("/var/cache")
_KEEP = 8
_PREFIX = "jit-"


def fingerprint(root: Path = _ROOT) -> str:
    """Hash of this checkout's place (numba keeps its files by it), its compiled loops, numba and Python."""
    numba = find_spec("numba")  # not imported: `dpud --help` does not need it
    assert numba is not None
    assert numba.origin is not None
    digest = hashlib.sha256(f"{root}\0{sys.version}\0".encode())
    digest.update(Path(numba.origin).with_name("_version.py").read_bytes())
    for folder in _SOURCES:
        for path in sorted((root / folder).rglob("*.py")):
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def use() -> Path:
    """Point numba at the folder for these sources, before numba is imported; returns that folder.

    A `NUMBA_CACHE_DIR` set by the user stays; one inherited from another dpud process is found anew.
    """
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given and not Path(given).name.startswith(_PREFIX):
        return Path(given)
    name = _PREFIX + fingerprint()
    folder = next((made for base in _bases() if (made := _open(base / "dpud" / name))), None)
    if folder is None:
        folder = _temporary(name)
    os.environ["NUMBA_CACHE_DIR"] = str(folder)
    return folder


def _bases() -> Iterator[Path]:
    if xdg := os.environ.get("XDG_CACHE_HOME"):
        yield Path(xdg)
    yield _SHARED
    if (home := os.path.expanduser("~")) != "~":
        yield Path(home, ".cache")


def _open(folder: Path) -> Path | None:
    """The folder, made where missing, or None where this user may not write."""
    try:
        if not folder.is_dir():
            folder.parent.mkdir(parents=True, exist_ok=True)
            _start(folder)
            _prune(folder.parent)
        os.utime(folder)  # the age that _prune() goes by
    except OSError:
        return None
    return folder if os.access(folder, os.W_OK) else None


def _start(folder: Path) -> None:
    warmed = _SHARED / "dpud" / folder.name
    if warmed.is_dir() and warmed != folder:
        shutil.copytree(warmed, folder, dirs_exist_ok=True)
    else:
        folder.mkdir(exist_ok=True)


def _prune(parent: Path) -> None:
    """Drop the folders of older sources; the newest few stay, for other checkouts and branches."""
    folders = sorted(parent.glob(_PREFIX + "*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in folders[_KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def _temporary(name: str) -> Path:
    import tempfile  # only this rare path needs it; `dpud --help` should not pay for the import

    parent = Path(tempfile.mkdtemp(prefix="dpud-"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    folder = parent / name
    _start(folder)
    return folder
