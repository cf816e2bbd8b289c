# SPDX-License-Identifier: GPL-2.0-only
"""Where numba keeps its compiled loops.

numba notices a change in the file of a cached function, not in the files of the functions it calls: after
an edit of a callee, the caller's stale machine code would still be loaded. So the cache folder's own name
carries a hash of every source file that holds compiled loops: changed sources mean another, empty folder,
never stale code.

A new folder takes over what an older one has of the modules that are the same, and import only modules that
are the same (`closures`), so that an edit costs compiling only what it can have changed.

The folder is the first of `$XDG_CACHE_HOME`, `/var/cache`, `~/.cache` that can be written to, else a
temporary one that lives as long as the process. A user's new folder starts as a copy of the one in
`/var/cache`, where root's `make install` compiled everything once.
"""

import ast
import atexit
import fcntl
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
_SOURCES = ("kernelsim", "fs", "dpud/dpu", "dpud/gpu/address_space")
_SHARED = Path("/var/cache")
_KEEP = 24
_PREFIX = "jit-"
_CLOSURES = "closures.json"
_held: list[int] = []
"""A descriptor of the folder in use, with a shared lock."""


def fingerprint(root: Path) -> str:
    """Hash of this checkout's place (numba keeps its files by it), its compiled loops, numba and Python."""
    numba = find_spec("numba")  # not imported: `dpud --help` does not need it
    assert numba is not None
    assert numba.origin is not None
    digest = hashlib.sha256(f"{root}\0{sys.version}\0".encode())
    digest.update(Path(numba.origin).with_name("_version.py").read_bytes())
    for path in _sources(root):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def _sources(root: Path) -> list[Path]:
    return [path for folder in _SOURCES for path in sorted((root / folder).rglob("*.py"))]


def closures(root: Path) -> dict[str, str]:
    """For each source file (relative, "kernelsim/page.py") a hash over it and all it imports, however indirectly."""
    texts = {str(path.relative_to(root)): path.read_text() for path in _sources(root)}
    imports = {name: _imported(text) & texts.keys() for name, text in texts.items()}
    numbers = {}
    for name in texts:
        reached, open_names = {name}, [name]
        while open_names:
            new = imports[open_names.pop()] - reached
            reached |= new
            open_names += new
        digest = hashlib.sha256(sys.version.encode())
        for each in sorted(reached):
            digest.update(f"{each}\0{texts[each]}\0".encode())
        numbers[name] = digest.hexdigest()[:16]
    return numbers


def _imported(text: str) -> set[str]:
    """File names of the modules that a source imports (`from kernelsim import page` imports kernelsim.page)."""
    modules = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {f"{module.replace('.', '/')}.py" for module in modules}


def use() -> Path:
    """Point numba at the folder for these sources, before numba is imported; returns that folder.

    A `NUMBA_CACHE_DIR` set by the user stays; one inherited from another dpud process is found anew.
    """
    given = os.environ.get("NUMBA_CACHE_DIR")
    if given and not Path(given).name.startswith(_PREFIX):
        return Path(given)
    name = _PREFIX + fingerprint(_ROOT)
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
        if not os.access(folder, os.W_OK):
            return None
        _hold(folder)
    except OSError:
        return None
    return folder


def _hold(folder: Path) -> None:
    """Nobody drops it while this process, or one that it forked, may still load loops from it. Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    fcntl.flock(fd, fcntl.LOCK_SH)
    while _held:
        os.close(_held.pop())
    _held.append(fd)


def _start(folder: Path) -> None:
    warmed = _SHARED / "dpud" / folder.name
    if warmed.is_dir() and warmed != folder:
        shutil.copytree(warmed, folder, dirs_exist_ok=True)
    else:
        folder.mkdir(exist_ok=True)
        _take_over(folder)


def _take_over(folder: Path) -> None:
    """Copy what older folders compiled of modules whose closure is the same as ours."""
    ours = closures(_ROOT)
    (folder / _CLOSURES).write_text(json.dumps(ours))
    missing = dict(ours)
    for other in sorted(folder.parent.glob(f"{_PREFIX}*/{_CLOSURES}"), key=os.path.getmtime, reverse=True):
        if other.parent == folder:
            continue
        theirs: dict[str, str] = json.loads(other.read_text())
        for name in [name for name, number in missing.items() if theirs.get(name) == number]:
            if _copy_module(other.parent, folder, name):
                del missing[name]


def _copy_module(source: Path, folder: Path, name: str) -> bool:
    """numba names its subfolders `parent_sha1(path)` and the files in it `module.function-line...`."""
    parent, _, module = name.removesuffix(".py").rpartition("/")
    place = folder / _subfolder(parent)
    place.mkdir(exist_ok=True)
    found = False
    for path in source.glob(f"{parent.rpartition('/')[2]}_*/{module}.*-*"):
        if ".tmp." not in path.name:
            shutil.copy2(path, place / path.name)
            found = True
    return found


def _subfolder(parent: str) -> str:
    path = str(_ROOT / parent)
    return f"{os.path.basename(path)}_{hashlib.sha1(path.encode()).hexdigest()}"


def _prune(parent: Path) -> None:
    """Drop the folders of older sources; the newest few stay, for other checkouts and branches, and those in use."""
    folders = sorted(parent.glob(_PREFIX + "*"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in folders[_KEEP:]:
        if not _is_held(old):
            shutil.rmtree(old, ignore_errors=True)


def _is_held(folder: Path) -> bool:
    """Raises OSError."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(fd)
    return False


def _temporary(name: str) -> Path:
    import tempfile  # only this rare path needs it; `dpud --help` should not pay for the import

    parent = Path(tempfile.mkdtemp(prefix="dpud-"))
    atexit.register(shutil.rmtree, parent, ignore_errors=True)
    folder = parent / name
    _start(folder)
    return folder
