# SPDX-License-Identifier: GPL-2.0-only
"""`dpud bench hostile` in short: what hostile clients get, and that the daemon is what it was. No timing decides."""

import os
from collections.abc import Iterator

import pytest
from emulated import Emulated, emulated, has_fuse

from dpud.bench.hostile import CLIENTS, client, rss_bytes, use
from fs.shares import MAX_TEXT_BYTES

pytestmark = [
    pytest.mark.mount,
    pytest.mark.slow,
    pytest.mark.skipif(os.geteuid() != 0 or not has_fuse(), reason="mounts with allow_other and changes users"),
]

MIB = 1 << 20
SECONDS = 0.3
REFUSED = {
    "opened_only": set[str](),
    "begun": {"ENOMEM"},
    "blocked": set[str](),
    "polled": set[str](),
    "odd_calls": {"ENOTTY", "ENODEV", "EINVAL", "EACCES", "EPERM", "EAGAIN"},
    "listing": set[str](),
    "names": {"ENOENT", "ENAMETOOLONG"},
    "logging": {"EINVAL"},
    "making": set[str](),
    "buffers": {"ENOSPC"},
}
"""With what each may be refused; a kernel's errno for it."""
HELD = {"opened_only": 10_000, "begun": 500, "blocked": 1_000, "polled": 1_000, "listing": 1_000, "making": 1}
GROWTH_MIB = {"opened_only": 60, "begun": 40 + MAX_TEXT_BYTES / MIB, "blocked": 250, "listing": 60, "making": 60} | {
    "buffers": 30 + 64  # the bytes are there
}
"""What the daemon may take more for it; 30 else."""


@pytest.fixture(scope="module")
def dpud() -> Iterator[Emulated]:
    with emulated() as found:
        use(found.mnt, 0.1)
        yield found


@pytest.mark.parametrize("job", CLIENTS)
def test_a_client_that_means_ill(dpud: Emulated, job: str) -> None:
    before = rss_bytes(dpud.daemon.pid)
    with client(dpud.mnt, job, CLIENTS[job][1], SECONDS) as hostile:
        seen_by_other = use(dpud.mnt, SECONDS / 2)
        grown = rss_bytes(dpud.daemon.pid) - before
        seen = hostile()
    assert (seen_by_other["wrong"], bool(seen_by_other["reads"])) == ([], True)
    assert set(seen["errors"]) <= REFUSED[job]
    assert seen["nr_held"] >= HELD.get(job, 0)
    assert grown <= GROWTH_MIB.get(job, 30) * MIB
    assert dpud.daemon.poll() is None
    assert dpud.text("/proc/buddyinfo").startswith("Node 0, zone")
