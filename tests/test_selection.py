"""Significance, and exactly which samples it selects."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from conftest import (
    LayerNormNet,
    as_batch,
    make_batch,
    make_config,
    make_run,
    scores_of,
    sparse_step,
)
from lab.base.errors import TrainingFailed
from lab.data.loading import BatchScores
from train_ast import (
    Choice,
    Pool,
    Run,
    Threshold,
    TopShare,
    ast_forward,
    close_epoch,
    per_sample_entropy,
    significance,
    with_floor,
)


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
    rule.observe_spread(np.arange(101.0), 1)
    assert rule.iqr == 50.0
    rule.observe_spread(np.arange(0.0, 1010.0, 10), 1)  # one batch alone is noisy
    assert rule.iqr == pytest.approx(0.9 * 50 + 0.1 * 500)
    rule.iqr = 50.0
    rule.observe_spread(np.arange(0.0, 1010.0, 10), 3)  # as of three batches, one after the other
    assert rule.iqr == pytest.approx(0.729 * 50 + 0.271 * 500)


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


# ------------------------------------------------------------- Doubt, exploration, weights, no read

CPU = torch.device("cpu")


def built(samples: int, *overrides: str) -> Run:
    torch.manual_seed(0)
    config = make_config(*overrides)
    return Run.build(config, LayerNormNet(), CPU, planned_steps=100, samples=samples)


@pytest.mark.parametrize("rule", ["pi", "topk"])
def test_the_rule_never_takes_who_is_doubted(rule):
    way = [f"ast.rule={rule}", "ast.forget_rate=0.25", "training.batch_size=64", "ast.min_active=0"]
    selection = built(64, *way, "ast.target_activation=0.75").selection
    for seed in range(4):
        scores = torch.rand(64, generator=torch.Generator().manual_seed(seed))
        chosen = selection.choose(torch.arange(64), scores, 0.0)
        highest = set(scores.topk(16).indices.tolist())
        assert not highest & set(chosen.rows.tolist())
        assert selection.doubt.forgotten() == 0.25
        assert set(np.flatnonzero(selection.doubt.left_out())) >= highest


def test_the_floor_takes_who_is_doubted_last():
    """And who is taken was not left out."""
    scores = torch.tensor([9.0, 8.0, 1.0, 2.0])
    nobody = Choice(torch.arange(0), 0.0)
    kept = torch.tensor([2, 3])
    taken = [with_floor(nobody, scores, kept, floor).rows.tolist() for floor in range(6)]
    assert taken == [[], [3], [2, 3], [0, 2, 3], [0, 1, 2, 3], [0, 1, 2, 3]]
    way = ["ast.rule=topk", "ast.forget_rate=0.5", "ast.target_activation=0.5", "ast.min_active=3"]
    selection = built(4, *way).selection
    assert selection.choose(torch.arange(4), scores, 0.0).rows.tolist() == [0, 2, 3]
    assert selection.activations == [0.5]
    assert selection.doubt.left_out().tolist() == [False, True, False, False]


def test_a_batch_in_which_all_are_doubted_trains_nobody():
    """.95 of 16 is 15.2: every fifth batch has nobody left."""
    way = ["ast.forget_rate=0.95", "ast.target_activation=0.05", "ast.min_active=0"]
    for rule in ("pi", "topk"):
        selection = built(16, *way, f"ast.rule={rule}").selection
        counts = [
            len(selection.choose(torch.arange(16), torch.rand(16), 0.0).rows) for _ in range(5)
        ]
        assert counts[4] == 0
        assert selection.doubt.forgotten() == 0.95


def test_doubt_goes_before_exploration_and_both_make_the_whole_target():
    """.2 of all are left out, whoever chance draws; explored and chosen are the target together."""
    way = ["ast.scoring=history", "ast.forget_rate=0.2", "ast.explore=0.1", "ast.kp=1"]
    run = built(5000, *way, "ast.target_activation=0.4", "training.batch_size=100")
    scores = torch.rand(5000, generator=torch.Generator().manual_seed(0))
    run.selection.store.significance.copy_(scores)
    run.start_epoch(0, np.random.default_rng(0).permutation(5000))
    chosen = run.selection.mask() > 0
    highest = torch.zeros(5000, dtype=torch.bool).index_fill_(0, scores.topk(1000).indices, True)
    assert run.selection.doubt.forgotten() == 0.2
    assert (run.selection.doubt.left_out() == highest.numpy()).all()
    assert not chosen[highest].any()
    assert chosen.mean() == run.selection.activations[0] == pytest.approx(0.4, abs=0.01)
    low = scores.numpy() < 0.3  # far below the threshold: chance alone takes them
    assert chosen[low].mean() == pytest.approx(0.1, abs=0.02)


def test_the_weights_of_infobatch_travel_with_the_rows_through_packing():
    way = ["ast.rule=infobatch", "ast.entropy_weight=0", "ast.pack=true", "ast.min_active=0"]
    run = built(0, *way)
    reference = copy.deepcopy(run.network.model)
    rows = []
    for seed in range(2):  # about 12 of 16 are chosen: the second batch fills the queue
        images, labels = make_batch(seed=seed)
        scores, _ = scores_of(run, images, labels).read()
        below = scores < scores.double().mean()
        drawn = run.selection.uniforms(16, 0) < 0.5
        rows += [
            (images[i], labels[i], 2.0 if below[i] else 1.0)
            for i in torch.nonzero(~below | drawn)[:, 0]
        ]
        assert (sparse_step(run, images, labels) == 16) == (seed == 1)
    images, labels, weights = (
        torch.stack([torch.as_tensor(e) for e in c]) for c in zip(*rows, strict=True)
    )
    assert set(weights[:16].tolist()) == {1.0, 2.0}
    logits = reference(run.network.normalise(images[:16]))
    (F.cross_entropy(logits, labels[:16], reduction="none") * weights[:16]).mean().backward()
    for ours, theirs in zip(run.network.model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    assert torch.equal(run.queue.samples.weights, weights[16:])
    assert close_epoch(run, 0.0, 32)["target"] is None


def test_a_top_share_is_chosen_without_a_look_at_the_scores():
    """On `meta`, where a tensor has no values, any read of one raises."""
    scores = torch.empty(32, device="meta")
    pool = Pool(scores, lambda: scores, 0.0)
    chosen = TopShare(make_config("ast.rule=topk")).choose(pool, 0.25)
    assert chosen.rows.shape == (8,)
    assert chosen.threshold.shape == ()
    kept = torch.empty(24, dtype=torch.int64, device="meta")
    assert with_floor(chosen, scores, kept, 12).rows.shape == (12,)
