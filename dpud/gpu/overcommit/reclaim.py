# SPDX-License-Identifier: MIT
"""Whose pages leave a device's memory first.

The lowest priority first, and none above the priority that asks. Within one: clients that accessed nothing for IDLE_NS,
the longest idle first, all they have; then the others, each in proportion to what it has there. What a client has
reserved is left alone. (Which of a client's pages go is the replacement policy's business.)
"""

from collections.abc import Iterable, Iterator, Mapping

from dpud.gpu.overcommit.account import Account

IDLE_NS = 2_000_000_000


def reclaim_order(
    accounts: Iterable[Account], need_bytes: int, for_priority: int, now_ns: int, resident: Mapping[str, int]
) -> list[tuple[str, int]]:
    """(client, bytes) until there are `need_bytes`, or nobody is left. `resident`: what each client has there now."""
    takeable = {each: max(0, resident.get(each.client, 0) - each.reservation_bytes) for each in accounts}
    found: list[tuple[str, int]] = []
    candidates = [each for each, nr_bytes in takeable.items() if each.priority <= for_priority and nr_bytes > 0]
    for priority in sorted({account.priority for account in candidates}):
        same = {each: takeable[each] for each in candidates if each.priority == priority}
        for client, nr_bytes in _within(same, need_bytes, now_ns):
            found.append((client, nr_bytes))
            need_bytes -= nr_bytes
        if need_bytes <= 0:
            break
    return found


def _within(takeable: dict[Account, int], need_bytes: int, now_ns: int) -> Iterator[tuple[str, int]]:
    """Shares of clients of one priority."""
    active = []
    for account in sorted(takeable, key=lambda each: (each.active_ns, each.client)):
        if now_ns - account.active_ns < IDLE_NS:
            active.append(account)
        elif need_bytes > 0:
            taken = min(need_bytes, takeable[account])
            need_bytes -= taken
            yield account.client, taken
    total = sum(takeable[account] for account in active)
    need_bytes = min(need_bytes, total)
    for account in active:
        has = takeable[account]
        share = -(-need_bytes * has // total)
        total -= has
        need_bytes -= share
        if share > 0:
            yield account.client, share
