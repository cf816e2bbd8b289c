# SPDX-License-Identifier: GPL-2.0-only
"""Each scenario does what its name says, and `dpud run` takes a user's own."""

import re
import subprocess
from pathlib import Path

import pytest
from emulated import DPUD, TIMEOUT_S

from dpud import config, scenario, workload
from dpud.errors import UserError
from fs.kernfs import Tree
from kernelsim.attr import Attr, Int, Kobject, Registry

pytestmark = [pytest.mark.mount, pytest.mark.slow]

ORDER_OF_A_HUGE_PAGE = 9


def shown(name: str, script: str) -> str:
    """What a shell script prints under `dpud exec --scenario`."""
    done = subprocess.run(
        [*DPUD, "exec", "--scenario", name, "--", "sh", "-c", script], capture_output=True, text=True, timeout=TIMEOUT_S
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def normal_zone(text: str, file: str) -> list[float]:
    """The numbers by order of the zone that has the memory, in the part of the output that a file begins."""
    lines = text.partition(f"## {file}\n")[2].partition("\n##")[0].splitlines()
    (line,) = (line for line in lines if "DMA32" in line)
    return [float(word) for word in line.split()[4:]]


def test_the_web_server_s_memory_is_fragmented() -> None:
    """Much is free, none of it in a huge page, and fragmentation is why (an index near 1)."""
    text = shown(
        "web-server",
        "cd /sys/kernel/debug/extfrag; echo '## buddyinfo'; cat /proc/buddyinfo; echo '## index'; cat extfrag_index;"
        "echo 1 > /sys/devices/system/node/node0/compact_dpu; echo '## after'; cat /proc/buddyinfo;"
        "cat /sys/kernel/config/kernelsim/mm/*/verify",
    )
    free = normal_zone(text, "buddyinfo")
    assert sum(count * 2**order for order, count in enumerate(free)) > 256 * 256  # 256 MiB in pages
    assert free[ORDER_OF_A_HUGE_PAGE:] == [0, 0]
    assert normal_zone(text, "index")[ORDER_OF_A_HUGE_PAGE] > 0.9
    after = normal_zone(text, "after")
    assert after[9] + 2 * after[10] > 64
    assert text.split()[-4:] == ["ok"] * 4


def test_the_database_gets_its_huge_pages_after_a_compaction() -> None:
    text = shown(
        "thp-database",
        "cd /sys/kernel/config/kernelsim/alloc/hugepages; grep thp_fault /proc/vmstat;"
        "(env echo 1 > alloc) 2>&1; cat allocated; echo 1 > /sys/devices/system/node/node0/compact_dpu; echo 1 > alloc;"
        "cat allocated; cat /sys/kernel/config/kernelsim/mm/*/verify",
    )
    wanted = (256 << 20) // (2 << 20)
    vmstat = dict(re.findall(r"^(thp_\w+) (\d+)$", text, re.MULTILINE))
    assert int(vmstat["thp_fault_fallback"]) > wanted // 2
    assert int(vmstat["thp_fault_alloc"]) + int(vmstat["thp_fault_fallback"]) == wanted
    assert "Cannot allocate memory" in text
    before, after, *verified = text.split("memory", 1)[1].split()
    assert (before, after) == ("0", "64")
    assert verified == ["ok", "ok"]


def test_the_camera_has_its_range() -> None:
    text = shown(
        "cma-camera",
        "cat /sys/kernel/debug/cma/pernuma0/used; cat /sys/kernel/config/kernelsim/mm/apps/verify; dmesg;"
        "grep -E 'moved|dpu' /sys/kernel/debug/dpu_compact/contig_stats",
    )
    assert text.split()[:2] == [str((64 << 20) // 4096), "ok"]
    moved = re.findall(r"(\d+) fragments moved", text)
    assert sum(map(int, moved)) > 1000


def test_the_gpu_s_tenants_are_under_pressure_by_their_rank() -> None:
    text = shown(
        "gpu-inference",
        "cd /sys/kernel/config/gpu_memvirt/gpu0/clients; cat /sys/class/gpu_memvirt/gpu0/memory/total_bytes;"
        "cat */buffers/*/data >/dev/null;"  # whose pages are in swap waits for them
        "for c in chat search batch; do cat $c/allocated_bytes $c/resident_bytes; grep -o 'total=.*' $c/pressure; done;"
        "cat /sys/class/gpu_memvirt/gpu0/swap/nr_pages; cat /sys/class/gpu_memvirt/gpu0/address_space/verify",
    )
    total, *words = text.split()
    clients = [words[at : at + 4] for at in range(0, 12, 4)]
    allocated = [int(client[0]) for client in clients]
    resident = [int(client[1]) for client in clients]
    assert sum(allocated) > 1.5 * int(total) >= 1.5 * sum(resident)
    assert resident[0] == allocated[0], "nobody below it takes a page of the first in rank"
    assert resident[1] < allocated[1]
    assert [client[2] != "total=0" for client in clients] == [False, True, True], "who has waited for memory"
    assert words[-1] == "ok"


def test_scenarios_are_listed_with_a_line_each() -> None:
    out = subprocess.run([*DPUD, "scenarios"], capture_output=True, text=True, check=True).stdout
    lines = [line.split(None, 1) for line in out.splitlines()]
    assert [name for name, _ in lines] == ["cma-camera", "gpu-inference", "thp-database", "web-server"]
    assert all(len(about) > 20 for _, about in lines)


def test_a_user_s_own_file_works_with_a_configuration_over_it(tmp_path: Path) -> None:
    own, above = tmp_path / "own.toml", tmp_path / "above.toml"
    own.write_text(
        '[[machine.nodes]]\nmemory = "64M"\n[sysctl]\nvm.extfrag_threshold = 300\n[gpu]\ndevices = 0\n'
        '[[workload]]\nabout = "two"\ndirectory = "/sys/kernel/config/kernelsim/mm/web"\nwrite = { anon = "4M" }\n'
    )
    above.write_text('[sysctl]\n"vm.extfrag_threshold" = 400\n[dpu]\nranks = 0\n')
    command = [*DPUD, "exec", "--scenario", str(own), "--config", str(above), "--", "sh", "-c"]
    script = "cat /proc/sys/vm/extfrag_threshold /sys/kernel/config/kernelsim/mm/web/anon; ls /sys/class/dpu_rank"
    done = subprocess.run([*command, script], capture_output=True, text=True, timeout=TIMEOUT_S)
    assert (done.returncode, done.stdout.split()) == (0, ["400", str(4 << 20)]), done.stderr


def test_run_says_which_step_it_is_at(tmp_path: Path) -> None:
    own = tmp_path / "own.toml"
    steps = '[[workload]]\nabout = "one"\n[[workload]]\ndirectory = "/proc/sys"\n'
    own.write_text(f'[[machine.nodes]]\nmemory = "64M"\n[gpu]\ndevices = 0\n{steps}')
    run = [*DPUD, "run", "--mount", str(tmp_path / "mnt"), "--scenario", str(own)]
    with subprocess.Popen(run, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        lines = [daemon.stderr.readline() for _ in range(3)]
        daemon.terminate()
    assert lines[:2] == ["dpud: 1/2 one\n", "dpud: 2/2 /proc/sys\n"]
    assert lines[2].startswith("dpud: ready at ")
    assert not (tmp_path / "mnt").exists()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[sysctl]\nvm.swapiness = 1", "own.toml:2: sysctl.vm.swapiness: /proc/sys/vm/swapiness: No such file"),
        ("[sysctl]\n\nvm.extfrag_threshold = 1001", "own.toml:3: sysctl.vm.extfrag_threshold: "),
        ('[[workload]]\n[[workload]]\ndirectory = "/sys/x"', "own.toml:2: workload[1]: /sys/x: "),
        ('[dpu]\nranks = 1\nprofile = "fast"', 'own.toml:3: dpu.profile: "fast": '),
        ("[[workload]]\ndirectory = 3", "own.toml:2: workload[0].directory: Expected `str`"),
    ],
)
def test_what_cannot_be_done_names_file_line_and_key(tmp_path: Path, text: str, problem: str) -> None:
    own = tmp_path / "own.toml"
    own.write_text(f'{text}\n[[machine.nodes]]\nmemory = "64M"\n')
    run = [*DPUD, "run", "--mount", str(tmp_path / "mnt"), "--scenario", str(own)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=TIMEOUT_S)
    assert done.returncode == 2
    assert f"dpud: {tmp_path}/{problem}".replace("`", "") in done.stderr
    assert not (tmp_path / "mnt").exists()


class Knob(Kobject):
    level = Attr(Int(0, 9), 1, doc="A number.")


def small_tree() -> Tree:
    registry = Registry()
    registry.add("/proc/sys/vm", Knob())
    return Tree(registry)


def test_a_step_that_may_fail_is_told_of() -> None:
    said: list[str] = []
    text = '[[workload]]\ndirectory = "/proc/sys/vm"\nmay_fail = true\nwrite = { level = 10 }\n'
    workload.apply(small_tree(), config.parse(text), said.append)
    assert said == ["1/1 /proc/sys/vm", "workload[0]: /proc/sys/vm/level: 10 is not in 0..9"]
    with pytest.raises(UserError, match="level: 10 is not in"):
        workload.apply(small_tree(), config.parse(text.replace("true", "false")), said.append)


def test_an_unknown_scenario_says_which_there_are() -> None:
    with pytest.raises(config.ConfigError, match="no scenario web: there are cma-camera, "):
        scenario.load(None, "web")
