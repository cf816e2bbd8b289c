# SPDX-License-Identifier: MIT
"""Defragmentation: free memory in one piece, while everybody goes on using the rest.

Two levels. Frames of a location (blocks.py, relocate.py, locality.py): pages move to other frames, and page tables
follow, so that nobody's addresses change. Byte ranges in a region (heap.py, plan.py, moving.py): a suballocator whose
blocks are reached through handles, so that they may move, too.
"""
