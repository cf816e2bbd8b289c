# SPDX-License-Identifier: MIT
"""One virtual address range over host and devices: regions, page tables, TLBs, permissions, advice, the fault log."""
