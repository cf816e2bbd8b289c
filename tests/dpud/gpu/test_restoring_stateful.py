# SPDX-License-Identifier: GPL-2.0-only
"""The same while memory breaks, with the policies that take a client back to its checkpoint, or all of a device's to
another, in the middle of whatever an access is doing.

A multi-page access in whose middle its client went back has done a part of its work before, which is undone, and a part
after. So each of its bytes has to be either that of the checkpoint or that of the access; all others are the
checkpoint's.
"""

import errno

import numpy as np
import pytest
from effort import examples
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import invariant, rule
from test_data_path_stateful import Model
from test_fault_stateful import BreakingPath

from dpud.gpu.errors import GpuError
from dpud.gpu.fault import pages
from dpud.gpu.fault.recovery import Policy


class RestoringPath(BreakingPath):
    """Clients go back, and the models with them."""

    def __init__(self) -> None:
        self.gone_back: set[str] = set()
        super().__init__()
        self.fault.recovery.roll_back = self.fault.failover.roll_back = self.noted

    def noted(self, client: str) -> bool:
        done = self.fault.go_back(client)
        if done:
            self.gone_back.add(client)
        return done

    @rule(policy=st.sampled_from(list(Policy)))
    def choose(self, policy: Policy) -> None:
        self.fault.recovery.policy = policy

    @rule(spare=st.sampled_from([None, 0, 1]))
    def name_a_spare(self, spare: int | None) -> None:
        self.fault.failover.spare = spare

    @invariant()
    def models_follow(self) -> None:
        """After each step: those that went back meanwhile."""
        for client in sorted(self.gone_back):
            self.went_back(client)
        self.gone_back.clear()

    def saw(self, model: Model, start: int, data: bytes) -> None:
        old = bytes(model.data[start : start + len(data)])
        if model.owner not in self.gone_back:
            assert data == old
            return
        then = self.snapshots.get(model.owner, {}).get(model.va, bytes(len(model.data)))[start : start + len(data)]
        assert is_mix(data, old, then)

    def wrote(self, model: Model, start: int, data: bytes) -> None:
        if model.owner not in self.gone_back:
            super().wrote(model, start, data)
            return
        self.models_follow()
        if model not in self.models:
            return
        region = self.memory.space.regions.find(model.va)
        assert region is not None
        for page in range(start // model.page, -(-(start + len(data)) // model.page)):
            low, high = max(start, page * model.page), min(start + len(data), (page + 1) * model.page)
            try:
                row = pages.load(self.memory, region, np.array([page]))[0].tobytes()
            except GpuError as error:
                self.expect(error.errno in (errno.EIO, errno.ENOMEM))
                continue  # it is lost, and only a write of all of it will be seen again
            if model.owner in self.gone_back:
                return  # once more, by looking
            now = row[low - page * model.page : high - page * model.page]
            assert is_mix(now, bytes(model.data[low:high]), data[low - start : high - start])
            model.data[low:high] = now

    def may_have_none(self, client: str, error: GpuError) -> bool:
        """Also because it went back meanwhile: whoever reads a page may find it broken."""
        went_back = client in self.gone_back
        return super().may_have_none(client, error) or (went_back and error.errno in (errno.EAGAIN, errno.ENOMEM))

    def look(self, model: Model, start: int) -> None:
        if model in self.models:
            super().look(model, start)
            self.models_follow()


def is_mix(data: bytes, one: bytes, other: bytes) -> bool:
    """Whether each byte is that of one of two."""
    found, first, second = (np.frombuffer(each, dtype=np.uint8) for each in (data, one, other))
    return bool(((found == first) | (found == second)).all())


TestRestoringPath = RestoringPath.TestCase
TestRestoringPath.settings = settings(max_examples=examples(25), stateful_step_count=30, deadline=None)
TestRestoringPath.pytestmark = [pytest.mark.slow]
