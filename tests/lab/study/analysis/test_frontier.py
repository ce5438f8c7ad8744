"""The curve of dense training between its lengths."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lab.study.analysis.frontier import Frontier, growth

LENGTHS = np.log([20.0, 28.0, 40.0, 60.0, 80.0])
BETWEEN = np.linspace(LENGTHS[0], LENGTHS[-1], 101)


@pytest.mark.parametrize("exponent", [-0.5, 0.0, 0.95, 2.0])
def test_a_power_law_is_found_again_between_the_lengths(exponent):
    def law(times):
        return 90 + 2 * growth(times - LENGTHS.mean(), exponent)

    found = Frontier(LENGTHS, law(LENGTHS))(BETWEEN)
    assert np.abs(found.accuracy - law(BETWEEN)).max() < 0.05
    inner = slice(10, -10)
    slopes = np.gradient(law(BETWEEN), BETWEEN)
    assert found.slope[inner] == pytest.approx(slopes[inner], rel=0.15)


@given(st.lists(st.floats(0, 100), min_size=1, max_size=5))
def test_whatever_the_means_it_is_no_lower_than_the_best_before_and_than_straight_lines(means):
    times = LENGTHS[: len(means)]
    found = Frontier(times, np.array(means))(BETWEEN)
    reached = np.maximum.accumulate(means)
    inside = np.clip(BETWEEN, times[0], times[-1])
    assert (found.accuracy >= np.interp(inside, times, reached) - 1e-6).all()
    assert (found.slope >= 0).all()
    assert found.weights.sum(axis=1) == pytest.approx(1, abs=1e-6)


def test_beyond_its_ends_it_is_what_it_is_there():
    frontier = Frontier(LENGTHS, np.array([89.5, 90.4, 91.2, 91.7, 92.0]))
    ends = frontier(LENGTHS[[0, -1]]).accuracy
    assert frontier(np.log([10.0, 200.0])).accuracy == pytest.approx(ends)
    assert frontier(np.log([200.0])).slope.tolist() == [0]


def test_two_lengths_show_no_curve_so_that_it_may_be_anything_from_a_line_to_one_over_time():
    frontier = Frontier(np.log([20.0, 40.0]), np.array([89.0, 91.0]))
    found = frontier(np.log([30.0]))
    line = 89 + 2 * np.log2(1.5)
    inverse = 89 + 2 * (1 - 20 / 30) / (1 - 20 / 40)
    assert found.accuracy == pytest.approx((line + inverse) / 2)
    assert found.doubt == pytest.approx((inverse - line) / 2)


def test_a_steep_rise_does_not_run_over_the_level_part_behind_it():
    frontier = Frontier(np.log([10.0, 20.0, 40.0]), np.array([80.0, 90.0, 90.1]))
    assert frontier(np.log(np.linspace(20, 40, 50))).accuracy.max() < 90.2
