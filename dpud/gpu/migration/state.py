# SPDX-License-Identifier: MIT
"""Where a migration is: QEMU's names of its states (MigrationStatus, qapi/migration.json), and what may follow what.

Differs from QEMU: `postcopy-recover-setup`, `pre-switchover` and `colo` do not exist here. A pre-copy whose last word
was lost waits in `device` until both sides agree who owns the pages; QEMU leaves that to who manages it.
"""

import errno
from dataclasses import dataclass, field
from enum import StrEnum

from dpud.gpu.errors import GpuError


class State(StrEnum):
    NONE = "none"
    """There was no migration yet."""
    SETUP = "setup"
    ACTIVE = "active"
    """Pages go over while their client runs."""
    DEVICE = "device"
    """The client is held; what is left goes over; who owns it is being settled."""
    POSTCOPY_ACTIVE = "postcopy-active"
    """The client runs over there; the rest follows."""
    POSTCOPY_PAUSED = "postcopy-paused"
    """The same, and the connection is lost."""
    POSTCOPY_RECOVER = "postcopy-recover"
    COMPLETED = "completed"
    FAILING = "failing"
    FAILED = "failed"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"


NEXT: dict[State, frozenset[State]] = {
    State.NONE: frozenset({State.SETUP}),
    State.SETUP: frozenset({State.ACTIVE, State.DEVICE, State.FAILING, State.CANCELLING}),
    State.ACTIVE: frozenset({State.DEVICE, State.FAILING, State.CANCELLING}),
    State.DEVICE: frozenset({State.POSTCOPY_ACTIVE, State.COMPLETED, State.FAILING, State.CANCELLING}),
    State.POSTCOPY_ACTIVE: frozenset({State.POSTCOPY_PAUSED, State.COMPLETED, State.FAILING}),
    State.POSTCOPY_PAUSED: frozenset({State.POSTCOPY_RECOVER, State.FAILING}),
    State.POSTCOPY_RECOVER: frozenset({State.POSTCOPY_ACTIVE, State.POSTCOPY_PAUSED, State.COMPLETED, State.FAILING}),
    State.FAILING: frozenset({State.FAILED}),
    State.CANCELLING: frozenset({State.CANCELLED, State.FAILING}),
    State.COMPLETED: frozenset(),
    State.FAILED: frozenset(),
    State.CANCELLED: frozenset(),
}

OVER = frozenset(state for state, following in NEXT.items() if not following)


class Cancelled(GpuError):
    """Somebody asked for it."""

    def __init__(self) -> None:
        super().__init__(errno.ECANCELED, "cancelled")


@dataclass
class Progress:
    """What anybody may read at any time. Times in ns, bytes as they went over."""

    id: str
    client: str
    target: str
    total_bytes: int = 0
    state: State = State.NONE
    begin_ns: int = 0
    end_ns: int = 0
    rounds: int = 0
    moved_bytes: int = 0
    """On the way or there."""
    moved_pages: int = 0
    zero_pages: int = 0
    delta_pages: int = 0
    round_pages: list[int] = field(default_factory=list)
    """Sent in each round, the last one, for which the client was held, among them."""
    remaining_bytes: int = 0
    dirty_bytes_per_s: int = 0
    bandwidth_bytes_per_s: int = 0
    """As measured in the last round."""
    throttle_percent: int = 0
    downtime_ns: int = 0
    expected_downtime_ns: int = 0
    postcopy_requests: int = 0
    strategy: str = ""
    """Which was taken, once that is known."""
    why: str = ""
    """Of the choice, or of the failure."""
    digest: str = ""
    history: list[tuple[int, State]] = field(default_factory=list)

    def to(self, state: State, now_ns: int) -> None:
        """The next state."""
        assert state in NEXT[self.state], f"{self.state} to {state}"
        self.state = state
        self.history.append((now_ns, state))
        if state in OVER:
            self.end_ns = now_ns

    @property
    def is_over(self) -> bool:
        return self.state in OVER

    def line(self, now_ns: int) -> str:
        """The columns of `progress` and `history`, see COLUMNS."""
        total_ms = ((self.end_ns or now_ns) - self.begin_ns) // 1_000_000
        cells = (
            self.id,
            self.client,
            self.target,
            self.state,
            self.strategy or "-",
            self.rounds,
            self.total_bytes,
            self.moved_bytes,
            self.remaining_bytes,
            self.dirty_bytes_per_s,
            self.bandwidth_bytes_per_s,
            self.throttle_percent,
            total_ms,
            f"{self.downtime_ns / 1e6:.3f}",
        )
        return " ".join(map(str, cells))


COLUMNS = (
    "id client target state strategy rounds total_bytes moved_bytes remaining_bytes dirty_bytes_per_s"
    " bandwidth_bytes_per_s throttle_percent total_ms downtime_ms"
)
