"""Intervals, and what a setting is worth against dense training: time to match, and the difference
at equal time.

Accuracies are in percent, differences in points, time is seconds of training. Intervals are at 95
%.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import stdtrit

CONFIDENCE = 0.95
RESAMPLES = 2000
# an interval of the time to match whose ends are further apart than this factor resolves nothing
WIDEST = 1.4
# a share: a time this close to an end of the dense settings counts as that end, as a twin's does
SAME_TIME = 0.02


def half_width(sd: Any, n: Any) -> Any:
    """Half the 95 % confidence interval of a mean (Student's t); NaN for n = 1.

    `sd`: standard deviation of the `n` values.
    """
    return stdtrit(np.subtract(n, 1), (1 + CONFIDENCE) / 2) * sd / np.sqrt(n)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The ends of the 95 % confidence interval of the mean of `values` [n]; of two values their
    range, for Student's t would be 12.7 times as wide; NaN for one.
    """
    if len(values) < 3:
        return (
            (float(values.min()), float(values.max()))
            if len(values) == 2
            else (float("nan"), float("nan"))
        )
    half = half_width(values.std(ddof=1), len(values))
    return float(values.mean() - half), float(values.mean() + half)


def difference_half_width(sd: Any, n: Any, base_sd: Any, base_n: Any) -> Any:
    """Half the 95 % confidence interval of the difference of two means; NaN where one has a single
    value.

    The variances need not be equal (Welch 1947).
    """
    with np.errstate(all="ignore"):
        own = np.square(sd) / n
        base = np.square(base_sd) / base_n
        freedom = (own + base) ** 2 / (
            own**2 / np.subtract(n, 1) + base**2 / np.subtract(base_n, 1)
        )
        return np.where(
            own + base == 0,
            own + base,
            stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(own + base),
        )


def small_sample_factor(n: int) -> float:
    """By how much the bootstrap interval of a mean of n values is narrower than Student's.

    The resampled means spread too little by sqrt((n - 1) / n), and their percentiles are those of a
    normal distribution where Student's t is needed (Hesterberg 2015, "What Teachers Should Know
    About the Bootstrap"). Two values have but three different resamples, so that an interval still
    covers only 17 times of 20.
    """
    normal = stdtrit(np.inf, (1 + CONFIDENCE) / 2)
    return (
        float(np.sqrt(n / (n - 1)) * stdtrit(n - 1, (1 + CONFIDENCE) / 2) / normal)
        if n > 1
        else 1.0
    )


@dataclass(frozen=True)
class Runs:
    """The runs of a setting that have a final accuracy and training seconds, [n] of each."""

    name: str
    seconds: np.ndarray
    accuracy: np.ndarray

    @property
    def n(self) -> int:
        return len(self.accuracy)

    @cached_property
    def means(self) -> np.ndarray:
        """Mean seconds and accuracy [2]."""
        return np.array([self.seconds.mean(), self.accuracy.mean()])

    @cached_property
    def sd(self) -> float:
        return float(self.accuracy.std(ddof=1)) if self.n > 1 else float("nan")

    @cached_property
    def draws(self) -> np.ndarray:
        """The means, and below them those of RESAMPLES draws of n runs with replacement: [1 +
        RESAMPLES, 2].

        The draws depend on the name and the runs alone, so that an analysis can be repeated. The
        drawn seconds are spread by `small_sample_factor`.
        """
        dice = np.random.default_rng(zlib.crc32(self.name.encode()))
        picks = dice.integers(0, self.n, (RESAMPLES, self.n))
        drawn = np.column_stack(
            [self.seconds[picks].mean(axis=1), self.accuracy[picks].mean(axis=1)]
        )
        drawn[:, 0] = self.means[0] + small_sample_factor(self.n) * (drawn[:, 0] - self.means[0])
        return np.vstack([self.means, np.maximum(drawn, 1e-9)])


@dataclass(frozen=True)
class Match:
    """A time to match: `ratio` from `low` to `high`, NaN where unknown.

    `bound`: "<" and ">" where the ratio is only a bound, "not resolved" where the seeds do not say,
    otherwise "". `low_cut`, `high_cut`: whether that end of the interval is itself a bound, for it
    lies beyond the dense settings.
    `against`: the dense setting whose time it is a ratio of.
    """

    ratio: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    bound: str = ""
    low_cut: bool = False
    high_cut: bool = False
    against: str = ""


def worthwhile(dense: Sequence[Runs]) -> list[Runs]:
    """The dense settings, shortest first, without those that a shorter one beats significantly
    (Welch's test).
    """
    kept: list[Runs] = []
    for each in sorted(dense, key=lambda each: each.means[0]):
        shorter = np.array([(other.means[1], other.sd, other.n) for other in kept]).reshape(-1, 3)
        half = difference_half_width(shorter[:, 1], shorter[:, 2], each.sd, each.n)
        if not (shorter[:, 0] - each.means[1] > half).any():
            kept.append(each)
    return kept


@dataclass(frozen=True)
class DenseTraining:
    """The dense settings of the same data, model and machine whose schedule ended."""

    settings: list[Runs]

    @cached_property
    def every(self) -> list[Runs]:
        return worthwhile(self.settings)

    @cached_property
    def tested(self) -> list[Runs]:
        """Those with two seeds and more."""
        return worthwhile([each for each in self.settings if each.n > 1])

    @cached_property
    def draws(self) -> np.ndarray:
        """The draws of those with two seeds and more: [1 + RESAMPLES, settings, 2]."""
        return np.stack([each.draws for each in self.tested], axis=1)


def time_to_match(own: Runs, dense: DenseTraining) -> Match:
    """The training seconds of a setting over those of the shortest dense setting that is not
    significantly worse.

    Below 1 the setting saves time. "Significantly": by Welch's test at 95 %. Two bounds: "<" where
    every dense setting is significantly worse, the ratio is to the longest one; ">" where the
    setting is significantly worse than the shortest one. "not resolved" where the setting or all
    dense ones have fewer than two seeds; where no dense setting is significantly worse or better;
    where the chosen one is significantly better, so that the setting lies in a gap between two
    dense ones; and where the interval spans more than a factor of WIDEST: the frontier is flat
    there.

    The interval is that of the percentile bootstrap (Efron & Tibshirani 1993, "An Introduction to
    the Bootstrap", chapter 13). Each of RESAMPLES resamples draws the runs of the setting and of
    every dense setting anew, with replacement, and chooses the dense setting again by the resampled
    means. The half widths of Welch's tests stay those of the runs as they are, for few seeds drawn
    again are often one seed several times, without a variance; they allow for few seeds by
    Student's t. Percentiles do not, and with three seeds cover 3 times of 4 and not 19 of 20: so
    the resampled seconds are spread by `small_sample_factor`.
    """
    tested = dense.tested
    if not dense.settings or not own.n:
        return Match()
    if own.n < 2 or not tested:
        return Match(bound="not resolved")
    half = difference_half_width(
        own.sd, own.n, [each.sd for each in tested], [each.n for each in tested]
    )
    lead = own.draws[:, 1:] - dense.draws[:, :, 1]  # points, [1 + RESAMPLES, dense settings]
    enough = lead <= half
    chosen = np.where(enough.any(axis=1), enough.argmax(axis=1), len(tested) - 1)
    ratios = own.draws[:, 0] / dense.draws[np.arange(len(chosen)), chosen, 0]
    above = ~enough.any(axis=1)
    below = lead[:, 0] < -half[0]
    against = tested[chosen[0]].name
    ratio = float(ratios[0])
    if above[0] or below[0]:
        return Match(ratio, bound="<" if above[0] else ">", against=against)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(ratios[1:], [tail, 1 - tail]).tolist()
    in_a_gap = lead[0, chosen[0]] < -half[chosen[0]]
    if in_a_gap or not (np.abs(lead[0]) > half).any() or high > WIDEST * low:
        return Match(bound="not resolved", against=against)
    return Match(
        ratio, low, high, "", bool(above[1:].mean() > tail), bool(below[1:].mean() > tail), against
    )


def at_equal_time(own: Runs, dense: DenseTraining) -> tuple[float, float]:
    """A setting's accuracy less what dense training reaches in the same time, in points, and half
    its 95 % interval.

    Dense training at a time between two dense settings is a straight line between their means; the
    variances are carried over, with Welch's degrees of freedom (Satterthwaite 1946). That times
    scatter, by a percent or so, is left out. NaN outside the range of the dense settings, by more
    than SAME_TIME; an interval needs two seeds of each. Dense settings of one seed are used only
    where those with more do not reach.
    """
    for points in filter(None, (dense.tested, dense.every)):
        times = np.array([each.means[0] for each in points])
        if own.n and times[0] * (1 - SAME_TIME) <= own.means[0] <= times[-1] * (1 + SAME_TIME):
            break
    else:
        return float("nan"), float("nan")
    upper = min(int(np.searchsorted(times, own.means[0])), len(times) - 1)
    lower = max(upper - 1, 0)
    span = times[upper] - times[lower]
    share = min(max((own.means[0] - times[lower]) / span, 0.0), 1.0) if span > 0 else 1.0
    parts = [(1.0, own), (share, points[upper]), (1 - share, points[lower])]
    parts = [(weight, each) for weight, each in parts if weight > 0]
    gap = 2 * own.means[1] - sum(weight * each.means[1] for weight, each in parts)
    variances = np.array([weight**2 * each.sd**2 / each.n for weight, each in parts])
    total = variances.sum()
    if np.isnan(total) or total == 0:
        return float(gap), float(total)
    freedom = total**2 / (variances**2 / [each.n - 1 for _, each in parts]).sum()
    return float(gap), float(stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(total))
