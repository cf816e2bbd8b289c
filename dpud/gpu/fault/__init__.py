# SPDX-License-Identifier: MIT
"""Fault recovery: memory breaks, is found to be broken, and clients go on with the right bytes or are told.

Theory of operation
    Between a memory's cells and whoever reads them is ECC (cells.py, secded.py). One flipped bit of a word is corrected
    on the way; what cannot be corrected is never handed out. Before the data path reads pages it has them examined
    (recovery.py): a page that ECC would refuse is made good from a copy elsewhere (copies.py), by a policy; or it is
    lost, and known to be. Broken frames go out of use (placing.py) and come back at a reset where there are spare rows
    (rows.py). Errors are events with numbers (events.py). Too many corrected ones put a frame out of use beforehand
    (errorcount.py), and a predictor says which bank will fail (predictor.py).

    A device can be lost as a whole (failover.py). What no copy has comes from checkpoints (checkpoints.py), which are
    made as often as their cost and the rate of failures make best (interval.py).

Invariants
    - No read gives a byte that was not written there: it is the right one, or the read fails.
    - A frame is retired only once no page is in it.
    - What recovery does it does between operations of the data path, before these have looked where pages are.
"""
