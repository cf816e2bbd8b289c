# SPDX-License-Identifier: GPL-2.0-only
"""Figures typed in from reference dpu.md sections 2.1 and 6, independent of the profile files."""

import msgspec
import pytest

from dpud.dpu.errors import DpuErr, DpuError
from dpud.dpu.profile import Channels, Constant, Dma, Host, Profile, Work, load_cpu, load_profile, profile_names
from kernelsim.dpu_hw import BatchTimes, HostWork

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


ENGINES = ["cpu", "cpu-batched", "dsa", "host", "ideal", "ptdma", "seed", "upmem-v1a", "upmem-v1b"]


def test_every_constant_is_documented_and_estimates_say_so() -> None:
    assert profile_names() == ENGINES
    for name in profile_names():
        profile = load_profile(name)
        assert (profile.name, len(profile.doc) > 20) == (name, True)
        constants = profile.constants()
        assert all(len(constant.source) > 5 for constant in constants.values())
        if profile.copier == "device":
            assert not constants["host.result_timeout_us"].calibrated
    assert not load_profile("upmem-v1a").constants()["device.launch_overhead_us"].calibrated
    assert load_profile("upmem-v1a").constants()["device.dma_read_fixed_cycles"].calibrated
    assert not load_profile("dsa").constants()["device.descriptor_ns"].calibrated
    assert not load_profile("cpu").constants()["cpu.scan.free_scan_ns"].calibrated


def test_what_was_fitted_says_to_what() -> None:
    fitted = {
        name: {key for key, constant in load_cpu(name).constants().items() if constant.fitted_to}
        for name in ("zen3-2025", "haswell-2019")
    }
    both = {"metadata.metadata_ns", "copy.bandwidth_bytes_per_ns"}
    assert fitted["zen3-2025"] == both | {"threads.serial_ns", "threads.shared_ns"}
    assert fitted["haswell-2019"] == both | {"copy.start_ns", "call.fixed_ns"}
    assert {name for name, constant in load_profile("ptdma").constants().items() if constant.fitted_to} >= {
        "device.serial_ns",
        "device.shared_ns",
    }


@pytest.mark.parametrize(
    ("name", "metadata_us", "page_us"), [("zen3-2025", 0.714, 1.098), ("haswell-2019", 2.73, 4.80)]
)
def test_cpu_profiles_of_section_6(name: str, metadata_us: float, page_us: float) -> None:
    cpu = load_cpu(name)
    assert cpu.metadata.metadata_ns.value == 1000 * metadata_us
    assert cpu.migrate_ns(512) / 512 == pytest.approx(1000 * page_us, rel=0.002)
    shares = cpu.metadata.constants()
    assert sum(constant.value for key, constant in shares.items() if key.endswith("percent")) == 100


@pytest.mark.parametrize(("nr_cpus", "us"), [(1, 1.0), (4, 1.6), (64, 13.6), (256, 52.0)])
def test_tlb_shootdown(nr_cpus: int, us: float) -> None:
    """1 + 0.2 (c - 1); measured were 1.6, 14 and 50 us for 4, 64 and 256 cores."""
    assert load_cpu("zen3-2025").tlb.ns(nr_cpus) == pytest.approx(1000 * us)


def test_scanning_as_linux_does_it() -> None:
    """2.17 and 18.1 frames a page at 30 ns; with batches of 32 and 32 CPUs, 512 pages come to 0.99 ms."""
    cpu = load_cpu("zen3-2025")
    assert cpu.scan_ns(1) == pytest.approx(30 * 20.27)
    total_ns = cpu.migrate_ns(512) + 512 / 32 * cpu.tlb.ns(32) + cpu.scan_ns(512)
    assert total_ns == pytest.approx(990_000, rel=0.01)


@pytest.mark.parametrize(
    ("nr_channels", "gb_per_s"), [(1, 2.74), (2, 3.49), (4, 4.04), (8, 4.39), (12, 4.51), (16, 4.58)]
)
def test_ptdma_of_section_6(nr_channels: int, gb_per_s: float) -> None:
    device = load_profile("ptdma").device
    assert isinstance(device, Channels)
    assert 4096 / (714 + device.page_ns(nr_channels)) == pytest.approx(gb_per_s, abs=0.006)
    assert load_profile("ptdma").device_ns(one_wave(100, 64)) == 100 * 180


def test_dsa_of_section_6() -> None:
    """0.9 us for each batch of 128 descriptors; 4.096 us / 22 = 0.186 us a page, more than the 0.1 of a descriptor."""
    dsa = load_profile("dsa")
    assert dsa.device_ns(one_wave(128, 1)) == pytest.approx(900 + 128 * 186.18, abs=1)
    assert dsa.device_ns(one_wave(129, 1)) == pytest.approx(1800 + 129 * 186.18, abs=1)


def test_ideal_takes_no_time_to_copy_and_the_cpu_s_to_do_the_rest() -> None:
    ideal = load_profile("ideal")
    assert ideal.device_ns(Work(512, 4, 8, 5000)) == 0
    times = ideal.times(HostWork(nr_folios=512, nr_scanned=512, nr_flushes=2, nr_cpus=4, nr_ptes=512), 0)
    assert times == BatchTimes(512 * 30, round(512 * 714 * 0.53), 3200, 0, round(512 * 714 * 0.47))


def test_a_whole_batch_of_the_cpu() -> None:
    cpu = load_profile("cpu")
    assert (cpu.copier, load_profile("cpu-batched").copier) == ("cpu", "cpu-batched")
    assert cpu.copy_ns(512, 7) == pytest.approx(197_000, rel=0.005)
    work = HostWork(nr_folios=512, nr_scanned=0, nr_flushes=0, nr_cpus=1, nr_ptes=512)
    assert cpu.times(work, cpu.copy_ns(512, 7)).total_ns == pytest.approx(512 * 1098, rel=0.002)


def test_the_seed_knows_moves_and_ptes_only_and_host_knows_what_it_took() -> None:
    work = HostWork(128, 512, 1, 4, 64, prepare_wall_ns=11, update_wall_ns=22)
    assert load_profile("seed").times(work, 234567) == BatchTimes(0, 0, 0, 234567, 123456)
    assert load_profile("host").times(work, 33) == BatchTimes(11, 0, 0, 33, 22)


def test_chip_limits() -> None:
    limits = {
        "upmem-v1a": (67108864, 65536, 4096 * 6, 24, 350),
        "upmem-v1b": (67108864, 63488, 3968 * 6, 16, 400),
    }
    for name, expected in limits.items():
        chip = load_profile(name).chip
        assert chip is not None
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
