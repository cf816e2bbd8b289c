# SPDX-License-Identifier: GPL-2.0-only
"""Anything that can be done on the data path, while memory breaks: no read gives a byte that was not written."""

import errno
import tempfile
from pathlib import Path as Folder

from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule
from small import attempt
from test_data_path_stateful import CLIENTS, FRACTIONS, Model, Path

from dpud.gpu.address_space.permissions import Permission
from dpud.gpu.address_space.regions import PageState
from dpud.gpu.errors import GpuError, HalfBack
from dpud.gpu.fault.module import FaultModule
from dpud.gpu.fault.recovery import Policy

# Those that may take a client back to a checkpoint in the middle of an access are left out: what a multi-page write
# that began before it leaves is nothing that a model could say.
POLICIES = st.sampled_from([Policy.RETRY, Policy.REMAP, Policy.MIGRATE])
SEEDS = st.integers(0, 1000)


class BreakingPath(Path):
    """The same, and what can break."""

    may_fail = (errno.EIO, errno.ENODEV)

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.fault = FaultModule(self.memory, None, Folder(self.folder.name))
        self.fault.failover.roll_back = lambda _client: False  # test_restoring_stateful.py has that
        self.snapshots: dict[str, dict[int, bytes]] = {}

    def judge(self, model: Model, client: str, start: int, end: int, wanted: Permission, number: int) -> None:
        """EIO only where bytes are known to be lost, ENODEV only where a device is."""
        region = self.memory.space.regions.find(model.va)
        assert region is not None
        lost = (region.state[start // model.page : -(-end // model.page)] == PageState.CORRUPT).any()
        if number == errno.EIO:
            assert lost
        elif number == errno.ENODEV:
            assert any(location.is_lost for location in self.memory.locations)
        else:
            super().judge(model, client, start, end, wanted, number)

    @rule(policy=POLICIES)
    def choose(self, policy: Policy) -> None:
        self.fault.recovery.policy = policy

    @rule(
        seed=SEEDS,
        gpu=st.integers(0, 2),
        bits=st.integers(1, 4),
        nr=st.integers(1, 5),
        stuck=st.sampled_from(["", " stuck=0", " stuck=1"]),
    )
    def flip(self, seed: int, gpu: int, bits: int, nr: int, stuck: str) -> None:
        number = attempt(self.fault.inject, f"bit gpu={gpu} bits={bits} nr={nr} seed={seed}{stuck}")
        assert number in (0, errno.ENODEV)

    @rule(seed=SEEDS, gpu=st.integers(0, 2), kind=st.sampled_from(["row", "bank"]))
    def smash(self, seed: int, gpu: int, kind: str) -> None:
        assert attempt(self.fault.inject, f"{kind} gpu={gpu} seed={seed}") in (0, errno.ENODEV)

    @rule(gpu=st.integers(0, 1), how=st.sampled_from(["lose", "drain", "reset", "reset"]))
    def whole_device(self, gpu: int, how: str) -> None:
        location = self.memory.locations[gpu]
        if not location.is_lost or how == "reset":
            {"lose": self.fault.lose, "drain": self.fault.drain, "reset": self.fault.reset}[how](location)

    @rule(nr_bytes=st.integers(1, 1 << 21))
    def scrub(self, nr_bytes: int) -> None:
        self.fault.scrubber.scrub(nr_bytes)

    @rule(client=st.sampled_from(CLIENTS), full=st.booleans())
    def checkpoint(self, client: str, full: bool) -> None:
        if client not in self.memory.clients:
            return
        try:
            self.fault.checkpoints.create(client, full)
        except GpuError as error:
            self.expect(self.may_have_none(client, error))
            return
        self.snapshots[client] = {model.va: bytes(model.data) for model in self.models if model.owner == client}

    def may_have_none(self, client: str, error: GpuError) -> bool:
        """Why no checkpoint can be made."""
        regions = [region for region in self.memory.space.regions if region.client == client]
        return error.errno == errno.EIO and any(region.count(PageState.CORRUPT) for region in regions)

    @precondition(lambda self: self.snapshots)
    @rule(which=FRACTIONS)
    def go_back(self, which: float) -> None:
        client = sorted(self.snapshots)[int(which * len(self.snapshots))]
        try:
            if self.fault.is_held(client):
                assert not self.fault.roll_back(client)
                return
            assert self.fault.roll_back(client)
        except HalfBack as error:
            self.expect(error.errno == errno.ENOMEM)  # pinned memory, of a host that is full
        self.went_back(client)

    def went_back(self, client: str) -> None:
        """Its bytes are as they were, but for pages that are lost: reading those is EIO."""
        for model in self.models:
            if model.owner == client:
                model.data[:] = self.snapshots.get(client, {}).get(model.va, bytes(len(model.data)))

    def free_model(self, model: Model) -> None:
        self.memory.free(model.va, model.owner)
        self.models.remove(model)
        for snapshot in self.snapshots.values():
            snapshot.pop(model.va, None)

    @precondition(lambda self: self.models)
    @rule(which=FRACTIONS)
    def free(self, which: float) -> None:
        model = self.pick(which)
        self.free_model(model)
        assert attempt(self.memory.read, model.owner, model.va, 1) in (errno.EFAULT, errno.ENODEV)

    def teardown(self) -> None:
        for model in list(self.models):
            for start in range(0, len(model.data), model.page):
                self.look(model, start)
        super().teardown()
        self.folder.cleanup()

    def look(self, model: Model, start: int) -> None:
        """At one page, from the host."""
        nr_bytes = min(model.page, len(model.data) - start)
        number = attempt(self.memory.protect, model.owner, model.va, len(model.data), Permission.READ)
        assert number == 0
        try:
            self.saw(model, start, self.memory.read(model.owner, model.va + start, nr_bytes, 2))
        except GpuError as error:
            self.expect(error.errno in (errno.EIO, errno.ENOMEM))


TestBreakingPath = BreakingPath.TestCase
TestBreakingPath.settings = settings(max_examples=examples(25), stateful_step_count=30, deadline=None)
