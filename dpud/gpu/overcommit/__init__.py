# SPDX-License-Identifier: MIT
"""Promising more memory than there is: admission by prediction, queues, reclaim order, pressure.

What clients may rely on when memory runs out is docs/exhaustion.md.
"""

from dpud.gpu.overcommit.account import Account as Account
from dpud.gpu.overcommit.account import Grant as Grant
from dpud.gpu.overcommit.admission import Admission as Admission
from dpud.gpu.overcommit.predictor import POLICIES as POLICIES
from dpud.gpu.overcommit.pressure import PressureStall as PressureStall
