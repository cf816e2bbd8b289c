# SPDX-License-Identifier: GPL-2.0-only
"""Figures typed in from reference dpu.md sections 2.1 and 6, independent of the profile files."""

import msgspec
import pytest

from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.profile import Constant, Dma, Host, Profile, Work, load_profile, profile_names

T_OVH_US = 35


def one_wave(nr_pages: int, nr_dpus: int) -> Work:
    return Work(nr_pages, 1, -(-nr_pages // nr_dpus), 0)


def dma_of(profile: Profile) -> Dma:
    assert isinstance(profile.device, Dma)
    return profile.device


@pytest.mark.parametrize(
    ("nr_bytes", "cycles"),
    [(8, 77 + 61 + 8), (256, 394), (512, 650), (2048, 77 + 1024 + 61 + 1024), (4096, 4372)],
)
def test_prim_dma_latency(nr_bytes: int, cycles: int) -> None:
    assert dma_of(load_profile("upmem-v1a")).copy_cycles(nr_bytes) == cycles


@pytest.mark.parametrize(("name", "page_us"), [("upmem-v1a", 12.49), ("upmem-v1b", 10.93)])
def test_page_time(name: str, page_us: float) -> None:
    ns = load_profile(name).device_ns(one_wave(1, 1)) - 1000 * T_OVH_US
    assert ns == pytest.approx(1000 * page_us, abs=5)


@pytest.mark.parametrize(("nr_dpus", "us"), [(1, 1599), (8, 200), (64, 25)])
def test_128_pages_on_so_many_dpus(nr_dpus: int, us: int) -> None:
    ns = load_profile("upmem-v1a").device_ns(one_wave(128, nr_dpus)) - 1000 * T_OVH_US
    assert ns == pytest.approx(1000 * us, abs=500)


@pytest.mark.parametrize(("nr_pages", "us"), [(32, 47.5), (512, 135)])
def test_batches_of_section_6(nr_pages: int, us: float) -> None:
    ns = load_profile("upmem-v1a").device_ns(one_wave(nr_pages, 64))
    assert ns == pytest.approx(1000 * us, rel=0.002)


def test_break_even_with_one_core() -> None:
    """At 0.384 us per page a core's memcpy loses to 33 DPUs and more, and to 64 DPUs from about 185 pages."""
    page_us = (load_profile("upmem-v1a").device_ns(one_wave(1, 1)) / 1000) - T_OVH_US
    assert page_us / 33 < 0.384 < page_us / 32
    assert T_OVH_US / (0.384 - page_us / 64) == pytest.approx(185, abs=1)


def test_every_wave_beyond_the_first_costs_another_launch() -> None:
    profile = load_profile("upmem-v1a")
    assert profile.device_ns(Work(64, 3, 3, 0)) - profile.device_ns(Work(64, 1, 3, 0)) == 2 * 35_000
    assert profile.device_ns(Work(0, 0, 0, 0)) == 35_000


def test_seed_prints_the_sample_log() -> None:
    seed = load_profile("seed")
    assert seed.device_ns(one_wave(128, 64)) == 234567
    assert seed.device_ns(Work(128, 5, 9, 1)) == 234567
    assert seed.device_ns(one_wave(1, 1)) == 1833
    assert seed.mapping_update_ns(64, 5) == 123456
    assert seed.mapping_update_ns(1, 5) == 1929


def test_host_is_what_was_measured() -> None:
    host = load_profile("host")
    assert host.device_ns(Work(128, 1, 2, 4711)) == 4711
    assert host.mapping_update_ns(64, 815) == 815


def test_mapping_update_is_the_remap_share_of_zen3() -> None:
    for name in ("upmem-v1a", "upmem-v1b"):
        assert load_profile(name).mapping_update_ns(1000, 1) == pytest.approx(1000 * 714 * 0.24, rel=1e-6)


def test_every_constant_is_documented_and_estimates_say_so() -> None:
    assert profile_names() == ["host", "seed", "upmem-v1a", "upmem-v1b"]
    for name in profile_names():
        constants = load_profile(name).constants()
        assert all(len(constant.source) > 5 for constant in constants.values())
        assert not constants["host.result_timeout_us"].calibrated
    assert not load_profile("upmem-v1a").constants()["device.launch_overhead_us"].calibrated
    assert load_profile("upmem-v1a").constants()["device.dma_read_fixed_cycles"].calibrated


def test_chip_limits() -> None:
    limits = {
        "upmem-v1a": (67108864, 65536, 4096 * 6, 24, 350),
        "upmem-v1b": (67108864, 63488, 3968 * 6, 16, 400),
    }
    for name, expected in limits.items():
        chip = load_profile(name).chip
        assert tuple(constant.value for constant in chip.constants().values()) == expected


def test_unknown_profile() -> None:
    with pytest.raises(DpuError) as caught:
        load_profile("../seed")
    assert caught.value.code is DpuErr.INVALID_PROFILE


@pytest.mark.parametrize(
    ("constant", "complaint"),
    [
        ({"value": 1, "unit": "ns", "source": "x"}, "not in ns"),
        ({"value": 0, "unit": "us", "source": "x"}, "above 0"),
    ],
)
def test_a_wrong_unit_or_value_is_refused(constant: dict[str, object], complaint: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=complaint):
        msgspec.convert({"result_timeout_us": constant}, Host)
    assert Host(Constant(1, "us", "x")).result_timeout_us.calibrated
