"""What is decayed, by which optimizer, and the average of the weights."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from timm.optim import create_optimizer_v2, list_optimizers
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from conftest import (
    BatchNormNet,
    LayerNormNet,
    as_batch,
    make_batch,
    make_config,
    make_run,
    scores_of,
    sparse_step,
    trained_on,
)
from lab.base.errors import RequestError
from lab.config.sections import ModelConfig, TrainingConfig
from lab.engine.optimizer import build_optimizer
from lab.method.schedule import lr_at
from lab.models.building import get_model
from train_ast import evaluate

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "excepted"),
    [
        ("vit_b_16", {"class_token", "encoder.pos_embedding"}),
        ("test_vit", {"cls_token", "pos_embed"}),
        ("swin_tiny_patch4_window7_224", "relative_position_bias_table"),
        ("resnet18", set()),
    ],
)
def test_norms_biases_and_embeddings_are_not_decayed(name, excepted):
    model = get_model(ModelConfig(name=name), 10, 32)
    free, decayed = build_optimizer(model, TrainingConfig(weight_decay=0.1), CPU).param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    assert len(decayed["params"]) + len(free["params"]) == len(names)
    large = {names[id(parameter)] for parameter in free["params"] if parameter.ndim > 1}
    assert (
        all(excepted in each for each in large) if isinstance(excepted, str) else large == excepted
    )
    assert bool(large) == bool(excepted)
    assert all(parameter.ndim > 1 for parameter in decayed["params"])


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "lamb", "muon", "lars", "lion", "adan"])
def test_an_optimizer_is_timms_on_the_same_parameter_groups(name):
    """After three steps the weights are those of timm's factory, bit for bit."""
    if name not in list_optimizers():
        with pytest.raises(
            RequestError, match="training.optimizer: muon: .*a newer timm may have it"
        ):
            build_optimizer(BatchNormNet(), TrainingConfig(optimizer=name), CPU)
        return
    torch.manual_seed(0)
    ours = BatchNormNet()
    theirs = copy.deepcopy(ours)
    (images, labels) = make_batch()
    training = TrainingConfig(
        optimizer=name, lr=0.01, weight_decay=0.1, momentum=0.8, nesterov=True
    )
    own = {"nesterov": True} if name in ("sgd", "muon") else {}
    whole = (
        [p for p in theirs.parameters() if p.ndim > 1],
        [p for p in theirs.parameters() if p.ndim == 1],
    )
    groups = [{"params": whole[0]}, {"params": whole[1], "weight_decay": 0.0}]
    expected = create_optimizer_v2(groups, name, lr=0.01, weight_decay=0.1, momentum=0.8, **own)
    optimizer = build_optimizer(ours, training, CPU)
    for _ in range(3):
        for model, each in ((ours, optimizer), (theirs, expected)):
            each.zero_grad()
            F.cross_entropy(model(images.float() / 255), labels).backward()
            each.step()
    assert all(
        torch.equal(*pair) for pair in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_any_optimizer_of_timm_is_known_by_name():
    for text, said in {
        "sgdd": "no 'sgdd'; did you mean sgd",
        "adahessian": "adahessian needs second derivatives",
        "lion training.momentum=0.5": "training.momentum: nothing reads it here",
        "lars training.nesterov=true": "training.nesterov: nothing reads it here",
    }.items():
        with pytest.raises(RequestError, match=said):
            make_config(*f"training.optimizer={text}".split())
    training = make_config("training.optimizer=lars", "training.momentum=0.5").training
    optimizer = build_optimizer(BatchNormNet(), training, CPU)
    assert optimizer.defaults["momentum"] == 0.5
    if not torch.cuda.is_available():
        training = make_config("training.optimizer=fusedlamb").training
        with pytest.raises(RequestError, match="training.optimizer: fusedlamb: "):
            build_optimizer(BatchNormNet(), training, CPU)


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_muon_orthogonalises_matrices_alone_whatever_is_decayed(weight_decay, layer_decay):
    """Embeddings, norms and biases get AdamW, as from timm's own factory."""
    training = TrainingConfig(
        optimizer="muon", lr=0.01, weight_decay=weight_decay, layer_decay=layer_decay
    )
    ours = get_model(ModelConfig(name="test_vit"), 10, 32)
    theirs = copy.deepcopy(ours)
    expected = create_optimizer_v2(
        theirs,
        "muon",
        lr=0.01,
        weight_decay=weight_decay,
        momentum=training.momentum,
        layer_decay=None if layer_decay == 1 else layer_decay,
        fallback_list=ours.no_weight_decay(),
        nesterov=training.nesterov,
    )
    for model, optimizer in ((ours, build_optimizer(ours, training, CPU)), (theirs, expected)):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(8, 3, 32, 32, generator=generator)
        F.cross_entropy(model(images), torch.arange(8)).backward()
        optimizer.step()
    assert all(
        torch.equal(*pair) for pair in zip(ours.parameters(), theirs.parameters(), strict=True)
    )


def test_each_layer_learns_more_slowly_than_the_one_after_it():
    model = get_model(ModelConfig(name="test_vit"), 10, 32)
    run = make_run(model, "training.layer_decay=0.5", "ast.mode=dense", "training.optimizer=adamw")
    groups = run.trainer.optimizer.param_groups
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    by_name = {
        names[id(p)]: (group["lr_scale"], group["weight_decay"])
        for group in groups
        for p in group["params"]
    }
    assert by_name.keys() == set(names.values())
    assert by_name["head.weight"] == (1.0, 5e-4)
    scales = [by_name[f"blocks.{block}.attn.qkv.weight"][0] for block in range(len(model.blocks))]
    assert scales == sorted(scales)
    assert scales[-1] == scales[-2] * 2
    assert by_name["patch_embed.proj.weight"][0] == scales[0] / 2
    assert by_name["cls_token"][1] == by_name["blocks.0.norm1.weight"][1] == 0.0
    trained_on(run, torch.zeros(4, 3, 32, 32, dtype=torch.uint8), torch.arange(4))
    run.optimizer_step()
    assert all(group["lr"] == run.schedule.lr * group["lr_scale"] for group in groups)


def test_layers_that_are_not_known_are_told():
    with pytest.raises(
        RequestError, match="training.layer_decay: timm knows no layers of this network"
    ):
        build_optimizer(LayerNormNet(), TrainingConfig(layer_decay=0.5), CPU)


@pytest.mark.parametrize(
    ("schedule", "rates"),
    [
        ("cosine", [0.2, 0.4, 0.4 * 0.75 + 0.01 * 0.25, 0.205, 0.01]),
        ("linear", [0.2, 0.4, 0.27, 0.205, 0.01]),
        ("constant", [0.2, 0.4, 0.4, 0.4, 0.4]),
        ("step", [0.2, 0.4, 0.04, 0.04, 0.01]),
    ],
)
def test_the_rate_falls_as_its_schedule_says(schedule, rates):
    training = TrainingConfig(
        epochs=10, lr=0.4, min_lr=0.0 if schedule == "constant" else 0.01, lr_schedule=schedule
    )
    third = 0.2 + 0.8 / 3 + 1e-9
    assert [lr_at(at, training, 0.2) for at in (0.1, 0.2, third, 0.6, 1.0)] == pytest.approx(rates)


def test_the_average_is_torchs_and_is_what_is_validated():
    """As torch's AveragedModel makes it; selection scores by the weights themselves."""
    torch.manual_seed(0)
    model = BatchNormNet()
    (images, labels) = make_batch()
    run = make_run(
        model, "training.weight_average=0.6", "training.lr=0.5", "ast.target_activation=0.5"
    )
    expected = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.0), use_buffers=True)
    for step in range(1, 13):
        sparse_step(run, images, labels)
        run.optimizer_step()
        expected.multi_avg_fn = get_ema_multi_avg_fn(min(0.6, (1 + step) / (10 + step)))
        if (
            step == 1
        ):  # its first update copies; ours averages with the weights the run started from
            expected.module.load_state_dict(run.network.exported.state_dict())
            expected.n_averaged.fill_(1)
        else:
            expected.update_parameters(model)
    got = run.network.exported.state_dict()
    average = expected.module.state_dict()
    fractions = [name for name in average if average[name].is_floating_point()]
    assert all(torch.allclose(got[name], average[name], atol=1e-6) for name in fractions)
    assert got["body.1.num_batches_tracked"] == 12
    assert not torch.allclose(model.head.weight, run.network.exported.head.weight, atol=1e-3)
    with torch.no_grad():
        logits = copy.deepcopy(run.network.exported).eval()(run.network.normalise(images))
        own = copy.deepcopy(model).eval()(run.network.normalise(images))
    counts = evaluate(run.network, [as_batch(images, labels)], run.clock)
    assert counts.accuracy() == pytest.approx(
        100 * (logits.argmax(1) == labels).float().mean().item()
    )
    scores = scores_of(run, images, labels).read()[0].numpy()
    entropy = torch.distributions.Categorical(logits=own).entropy()
    assert np.allclose(
        scores, (F.cross_entropy(own, labels, reduction="none") + entropy).numpy(), atol=1e-5
    )
