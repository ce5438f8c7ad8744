"""What every rule of selection shares: a floor under the number of samples."""

from __future__ import annotations

import numpy as np


def top_up(chosen: np.ndarray, scores: np.ndarray, floor: int, forget_rate: float = 0.0) -> np.ndarray:
    """Of the samples not chosen, those with the highest scores that make up for a number below `floor`, int64.

    chosen, scores: [n]. forget_rate: the share of the samples, of the highest scores, that comes last.
    """
    lacking = min(floor, len(scores)) - int(np.count_nonzero(chosen))
    if lacking <= 0:
        return np.zeros(0, dtype=np.int64)
    order = np.roll(np.argsort(-scores, kind="stable"), -round(forget_rate * len(scores)))
    return order[chosen[order] == 0][:lacking]
