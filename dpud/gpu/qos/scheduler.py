# SPDX-License-Identifier: MIT
"""Who moves bytes next: mClock over a hierarchy of token buckets.

Theory of operation
    Requests wait in their client's queue, the most important level first. One is granted whenever the bucket of the
    total lets it pass; which one is mClock's rule (Gulati, Merchant, Varman, OSDI 2010, algorithm 1):

        1. by constraint: of the clients whose reservation entitles them to a request by now, the one whose entitlement
           (R tag) is the oldest;
        2. by weight: else, of those whose buckets let it pass, the one that was served the least for its share (P tag),
           in the first lane that the policy makes of the levels. It does not count against the reservation.

    In either case the client's limit (L tag) has to let it pass: it is a bucket of its own. By weight, the level's
    bucket has to as well, and the caps of the levels above (guard.py). So the hierarchy is
    total -> caps of the levels above -> level -> client. What was reserved passes levels and caps.

    Nothing runs by itself: whoever waits calls `grant` with the time until it gives nothing more, and again at
    `next_ns`. Every time that comes late is made up for: buckets and tags are moments, not intervals.

Invariants
    - A client gets its reservation in any span in which it always has requests, less two of the largest, as long as
      all reservations together are at most the total, and but for what is owed: those bytes have moved already.
    - In any window of T at most limit * T + max(burst, largest request) bytes are granted to a client. The same is true
      of the total, and of a level but for what was reserved.
    - Decisions depend on nothing but the calls made here and the times given: `log` has all of them (decisions.py).

Differs from the paper
    - Requests have sizes, so a tag grows by the size of the request before it. Tags are given when a request is the
      first of its queue, so that a limit that is lifted is lifted at once.
    - The paper gives a client that was idle the smallest P tag there is. Where one client is held back by its limit,
      that is a tag of long ago. Here it is the P tag served last. Who is held back goes first whenever he may; when
      what held him back is lifted, he begins anew.
    - An R tag may be older than its request, though not than the time since which the client has always had requests:
      what a server that is late owes to a client does not depend on how many requests that keeps outstanding.
    - The limit is strict: it holds for what is reserved too.
"""

from collections import Counter
from typing import Protocol

from dpud.gpu.qos.bucket import NS_PER_S, Bucket
from dpud.gpu.qos.flow import NR_LEVELS, Flow, Request
from dpud.gpu.qos.guard import PERIOD_NS, Load, Period
from dpud.gpu.qos.levels import Level, LevelStat
from dpud.gpu.qos.policy import DEFAULT_POLICY, POLICIES
from dpud.gpu.traffic import Cause


class Log(Protocol):
    """Who is told every input and every decision: a word, a time, and what belongs to it."""

    def add(self, scheduler: "Scheduler", *fields: object) -> None: ...


class Scheduler:
    """Requests in, grants out. Times are passed in and never go back."""

    def __init__(self, log: Log | None = None) -> None:
        self.total = Bucket()
        self.levels = [Level(number) for number in range(NR_LEVELS)]
        self.flows: dict[str, Flow] = {}
        self.policy = POLICIES[DEFAULT_POLICY]
        self.virtual = [0] * NR_LEVELS
        """P tag served last, in each lane."""
        self.next_number = 0
        self.ticked_ns = 0
        self.log = log
        self.stats = [LevelStat() for _ in self.levels]
        self.granted_bytes: Counter[str] = Counter()
        self.counts: Counter[str] = Counter(dict.fromkeys(("by_constraint", "by_weight", "owed", "cancelled"), 0))
        self._waiting: dict[str, Flow] = {}
        self._passed_over: tuple[int, Flow | None] = (0, None)
        """When, and whose turn it was while the total was used up."""

    def note(self, *fields: object) -> None:
        """Something changes."""
        self._passed_over = (0, None)
        if self.log is not None:
            self.log.add(self, *fields)

    def flow(self, name: str) -> Flow:
        """A client's, made where there is none."""
        found = self.flows.get(name)
        if found is None:
            found = self.flows[name] = Flow(name)
        return found

    def look(self, name: str) -> Flow:
        """The same for who only looks."""
        return self.flows.get(name) or Flow(name)

    def adopt(self, flow: Flow) -> None:
        """A client that comes with tags and a queue."""
        self.flows[flow.name] = flow
        if flow.queue:
            self._waiting[flow.name] = flow

    def begin_again(self) -> None:
        """With another clock: what was promised stays, what was used is forgotten."""
        for bucket in (self.total, *(level.bucket for level in self.levels), *(f.bucket for f in self.flows.values())):
            bucket.full_ns = 0
        for level in self.levels:
            level.guard.release()
        for flow in self.flows.values():
            flow.reserved_ns = flow.since_ns = 0
            for request in flow.queue:
                request.submit_ns = 0
        self.ticked_ns = 0

    # In.

    def submit(self, client: str, cause: Cause, nr_bytes: int, now_ns: int, level: int | None = None) -> Request:
        """Bytes that are not to move before they are granted. `level`: else the client's."""
        flow = self.flow(client)
        level = flow.level if level is None else level
        request = Request(self.next_number, client, cause, nr_bytes, level, now_ns)
        self.note("submit", now_ns, client, level, cause.value, nr_bytes)
        self.next_number += 1
        if not flow.queue:
            flow.since_ns = now_ns
            self._waiting[client] = flow
        if not (flow.nr_waiting[level] if self.policy.by_level else flow.queue):
            lane = self.policy.lane(level)
            flow.catch_up(lane, self.virtual[lane])
        flow.push(request)
        self.levels[level].period.asked_bytes += nr_bytes
        self.levels[level].queued_bytes += nr_bytes
        return request

    def cancel(self, request: Request, now_ns: int) -> None:
        """It is not wanted any more; it was not granted yet."""
        flow = self.flows[request.client]
        self.note("cancel", now_ns, request.number)
        flow.remove(request)
        self._left(flow, request)
        self.counts["cancelled"] += 1
        self.stats[request.level].counts["cancelled"] += 1

    def owe(self, client: str, cause: Cause, nr_bytes: int, now_ns: int) -> None:
        """Bytes that move at once, whatever was promised: what comes next waits for them."""
        flow = self.flow(client)
        self.note("owe", now_ns, client, cause.value, nr_bytes)
        self._pay(flow, flow.level, nr_bytes, now_ns)
        self._pay_caps(flow.level, nr_bytes, now_ns)
        flow.use_reservation(nr_bytes, flow.since_ns if flow.queue else now_ns)
        lane = self.policy.lane(flow.level)
        flow.served[lane] = max(flow.served[lane], self.virtual[lane]) + flow.weighted(nr_bytes)
        self.levels[flow.level].period.asked_bytes += nr_bytes
        self.counts["owed"] += 1
        self.stats[flow.level].counts["owed_bytes"] += nr_bytes

    # Out.

    def grant(self, now_ns: int) -> Request | None:
        """The next request that may go now; None where there is none."""
        if self.policy.adapts and now_ns - self.ticked_ns >= PERIOD_NS:
            self.tick(now_ns)
        chosen = self._choose(now_ns)
        if chosen is None:
            return None
        flow, by_constraint = chosen
        if self.total.ready_ns(flow.head.nr_bytes) > now_ns:
            self._passed_over = now_ns, flow
            return None
        return self._grant(flow, by_constraint, now_ns)

    def next_ns(self, now_ns: int) -> int | None:
        """When to ask again, if nothing is submitted until then; None where nobody waits."""
        if not self._waiting:
            return None
        at_now_ns, flow = self._passed_over
        if flow is None or at_now_ns != now_ns:
            chosen = self._choose(now_ns)
            flow = None if chosen is None else chosen[0]
        if flow is not None:
            at_ns = self.total.ready_ns(flow.head.nr_bytes)
        else:
            at_ns = min(map(self._eligible_ns, self._waiting.values()))
        return min(at_ns, self.ticked_ns + PERIOD_NS) if self.policy.adapts else at_ns

    def _choose(self, now_ns: int) -> tuple[Flow, bool] | None:
        """(whose request is next, whether by constraint), the total aside."""
        best: tuple[int, int, int, int] | None = None
        found: Flow | None = None
        for flow in self._waiting.values():
            head = flow.head
            if flow.bucket.ready_ns(head.nr_bytes) > now_ns:
                continue
            entitled_ns = flow.reservation_ns()
            if entitled_ns is not None and entitled_ns <= now_ns:
                rank = (-1, entitled_ns, head.number, 1)
            elif self._level_ns(head) <= now_ns:
                lane = self.policy.lane(head.level)
                rank = (lane, flow.served[lane], head.number, 0)
            else:
                continue
            if best is None or rank < best:
                best, found = rank, flow
        return None if best is None or found is None else (found, best[0] < 0)

    def _level_ns(self, request: Request) -> int:
        """From when on its level, and those above it, let a request pass."""
        ready_ns = self.levels[request.level].bucket.ready_ns(request.nr_bytes)
        if not self.policy.adapts:  # there are no caps
            return ready_ns
        for level in self.levels[: request.level]:
            if level.guard.cap.rate:
                ready_ns = max(ready_ns, level.guard.cap.ready_ns(request.nr_bytes))
        return ready_ns

    def _eligible_ns(self, flow: Flow) -> int:
        """From when on a client's next request can be chosen."""
        entitled_ns = flow.reservation_ns()
        by_weight_ns = self._level_ns(flow.head)
        either_ns = by_weight_ns if entitled_ns is None else min(entitled_ns, by_weight_ns)
        return max(flow.bucket.ready_ns(flow.head.nr_bytes), either_ns)

    def _grant(self, flow: Flow, by_constraint: bool, now_ns: int) -> Request:
        request = flow.pop()
        lane = self.policy.lane(request.level)
        if by_constraint:
            flow.use_reservation(request.nr_bytes, flow.since_ns)
        else:
            self.virtual[lane] = max(self.virtual[lane], flow.served[lane])
            self._pay_caps(request.level, request.nr_bytes, now_ns)
        flow.served[lane] += flow.weighted(request.nr_bytes)
        self._pay(flow, request.level, request.nr_bytes, now_ns)
        self._left(flow, request)
        request.granted_ns = now_ns
        self._count(request, by_constraint, now_ns - request.submit_ns)
        self.note("grant", now_ns, request.number, "R" if by_constraint else "W")
        return request

    def _pay(self, flow: Flow, level: int, nr_bytes: int, now_ns: int) -> None:
        self.total.take(nr_bytes, now_ns)
        flow.bucket.take(nr_bytes, now_ns)
        self.levels[level].bucket.take(nr_bytes, now_ns)

    def _pay_caps(self, level: int, nr_bytes: int, now_ns: int) -> None:
        for above in self.levels[:level]:
            above.guard.cap.take(nr_bytes, now_ns)

    def _left(self, flow: Flow, request: Request) -> None:
        self.levels[request.level].queued_bytes -= request.nr_bytes
        if not flow.queue:
            del self._waiting[flow.name]

    def _count(self, request: Request, by_constraint: bool, waited_ns: int) -> None:
        level = self.levels[request.level]
        level.period.granted(waited_ns, level.target_ns)
        level.period.entitled_bytes += request.nr_bytes if by_constraint else 0
        self.stats[request.level].granted(request.nr_bytes, waited_ns, level.target_ns)
        self.granted_bytes[request.client] += request.nr_bytes
        self.counts["by_constraint" if by_constraint else "by_weight"] += 1

    # Latency targets.

    def tick(self, now_ns: int) -> None:
        """A period of the guards is over."""
        self.note("tick", now_ns)
        elapsed_ns, self.ticked_ns = max(1, now_ns - self.ticked_ns), now_ns
        asked = backlog = 0
        entitled = sum(level.period.entitled_bytes for level in self.levels)
        for level in self.levels:
            asked += level.period.asked_bytes
            backlog += level.queued_bytes
            entitled -= level.period.entitled_bytes
            seen, level.period = level.period, Period()
            if level.target_ns and self.total.rate:
                self._see_waiting(level, seen, now_ns)
                demand, entitled_below = (nr * NS_PER_S // elapsed_ns for nr in (asked, entitled))
                load = Load(self.total.rate, demand, backlog, entitled_below)
                was_capped = level.guard.cap.rate
                level.guard.tick(seen, level.target_ns, load, now_ns)
                if was_capped and not level.guard.cap.rate:
                    self._catch_up(level.number + 1)
            else:
                level.guard.release()

    def _catch_up(self, first_level: int) -> None:
        """Nothing holds back clients of this level and those below any more."""
        for flow in self.flows.values():
            if flow.level >= first_level:
                lane = self.policy.lane(flow.level)
                flow.catch_up(lane, self.virtual[lane])

    def _see_waiting(self, level: Level, seen: Period, now_ns: int) -> None:
        """Who waits still, and too long already, has missed the target too."""
        oldest_ns = min(
            (request.submit_ns for flow in self._waiting.values() for request in flow.of_level(level.number)),
            default=now_ns,
        )
        if now_ns - oldest_ns > level.target_ns:
            seen.granted(now_ns - oldest_ns, level.target_ns)

    # What is promised.

    def set_policy(self, name: str, now_ns: int) -> None:
        """Raises KeyError for a name that is none."""
        policy = POLICIES[name]
        self.note("policy", now_ns, name)
        self.policy = policy
        self.virtual = [0] * NR_LEVELS
        for flow in self.flows.values():
            flow.served = [0] * NR_LEVELS
        for level in self.levels:
            level.guard.release()
            level.period = Period()
        self.ticked_ns = now_ns

    def set_total(self, rate: int, burst: int, now_ns: int) -> None:
        self.note("total", now_ns, rate, burst)
        self.total.set(rate, burst, now_ns)
        for level in self.levels:
            level.guard.release()

    def set_level(self, number: int, rate: int, burst: int, target_ns: int, now_ns: int) -> None:
        self.note("level", now_ns, number, rate, burst, target_ns)
        level = self.levels[number]
        level.target_ns = target_ns
        level.bucket.set(rate, burst, now_ns)
        self._catch_up(number)

    def set_client(self, name: str, now_ns: int, **changes: int) -> None:
        """Any of reservation, limit, burst, share, level. What has to do with what is changed is counted anew."""
        flow = self.flow(name)
        promised = self.promise(name) | changes
        self.note("client", now_ns, name, *promised.values())
        flow.share, flow.level = promised["share"], promised["level"]
        if (promised["limit"], promised["burst"]) != (flow.bucket.rate, flow.bucket.burst_set):
            flow.bucket.set(promised["limit"], promised["burst"], now_ns)
        if promised["reservation"] != flow.reservation:
            flow.reservation, flow.reserved_ns = promised["reservation"], now_ns
        flow.served = list(self.virtual)

    def promise(self, name: str) -> dict[str, int]:
        """What a client was promised, by name."""
        flow = self.look(name)
        rates = {"reservation": flow.reservation, "limit": flow.bucket.rate, "burst": flow.bucket.burst_set}
        return rates | {"share": flow.share, "level": flow.level}

    def forget(self, name: str, now_ns: int) -> None:
        """A client is gone, and what it waited for."""
        if name not in self.flows:
            return
        self.note("gone", now_ns, name)
        self._waiting.pop(name, None)
        for request in self.flows.pop(name).queue:
            request.dropped = True
            self.levels[request.level].queued_bytes -= request.nr_bytes

    @property
    def reserved(self) -> int:
        """All reservations together, bytes/s."""
        return sum(flow.reservation for flow in self.flows.values())

    def paces(self, name: str) -> bool:
        """Whether anything could make this client wait, or make others wait for it."""
        if self.total.rate or self._waiting:
            return True
        flow = self.look(name)
        return bool(flow.bucket.rate or self.levels[flow.level].bucket.rate)

    def waiting(self) -> list[Request]:
        """All who wait, as they came."""
        return sorted((r for flow in self._waiting.values() for r in flow.queue), key=lambda request: request.number)

    def violations(self) -> list[str]:
        """What cannot be, if all is right."""
        found = [f"{name} waits with an empty queue" for name, flow in self._waiting.items() if not flow.queue]
        found += [
            f"{name} does not wait" for name, flow in self.flows.items() if flow.queue and name not in self._waiting
        ]
        for level in self.levels:
            queued = sum(request.nr_bytes for request in self.waiting() if request.level == level.number)
            if queued != level.queued_bytes:
                found.append(f"level {level.number} has {queued} bytes queued, not {level.queued_bytes}")
        granted = sum(stat.counts["granted_bytes"] for stat in self.stats)
        if granted != self.granted_bytes.total():
            found.append(f"levels were granted {granted} bytes, clients {self.granted_bytes.total()}")
        if self.total.rate and self.reserved > self.total.rate:
            found.append(f"{self.reserved} bytes/s are reserved of {self.total.rate}")
        return found
