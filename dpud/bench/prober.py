# SPDX-License-Identifier: GPL-2.0-only
"""The other shell: reads one file again and again until SIGTERM, and then writes out how long each time took.

Output: int64 pairs (begin, end) in ns of the monotonic clock. Run as `python -m dpud.bench.prober FILE`; it prints
one `.` when it begins.
"""

import os
import signal
import sys
from array import array
from time import perf_counter_ns

_READ_SIZE = 1 << 16


def probe(path: str, samples: "array[int]") -> None:
    """open, read, close, as `cat` does, without end."""
    while True:
        begin = perf_counter_ns()
        fd = os.open(path, os.O_RDONLY)
        while os.read(fd, _READ_SIZE):
            pass
        os.close(fd)
        samples.extend((begin, perf_counter_ns()))


def _stop(*_: object) -> None:
    raise SystemExit


def main() -> None:
    samples = array("q")
    signal.signal(signal.SIGTERM, _stop)
    os.write(1, b".")
    try:
        probe(sys.argv[1], samples)
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        sys.stdout.buffer.write(samples[: len(samples) & ~1].tobytes())


if __name__ == "__main__":
    main()
