# SPDX-License-Identifier: MIT
"""Quality of service: who may move how many bytes a second, who goes first, and how long anybody waits.

bucket.py     a token bucket as one moment
flow.py       one client: promises, tags, queue
levels.py     priority levels; guard.py keeps a level's latency target
policy.py     fair, priority, adaptive
scheduler.py  mClock over all of these: requests in, grants out
decisions.py  the log of both; replay.py does it again
module.py     the data path's Traffic; files.py shows it
"""

from dpud.gpu.qos.module import QosModule as QosModule
