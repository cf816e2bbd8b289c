# SPDX-License-Identifier: GPL-2.0-only
"""Kernels built otherwise, and machines without a DPU, as a user meets them: under `dpud exec`."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [
    pytest.mark.mount,
    pytest.mark.skipif(not os.access("/dev/fuse", os.R_OK | os.W_OK), reason="/dev/fuse cannot be opened"),
]

TIMEOUT_S = 120
SMALL = '[[machine.nodes]]\nmemory = "64M"\n[memory]\nbytes = "stamp"\n'

EVERYTHING_DPU = (
    "/proc/sys/vm/dpu_compact_enabled /sys/devices/system/node/node0/compact_dpu /sys/kernel/debug/dpu_compact"
)


def shell(tmp_path: Path, config: str, script: str) -> str:
    """Output of a script under `dpud exec --config`; it must succeed, and say nothing on stderr."""
    file = tmp_path / "config.toml"
    file.write_text(SMALL + config)
    done = subprocess.run(
        [sys.executable, "-P", "-m", "dpud", "exec", "--config", str(file), "--", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        stdin=subprocess.DEVNULL,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_kernel_without_dpu_compaction(tmp_path: Path) -> None:
    script = f"""
        for path in {EVERYTHING_DPU}; do ls $path 2>&1 | grep -o 'No such file or directory'; done
        dmesg | grep -c DPU
        zcat $DPUD_MOUNT/proc/config.gz | grep DPU
        cat /sys/devices/system/node/online
    """
    none = "No such file or directory\n"
    assert shell(tmp_path, '[kconfig]\nCONFIG_DPU_COMPACTION = "n"\n', script) == (
        f"{3 * none}0\n# CONFIG_DPU_COMPACTION is not set\n# CONFIG_DPU_COMPACTION_DEFAULT_ON is not set\n0\n"
    )


def test_what_the_kernel_lacks_is_not_the_hosts_either(tmp_path: Path) -> None:
    """Of a kernel without NUMA, sysctls or debugfs, not even the real kernel's directories show."""
    config = "[kconfig]\n" + "".join(
        f'CONFIG_{name} = "n"\n' for name in ("NUMA", "DEBUG_FS", "DPU_COMPACTION", "HUGETLB_PAGE")
    )
    script = "ls /sys/devices/system/node /sys/kernel/debug; grep -c . /proc/buddyinfo"
    assert shell(tmp_path, config, script) == "/sys/devices/system/node:\n\n/sys/kernel/debug:\n2\n"


def test_a_machine_without_a_dpu(tmp_path: Path) -> None:
    script = """
        cd /sys/kernel/config/kernelsim/mm && mkdir a && echo 32M > a/anon && echo '50 seed=1' > a/holes
        echo 1 > /proc/sys/vm/dpu_compact_enabled
        cat /proc/sys/vm/dpu_compact_enabled
        echo 12 > /proc/sys/vm/dpu_compact_region_order
        echo 1 > /sys/devices/system/node/node0/compact_dpu
        cat a/verify
        ls /sys/class/dpu_rank | wc -l
        ls /sys/kernel/debug/dpu_compact | grep fail_ | grep -vc fail_page_
        grep '^pages_moved ' /sys/kernel/debug/dpu_compact/stats
        awk '/^pgmigrate_success/ { print ($2 > 1000) }' /proc/vmstat
        dmesg | grep -o 'DPU.*'
    """
    assert shell(tmp_path, "[dpu]\nranks = 0\n", script) == (
        "1\nok\n0\n0\npages_moved 0\n1\nDPU Memory Compaction: no DPU found, compact_dpu does as compact\n"
    )
