# SPDX-License-Identifier: GPL-2.0-only
"""The C names of quality of service: arguments, return values, errors, and the configurations of the seed."""

import errno
from collections.abc import Iterator

import numpy as np
import pytest

from dpud.gpu import facade

MIB = 1 << 20
SEED_CONFIGURATIONS = (
    (20000, facade.BANDWIDTH_POLICY_FAIR),
    (10000, facade.BANDWIDTH_POLICY_PRIORITY),
    (15000, facade.BANDWIDTH_POLICY_ADAPTIVE),
)


@pytest.fixture(autouse=True)
def clean() -> Iterator[None]:
    yield
    facade.cleanup_memory_qos()
    facade.cleanup_swap_system()


def with_memory(nr_bytes: int = 4 * MIB) -> tuple[int, bytes]:
    assert facade.init_swap_system(16 * MIB, 4096, 0.8) == 0
    pointer = facade.allocate_gpu_memory(nr_bytes)
    assert pointer is not None
    data = np.random.default_rng(3).bytes(nr_bytes)
    facade.write_memory(pointer, data)
    return pointer, data


@pytest.mark.slow
@pytest.mark.parametrize(("mbps", "policy"), SEED_CONFIGURATIONS)
@pytest.mark.parametrize("qos_first", [True, False])
def test_the_seed_s_configurations(mbps: int, policy: str, qos_first: bool) -> None:
    if qos_first:
        assert facade.init_memory_qos(mbps, policy) == 0
    pointer, data = with_memory()
    if not qos_first:
        assert facade.init_memory_qos(mbps, policy) == 0
    for client in range(8):
        level = client % 5
        assert facade.submit_memory_request(pointer, MIB, facade.ACCESS_TYPE_READ, level, client) == 0
        assert facade.submit_memory_request(pointer + MIB, MIB, facade.ACCESS_TYPE_WRITE, level, client) == 0
    stats = facade.get_qos_stats()
    assert (stats["total_mbps"], stats["policy"]) == (mbps, policy)
    assert {name: row["bytes"] for name, row in stats["clients"].items() if name != "facade"} == {
        f"client-{client}": 3 * MIB for client in range(8)
    }
    assert facade.read_memory(pointer, len(data)) == data


def order(policy: str) -> list[int]:
    """Levels of requests, in the order in which they moved their bytes: 4 clients, a level each, at 10 MB/s."""
    assert facade.init_memory_qos(10, policy) == 0
    pointer, _ = with_memory()
    memory, seen = facade.the_memory(), []
    for _ in range(3):
        for level in (3, 2, 1, 0):
            assert facade.submit_memory_request(pointer, MIB, facade.ACCESS_TYPE_READ, level, level) == 0
    before = memory.residency.traffic.charge

    def charge(client: str, cause: object, nr_bytes: int, location: int) -> None:
        before(client, cause, nr_bytes, location)  # type: ignore[arg-type]
        seen.append(level_moved())

    counts = dict.fromkeys(range(5), 0)

    def level_moved() -> int:
        stats = memory.residency.traffic.nr_bytes  # type: ignore[attr-defined]
        now = {level: sum(nr for (name, _), nr in stats.items() if name == f"client-{level}") for level in range(5)}
        moved = next(level for level in range(5) if now[level] != counts[level])
        counts.update(now)
        return moved

    memory.residency.traffic.charge = charge  # type: ignore[method-assign]
    assert facade.process_memory_requests() == 12
    return seen


@pytest.mark.slow
def test_fair_takes_turns() -> None:
    assert order(facade.BANDWIDTH_POLICY_FAIR) == [3, 2, 1, 0] * 3


@pytest.mark.slow
def test_priority_does_the_most_important_first() -> None:
    assert order(facade.BANDWIDTH_POLICY_PRIORITY) == [0] * 3 + [1] * 3 + [2] * 3 + [3] * 3


@pytest.mark.slow
def test_adaptive_begins_fair_and_then_does_what_the_missed_target_needs() -> None:
    found = order(facade.BANDWIDTH_POLICY_ADAPTIVE)
    assert found[0] == 3
    last = {level: 11 - found[::-1].index(level) for level in range(4)}
    assert last[0] < last[1] < last[3]


def test_limits_are_megabytes_a_second() -> None:
    assert facade.init_memory_qos(1000, facade.BANDWIDTH_POLICY_FAIR) == 0
    pointer, _ = with_memory()
    assert facade.set_client_qos(7, limit_mbps=2) == 0
    begin = facade.the_memory().clock.now_ns()
    for _ in range(10):
        assert facade.submit_memory_request(pointer, 1_000_000, facade.ACCESS_TYPE_READ, 2, 7) == 0
    facade.process_memory_requests()
    assert facade.the_memory().clock.now_ns() - begin == pytest.approx(
        4.5e9, rel=0.02
    )  # 10 MB, the first from the burst


def test_errors() -> None:
    assert facade.get_qos_stats() == {}
    assert facade.submit_memory_request(0, 1, 0, 0, 0) == -1
    assert facade.last_error() == errno.ENODEV
    assert facade.init_memory_qos(0, facade.BANDWIDTH_POLICY_FAIR) == -1
    assert facade.last_error() == errno.EINVAL
    assert facade.init_memory_qos(100, "random") == -1
    assert facade.last_error() == errno.EINVAL
    assert facade.init_memory_qos(100, facade.BANDWIDTH_POLICY_FAIR) == 0
    assert facade.init_memory_qos(100, facade.BANDWIDTH_POLICY_FAIR) == -1
    assert facade.last_error() == errno.EBUSY
    assert facade.submit_memory_request(4096, 1, 0, 0, 0) == -1
    assert facade.last_error() == errno.ENODEV
    pointer, data = with_memory()
    assert [
        facade.submit_memory_request(*call) for call in ((pointer, len(data) + 4096, 0, 0, 0), (1, 1, 0, 0, 0))
    ] == [-1, -1]
    assert facade.last_error() == errno.EFAULT
    for call in ((pointer, 0, 0, 0, 0), (pointer, 1, 2, 0, 0), (pointer, 1, 0, 5, 0)):
        assert facade.submit_memory_request(*call) == -1
        assert facade.last_error() == errno.EINVAL
    assert facade.set_client_qos(1, reservation_mbps=101) == -1
    assert facade.last_error() == errno.EBUSY


def test_statistics_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    facade.init_memory_qos(100, facade.BANDWIDTH_POLICY_PRIORITY)
    pointer, _ = with_memory()
    facade.submit_memory_request(pointer, 4096, facade.ACCESS_TYPE_READ, facade.QOS_LEVEL_HIGH, 3)
    facade.get_qos_stats()
    printed = capsys.readouterr().out
    assert printed.startswith("Memory QoS: 100 MB/s, priority\n")
    assert "client-3" in printed


def test_after_cleanup_nothing_is_paced() -> None:
    facade.init_memory_qos(1, facade.BANDWIDTH_POLICY_FAIR)
    facade.cleanup_memory_qos()
    with_memory()
    assert facade.the_memory().clock.now_ns() < 1_000_000_000
