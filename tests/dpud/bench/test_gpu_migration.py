# SPDX-License-Identifier: GPL-2.0-only
"""The benchmark of migration: the simulated grid, and one real run over a limited link, small."""

import pytest

from dpud.bench.gpu import veth
from dpud.bench.gpu.lent import kernel_can
from dpud.bench.gpu.migration import grid_line, one_run
from dpud.gpu.migration.converge import Strategy


def test_a_row_holds_ours_against_the_recurrence() -> None:
    line = grid_line(0.3, nr_pages=512)
    ratio, rounds, total, *_ = line.cells()
    assert ratio == "0.3"
    assert rounds == "2, 2"
    ours, theirs = (float(cell) for cell in total.split(",")[:2])
    assert ours == pytest.approx(theirs, rel=0.05)


@pytest.mark.slow
@pytest.mark.host
@pytest.mark.skipif(bool(veth.why_not()) or not kernel_can(), reason="no root, no ip, no tc, or no WP_ASYNC")
def test_a_real_writer_is_down_for_less_than_if_it_were_stopped_first() -> None:
    """A tenth of 32 MiB is written to; at 200 Mbit/s the whole of it takes at least a second."""
    with veth.link(200) as link:
        stopped = one_run(link, Strategy.STOP_AND_COPY, 32 << 20, 500.0)
        live = one_run(link, Strategy.PRECOPY, 32 << 20, 500.0)
    assert stopped["same"]
    assert live["same"]
    assert stopped["downtime_ns"] > 900_000_000
    assert live["downtime_ns"] < stopped["downtime_ns"]
