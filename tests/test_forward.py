"""The sparse step: its gradient against autograd's own, the work it skips, packing, windows,
scaling.
"""

import copy
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import v2

from conftest import (
    BatchNormNet,
    LayerNormNet,
    as_batch,
    loaded,
    make_batch,
    make_config,
    make_run,
    scores_of,
    sparse_step,
)
from lab.data.mixing import Mixing
from lab.data.queue import ActiveQueue
from lab.machine.distributed import Dist
from lab.models.building import count_flops
from train_ast import Choice, score, train_one_epoch, with_floor

NETS = [LayerNormNet, BatchNormNet]
PLAIN_SGD = (
    "training.momentum=0",
    "training.weight_decay=0",
    "training.lr=1.0",
    "training.min_lr=1.0",
)


def gradients(model):
    return [p.grad.clone() for p in model.parameters()]


def reference_gradients(run, model, batches):
    """Autograd's gradient of the mean loss over all `batches`, each forwarded by itself in train
    mode.
    """
    total = sum(len(labels) for _, labels in batches)
    model.zero_grad()
    for images, labels in batches:
        if len(labels):
            (
                F.cross_entropy(model(run.network.normalise(images)), labels, reduction="sum")
                / total
            ).backward()
    return gradients(model)


def active_part(run, model, images, labels, threshold, min_active=0):
    """What the law says is active, worked out without `ast_forward`: eval-mode loss + entropy over
    a threshold.
    """
    with torch.no_grad():
        logits = copy.deepcopy(model).eval()(run.network.normalise(images))
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    scores = (
        F.cross_entropy(logits, labels, reduction="none") + run.config.ast.entropy_weight * entropy
    )
    k = max(int((scores > threshold).sum()), min_active)
    indices = scores.topk(k).indices.sort().values
    return images[indices], labels[indices]


@pytest.mark.parametrize("net", NETS)
def test_gradient_is_autograds_over_the_active_samples(net):
    torch.manual_seed(0)
    model = net()
    reference = copy.deepcopy(model)
    images, labels = make_batch()
    run = make_run(model, "ast.initial_threshold=4.5")
    active = active_part(run, reference, images, labels, 4.5)
    assert 1 < len(active[1]) < 16  # a real selection
    assert sparse_step(run, images, labels) == len(active[1])
    for got, expected in zip(
        gradients(model), reference_gradients(run, reference, [active]), strict=True
    ):
        assert torch.allclose(got, expected, atol=1e-6)


@pytest.mark.parametrize("net", NETS)
@pytest.mark.parametrize(
    ("setting", "mix"),
    [("mixup=0.4", v2.MixUp(alpha=0.4, num_classes=10)), ("cutmix=1", v2.CutMix(num_classes=10))],
)
def test_gradient_is_autograds_over_mixtures_of_the_active_samples(setting, mix, net, monkeypatch):
    """Chosen by unmixed pictures, then mixed among themselves, with smoothed labels."""
    torch.manual_seed(0)
    model = net()
    reference = copy.deepcopy(model)
    (images, labels) = make_batch()
    settings = ["ast.initial_threshold=4.5", f"training.{setting}", "training.label_smoothing=0.1"]
    run = make_run(model, *settings)
    drawn = []
    monkeypatch.setattr("lab.data.mixing.as_seed", lambda number: drawn.append(number) or 7)
    active = active_part(run, reference, images, labels, 4.5)
    assert 1 < len(active[1]) < 16
    assert sparse_step(run, images, labels) == len(active[1])
    assert len(drawn) == 1
    torch.manual_seed(7)
    torch.multinomial(torch.ones(1), 1)  # which of the two
    mixed, shares = mix(active[0].float(), active[1])
    assert (shares.max(1).values < 1).any()  # a real mixture
    reference.zero_grad()
    F.cross_entropy(reference(run.network.normalise(mixed)), shares, label_smoothing=0.1).backward()
    for got, expected in zip(gradients(model), gradients(reference), strict=True):
        assert torch.allclose(got, expected, atol=1e-6)
    with torch.no_grad():  # the loss that is reported is not smoothed
        plain = F.cross_entropy(reference(run.network.normalise(mixed)), shares)
    assert run.metrics.meter.read()[0] == pytest.approx(plain.item(), abs=1e-5)


def test_a_mixture_depends_on_seed_epoch_step_and_process_alone():
    images, labels = make_batch()
    training = make_config("training.mixup=0.3", "training.cutmix=0.7").training
    state = torch.get_rng_state()
    mixing = Mixing(training, 10, Dist())
    first = mixing(images, labels, 2, 5)[:2]
    assert all(
        torch.equal(*pair) for pair in zip(mixing(images, labels, 2, 5)[:2], first, strict=True)
    )
    assert torch.equal(torch.get_rng_state(), state)
    others = [mixing(images, labels, 2, 6), mixing(images, labels, 3, 5)]
    others += [Mixing(training.model_copy(update={"seed": 1}), 10, Dist())(images, labels, 2, 5)]
    others += [Mixing(training, 10, Dist(rank=1, world=2))(images, labels, 2, 5)]
    assert not any(torch.equal(first[1], other[1]) for other in others)
    for count in (0, 1, 3):  # any number of active samples
        mixed, shares, _ = mixing(images[:count], labels[:count], 0, 0)
        assert mixed.shape == images[:count].shape
        assert torch.allclose(shares.sum(1), torch.ones(count))


@pytest.mark.parametrize("net", NETS)
def test_window_gradient_is_the_mean_over_unequal_active_counts(net):
    """Three batches a window, one of them with nothing active: plain SGD with rate 1 moves by the
    gradient.
    """
    torch.manual_seed(1)
    model = net()
    batches = [make_batch(seed=1), make_batch(seed=2), make_batch(seed=3)]
    overrides = [
        "training.grad_accum_steps=3",
        "ast.min_active=0",
        "ast.kp=0",
        "ast.ki=0",
        *PLAIN_SGD,
    ]
    run = make_run(model, *overrides, "ast.initial_threshold=4.5")
    batches[1] = (batches[1][0][:3], batches[1][1][:3])
    low = active_part(run, model, *batches[1], 0.0)
    with torch.no_grad():  # labels the model is surest of: none of this batch is over the threshold
        batches[1] = (low[0], copy.deepcopy(model).eval()(run.network.normalise(low[0])).argmax(-1))
    reference = copy.deepcopy(model)
    active = [active_part(run, reference, *batch, 4.5) for batch in batches]
    counts = [len(labels) for _, labels in active]
    assert counts[1] == 0
    assert counts[0] != counts[2]
    before = [p.detach().clone() for p in model.parameters()]
    assert train_one_epoch(run, loaded(batches), 3)
    for old, new, expected in zip(
        before, model.parameters(), reference_gradients(run, reference, active), strict=True
    ):
        assert torch.allclose(old - new, expected, atol=1e-6)
    assert (run.metrics.ledger.steps, run.metrics.ledger.trained, run.metrics.ledger.scored) == (
        1,
        sum(counts),
        35,
    )


@pytest.mark.parametrize("net", NETS)
def test_scoring_leaves_the_model_untouched(net):
    model = net()
    before = copy.deepcopy(model.state_dict())
    run = make_run(model)
    scores, hits = scores_of(run, *make_batch()).read()
    images, labels = make_batch()
    assert (
        hits
        == (copy.deepcopy(model).eval()(run.network.normalise(images)).argmax(-1) == labels).sum()
    )
    assert not scores.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert model.training
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_running_statistics_come_from_the_active_samples_alone():
    model = BatchNormNet()
    reference = copy.deepcopy(model)
    images, labels = make_batch()
    run = make_run(model, "ast.initial_threshold=4.5")
    active = active_part(run, reference, images, labels, 4.5)
    sparse_step(run, images, labels)
    reference(run.network.normalise(active[0]))
    assert torch.allclose(model.body[1].running_mean, reference.body[1].running_mean)
    assert model.body[1].num_batches_tracked == 1


@pytest.mark.parametrize("pack", [False, True])
def test_inactive_rows_never_reach_the_training_forward(pack):
    model = LayerNormNet()
    rows = []
    run = make_run(model, "ast.initial_threshold=4.5", f"ast.pack={pack}")
    model.body.register_forward_pre_hook(
        lambda _, args: rows.append(args[0]) if torch.is_grad_enabled() else None
    )
    batches = [make_batch(seed=seed) for seed in range(12)]
    expected = []
    for images, labels in batches:
        scores, _ = scores_of(run, images, labels).read()
        over = torch.nonzero(scores > run.selection.rule.controller.threshold)[:, 0]
        chosen = with_floor(Choice(over, 0.0), scores, None, 2)
        expected.append(run.network.normalise(images[chosen.rows]))
        sparse_step(run, images, labels)
    trained = torch.cat(rows)
    wanted = torch.cat(expected)
    assert len(wanted) < 0.8 * 12 * 16
    assert torch.equal(trained, wanted[: len(trained)])  # the active rows, in order, and no others
    if pack:
        assert {len(chunk) for chunk in rows} == {16}
        assert len(trained) == len(wanted) // 16 * 16
        assert len(run.queue) == len(wanted) % 16
    else:
        assert len(trained) == len(wanted)


def test_nothing_active_takes_no_step():
    """Momentum and weight decay would move the weights even on a zero gradient:
    `any_active_in_accum` guards them.
    """
    model = LayerNormNet()
    run = make_run(
        model, "ast.initial_threshold=1e6", "ast.min_active=0", "training.grad_accum_steps=2"
    )
    before = copy.deepcopy(model.state_dict())
    train_one_epoch(run, loaded([make_batch(seed=s) for s in range(4)]), 4)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert (run.metrics.ledger.steps, run.metrics.ledger.trained, run.metrics.ledger.loaded) == (
        0,
        0,
        64,
    )


def test_min_active_trains_on_the_top_samples_and_the_controller_does_not_see_it():
    model = LayerNormNet()
    run = make_run(model, "ast.initial_threshold=1e6", "ast.min_active=3")
    assert sparse_step(run, *make_batch()) == 3
    assert run.selection.activations == [0.0]
    assert run.selection.rule.controller.threshold < 1e6


def test_hand_over_starts_at_the_quantile_of_the_first_batch():
    run = make_run(LayerNormNet(), "ast.target_activation=0.25")
    images, labels = make_batch()
    scores, _ = scores_of(run, images, labels).read()
    sparse_step(run, images, labels)
    assert run.selection.thresholds[0] == pytest.approx(torch.quantile(scores, 0.75).item())
    assert run.selection.activations == [0.25]


def test_a_threshold_left_behind_is_found_again():
    """Scores collapse a thousandfold between two batches: the next batch starts from its own
    quantile.
    """
    run = make_run(LayerNormNet(), "ast.target_activation=0.5", "training.batch_size=64")
    for _ in range(3):
        sparse_step(run, *make_batch(64))
    run.selection.rule.controller.threshold *= 1000
    sparse_step(run, *make_batch(64, seed=9))
    sparse_step(run, *make_batch(64, seed=10))
    assert run.selection.activations[-2:] == [0.0, 0.5]


def test_float16_scales_the_loss_and_unscales_the_gradient():
    torch.manual_seed(0)
    model = LayerNormNet()
    reference = copy.deepcopy(model)
    run = make_run(model, "training.mixed_precision=float16", "ast.mode=dense", *PLAIN_SGD)
    assert run.trainer.scaler.is_enabled()
    images, labels = make_batch()
    before = [p.detach().clone() for p in model.parameters()]
    train_one_epoch(run, loaded([(images, labels)]), 1)
    expected = reference_gradients(run, reference, [(images, labels)])
    for old, new, gradient in zip(before, model.parameters(), expected, strict=True):
        assert torch.allclose(old - new, gradient, atol=2e-3)


def test_a_step_the_scaler_skips_advances_neither_schedule_nor_ledger():
    model = LayerNormNet()
    run = make_run(model, "training.mixed_precision=float16", "ast.mode=dense")
    run.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120, growth_interval=1000)
    before = copy.deepcopy(model.state_dict())
    train_one_epoch(run, loaded([make_batch()]), 1)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    ledger = run.metrics.ledger
    assert (ledger.steps, ledger.trained, run.schedule.applied, ledger.loaded) == (0, 0, 0, 16)
    run.trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    run.start_epoch(0, np.arange(0))
    train_one_epoch(run, loaded([make_batch()]), 1)
    assert (ledger.steps, ledger.trained, run.schedule.applied) == (1, 16, 1)


def test_gradient_clipping_bounds_the_step():
    model = LayerNormNet()
    run = make_run(model, "ast.mode=dense", "training.grad_clip_norm=0.01", *PLAIN_SGD)
    before = torch.cat([p.detach().flatten() for p in model.parameters()])
    train_one_epoch(run, loaded([make_batch()]), 1)
    moved = torch.cat([p.detach().flatten() for p in model.parameters()]) - before
    assert moved.norm() == pytest.approx(0.01, rel=1e-3)


def test_leftover_of_a_window_steps_at_the_end_of_the_epoch():
    run = make_run(LayerNormNet(), "ast.mode=dense", "training.grad_accum_steps=4")
    train_one_epoch(run, loaded([make_batch(seed=s) for s in range(6)]), 6)
    assert (run.metrics.ledger.steps, run.metrics.ledger.trained, run.schedule.applied) == (
        2,
        96,
        6,
    )


@given(st.lists(st.integers(0, 8), max_size=30))
def test_queue_gives_every_sample_once_in_order_and_only_full_batches(sizes):
    queue = ActiveQueue(8, torch.device("cpu"))
    given_out = []
    pushed = 0
    for size in sizes:
        labels = torch.arange(pushed, pushed + size)
        ready = queue.push(
            as_batch(
                labels.view(-1, 1, 1, 1).expand(-1, 3, 2, 2).to(torch.uint8), labels, labels + 7
            )
        )
        pushed += size
        if ready is not None:
            assert len(ready[1]) == 8
            assert torch.equal(ready[0][:, 0, 0, 0], ready[1].to(torch.uint8))
            assert torch.equal(ready.indices, ready.labels + 7)
            given_out += ready[1].tolist()
    assert given_out == list(range(pushed // 8 * 8))
    assert len(queue) == pushed % 8


def test_the_rate_follows_the_loop_steps_and_ends_fully_decayed():
    """Packing takes an optimizer step every few loop steps, across the ends of epochs: none is lost
    to the schedule.
    """
    run = make_run(LayerNormNet(), "ast.pack=true", "training.lr=0.4", "training.epochs=4")
    rates = []
    for epoch in range(10):
        run.start_epoch(0, np.arange(0))
        train_one_epoch(run, loaded([make_batch(seed=10 * epoch + s) for s in range(10)]), 10)
        rates.append(run.trainer.optimizer.param_groups[0]["lr"])
    assert run.schedule.applied + run.schedule.pending == run.schedule.planned_steps == 100
    assert rates == sorted(rates, reverse=True)
    assert rates[4] == pytest.approx(0.2, rel=0.2)
    assert rates[-1] < 0.004


@pytest.mark.parametrize(("rule", "ahead"), [("pi", True), ("topk", False)])
def test_scoring_ahead_is_one_training_step_older_and_loses_no_batch(rule, ahead):
    """Each batch's scores against those of the weights it should have seen: its own step's, or the
    step before's. A rule that chooses on the device needs none of it.
    """
    torch.manual_seed(0)
    model = LayerNormNet()
    run = make_run(model, f"ast.rule={rule}", *PLAIN_SGD)
    batches = [make_batch(seed=s) for s in range(5)]
    weights = [copy.deepcopy(model)]
    seen = []
    for batch, scores in run.ahead.pairs(loaded(batches), partial(score, run)):
        seen.append((batch.labels, scores.read()[0].clone()))
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(1.1)
        weights.append(copy.deepcopy(model))
    assert [labels.tolist() for labels, _ in seen] == [labels.tolist() for _, labels in batches]
    for i, (images, labels) in enumerate(batches):
        reference = make_run(weights[max(0, i - ahead)])
        assert torch.allclose(seen[i][1], scores_of(reference, images, labels).read()[0])


def test_scoring_ahead_is_for_scoring_alone():
    run = make_run(LayerNormNet(), "ast.mode=dense")
    batches = [make_batch(seed=s) for s in range(3)]
    assert run.selection.scores.before_loading
    assert run.ahead.depth == 0
    assert [scores for _, scores in run.ahead.pairs(loaded(batches), None)] == [None] * 3
    sparse = make_run(LayerNormNet())  # and for sparse epochs
    assert [scores for _, scores in sparse.ahead.pairs(loaded(batches), None)] == [None] * 3


def test_scores_come_from_the_stated_resolution_and_training_from_the_full_one():
    model = BatchNormNet()
    sides = {True: set(), False: set()}
    run = make_run(model, "dataset.image_size=16", "ast.score_resolution=12", "ast.pack=true")
    hook = torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, args: (
            sides[module.training].add(args[0].shape[-1])
            if isinstance(module, BatchNormNet)
            else None
        )
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, 10, (16,), generator=generator)
    try:
        train_one_epoch(run, loaded([(images, labels)] * 8), 8)
        assert sides == {True: {16}, False: {12}}
        shrunk = torchvision_resize(images, 12)
        expected = copy.deepcopy(model).eval()(run.network.normalise(shrunk))
        hits = (expected.argmax(-1) == labels).sum()
        assert scores_of(run, images, labels).read()[1] == hits
    finally:
        hook.remove()
    small, full = (count_flops(model, side) for side in (12, 16))
    assert run.selection.scores.cost == small / full / 3
    assert (12 / 16) ** 2 / 3 < run.selection.scores.cost < 1 / 3  # the head costs as much


def torchvision_resize(images, size):
    return v2.functional.resize(images.float(), [size, size], antialias=True)


RECIPE = [
    "training.mixup=0.2",
    "training.cutmix=1",
    "training.weight_average=0.5",
]  # Adam would magnify rounding


@pytest.mark.parametrize("more", [[], pytest.param(RECIPE, marks=pytest.mark.long)])
def test_compiled_steps_move_the_weights_as_eager_ones_do(more, monkeypatch, tmp_path):
    """With reduce-overhead and windows the gradients stay where they are and are zeroed, not
    dropped.
    """
    # a C++ file for each kind of vector instructions, only to see which there are: ten seconds
    monkeypatch.setattr("torch._inductor.cpu_vec_isa.valid_vec_isa_list", list)
    # apart from what others compiled for theirs, which this would not fit
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    moved = {}
    for mode in ("off", "reduce-overhead"):
        torch.manual_seed(0)
        model = BatchNormNet()
        run = make_run(
            model, f"training.compile={mode}", "training.grad_accum_steps=2", "ast.pack=true", *more
        )
        if mode != "off":
            run.warm_up()
        train_one_epoch(run, loaded([make_batch(seed=s) for s in range(12)]), 12)
        assert run.metrics.ledger.steps >= 1
        moved[mode] = [tensor.clone() for tensor in run.network.exported.state_dict().values()]
    for eager, compiled in zip(moved["off"], moved["reduce-overhead"], strict=True):
        assert torch.allclose(eager, compiled, atol=1e-5)
