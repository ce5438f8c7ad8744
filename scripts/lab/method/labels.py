"""Which labels are not believed: told from what the network made of each sample at its last
visits.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

STREAK = 4  # visits in a row at which the network has to predict the same other class
FORGET_FROM = 0.5  # share of the schedule after which samples are left out
CERTAIN_UNTIL = (
    0.75  # share of the schedule up to which only those are left out that the network is sure of
)
REVISIT = (
    0.25  # share of the samples left out that an epoch looks at again, without training on them
)


def doubted(columns: Mapping[str, np.ndarray], before: np.ndarray, progress: float) -> np.ndarray:
    """Which samples have a label that is not believed, bool [samples].

    columns: of `SampleStore.on_host`, with labels. A label is not believed where the network has
    predicted one and the same other class at the last STREAK visits. Up to CERTAIN_UNTIL of the
    schedule it must also have been as sure of that class as it is, on average, of the labels of
    that class: what is left out early is not learned, so that an early mistake costs more than a
    late one. The comparison with a class's mean confidence is that of confident learning (Northcutt
    et al. 2021, "Confident learning: estimating uncertainty in dataset labels", section 3.1).

    before: bool [samples], which were not believed so far. Of these a label is believed again as
    soon as the network predicts it. progress: of the schedule, 0 to 1.
    """
    wrong = columns["streak"] >= STREAK
    if progress < CERTAIN_UNTIL:
        wrong &= columns["confidence"] >= class_bars(columns)[columns["predicted"]]
    return wrong | (before & (columns["streak"] > 0))


def class_bars(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mean probability of their label over the samples of each class, float64 [largest class +
    1].

    The probability of a sample is that of its mean loss. Infinite for a class without samples.
    """
    seen = columns["given"] >= 0
    classes = int(max(columns["given"].max(initial=0), columns["predicted"].max(initial=0))) + 1
    counts = np.bincount(columns["given"][seen], minlength=classes)
    sums = np.bincount(
        columns["given"][seen], np.exp(-columns["loss"][seen].astype(np.float64)), minlength=classes
    )
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
