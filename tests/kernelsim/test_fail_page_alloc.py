# SPDX-License-Identifier: GPL-2.0-only
"""fail_page_alloc against Documentation/fault-injection: names, defaults, and which requests fail."""

import pytest
from machines import Lab

FAIL = "/sys/kernel/debug/fail_page_alloc"


def lab_with(**knobs: str) -> Lab:
    lab = Lab((64,), nr_ranks=None)
    for name, value in {"probability": "100", "times": "-1", **knobs}.items():
        lab.write(f"{FAIL}/{name.replace('_', '-') if 'ignore' in name or 'min' in name else name}", value)
    return lab


def failed(lab: Lab, order: int, gfp: str) -> int:
    path = lab.allocator(f"x{order}", order=str(order), gfp=gfp, count="4")
    return lab.alloc(path)["failed"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("order", "gfp", "knobs", "nr_failed"),
    [
        (3, "GFP_NOWAIT", {}, 4),
        (0, "GFP_NOWAIT", {}, 0),  # min-order is 1
        (0, "GFP_NOWAIT", {"min_order": "0"}, 4),
        (3, "GFP_KERNEL", {}, 0),  # could reclaim
        (3, "GFP_KERNEL", {"ignore_gfp_wait": "N"}, 4),
        (3, "GFP_HIGHUSER_MOVABLE", {"ignore_gfp_wait": "N"}, 0),
        (3, "GFP_HIGHUSER_MOVABLE", {"ignore_gfp_wait": "0", "ignore_gfp_highmem": "off"}, 4),
        (3, "GFP_KERNEL|__GFP_NOFAIL", {"ignore_gfp_wait": "N"}, 0),
        (3, "GFP_NOWAIT", {"times": "1"}, 1),
        (3, "GFP_NOWAIT", {"interval": "2"}, 2),
        (3, "GFP_NOWAIT", {"space": "17"}, 2),  # pages: two requests of 8 pass
        (3, "GFP_NOWAIT", {"probability": "0"}, 0),
    ],
)
def test_which_requests_fail(order: int, gfp: str, knobs: dict[str, str], nr_failed: int) -> None:
    lab = lab_with(**knobs)
    assert failed(lab, order, gfp) == nr_failed
    assert lab.read(f"{FAIL}/injected") == f"{nr_failed}\n"
    assert lab.machine.check() == []


def test_a_failure_is_logged_unless_told_not_to() -> None:
    for gfp, logged in (("GFP_KERNEL", True), ("GFP_KERNEL|__GFP_NOWARN", False)):
        lab = lab_with(ignore_gfp_wait="N")
        assert failed(lab, 2, gfp) == 4
        lines = lab.machine.printk.lines()
        assert (lines.count("FAULT_INJECTION: forcing a failure.") == 4) == logged
        assert ("name fail_page_alloc, interval 1, probability 100, space 0, times -1" in lines) == logged
        assert not any("page allocation failure" in line for line in lines), "nothing was tried"


@pytest.mark.slow
def test_the_rate_of_log_lines() -> None:
    lab = lab_with(ignore_gfp_wait="N", verbose_ratelimit_interval_ms="1000", verbose_ratelimit_burst="2")
    assert failed(lab, 2, "GFP_KERNEL") == 4
    assert lab.machine.printk.lines().count("FAULT_INJECTION: forcing a failure.") == 2


def test_the_bools_are_debugfs_s() -> None:
    lab = Lab((64,), nr_ranks=None)
    for text, shown in (("N", "N"), ("y\n", "Y"), ("0", "N"), ("on", "Y"), ("Off\n", "N"), ("1", "Y")):
        lab.write(f"{FAIL}/ignore-gfp-wait", text)
        assert lab.read(f"{FAIL}/ignore-gfp-wait") == f"{shown}\n"
