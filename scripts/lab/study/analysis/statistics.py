"""Intervals, and what a setting is worth against dense training: time to match, and the difference
at equal time, both by one frontier.

Accuracies are in percent, differences in points, time is seconds of training. Intervals are at 95
%.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import numpy as np
from scipy.special import stdtrit

from lab.study.analysis.frontier import Frontier

CONFIDENCE = 0.95
# an interval of the time to match whose ends are further apart than this factor resolves nothing
WIDEST = 2.0
# a share: a time this close to an end of the dense settings counts as that end, as a twin's does
SAME_TIME = 0.02
# dense lengths within this factor are one length: the more accurate of them counts
SAME_LENGTH = 1.1
# between dense lengths further apart than this factor the curve is mostly guessed
WIDE_GAP = 1.7
CURVE_POINTS = 200


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


def confidence_of_best(count: int) -> float:
    """The confidence at which each of `count` intervals is taken, so that all of them hold at 95 %
    and so the one that is picked afterwards (Bonferroni).
    """
    return 1 - (1 - CONFIDENCE) / max(1, count)


def welch_half_width(variances: np.ndarray, freedoms: np.ndarray, extra: Any, count: int) -> Any:
    """Half the interval of a sum whose parts have these variances and degrees of freedom, both
    [..., parts]; see `confidence_of_best` for `count`.

    The variances need not be equal (Welch 1947, Satterthwaite 1946). `extra`: [...], a variance
    that is known. NaN where a part with a weight has a single value.
    """
    total = variances.sum(axis=-1) + extra
    with np.errstate(all="ignore"):
        freedom = total**2 / np.where(variances == 0, 0, variances**2 / freedoms).sum(axis=-1)
        half = stdtrit(freedom, (1 + confidence_of_best(count)) / 2) * np.sqrt(total)
    return np.where(total == 0, 0.0, half)


def difference_half_width(sd: Any, n: Any, base_sd: Any, base_n: Any, count: int = 1) -> Any:
    """Half the 95 % confidence interval of the difference of two means; NaN where one has a single
    value. `count`: see `confidence_of_best`.
    """
    sds, ns = (
        np.stack(np.broadcast_arrays(own, base), -1) for own, base in ((sd, base_sd), (n, base_n))
    )
    return welch_half_width(np.square(sds) / ns, ns - 1.0, 0.0, count)


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

    def variance(self, slopes: np.ndarray) -> np.ndarray:
        """The variance of the mean of accuracy less slope times log seconds, [slopes]: how far the
        setting scatters about the frontier, in accuracy and in time together; NaN for one run.
        """
        if self.n < 2:
            return np.full(len(slopes), np.nan)
        time = np.log(self.seconds) - np.log(self.seconds).mean()
        rest = self.accuracy - self.accuracy.mean() - slopes[:, None] * time
        return np.square(rest).sum(axis=1) / (self.n - 1) / self.n


@dataclass(frozen=True)
class Match:
    """A time to match: `ratio` from `low` to `high`, NaN where unknown.

    `bound`: "<" and ">" where the ratio is only a bound, "not resolved" where the seeds do not say,
    otherwise "". `low_cut`, `high_cut`: whether that end of the interval is itself a bound, for it
    lies beyond the dense settings.
    `dense_seconds`: the dense training time that it is a ratio of.
    """

    ratio: float = float("nan")
    low: float = float("nan")
    high: float = float("nan")
    bound: str = ""
    low_cut: bool = False
    high_cut: bool = False
    dense_seconds: float = float("nan")


def worthwhile(dense: Sequence[Runs]) -> list[Runs]:
    """The dense settings, shortest first, without those that a shorter one beats significantly
    (Welch's test), and of those of one length (SAME_LENGTH) the most accurate.
    """
    kept: list[Runs] = []
    for each in sorted(dense, key=lambda each: each.means[0]):
        better = [other for other in kept if other.means[1] > each.means[1]]
        halves = [difference_half_width(other.sd, other.n, each.sd, each.n) for other in better]
        leads = [other.means[1] - each.means[1] for other in better]
        if any(lead > half for lead, half in zip(leads, halves, strict=True)):
            continue
        if kept and each.means[0] < SAME_LENGTH * kept[-1].means[0]:
            each = max(kept.pop(), each, key=lambda other: other.means[1])
        kept.append(each)
    return kept


@dataclass(frozen=True)
class DenseTraining:
    """The dense settings of the same data, model and machine whose schedule ended."""

    settings: list[Runs]

    @cached_property
    def every(self) -> Measure:
        return Measure(worthwhile(self.settings), self.settings)

    @cached_property
    def tested(self) -> Measure:
        """Of those with two seeds and more."""
        several = [each for each in self.settings if each.n > 1]
        return Measure(worthwhile(several), several)


@dataclass(frozen=True)
class Measure:
    """A frontier through dense settings, `points`, shortest first; `tried`: those and the ones that
    are worse than a shorter one.
    """

    points: list[Runs]
    tried: list[Runs]

    @cached_property
    def frontier(self) -> Frontier:
        """Over the mean logarithm of the settings' seconds."""
        times = np.array([np.log(each.seconds).mean() for each in self.points])
        return Frontier(times, np.array([each.means[1] for each in self.points]))

    @cached_property
    def scatter(self) -> tuple[np.ndarray, np.ndarray]:
        """Of the settings' means about the frontier: variances and degrees of freedom, [points].

        Dense runs of all lengths scatter much alike. From three lengths on, each variance is
        moderated by the mean of all, as if that had the degrees of freedom of one length more
        (Smyth 2004, "Linear models and empirical Bayes methods").
        """
        slopes = self.frontier(self.frontier.times).slope
        pairs = zip(self.points, slopes, strict=True)
        variances = np.array([each.variance(np.array([slope]))[0] for each, slope in pairs])
        counts = np.array([each.n for each in self.points])
        freedoms = counts - 1.0
        if len(counts) < 3 or not freedoms.all():
            return variances, freedoms
        of_a_run = variances * counts
        typical = (freedoms * of_a_run).sum() / freedoms.sum()
        more = freedoms.mean()
        moderated = (freedoms * of_a_run + more * typical) / (freedoms + more)
        return moderated / counts, freedoms + more

    @cached_property
    def ends(self) -> tuple[float, float]:
        """Log seconds of the shortest and of the longest dense setting, also of those that gain
        nothing: beyond the last point dense training is known to gain nothing.
        """
        tried = [np.log(each.seconds).mean() for each in self.tried]
        return float(self.frontier.times[0]), max(tried)

    @cached_property
    def grid(self) -> np.ndarray:
        """Log seconds from the first point to the last, [CURVE_POINTS]; of one point, itself."""
        times = self.frontier.times
        return np.linspace(times[0], times[-1], CURVE_POINTS if len(times) > 1 else 1)

    def curve(self) -> np.ndarray:
        """The frontier as points (seconds, percent), [points, 2]."""
        return np.column_stack([np.exp(self.grid), self.frontier(self.grid).accuracy])

    def reaches(self, own: Runs) -> bool:
        """Whether the setting's time is within the dense ones, or SAME_TIME beyond."""
        if not self.points or not own.n:
            return False
        time = np.log(own.seconds).mean()
        return self.ends[0] - SAME_TIME <= time <= self.ends[1] + SAME_TIME

    def gap(self, own: Runs, at: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
        """The setting's accuracy less that of dense training at log seconds `at` [times], and half
        its interval; see `confidence_of_best` for `count`.

        Three things are uncertain: the setting, the dense means, and the curve between them. The
        last is taken as the frontier's distance from straight lines (`Reading.doubt`), as a
        standard deviation.
        """
        read = self.frontier(at)
        scatter, freedoms = self.scatter
        variances = np.column_stack([own.variance(read.slope), np.square(read.weights) * scatter])
        freedoms = np.array([own.n - 1.0, *freedoms])
        half = welch_half_width(variances, freedoms, np.square(read.doubt), count)
        return own.means[1] - read.accuracy, half


def crossing(at: np.ndarray, values: np.ndarray, index: int) -> float:
    """Where `values` are 0 between at[index] and at[index + 1], on a straight line."""
    left, right = values[index : index + 2]
    return float(at[index] + (at[index + 1] - at[index]) * left / (left - right))


def time_to_match(own: Runs, dense: DenseTraining, count: int = 1) -> Match:
    """The training seconds of a setting over those of dense training of the same accuracy.

    Below 1 the setting saves time. The dense time is where the frontier has the setting's accuracy.
    The interval holds every time at which the difference to the frontier is not significant
    (a test inverted, as in Fieller 1954). So the scatter of accuracy and of seconds counts, of the
    setting and of the dense ones, and a setting saves time where it is better at equal time.
    (Percentiles of a bootstrap would be too narrow, for the mean of three seeds 2.7 times:
    Hesterberg 2015, "What Teachers Should Know About the Bootstrap".)

    "<": the setting is significantly better than every dense one; the ratio is to the longest.
    ">": it is significantly worse than the shortest. "not resolved": the setting or all dense ones
    have fewer than two seeds, the interval leaves the dense settings at both ends, or it spans more
    than a factor of WIDEST because the frontier is flat there. `count`: see
    `confidence_of_best`.
    """
    measure = dense.tested
    if not dense.settings or not own.n:
        return Match()
    if own.n < 2 or not measure.points:
        return Match(bound="not resolved")
    time = np.log(own.seconds).mean()
    at = measure.grid
    gap, half = measure.gap(own, at, count)
    if (gap > half).all():
        longest = measure.ends[1]
        return Match(np.exp(time - longest), bound="<", dense_seconds=np.exp(longest))
    if (gap < -half).all():
        return Match(np.exp(time - at[0]), bound=">", dense_seconds=np.exp(at[0]))
    reached = np.flatnonzero(gap <= 0)
    match = at[-1] if not len(reached) else at[0]
    if len(reached) and reached[0] > 0:
        match = crossing(at, gap, reached[0] - 1)
    seconds = float(np.exp(match))
    inside = np.flatnonzero(np.abs(gap) <= half)
    if not len(inside):  # nothing scatters, and the grid steps over the one time that fits
        return Match(*[float(np.exp(time - match))] * 3, dense_seconds=seconds)
    first, last = inside[[0, -1]]
    above = half - np.abs(gap)
    shortest = at[0] if first == 0 else crossing(at, above, first - 1)
    longest = at[-1] if last == len(at) - 1 else crossing(at, above, last)
    cut = (last == len(at) - 1, first == 0)
    elsewhere = not shortest <= match <= longest  # level beyond: other times fit no less
    if all(cut) or elsewhere or longest - shortest > np.log(WIDEST):
        return Match(bound="not resolved", dense_seconds=seconds)
    low, high = (float(np.exp(time - end)) for end in (longest, shortest))
    return Match(float(np.exp(time - match)), low, high, "", *map(bool, cut), seconds)


def at_equal_time(own: Runs, dense: DenseTraining, count: int = 1) -> tuple[float, float]:
    """A setting's accuracy less what dense training reaches in the same time, in points, and half
    its 95 % interval; see `Measure.gap`.

    NaN outside the range of the dense settings, by more than SAME_TIME; an interval needs two seeds
    of each. Dense settings of one seed are used only where those with more do not reach.
    """
    measure = dense.tested if dense.tested.reaches(own) else dense.every
    if not measure.reaches(own):
        return float("nan"), float("nan")
    gap, half = measure.gap(own, np.array([np.log(own.seconds).mean()]), count)
    return float(gap[0]), float(half[0])


def wide_gap(seconds: float, dense: DenseTraining) -> tuple[Runs, Runs] | None:
    """The two dense settings on either side of a time where they are further apart than WIDE_GAP:
    too far to know the curve between them.
    """
    points = (dense.tested if len(dense.tested.points) > 1 else dense.every).points
    for left, right in pairwise(points):
        near = left.means[0] * (1 + SAME_TIME) < seconds < right.means[0] * (1 - SAME_TIME)
        if near and right.means[0] > WIDE_GAP * left.means[0]:
            return left, right
    return None
