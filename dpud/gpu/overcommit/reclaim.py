# SPDX-License-Identifier: MIT
"""Whose pages leave a device's memory first.

The lowest priority first, and none above the priority that asks. Within one: clients that accessed nothing for IDLE_NS,
the longest idle first, all they have; then the others, each in proportion to what it has there. What a client has
reserved is left alone. (Which of a client's pages go is the replacement policy's business.)
"""

from collections.abc import Iterable, Iterator

from dpud.gpu.overcommit.account import Account

IDLE_NS = 2_000_000_000


def reclaim_order(
    accounts: Iterable[Account], need_bytes: int, for_priority: int, now_ns: int
) -> list[tuple[str, int]]:
    """(client, bytes) until there are `need_bytes`, or nobody is left."""
    found: list[tuple[str, int]] = []
    candidates = [each for each in accounts if each.priority <= for_priority and takeable_bytes(each) > 0]
    for priority in sorted({account.priority for account in candidates}):
        same = [account for account in candidates if account.priority == priority]
        for client, nr_bytes in _within(same, need_bytes, now_ns):
            found.append((client, nr_bytes))
            need_bytes -= nr_bytes
        if need_bytes <= 0:
            break
    return found


def takeable_bytes(account: Account) -> int:
    """What a client has in memory beyond its reservation."""
    return max(0, account.nr_resident - account.reservation_bytes)


def _within(accounts: list[Account], need_bytes: int, now_ns: int) -> Iterator[tuple[str, int]]:
    """Shares of clients of one priority."""
    active = []
    for account in sorted(accounts, key=lambda each: (each.active_ns, each.client)):
        if now_ns - account.active_ns < IDLE_NS:
            active.append(account)
        elif need_bytes > 0:
            taken = min(need_bytes, takeable_bytes(account))
            need_bytes -= taken
            yield account.client, taken
    total = sum(map(takeable_bytes, active))
    need_bytes = min(need_bytes, total)
    for account in active:
        has = takeable_bytes(account)
        share = -(-need_bytes * has // total)
        total -= has
        need_bytes -= share
        if share > 0:
            yield account.client, share
