"""The control law: sign, letter, bounds, anti-windup, ramps, hand-over, and that it tracks."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from train_ast import PIController

shares = st.floats(0, 1)
gains = st.floats(0.001, 5)


@given(shares, st.floats(0.01, 1), gains, gains, st.floats(0.001, 100))
def test_too_many_active_samples_raise_the_threshold(activation, target, kp, ki, spread):
    controller = PIController(target, kp, ki, min_threshold=-math.inf)
    controller.start(1.0)
    moved = controller.update(activation, spread) - 1.0
    error = activation - target
    assert moved == pytest.approx((kp + ki) * error * spread, abs=1e-9)
    assert math.copysign(1, moved) == math.copysign(1, error) or abs(error) < 1e-12


@given(st.lists(shares, min_size=1, max_size=50), gains, gains)
def test_raw_law_to_the_letter(activations, kp, ki):
    controller = PIController(0.25, kp, ki, min_threshold=-math.inf)
    controller.start(2.0)
    threshold = 2.0
    integral = 0.0
    for activation in activations:
        integral += activation - 0.25
        threshold += kp * (activation - 0.25) + ki * integral
        assert controller.update(activation) == pytest.approx(threshold, rel=1e-9, abs=1e-9)


@given(st.lists(shares, min_size=1, max_size=80), gains, gains, st.floats(0, 50))
def test_threshold_stays_within_its_bounds(activations, kp, ki, spread):
    controller = PIController(0.3, kp, ki, min_threshold=0.5, max_threshold=2.0)
    controller.start(9.0)
    assert controller.threshold == 2.0
    for activation in activations:
        assert 0.5 <= controller.update(activation, spread) <= 2.0


@pytest.mark.parametrize(("stuck_at", "activation", "back"), [(0.0, 0.0, 0.9), (5.0, 0.9, 0.0)])
def test_no_windup_on_a_bound(stuck_at, activation, back):
    controller = PIController(0.25, 0.1, 0.01, min_threshold=0.0, max_threshold=5.0)
    controller.start(stuck_at)
    for _ in range(10_000):
        controller.update(activation)
    assert controller.threshold == stuck_at
    assert abs(controller.integral) < 1e-9
    controller.update(back)
    assert (
        controller.threshold != stuck_at
    )  # leaves the bound with the first error of the other sign


def test_gains_ramp_linearly_over_their_own_epochs():
    controller = PIController(0.25, 0.4, 0.08, kp_warmup_epochs=2, ki_warmup_epochs=4)
    seen = []
    for controller.epoch in (0.0, 1.0, 2.0, 3.0, 4.0, 9.0):
        seen.append(controller.gains())
    assert seen == [
        (0, 0),
        (0.2, 0.02),
        (0.4, 0.04),
        (0.4, pytest.approx(0.06)),
        (0.4, 0.08),
        (0.4, 0.08),
    ]


def test_hand_over_forgets_earlier_errors():
    controller = PIController(0.25)
    controller.start(3.0)
    controller.update(1.0)
    controller.start(1.5)
    assert (controller.threshold, controller.integral) == (1.5, 0.0)


def test_state_round_trip_continues_alike():
    one = PIController(0.25)
    two = PIController(0.25)
    one.start(1.0)
    for activation in (0.9, 0.4, 0.1):
        one.update(activation)
    two.load_state_dict(one.state_dict())
    assert [one.update(0.7), one.update(0.2)] == [two.update(0.7), two.update(0.2)]


@settings(max_examples=25)
@given(
    target=st.floats(0.1, 0.7),
    kp=st.floats(0.1, 1.0),
    ki=st.floats(0.01, 0.05),
    sigma=st.floats(0.3, 1.5),
    seed=st.integers(0, 1000),
)
def test_activation_returns_to_target_while_the_scores_drift(target, kp, ki, sigma, seed):
    """Significance drawn log-normal, its scale falling a hundredfold: within 2 points over the last
    400 steps.
    """
    rng = np.random.default_rng(seed)
    batch = 256
    steps = 1200
    controller = PIController(target, kp, ki)
    controller.start(1.0)
    iqr = None
    activations = []
    for step in range(steps):
        scores = rng.lognormal(-math.log(100) * step / steps, sigma, batch)
        lower, upper = np.partition(scores, (batch // 4, 3 * batch // 4))[
            [batch // 4, 3 * batch // 4]
        ]
        iqr = upper - lower if iqr is None else 0.9 * iqr + 0.1 * (upper - lower)
        activations.append(float((scores > controller.threshold).mean()))
        controller.update(activations[-1], iqr)
    assert abs(np.mean(activations[-400:]) - target) < 0.02


def test_what_wound_up_on_the_way_to_a_bound_is_forgotten_there():
    """A long fall, a long stay at the lower bound: the first error of the other sign leaves it."""
    controller = PIController(0.25, 0.1, 0.01, min_threshold=0.0)
    controller.start(5.0)
    for _ in range(500):
        controller.update(0.0)
    assert controller.threshold == 0.0
    controller.update(0.9)
    assert controller.threshold > 0.0
