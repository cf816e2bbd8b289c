# SPDX-License-Identifier: MIT
"""The log: MEMORY_VIRT_LOG_LEVEL, and lines that begin with `Performance`."""

import logging
import os

LOG_VARIABLE = "MEMORY_VIRT_LOG_LEVEL"


def set_log_level() -> None:
    """DEBUG, INFO, WARNING or ERROR from the environment, for all that is logged below dpud.gpu; lines go to stderr.

    Without the variable nothing changes: Python shows warnings and errors.
    """
    level = logging.getLevelNamesMapping().get(os.environ.get(LOG_VARIABLE, "").upper())
    logger = logging.getLogger("dpud.gpu")
    if level is None:
        return
    logger.setLevel(level)
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        logger.addHandler(handler)
        logger.propagate = False


def performance(log: logging.Logger, what: str, nr_bytes: int, begin_ns: int, end_ns: int) -> None:
    """One INFO line of what was done, in the data path's time (which is the device's, where it is modelled)."""
    if log.isEnabledFor(logging.INFO) and nr_bytes:
        us = max(1, (end_ns - begin_ns) // 1000)
        log.info("Performance %s: %d bytes in %d us, %.0f MB/s", what, nr_bytes, us, nr_bytes / us)
