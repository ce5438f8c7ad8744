"""The losses: values and gradients against their formulas, and the memory of early learning."""

import copy
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.utils.class_weight import compute_class_weight

from conftest import LayerNormNet, make_batch, make_config, make_run, trained_on
from lab.machine.distributed import Dist
from lab.method.losses import LOSSES, EarlyLearning
from runs import ranks
from train_ast import Run, build_dataloaders, class_counts, train

CPU = torch.device("cpu")


def early_learning(samples=8, classes=3, dist=None, *overrides) -> EarlyLearning:
    training = make_config("training.loss=early_learning", *overrides).training
    return EarlyLearning(training, samples, classes, CPU, dist or Dist())


def generalised(logits, labels):
    """(1 - p^0.7) / 0.7 of the label's probability."""
    return (1 - logits.softmax(-1).gather(1, labels[:, None])[:, 0] ** 0.7) / 0.7


def regularised(logits, labels):
    """At the first visit the target is .3 of the prediction itself; the weight is the paper's."""
    p = logits.softmax(-1)
    return F.cross_entropy(logits, labels, reduction="none") + 3 * torch.log(
        1 - 0.3 * (p.detach() * p).sum(-1)
    )


def focal(logits, labels):
    p = logits.softmax(-1).gather(1, labels[:, None])[:, 0]
    return -((1 - p) ** 2) * p.log()


def each_class(logits, labels):
    chosen = F.one_hot(labels, logits.shape[1]).float()
    return F.binary_cross_entropy_with_logits(logits, chosen, reduction="none").mean(-1)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("generalised_cross_entropy", generalised),
        ("early_learning", regularised),
        ("focal", focal),
        ("binary_cross_entropy", each_class),
    ],
)
def test_the_gradient_of_a_step_is_that_of_the_formula(name, formula, weighted):
    """Of a dense step, and of one that records what it sees; both report the plain cross-entropy as
    their loss.
    """
    torch.manual_seed(0)
    model = LayerNormNet()
    reference = copy.deepcopy(model)
    way = (
        ["ast.scoring=history", "ast.target_activation=1", "ast.forget_rate=auto"]
        if weighted
        else ["ast.mode=dense"]
    )
    config = make_config(f"training.loss={name}", *way)
    run = Run.build(config, model, CPU, planned_steps=100, samples=16, classes=10)
    images, labels = make_batch()
    logits = reference(run.network.normalise(images))
    formula(logits, labels).mean().backward()
    trained_on(run, images, labels)
    for ours, theirs in zip(model.parameters(), reference.parameters(), strict=True):
        assert torch.allclose(ours.grad, theirs.grad, atol=1e-6)
    plain = F.cross_entropy(logits, labels).item()
    assert run.metrics.meter.read()[0] == pytest.approx(plain, rel=1e-5)
    if weighted:
        assert run.selection.store.columns["loss"].mean().item() == pytest.approx(plain, rel=1e-5)


def test_cross_entropy_is_smoothed_and_keeps_no_rows():
    run = make_run(LayerNormNet(), "ast.mode=dense", "training.label_smoothing=0.3")
    logits = torch.randn(4, 10)
    labels = torch.arange(4)
    losses, rows = run.network.loss(logits, labels)
    assert torch.equal(
        losses, F.cross_entropy(logits, labels, reduction="none", label_smoothing=0.3)
    )
    assert rows is run.network.loss.recall(labels) is None


def test_focal_and_binary_losses_of_mixtures():
    """Of a whole share they are those of the label; smoothing is timm's."""
    logits = torch.randn(4, 3)
    labels = torch.tensor([0, 1, 2, 0])
    for name in ("focal", "binary_cross_entropy"):
        loss = LOSSES[name](make_config(f"training.loss={name}").training, 8, 3, CPU, Dist())
        of_labels, _ = loss(logits, labels)
        torch.testing.assert_close(loss(logits, F.one_hot(labels, 3).float())[0], of_labels)
    training = make_config(f"training.loss={name}", "training.label_smoothing=0.3").training
    smoothed = 0.1 + 0.7 * F.one_hot(labels, 3)
    expected = F.binary_cross_entropy_with_logits(logits, smoothed, reduction="none").mean(-1)
    torch.testing.assert_close(
        LOSSES[name](training, 8, 3, CPU, Dist())(logits, labels)[0], expected
    )


def test_a_target_is_the_running_mean_of_a_samples_own_predictions():
    loss = early_learning()
    indices = torch.tensor([5, 2])
    expected = torch.zeros(2, 3)
    for _ in range(3):
        logits = torch.randn(2, 3)
        _, rows = loss(logits, torch.tensor([0, 1]), loss.recall(indices))
        loss.remember(indices, rows)
        expected = 0.7 * expected + 0.3 * logits.softmax(-1)
    assert torch.allclose(loss.targets[indices], expected, atol=1e-4)
    assert not loss.targets[[0, 1, 3, 4, 6, 7]].any()


def test_a_certain_network_has_a_finite_loss():
    loss = early_learning()
    logits = torch.tensor([[200.0, 0.0, 0.0]], requires_grad=True)
    rows = torch.tensor([[1.0, 0.0, 0.0]])
    losses, _ = loss(logits, torch.tensor([0]), rows)
    losses.sum().backward()
    assert math.isfinite(losses.item())
    assert logits.grad.isfinite().all()


def test_a_prediction_that_is_not_finite_leaves_no_trace_in_the_targets():
    """A step that a scaler skips, or an error that is forgiven: later steps must not suffer."""
    loss = early_learning()
    indices = torch.tensor([5, 2])
    _, rows = loss(torch.randn(2, 3), torch.tensor([0, 1]), loss.recall(indices))
    loss.remember(indices, rows)
    logits = torch.tensor([[math.nan, 0.0, 0.0], [1.0, 2.0, 3.0]])
    _, rows = loss(logits, torch.tensor([0, 1]), loss.recall(indices))
    before = loss.targets[5].clone()
    loss.remember(indices, rows)
    assert torch.equal(loss.targets[5], before)
    assert (loss.targets[2] > 0.3 * logits[1].softmax(-1)).all()  # both predictions are in it
    assert loss.state_dict()["targets"].isfinite().all()
    losses, _ = loss(torch.randn(2, 3), torch.tensor([0, 1]), loss.recall(indices))
    assert losses.isfinite().all()


@pytest.mark.parametrize("shares", [[0.3, 0.7, 0.0], [0.2, 0.5, 0.3], [0.0, 0.0, 1.0]])
def test_the_generalised_loss_of_a_mixture_is_the_mixture_of_losses(shares):
    """Value and gradient."""
    config = make_config("training.loss=generalised_cross_entropy")
    loss = LOSSES["generalised_cross_entropy"](config.training, 1, 3, CPU, Dist())
    logits = torch.tensor([[6.0, 0.0, -4.0]], requires_grad=True)
    mixed, _ = loss(logits, torch.tensor([shares]))
    single = [generalised(logits, torch.tensor([number])) for number in range(3)]
    expected = sum(share * each for share, each in zip(shares, single, strict=True))
    torch.testing.assert_close(mixed, expected)
    (ours,) = torch.autograd.grad(mixed.sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(ours, theirs)


def test_processes_share_the_targets_that_any_of_them_has_stored(tmp_path):
    values = torch.rand(8, 3, generator=torch.Generator().manual_seed(0))

    def work(rank):
        loss = early_learning(8, 3, Dist.join(CPU))
        part = torch.tensor([[0, 3, 5], [1, 2, 7]][rank])
        loss.remember(part, values[part])
        first = loss.state_dict()["targets"].clone()
        loss.remember(torch.tensor([rank + 3]), torch.full((1, 3), float(rank)))
        loss.merge()
        return first, loss.targets

    (first, second), (first_too, second_too) = ranks(2, work, tmp_path).results()
    expected = values.clone()
    expected[[4, 6]] = 0
    assert torch.equal(first, expected)
    expected[3] = 0.0
    expected[4] = 1.0
    assert torch.equal(second, expected)
    assert torch.equal(first, first_too)
    assert torch.equal(second, second_too)


@pytest.mark.parametrize("smoothing", [0, 0.2])
@pytest.mark.parametrize("name", LOSSES)
def test_class_weights_multiply_the_loss_of_each_sample(name, smoothing):
    """The weights are scikit-learn's; of a mixture they multiply the losses of its classes."""
    training = make_config(f"training.loss={name}").training
    training = training.model_copy(update={"label_smoothing": smoothing})
    loss, plain = (LOSSES[name](training, 8, 3, CPU, Dist()) for _ in range(2))
    labels = np.array([0, 0, 0, 0, 0, 1, 1, 2])
    loss.weigh_classes(np.bincount(labels), CPU)
    weights = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    weights = torch.from_numpy(weights).float()
    labels = torch.from_numpy(labels)
    logits = torch.randn(8, 3, requires_grad=True)
    rows = None if plain.recall(labels) is None else torch.rand(8, 3) / 3

    def of_whole(number):  # the loss of a mixture that is one class alone
        shares = F.one_hot(torch.full((8,), number), 3).float()
        return plain.of_batch(logits, shares, rows)[0]

    found = loss.of_batch(logits, labels, rows)[0]
    torch.testing.assert_close(found, plain.of_batch(logits, labels, rows)[0] * weights[labels])
    mixed = torch.rand(8, 3).softmax(-1)
    found = loss.of_batch(logits, mixed, rows)
    expected = sum(mixed[:, each] * weights[each] * of_whole(each) for each in range(3))
    torch.testing.assert_close(found[0], expected)
    reported = F.cross_entropy(logits, mixed, reduction="none")
    torch.testing.assert_close(found[1], reported.detach())
    (ours,) = torch.autograd.grad(found[0].sum(), logits, retain_graph=True)
    (theirs,) = torch.autograd.grad(expected.sum(), logits)
    torch.testing.assert_close(ours, theirs)


def test_a_class_of_no_samples_does_not_change_the_weights_of_the_others():
    loss = LOSSES["cross_entropy"](make_config().training, 8, 3, CPU, Dist())
    loss.weigh_classes(np.array([4, 4, 0]), CPU)
    assert loss.class_weights[:2].tolist() == [1, 1]


def test_class_weights_are_in_the_gradient_and_not_in_the_reported_loss():
    images, labels = make_batch(16)
    runs = [make_run(LayerNormNet(), "ast.mode=dense") for _ in range(2)]
    runs[1].network.model.load_state_dict(runs[0].network.model.state_dict())
    counts = np.arange(1, 11)
    runs[1].network.loss.weigh_classes(counts, CPU)
    results = [run.network.forward(images, labels) for run in runs]
    assert torch.equal(results[0].loss, results[1].loss)
    weights = torch.from_numpy(55 / (10 * counts)).float()
    model = runs[0].network.model
    logits = model(runs[0].network.normalise(images))
    expected = F.cross_entropy(logits, labels, weight=weights, reduction="sum")
    torch.testing.assert_close(results[1].objective, expected)


def test_a_run_weighs_its_classes_by_their_noisy_labels(tmp_path):
    small = ["training.epochs=1", "ast.mode=dense", "dataset.max_train_samples=200"]
    small += ["model.name=small_conv", "dataset.label_noise=0.3", "dataset.max_val_samples=50"]
    histories = []
    for weights in ("none", "balanced"):
        config = make_config(
            *small, f"training.class_weights={weights}", f"logging.output_dir={tmp_path}/{weights}"
        )
        histories.append(train(config)[0]["training_history"]["train_loss"])
    assert histories[0] != histories[1]
    data = build_dataloaders(config, CPU)
    counts = class_counts(data.train.dataset, data.plan.indices)
    assert counts.sum() == 200
    clean = data.train.dataset.labels()[data.plan.indices]
    assert (counts != np.bincount(clean)).any()


def test_every_loss_can_be_asked_for():
    assert [make_config(f"training.loss={name}").training.loss for name in LOSSES] == list(LOSSES)
