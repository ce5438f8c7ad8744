"""What rules of selection share: targets, choices before loading, a floor, equal scores, a target
out of reach.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lab.base.console import print_rank0
from lab.config.sections import ASTConfig


def top_up(
    chosen: np.ndarray, scores: np.ndarray, floor: int, forget_rate: float = 0.0
) -> np.ndarray:
    """Of the samples not chosen, those with the highest scores that make up for a number below
    `floor`, int64.

    chosen, scores: [n]. forget_rate: the share of the samples, of the highest scores, that comes
    last.
    """
    lacking = min(floor, len(scores)) - int(np.count_nonzero(chosen))
    if lacking <= 0:
        return np.zeros(0, dtype=np.int64)
    order = np.roll(np.argsort(-scores, kind="stable"), -round(forget_rate * len(scores)))
    return order[chosen[order] == 0][:lacking]


def highest(scores: np.ndarray, share: float) -> np.ndarray:
    """Which samples have the highest finite scores, so many that they are a `share` of all, bool
    [n].
    """
    order = np.argsort(np.where(np.isfinite(scores), -scores, math.inf), kind="stable")
    count = min(math.floor(share * len(scores)), int(np.isfinite(scores).sum()))
    found = np.zeros(len(scores), dtype=bool)
    found[order[:count]] = True
    return found


def plateau(scores: np.ndarray, share: float) -> float | None:
    """The score in which the top `share` ends, where more than a tenth of all samples have it; else
    None.

    No threshold takes that share then: it takes all of those samples or none.
    """
    last = len(scores) - 1
    rank = last - min(last, int(share * len(scores)))
    value = np.partition(scores, rank)[rank]
    return float(value) if np.count_nonzero(scores == value) > max(1, len(scores) / 10) else None


class Ties(NamedTuple):
    """What becomes of the samples whose score is the threshold itself."""

    taken: np.ndarray  # bool [n]
    expected: float  # share of all n to be active then, on average over the draws


def draw_ties(
    scores: np.ndarray, active: np.ndarray, threshold: float, target: float, uniforms: np.ndarray
) -> Ties:
    """Take so many of the samples at the threshold, at random, that a share `target` of all is
    expected to be active.

    active: bool [n], those that are in any case. uniforms: [n], a random number of each sample.
    """
    ties = (scores == threshold) & ~active
    above = int(np.count_nonzero(active))
    tied = int(np.count_nonzero(ties))
    lacking = min(max(0.0, target * len(scores) - above), tied)
    return Ties(ties & (uniforms * tied < lacking), (above + lacking) / len(scores))


def out_of_reach(
    ast: ASTConfig, target: float | None, activations: Sequence[float], thresholds: Sequence[float]
) -> bool:
    """Whether the threshold sat on its lower bound for the later half of an epoch, with too few
    samples above it.

    Prints so, with the share that is above it.
    """
    later = len(thresholds) // 2
    if target is None or not activations or max(thresholds[later:]) > ast.min_threshold:
        return False
    reached = float(np.mean(activations[later:]))
    if reached > target - 0.01:
        return False
    print_rank0(
        f"note: ast.target_activation={target:g} is out of reach: only {reached:.3f} of "
        f"the samples are "
        f"above ast.min_threshold={ast.min_threshold:g}"
    )
    return True


LEAST_SHARE = 0.5
WRONG_SHARE = 1 / 3


def first_target(ast: ASTConfig) -> float:
    """The target activation that a run begins with. With auto it is 1: nothing is learned yet."""
    return 1.0 if ast.target_activation == "auto" else ast.target_activation


def auto_target(wrong: float, scoring_cost: float) -> float:
    """The target activation that suits the state of learning, for `ast.target_activation: auto`.

    wrong: the share of the samples that the network predicts wrongly. scoring_cost: see `Scorer`.
    At most WRONG_SHARE of the active samples are wrongly predicted ones: a network that has far to
    go cannot learn from the hardest samples alone. No fewer than LEAST_SHARE are active. Where that
    and the scoring cost more than training on all samples, it is 1.
    """
    target = max(LEAST_SHARE, wrong / WRONG_SHARE)
    return target if target + scoring_cost < 1 else 1.0


class Choice(NamedTuple):
    """What an epoch does with each of its samples, where that is decided before loading."""

    kinds: np.ndarray  # uint8 [n]: LEFT_OUT, ACTIVE or EXPLORED
    threshold: float  # mean over the epoch, nats


LEFT_OUT, ACTIVE, EXPLORED, REVISITED = map(
    np.uint8, range(4)
)  # revisited: looked at, not trained on


def choose_by_mean(scores: np.ndarray, drawn: np.ndarray) -> Choice:
    """InfoBatch (Qin et al. 2024, "InfoBatch: lossless training speed up by unbiased dynamic data
    pruning", section 3): a sample below the mean of the stored losses stays with probability 1/2,
    and then counts twice.

    scores: float32 [n], nats. drawn: bool [n], true for one in two.
    """
    known = scores[np.isfinite(scores)]
    mean = float(known.mean(dtype=np.float64)) if len(known) else 0.0
    return Choice(np.where(scores < mean, drawn.astype(np.uint8) * EXPLORED, ACTIVE), mean)
