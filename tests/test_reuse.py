"""ast.reuse_forward: a step goes backward through the forward that scored its batch."""

from __future__ import annotations

import copy
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from conftest import (
    REPO,
    BatchNormNet,
    LayerNormNet,
    make_batch,
    make_config,
    make_run,
    sparse_step,
)
from lab.base.errors import RequestError
from lab.method.sample_store import SampleStore
from runs import final_state
from train_ast import Run, load_config, significance, train

REUSE = ["ast.reuse_forward=true", "ast.target_activation=0.5", "training.batch_size=8"]
DIGITS = ["model.name=small_conv", "dataset.image_size=8", "training.batch_size=32"]
DIGITS += ["dataset.max_train_samples=512", "dataset.max_val_samples=64", "training.lr=0.05"]
DIGITS += ["ast.warmup_epochs=1", "training.epochs=6"]


def gradient_by_autograd(run, model: nn.Module, batches, count: int) -> list[torch.Tensor]:
    """Of the mean loss over the highest `count` of every batch, through the whole batches."""
    model.train()
    losses = []
    for images, labels in batches:
        logits = model(run.network.normalise(images))
        scores = significance(logits.detach(), labels, 1.0)
        rows = scores.topk(count).indices
        losses.append(nn.functional.cross_entropy(logits[rows], labels[rows], reduction="none"))
    torch.cat(losses).mean().backward()
    return [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("accumulated", [1, 2])
def test_the_gradient_is_autograds_of_the_mean_over_the_active(accumulated):
    model = LayerNormNet()
    twin = copy.deepcopy(model)
    accumulate = f"training.grad_accum_steps={accumulated}"
    run = make_run(model, *REUSE, "ast.rule=topk", accumulate)
    batches = [make_batch(seed=seed) for seed in range(accumulated)]
    for batch in batches:
        assert sparse_step(run, *batch) == 8
    run.trainer.merge_gradients()
    expected = gradient_by_autograd(run, twin, batches, 8)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        assert torch.allclose(parameter.grad, gradient, atol=1e-6)
    assert run.trainer.window_reused == 8 * accumulated


def test_the_weights_of_classes_are_in_the_gradient():
    model = LayerNormNet()
    twin = copy.deepcopy(model)
    counts = np.arange(1, 11)
    config = make_config(*REUSE, "ast.rule=topk", "training.class_weights=balanced")

    def weigh(network):
        network.loss.weigh_classes(counts, network.device)

    run = Run.build(config, model, torch.device("cpu"), planned_steps=100, fit=weigh)
    run.start_epoch(run.config.ast.warmup_epochs, np.arange(0))
    images, labels = make_batch()
    assert sparse_step(run, images, labels) == 8
    run.trainer.merge_gradients()
    logits = twin(run.network.normalise(images))
    rows = significance(logits.detach(), labels, 1.0).topk(8).indices
    weights = torch.from_numpy(55 / (10 * counts)).float()
    losses = nn.functional.cross_entropy(
        logits[rows], labels[rows], weight=weights, reduction="none"
    )
    losses.mean().backward()
    for parameter, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(parameter.grad, other.grad, atol=1e-6)


def test_running_statistics_move_once_a_batch_and_the_ledger_counts_what_was_computed():
    model = BatchNormNet()
    twin = copy.deepcopy(model)
    run = make_run(model, *REUSE, "ast.rule=pi")
    images, labels = make_batch()
    active = sparse_step(run, images, labels)
    twin.train()
    twin(run.network.normalise(images))
    assert torch.allclose(model.body[1].running_mean, twin.body[1].running_mean, atol=1e-6)
    assert int(model.body[1].num_batches_tracked) == 1
    run.optimizer_step()
    ledger = run.metrics.ledger
    assert (ledger.scored, ledger.trained, ledger.reused) == (16, active, active)
    computed = active + ledger.padding
    assert computed in run.selection.scores.reuse.once.backwards
    assert ledger.dense_equivalents() == pytest.approx(16 / 3 + 2 / 3 * computed)


def test_a_number_of_active_samples_that_was_not_expected_gets_a_backward_of_its_own():
    run = make_run(LayerNormNet(), *REUSE, "ast.rule=pi", "ast.initial_threshold=0")
    known = set(run.selection.scores.reuse.once.backwards)
    assert sparse_step(run, *make_batch()) == 16  # all are over the first threshold
    assert max(run.selection.scores.reuse.once.backwards) == 16 not in known


def test_a_batch_without_some_of_its_pictures_takes_two_passes():
    run = make_run(LayerNormNet(), *REUSE, "ast.rule=topk")
    assert sparse_step(run, *make_batch(size=12)) == 6
    assert run.trainer.window_reused == 0
    assert sparse_step(run, *make_batch()) == 8
    assert run.trainer.window_reused == 8


@pytest.mark.parametrize(
    ("rule", "target"),
    [
        ("pi", "0.4"),
        ("topk", "auto"),
        pytest.param("pi", "auto", marks=pytest.mark.long),
        pytest.param("topk", "0.4", marks=pytest.mark.long),
    ],
)
def test_a_rule_holds_its_target(rule, target, tmp_path):
    keys = [f"ast.rule={rule}", f"ast.target_activation={target}", "ast.kp=1", "ast.ki=0.05"]
    keys = keys if rule == "pi" else keys[:2]
    config = make_config(*DIGITS, *REUSE[:1], *keys, f"logging.output_dir={tmp_path}")
    result, _ = train(config)
    history = result["training_history"]
    targets = [1.0 if each is None else each for each in history["target"]]
    assert history["activation_rate"][2:] == pytest.approx(
        targets[2:], abs=0.08 if rule == "pi" else 0.02
    )
    assert history["val_acc"][-1] > 50
    # a sparse epoch has batches of 32 / 0.4 or 32 / 0.5 samples, one step each
    wide = 80 if target == "0.4" else 64
    # and a dense one 16, or 15 of 500 samples while an automatic target keeps 12 pictures out
    without = result["auto_target"]["epochs_without"] if target == "auto" else 0
    dense = [15] * without + [16] * (len(targets) - without)
    sparse = np.array(targets) < 1
    assert history["optimizer_steps"] == np.where(sparse, 512 // wide, dense).tolist()
    kept_out = [12] * without + [0] * (len(targets) - without)
    assert history["samples_scored"] == np.where(sparse, 512 // wide * wide, kept_out).tolist()
    trained = np.array(history["samples_trained"])
    assert result["ledger"]["reused"] == trained[sparse].sum() > 0
    if rule == "topk" and target == "0.4":  # no padding
        assert history["energy_savings"][-1] == pytest.approx(1 - (480 + 2 * 192) / 3 / 512)


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param(
            ["training.loss=early_learning", "training.weight_average=0.9"],
            marks=pytest.mark.long,
        ),
        pytest.param(["ast.forget_rate=0.2"], marks=pytest.mark.long),
        ["ast.forget_rate=auto", "dataset.label_noise=0.2", "training.grad_accum_steps=2"],
    ],
    ids=["early learning, averaged", "forget 0.2", "forget auto, accumulated"],
)
def test_it_works_with_losses_that_remember_doubt_and_accumulation(keys, tmp_path):
    config = make_config(*DIGITS, *REUSE, "ast.rule=topk", *keys, f"logging.output_dir={tmp_path}")
    result, _ = train(config)
    history = result["training_history"]
    assert history["val_acc"][-1] > 50
    assert result["ledger"]["reused"] == sum(history["samples_trained"][1:])
    if keys == ["ast.forget_rate=0.2"]:
        assert history["forgotten"][1] == pytest.approx(0.2, abs=1 / 512)


class Branching(LayerNormNet):
    """Decides by what it computes: no graph of it can be traced."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        logits = super().forward(images)
        return logits * 2 if logits.mean() > 0 else logits


def test_what_cannot_be_traced_takes_two_passes_or_is_refused(capsys):
    keys = [*REUSE[1:], "ast.rule=topk"]
    run = make_run(Branching(), "ast.reuse_forward=auto", *keys)
    said = capsys.readouterr().out
    assert "note: ast.reuse_forward=auto takes two passes: its code decides by the values" in said
    assert sparse_step(run, *make_batch()) == 8
    assert run.trainer.window_reused == 0
    with pytest.raises(RequestError, match=r"^ast\.reuse_forward: its code decides by the values"):
        make_run(Branching(), *REUSE)
    with pytest.raises(RequestError, match=r"ast\.reuse_forward: a picture mixed by training\.m"):
        make_run(LayerNormNet(), *REUSE, "training.mixup=0.2")


@pytest.mark.parametrize(
    ("keys", "complaint"),
    [
        (
            ["ast.scoring=history"],
            "ast.reuse_forward: nothing reads it here; it needs ast.s",
        ),
        (
            ["ast.rule=infobatch", "ast.entropy_weight=0"],
            "ast.reuse_forward: nothing reads it here; it needs ast.rule=pi or topk",
        ),
        (
            ["ast.candidates=0.5", "ast.forget_rate=0.1"],
            "ast.candidates: 1 for ast.forget_rate, which is a share of all samples",
        ),
        (
            ["ast.candidates=0.5", "ast.target_activation=0.6"],
            "ast.candidates: 0.5 is fewer than ast.target_activation=0.6",
        ),
        (["ast.pack=true"], "ast.pack: nothing reads it here; it needs ast.reuse_forward=false"),
        (["ast.score_statistics=batch"], "ast.score_statistics: nothing reads it here; it needs"),
    ],
)
def test_what_does_not_go_with_it_is_refused(keys, complaint):
    with pytest.raises(RequestError, match=re.escape(complaint)):
        make_config("ast.reuse_forward=true", *keys)


def test_a_file_with_both_scoring_and_reuse_that_do_not_go_together_is_refused(tmp_path):
    path = tmp_path / "both.yaml"
    path.write_text("ast: {scoring: proxy, reuse_forward: auto}")
    with pytest.raises(RequestError, match="ast.reuse_forward: auto needs ast.scoring=batch$"):
        load_config(path, [])


@pytest.mark.parametrize(
    ("rule", "reuse"),
    [
        ("topk", "true"),
        ("pi", "false"),
        pytest.param("pi", "true", marks=pytest.mark.long),
        pytest.param("topk", "false", marks=pytest.mark.long),
    ],
)
def test_candidates_are_those_of_the_highest_scores_and_everyone_comes_back(rule, reuse, tmp_path):
    keys = ["model.name=test_resnet", "dataset.image_size=16"]
    keys += [f"ast.rule={rule}", f"ast.reuse_forward={reuse}", "ast.candidates=0.75"]
    keys += ["ast.target_activation=0.375", "ast.entropy_weight=0", "training.epochs=8"]
    keys += ["ast.kp=1", "ast.ki=0.05"] if rule == "pi" else []
    config = make_config(*DIGITS, *keys, f"logging.output_dir={tmp_path}")
    result, _ = train(config)
    history = result["training_history"]
    assert history["samples_loaded"] == [512] + [384] * 7
    assert history["samples_scored"] == [0] + [384] * 7
    if reuse == "true":
        assert history["optimizer_steps"] == [16] + [384 // 64] * 7
    assert history["activation_rate"][2:] == pytest.approx([0.375] * 6, abs=0.1)
    scored = final_state(config)["selection"]["store"]["last_epoch"]
    scored = scored[scored >= 0]
    assert len(scored) == 512
    assert int(scored.min()) >= 1  # nobody is left out for ever
    assert int(scored.max()) > int(scored.min())  # and some were, at the end


def test_a_score_doubles_with_every_epoch_that_leaves_its_sample_out():
    store = SampleStore(4, torch.device("cpu"))
    store.record_scores(torch.tensor([0, 1]), torch.tensor([3.0, 1.0]), 1)
    store.record_scores(torch.tensor([2]), torch.tensor([0.0]), 4)
    order = np.array([0, 1, 2, 3])
    assert store.scores(order).tolist() == [3.0, 1.0, 0.0, math.inf]
    aged = store.scores(order, 5)  # epochs 2, 3 and 4 left the first two out
    assert aged.tolist() == pytest.approx([24.0, 8.0, 1e-6, math.inf])


@pytest.mark.long  # both processes trace, half a minute
@pytest.mark.parametrize("rule", ["pi", "topk"])
def test_two_processes_train_as_one(rule, tmp_path):
    """Started afresh: a forked process cannot trace once its parent has."""
    keys = ["model.name=test_vit", "dataset.image_size=32", "training.batch_size=32"]
    keys += ["dataset.max_train_samples=256", "dataset.max_val_samples=64", "training.lr=0.01"]
    keys += ["training.epochs=3", "training.num_workers=0", f"ast.rule={rule}", *REUSE[:2]]
    keys += ["ast.candidates=0.75"]

    def config(name):
        return make_config(*keys, "ast.warmup_epochs=1", f"logging.output_dir={tmp_path / name}")

    one, _ = train(config("one"))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.dump(config("two").model_dump()))
    script = [sys.executable, "scripts/run_experiment.py", "--config", str(path), "--nproc", "2"]
    subprocess.run(script, cwd=REPO, check=True, capture_output=True)
    (found,) = (tmp_path / "two").glob("final_results_*.json")
    two = json.loads(found.read_text())
    for name in ("loaded", "scored", "trained", "reused", "steps"):
        assert two["ledger"][name] == one["ledger"][name], name
    assert one["ledger"]["reused"] > 0
    weights = [final_state(config(name))["model"] for name in ("one", "two")]
    for name, tensor in weights[0].items():
        assert torch.allclose(tensor, weights[1][name], atol=1e-4), name
