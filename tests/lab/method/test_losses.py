"""The losses: values and gradients against their formulas, and the memory of early learning."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import LayerNormNet, make_batch, make_config, make_run, trained_on
from lab.machine.distributed import Dist
from lab.method.losses import LOSSES, EarlyLearning
from runs import ranks
from train_ast import Run

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


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize(
    ("name", "formula"),
    [("generalised_cross_entropy", generalised), ("early_learning", regularised)],
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


def test_every_loss_can_be_asked_for():
    assert [make_config(f"training.loss={name}").training.loss for name in LOSSES] == list(LOSSES)
