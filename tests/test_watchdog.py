# SPDX-License-Identifier: GPL-2.0-only
"""Does a test that hangs fail?"""

import subprocess
import sys
from pathlib import Path

import pytest

CONFTEST = "from watchdog import Watchdog\ndef pytest_configure(config): config.pluginmanager.register(Watchdog(1.5))\n"
HANGS = {
    "a program": "import subprocess\ndef test():\n    with subprocess.Popen(['sleep', '1000']) as it: it.wait()\n",
    "a lock": "import threading\ndef test():\n    lock = threading.Lock()\n    with lock: lock.acquire()\n",
}


@pytest.mark.slow
@pytest.mark.parametrize("what", HANGS)
def test_it_fails_and_the_next_one_runs(what: str, tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(CONFTEST)
    (tmp_path / "test_it.py").write_text(HANGS[what] + "def test_next(): pass\n")
    program = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import pytest; sys.exit(pytest.main())"
    done = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert "it has hung for 1.5 s" in done.stdout
    assert "1 failed, 1 passed" in done.stdout
    assert (" sleep 1000" in done.stdout) == (what == "a program")
    assert done.returncode == 1
