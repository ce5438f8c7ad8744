"""The loops of others: what they back-propagate, and that each of them trains."""

import pytest
import torch

from conftest import BatchNormNet, make_config
from lab.machine.distributed import Dist
from lab.study.benchmark.peers import (
    hand_written_steps,
    masked,
    masked_loss_steps,
    two_forward_steps,
)
from lab.study.benchmark.timing import Workload, random_workload
from train_ast import significance


def make_workload(model: torch.nn.Module, batch_size: int = 16) -> Workload:
    config = make_config("dataset.num_classes=10", f"training.batch_size={batch_size}")
    lab = {"get_model": lambda *_: model, "significance": significance, "score_resolution": None}
    return random_workload(config, torch.device("cpu"), Dist(), **lab)


def test_a_masked_loss_is_the_mean_over_the_top_samples():
    losses = torch.tensor([1.0, 2.0, 4.0, 8.0])
    scores = torch.tensor([0.3, 0.1, 0.4, 0.2])
    loss, mask = masked(losses, scores, keep=2)
    assert loss == (1 + 4) / 2
    assert mask.tolist() == [1, 0, 1, 0]


def test_the_masked_loss_and_the_top_share_alone_have_the_same_gradient():
    gradients = []
    for top_k in (False, True):
        torch.manual_seed(1)
        model = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(192, 10)
        )  # no sample depends on another
        before = model[1].weight.detach().clone()
        two_forward_steps(make_workload(model), "off", top_k).steps(1)
        gradients.append(model[1].weight.detach() - before)
    torch.testing.assert_close(*gradients, rtol=2e-2, atol=1e-6)  # bfloat16


@pytest.mark.parametrize(
    ("build", "options", "forwards"),
    [
        (hand_written_steps, {}, [16] * 4),
        (hand_written_steps, {"stored": True}, [16]),
        (masked_loss_steps, {"ours": False}, [16] * 8),
        (masked_loss_steps, {"ours": True}, [16] * 8),
        (two_forward_steps, {"top_k": False}, [16] * 8),
        (two_forward_steps, {"top_k": True}, [16, 4] * 4),
    ],
)
def test_every_loop_trains_and_forwards_what_its_pattern_says(build, options, forwards):
    """Of 4 considered batches of 16 samples, a quarter of them active."""
    model = BatchNormNet()
    sizes = []
    model.body.register_forward_hook(lambda _, inputs, __: sizes.append(len(inputs[0])))
    before = model.head.weight.detach().clone()
    loop = build(make_workload(model), "off", **options)
    loop.steps(4)
    assert sizes == forwards
    assert not torch.equal(model.head.weight, before)
    assert loop.activation() is None
