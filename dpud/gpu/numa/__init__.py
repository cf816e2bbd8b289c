# SPDX-License-Identifier: MIT
"""NUMA: host memory in several nodes, which of them a page is put on, and when it moves."""
