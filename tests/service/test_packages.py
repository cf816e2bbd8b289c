# SPDX-License-Identifier: GPL-2.0-only
"""The wheel in an environment of its own, and the Debian package on a system of its own."""

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from booted import Booted, booted, can_boot, until

from dpud import scenario

ROOT = Path(__file__).parents[2]
MNT = "/run/dpud"

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="dpkg-deb is not installed"),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with both, as `make deb` leaves it."""
    folder = tmp_path_factory.mktemp("dist")
    done = subprocess.run(
        [ROOT / "scripts/make-deb", sys.executable, str(folder)], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stderr) == (0, "")
    return folder


def test_the_wheel_works_without_the_checkout(built: Path, tmp_path: Path) -> None:
    """As after `pipx install .`: a fresh environment (which finds what dpud needs in this one), and away from here."""
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    (wheel,) = built.glob("*.whl")
    pip = [venv / "bin/pip", "install", "--quiet", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(pip, check=True, capture_output=True)
    (site,) = venv.glob("lib/python*/site-packages")
    (site / "needed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "NUMBA"))}

    def out(*command: str) -> str:
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert (done.returncode, done.stderr) == (0, "")
        return done.stdout

    place = out(str(venv / "bin/python"), "-c", "import dpud; print(dpud.__file__)")
    assert place.startswith(str(site))
    assert [line.split()[0] for line in out(str(venv / "bin/dpud"), "scenarios").splitlines()] == scenario.names()
    assert "[machine]" in out(str(venv / "bin/dpud"), "config", "--scenario", "web-server")
    assert (site / "dpud/data/captures/demo/kpageflags.zst").exists()
    assert (site / "dpud/dpu/profiles/upmem-v1a.toml").exists()


def has_debian_python() -> bool:
    """The package is for Debian's python3, whose version has to be the one that it was built with."""
    asked = subprocess.run(["/usr/bin/python3", "-c", "import sys; print(sys.version_info[:2])"], capture_output=True)
    return asked.stdout.decode().strip() == str(sys.version_info[:2])


@pytest.mark.skipif(not can_boot(), reason="needs root, systemd and a cgroup2 hierarchy")
@pytest.mark.skipif(not has_debian_python(), reason="this is another Python than Debian's")
def test_the_debian_package_is_installed_started_and_removed(built: Path, tmp_path: Path) -> None:
    (deb,) = built.glob("*.deb")
    with booted(tmp_path) as system:
        with deb.open("rb") as package:
            system.run("sh", "-c", "cat >/root/dpud.deb", stdin=package)
        system.out("env", "DPUD_WARM=no", "dpkg", "--install", "/root/dpud.deb")
        assert system.sh("dpud scenarios | wc -l") == str(len(scenario.names()))
        system.out("/usr/lib/dpud/bin/python", "-c", "import dpud.cli, numba, zstandard, lz4, xxhash, snappy, mfusepy")
        _take_compiled_loops(system)
        system.out("systemctl", "start", "dpud")
        assert system.sh(f"cat {MNT}/proc/sys/vm/dpu_compact_enabled") == "1"
        assert "/usr/lib/dpud" in system.sh(
            "readlink -f /proc/$(systemctl show -P MainPID dpud)/exe; cat /usr/bin/dpud"
        )
        assert system.sh("dpud scenarios | wc -l") == str(len(scenario.names()))
        assert system.out("man", "-w", "dpud-config") == "/usr/share/man/man5/dpud-config.5"
        system.out("dpkg", "--remove", "dpud")
        until(lambda: MNT not in system.sh("cat /proc/mounts"))
        assert system.run("systemctl", "cat", "dpud").returncode != 0
        assert system.run("test", "-e", "/usr/lib/dpud/lib").returncode != 0
        assert system.sh("ls /etc/dpud.toml") == "/etc/dpud.toml"
        system.out("dpkg", "--purge", "dpud")
        assert system.run("test", "-e", "/etc/dpud.toml").returncode != 0


def _take_compiled_loops(system: Booted) -> None:
    """Those of this checkout, which are the same but for the files' times, so that nothing is compiled here.

    They are for one Python to the last digit, so the package gets ours where Debian's is not the same.
    """
    if system.out("/usr/bin/python3", "-c", "import sys; print(sys.version)") != sys.version:
        ours = Path(sys.executable).resolve()
        for folder in ours.parents:
            system.out("chmod", "o+x", str(folder))
        system.out("ln", "-sf", str(ours), "/usr/lib/dpud/bin/python")
        system.sh(f"sed 's,^home = .*,home = {ours.parent},' -i /usr/lib/dpud/pyvenv.cfg")
        system.sh("sed 's/^ProtectHome=.*/ProtectHome=read-only/' -i /usr/lib/systemd/system/dpud.service")
        system.out("systemctl", "daemon-reload")
    site = f"/usr/lib/dpud/lib/python{sysconfig.get_python_version()}/site-packages"
    copy_times = f"find kernelsim dpud -name '*.py' | while read file; do touch -r $file {site}/$file; done"
    system.sh(f"touch {os.environ['NUMBA_CACHE_DIR']}/closures.json")  # the latest is taken over
    system.sh(f"cd {ROOT}; {copy_times}; dpud config >/dev/null")
