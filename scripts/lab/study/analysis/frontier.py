"""The dense frontier: the accuracy of dense training at any time between its shortest and its
longest length.

Accuracies are in percent. All times are logarithms of seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.special import exprel

# of time in the law, tried in turn; with two lengths, which show no exponent, the error is as 1 / t
EXPONENTS = np.linspace(-1, 8, 91)
OF_TWO_LENGTHS = 1.0


@dataclass(frozen=True)
class Reading:
    """The frontier at some times [times]: `accuracy`, `slope` (points a unit of log time) and
    `doubt`, how far the two curves' mean is from straight lines over log time.

    `weights`: [times, lengths], how much of each dense mean is in the accuracy.
    """

    accuracy: np.ndarray
    slope: np.ndarray
    doubt: np.ndarray
    weights: np.ndarray


def growth(time: np.ndarray, exponent: float | np.ndarray) -> np.ndarray:
    """(1 - exp(-exponent * time)) / exponent: a power law of seconds; its limit at exponent 0."""
    return time * exprel(-exponent * time)


@dataclass(frozen=True)
class Frontier:
    """A curve near the means of dense lengths, at `times` [lengths], rising; `means` their percent.

    It is the mean of two curves. The natural cubic spline passes through all means, whatever their
    shape; it is kept between the two means beside it. The law, accuracy = a + b * growth, is the
    power law of learning curves (Hestness et al. 2017), fitted by least squares; it has three
    numbers, so that it scatters less. Accuracy is concave over log time, so the curve is nowhere
    below the straight lines between the means. Dense training may stop early, so a mean below that
    of a shorter length counts as that of the shorter one.
    """

    times: np.ndarray
    means: np.ndarray

    @cached_property
    def best(self) -> np.ndarray:
        """For each length, which one up to it has the highest mean, int [lengths]."""
        return np.array([self.means[: i + 1].argmax() for i in range(len(self.means))])

    @cached_property
    def middle(self) -> float:
        return float(self.times.mean())

    @cached_property
    def law(self) -> tuple[float, float]:
        """Its exponent and b, which is not negative; see the class."""
        means = self.means[self.best] - self.means[self.best].mean()
        exponents = EXPONENTS if len(means) > 2 else np.array([OF_TWO_LENGTHS])
        grown = growth(self.times - self.middle, exponents[:, None])
        grown -= grown.mean(axis=1, keepdims=True)
        scale = np.maximum(grown @ means, 0) / np.square(grown).sum(axis=1)
        misfit = np.square(means - scale[:, None] * grown).sum(axis=1)
        return float(exponents[misfit.argmin()]), float(scale[misfit.argmin()])

    def columns(self, at: np.ndarray) -> np.ndarray:
        """The derivatives of the law by its numbers at times, [times, numbers], up to a factor."""
        exponent, _ = self.law
        time = at - self.middle
        by_scale = growth(time, exponent)
        if len(self.times) == 2:
            return np.column_stack([np.ones_like(time), by_scale])
        step = 1e-3
        by_exponent = (growth(time, exponent + step) - growth(time, exponent - step)) / (2 * step)
        return np.column_stack([np.ones_like(time), by_scale, by_exponent])

    @cached_property
    def inverse(self) -> np.ndarray:
        """The weights of the means in the law's numbers, [numbers, lengths]."""
        return np.linalg.pinv(self.columns(self.times))

    @cached_property
    def spline(self) -> CubicSpline:
        """The weights of the means in the spline."""
        return CubicSpline(self.times, np.eye(len(self.times)), bc_type="natural")

    def __call__(self, at: np.ndarray) -> Reading:
        """The frontier at times [times]; beyond its ends it is what it is there."""
        means = self.means[self.best]
        inside = np.clip(at, self.times[0], self.times[-1])
        if len(means) == 1:
            nothing = np.zeros(len(at))
            return Reading(nothing + means[0], nothing, nothing, np.ones((len(at), 1)))
        exponent, scale = self.law
        grown = growth(inside - self.middle, exponent)
        origin = means.mean() - scale * growth(self.times - self.middle, exponent).mean()
        law_slope = scale * np.exp(-exponent * (inside - self.middle))
        right = np.clip(np.searchsorted(self.times, inside), 1, len(means) - 1)
        between = np.clip(self.spline(inside) @ means, means[right - 1], means[right])
        accuracy = (origin + scale * grown + between) / 2
        slope = (law_slope + self.spline(inside, 1) @ means) / 2
        weights = (self.columns(inside) @ self.inverse + self.spline(inside)) / 2
        own = np.zeros_like(weights)
        np.add.at(own, (slice(None), self.best), weights)
        lines = np.interp(inside, self.times, means)
        slope = np.where(at > self.times[-1], 0, np.maximum(slope, 0))
        return Reading(np.maximum(accuracy, lines), slope, accuracy - lines, own)
