"""Significance, and exactly which samples it selects."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from conftest import LayerNormNet, as_batch, make_batch, make_run
from lab.base.errors import TrainingFailed
from lab.data.loading import Scores
from train_ast import ast_forward, per_sample_entropy, select_active, significance


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
    chosen = select_active(torch.tensor(scores), threshold, min_active)
    assert chosen.indices.tolist() == indices
    assert chosen.activation == activation


@given(
    st.lists(st.floats(0, 10, width=32), min_size=1, max_size=40),
    st.floats(0, 10, width=32),
    st.integers(0, 8),
)
def test_every_active_sample_outranks_every_other(scores, threshold, min_active):
    chosen = select_active(torch.tensor(scores), threshold, min_active)
    active = set(chosen.indices.tolist())
    above = {i for i, score in enumerate(scores) if score > threshold}
    assert above <= active
    assert len(active) == max(len(above), min(min_active, len(scores)))
    rest = [score for i, score in enumerate(scores) if i not in active]
    assert not rest or not active or min(scores[i] for i in active) >= max(rest)


def test_spread_is_the_inter_quartile_range():
    chosen = select_active(torch.arange(101.0), 50.0)
    assert chosen.iqr == 50.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_batch_with_a_score_that_is_not_finite_is_left_out(bad):
    run = make_run(LayerNormNet(), "ast.initial_threshold=1", "training.max_nonfinite_steps=1")
    rows = torch.stack([torch.full((16,), 2.0), torch.zeros(16)])
    rows[0, 3] = bad
    assert (
        ast_forward(
            as_batch(*make_batch()), Scores(rows, None), run.selection, run.queue, run.trainer
        )
        == 0
    )
    assert run.selection.activations == []
    assert run.metrics.ledger.trained == 0
    with pytest.raises(TrainingFailed, match="non-finite loss in epoch 1, step 1"):
        ast_forward(
            as_batch(*make_batch()), Scores(rows, None), run.selection, run.queue, run.trainer
        )
