# SPDX-License-Identifier: GPL-2.0-only
"""Time, sleep and memory for the machine."""

import threading
import time

from dpud.inject import BlockingWaitQueue, LiveClock, boot_time_s

TIMEOUT_S = 10.0


def test_a_wake_up_between_looking_and_sleeping_is_not_lost() -> None:
    queue = BlockingWaitQueue()
    assert queue.wait(0)  # the first wait only takes note
    queue.wake_up()  # after the look, before the sleep
    assert queue.wait(0)
    assert not queue.wait(0), "one wake-up, one return"


def test_wake_up_wakes_everybody_who_sleeps() -> None:
    queue, asleep, woken = BlockingWaitQueue(), threading.Barrier(4), list[bool]()

    def sleeper() -> None:
        queue.wait(0)
        asleep.wait(TIMEOUT_S)
        woken.append(queue.wait(TIMEOUT_S))

    threads = [threading.Thread(target=sleeper) for _ in range(3)]
    for thread in threads:
        thread.start()
    asleep.wait(TIMEOUT_S)
    queue.wake_up()
    for thread in threads:
        thread.join(TIMEOUT_S)
    assert woken == [True] * 3


def test_the_clock_is_the_host_s_and_goes_forward() -> None:
    clock = LiveClock()
    assert time.monotonic_ns() <= clock.now_ns() <= clock.now_ns() <= time.monotonic_ns()
    assert abs(boot_time_s() + clock.now_ns() / 1e9 - time.time()) < 1
    assert clock.wall_ns() <= clock.wall_ns()
