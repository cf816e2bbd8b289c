# SPDX-License-Identifier: MIT
"""Where the predictor's weights come from: `python -m dpud.gpu.fault.learning` prints them.

Ridge-regularized logistic regression by Newton's method, on one sample for each bank and hour that had a corrected
error. The label of a sample: whether the bank has an uncorrectable error within the predictor's horizon.
"""

from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

from dpud.gpu.fault.features import HOUR_NS, NAMES, BankHistory, CorrectedError
from dpud.gpu.fault.predictor import HORIZON_NS
from dpud.gpu.fault.streams import StreamError, generate

SEED, NR_BANKS, NR_DAYS = 1, 2000, 90.0
_RIDGE = 1.0
_NR_STEPS = 25
Matrix = NDArray[np.float64]


def samples(errors: list[StreamError]) -> tuple[Matrix, Matrix]:
    """(features, labels)."""
    failures: dict[int, list[int]] = defaultdict(list)
    for error in errors:
        if not error.is_corrected:
            failures[error.bank].append(error.time_ns)
    histories: dict[int, BankHistory] = defaultdict(BankHistory)
    last: dict[int, int] = {}
    rows, labels = [], []
    for error in errors:
        if not error.is_corrected:
            continue
        history = histories[error.bank]
        history.add(CorrectedError(error.time_ns, error.row, error.word, error.bit))
        if error.time_ns // HOUR_NS != last.get(error.bank):
            last[error.bank] = error.time_ns // HOUR_NS
            rows.append(history.features(error.time_ns))
            labels.append(any(0 <= at - error.time_ns <= HORIZON_NS for at in failures[error.bank]))
    return np.array(rows), np.array(labels, dtype=np.float64)


def fit(features: Matrix, labels: Matrix) -> Matrix:
    """Weights, one for each feature."""
    weights = np.zeros(features.shape[1])
    ridge = _RIDGE * np.eye(len(weights))
    ridge[0, 0] = 0
    for _ in range(_NR_STEPS):
        p = 1 / (1 + np.exp(-np.clip(features @ weights, -30, 30)))
        gradient = features.T @ (p - labels) + ridge @ weights
        hessian = (features * (p * (1 - p))[:, None]).T @ features + ridge
        weights = weights - np.linalg.solve(hessian, gradient)
    return weights


def learn() -> tuple[float, ...]:
    found = fit(*samples(generate(SEED, NR_BANKS, NR_DAYS)))
    return tuple(round(float(weight), 3) for weight in found)


if __name__ == "__main__":
    for name, weight in zip(NAMES, learn(), strict=True):
        print(f"{weight:8.3f}  {name}")
