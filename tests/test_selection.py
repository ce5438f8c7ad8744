"""Significance, and exactly which samples it selects."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from conftest import LayerNormNet, as_batch, make_batch, make_config, make_run
from lab.base.errors import TrainingFailed
from lab.data.loading import BatchScores
from train_ast import Choice, Threshold, ast_forward, per_sample_entropy, significance


def test_entropy_of_known_distributions():
    logits = torch.tensor(
        [[0.0, 0.0, 0.0, 0.0], [100.0, 0.0, 0.0, 0.0], [math.log(3), 0.0, -math.inf, -math.inf]]
    )
    expected = [math.log(4), 0.0, -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))]
    assert per_sample_entropy(logits).tolist() == pytest.approx(expected, abs=1e-6)


def test_significance_is_loss_plus_weighted_entropy_in_float32():
    logits = torch.randn(32, 10, generator=torch.Generator().manual_seed(0)).bfloat16()
    labels = torch.arange(32) % 10
    loss = F.cross_entropy(logits.float(), labels, reduction="none")
    got = significance(logits, labels, 0.5)
    assert got.dtype == torch.float32
    assert torch.allclose(
        got, loss + 0.5 * torch.distributions.Categorical(logits=logits.float()).entropy()
    )
    assert torch.equal(significance(logits, labels, 0.0), loss)


@pytest.mark.parametrize(
    ("scores", "threshold", "min_active", "indices", "activation"),
    [
        ([0.1, 0.9, 0.5, 0.7], 0.6, 0, [1, 3], 0.5),
        ([0.1, 0.9, 0.5, 0.7], 0.7, 0, [1], 0.25),  # above, not at, the threshold
        ([0.1, 0.9, 0.5, 0.7], 2.0, 0, [], 0.0),
        ([0.1, 0.9, 0.5, 0.7], -1.0, 0, [0, 1, 2, 3], 1.0),
        (
            [0.1, 0.9, 0.5, 0.7],
            2.0,
            3,
            [1, 2, 3],
            0.0,
        ),  # the floor takes the top ones; activation does not see it
        ([0.1, 0.9, 0.5, 0.7], 0.4, 2, [1, 2, 3], 0.75),  # no floor where enough are active
        ([0.5, 0.5, 0.5, 0.5], 0.5, 2, [0, 1], 0.0),  # of equal scores the earlier
        ([0.5, 0.8, 0.5, 0.8], 0.9, 3, [0, 1, 3], 0.0),
        ([0.3], 0.1, 5, [0], 1.0),  # a floor above the batch size
    ],
)
def test_which_samples_are_active(scores, threshold, min_active, indices, activation):
    chosen, activations = chosen_over(scores, threshold, min_active)
    assert chosen.rows.tolist() == indices
    assert activations == [activation]
    assert chosen.threshold == threshold
    assert chosen.weights is None


FIXED = ["ast.kp=0", "ast.ki=0", "ast.initial_threshold=0", "training.batch_size=64"]
SELECTION = make_run(LayerNormNet(), *FIXED).selection


def chosen_over(scores, threshold, min_active) -> tuple[Choice, list[float]]:
    """Who of a batch is trained on with a threshold that stays, and the activation counted."""
    SELECTION.rule.controller.threshold = threshold
    SELECTION.min_active = min_active
    SELECTION.activations = []
    chosen = SELECTION.choose(torch.arange(len(scores)), torch.tensor(scores), 0.0)
    return chosen, SELECTION.activations


@given(
    st.lists(st.floats(0, 10, width=32), min_size=1, max_size=40),
    st.floats(0, 10, width=32),
    st.integers(0, 8),
)
def test_every_active_sample_outranks_every_other(scores, threshold, min_active):
    chosen, _ = chosen_over(scores, threshold, min_active)
    active = set(chosen.rows.tolist())
    assert chosen.rows.tolist() == sorted(active)
    above = {i for i, score in enumerate(scores) if score > threshold}
    assert above <= active
    assert len(active) == max(len(above), min(min_active, len(scores)))
    rest = [score for i, score in enumerate(scores) if i not in active]
    assert not rest or not active or min(scores[i] for i in active) >= max(rest)


def test_spread_is_the_inter_quartile_range():
    rule = Threshold(make_config())
    rule.controller.start(50.0)
    rule.step(torch.arange(101.0), None)
    assert rule.iqr == 50.0
    rule.step(torch.arange(0.0, 1010.0, 10), None)  # one batch alone is noisy
    assert rule.iqr == pytest.approx(0.9 * 50 + 0.1 * 500)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_score_that_is_not_finite_ends_the_run(bad):
    run = make_run(LayerNormNet(), "ast.initial_threshold=1")
    rows = torch.stack([torch.full((16,), 2.0), torch.zeros(16)])
    rows[0, 3] = bad
    with pytest.raises(TrainingFailed, match="non-finite scores in epoch 1, step 1"):
        ast_forward(as_batch(*make_batch()), BatchScores(rows), run, 0.0)
    assert run.selection.activations == []
    assert run.metrics.meter.trained == 0
    assert all(parameter.grad is None for parameter in run.network.model.parameters())
