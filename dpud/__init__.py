# SPDX-License-Identifier: GPL-2.0-only
"""The daemon, its command line, and the devices that hang on the emulated kernel.

Importing this package picks numba's cache folder, which only works before numba itself is imported.
"""

from dpud import jitcache

__version__ = "0.1.0"

jitcache.use()
