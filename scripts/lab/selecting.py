"""What every rule of selection shares: a floor under the number of samples, equal scores, a target out of reach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from lab.console import print_rank0
from lab.sections import ASTConfig


def top_up(chosen: np.ndarray, scores: np.ndarray, floor: int, forget_rate: float = 0.0) -> np.ndarray:
    """Of the samples not chosen, those with the highest scores that make up for a number below `floor`, int64.

    chosen, scores: [n]. forget_rate: the share of the samples, of the highest scores, that comes last.
    """
    lacking = min(floor, len(scores)) - int(np.count_nonzero(chosen))
    if lacking <= 0:
        return np.zeros(0, dtype=np.int64)
    order = np.roll(np.argsort(-scores, kind="stable"), -round(forget_rate * len(scores)))
    return order[chosen[order] == 0][:lacking]


def highest(scores: np.ndarray, share: float) -> np.ndarray:
    """Which samples have the highest finite scores, so many that they are a `share` of all, bool [n]."""
    known = scores[np.isfinite(scores)]
    return np.isfinite(scores) & (scores > np.quantile(known, 1 - share)) if len(known) else np.zeros(len(scores), bool)


def plateau(scores: np.ndarray, share: float) -> float | None:
    """The score in which the top `share` ends, where more than a tenth of all samples have it; else None.

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


def draw_ties(scores: np.ndarray, active: np.ndarray, threshold: float, target: float, uniforms: np.ndarray) -> Ties:
    """Take so many of the samples at the threshold, at random, that a share `target` of all is expected to be active.

    active: bool [n], those that are in any case. uniforms: [n], a random number of each sample.
    """
    ties = (scores == threshold) & ~active
    above, tied = int(np.count_nonzero(active)), int(np.count_nonzero(ties))
    lacking = min(max(0.0, target * len(scores) - above), tied)
    return Ties(ties & (uniforms * tied < lacking), (above + lacking) / len(scores))


class Chosen(NamedTuple):
    """Who is active of a batch, with a share of the samples at the threshold."""

    indices: np.ndarray  # int64, ascending
    activation: float  # share of the batch, before the floor
    expected: float  # the same on average over the draws


def with_ties(scores: np.ndarray, threshold: float, target: float, uniforms: np.ndarray, min_active: int) -> Chosen:
    """The samples above the threshold and those drawn at it (see `draw_ties`), at least `min_active`."""
    chosen = scores > threshold
    taken, expected = draw_ties(scores, chosen, threshold, target, uniforms)
    chosen = chosen | taken
    activation = int(np.count_nonzero(chosen)) / len(scores)
    chosen[top_up(chosen, scores, min_active)] = True
    return Chosen(np.flatnonzero(chosen), activation, expected)


def out_of_reach(ast: ASTConfig, activations: Sequence[float], thresholds: Sequence[float]) -> bool:
    """Whether the threshold sat on its lower bound for the later half of an epoch, with too few samples above it.

    Prints so, with the share that is above it.
    """
    later = len(thresholds) // 2
    if not activations or max(thresholds[later:]) > ast.min_threshold:
        return False
    reached = float(np.mean(activations[later:]))
    if reached > ast.target_activation - 0.01:
        return False
    print_rank0(
        f"note: ast.target_activation={ast.target_activation:g} is out of reach: only {reached:.3f} of the samples are "
        f"above ast.min_threshold={ast.min_threshold:g}"
    )
    return True
