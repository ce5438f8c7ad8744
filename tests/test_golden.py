"""What the lab trains is what `reference.py` trains, written plainly and in float64.

Nothing is stored, so nothing is bound to a version of torch or to a processor. Counts agree
exactly, figures and weights to what float32 can hold. That choices agree is no luck: SAFE asks of
every case that none of its decisions is close enough to the other choice for rounding to reach it.
"""

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import make_config
from lab.config.loading import Config, checkpoint_folder
from lab.engine.checkpoint import load_checkpoint
from reference import Outcome, Reference
from runs import StopAfter, ranks
from train_ast import train

SAFE = 2e-4  # nats, and logits: the least distance of a decision from the other choice
CLOSE = 1e-4  # nats, percent, relative: the largest difference of a figure
DRIFT = 1e-3  # of the way that a tensor has gone: the largest difference at its end
ROUNDED = 1e-6  # of a tensor: what float32 does to it where it hardly moves
COUNTS = ("samples_loaded", "samples_scored", "samples_trained", "optimizer_steps")
FIGURES = ("activation_rate", "threshold", "train_loss", "train_acc", "val_acc", "lr")
SMALL = (
    "model.name=small_conv",
    "training.batch_size=32",
    "training.lr=0.05",
    "training.epochs=3",
    "dataset.max_train_samples=250",  # the last 26 of an epoch fill no batch
    "dataset.max_val_samples=64",
    "ast.warmup_epochs=1",
)
BATCH = ("ast.target_activation=0.5", "training.seed=3")
PACKED = (
    "ast.pack=true",
    "training.grad_accum_steps=2",
    "ast.target_activation=0.5",
    "training.seed=0",
)
HISTORY = ("ast.scoring=history", "ast.target_activation=0.5", "training.seed=5")
AUGMENTED = ("dataset.augment=pad_crop", "dataset.random_erasing=0.5", "training.seed=4")
CASES: dict[str, tuple[str, ...]] = {  # the seeds are some that leave every decision SAFE
    "dense": (
        "ast.mode=dense",
        "training.lr_warmup_epochs=1",
        "training.label_smoothing=0.1",
        "training.grad_clip_norm=1",
        "training.seed=2",
    ),
    "random": ("ast.mode=random", "training.seed=3"),
    "batch-scored": BATCH,
    "packed, accumulated": PACKED,
    "kp rising": (
        "training.grad_accum_steps=3",
        "ast.kp_warmup_epochs=2",
        "ast.target_activation=0.5",
        "training.seed=4",
    ),
    "annealed": (
        "ast.anneal_epochs=1",
        "ast.entropy_weight=2",
        "ast.target_activation=0.5",
        "training.seed=3",
    ),
    "top-k": ("ast.rule=topk", "training.seed=2"),
    "low resolution": (
        "model.name=test_mambaout",
        "ast.score_resolution=4",
        "training.optimizer=adamw",
        "training.lr=0.003",
        "training.seed=3",
    ),
    "history": HISTORY,
    "InfoBatch": (
        "ast.scoring=history",
        "ast.rule=infobatch",
        "ast.entropy_weight=0",
        "training.seed=2",
    ),
    "augmented": AUGMENTED,
}


@functools.cache
def expected(*settings: str) -> Outcome:
    return Reference(settings).run()


def weights_of(config: Config) -> dict[str, torch.Tensor]:
    """Weights and buffers of the last checkpoint."""
    return load_checkpoint(checkpoint_folder(config) / "last.pt", config)["model"]


def compare(result: dict[str, Any], weights: dict[str, torch.Tensor], reference: Outcome) -> None:
    assert reference.margin > SAFE, "rounding may turn a choice: give the case another seed"
    names = ("reused", "padding", "learned", "looked", "seen", "judged")
    nothing = dict.fromkeys(names, 0)
    assert result["ledger"] == reference.ledger | nothing
    history = result["training_history"]
    for key in COUNTS:
        assert history[key] == reference.history[key], key
    assert result["classes"]["times_trained"] == reference.trained_by_class
    for key in FIGURES:
        got, right = (np.array(each[key], dtype=float) for each in (history, reference.history))
        np.testing.assert_allclose(got, right, rtol=CLOSE, atol=CLOSE, err_msg=key)
    assert weights.keys() == reference.weights.keys()
    for name, right in reference.weights.items():
        off = (weights[name].double() - right).norm()
        gone = (right - reference.first[name]).double().norm()
        assert off <= DRIFT * gone + ROUNDED * right.double().norm(), f"{name}: {off / gone}"


def check(settings: tuple[str, ...], folder: Path, *own: str, interrupted_at: int = 0) -> None:
    """Compare a run with the reference; `own` are settings that the reference need not know."""
    config = make_config(*settings, *own, f"logging.output_dir={folder}")
    if interrupted_at:
        assert train(config, StopAfter(interrupted_at))[0]["status"] == "interrupted"
    result, _ = train(config, resume="auto" if interrupted_at else None)
    compare(result, weights_of(config), expected(*settings))


@pytest.mark.parametrize("name", CASES)
def test_a_run_trains_what_the_reference_trains(name, tmp_path):
    check((*SMALL, *CASES[name]), tmp_path)


def test_a_cache_changes_nothing(tmp_path):
    check((*SMALL, *AUGMENTED), tmp_path, "dataset.cache=device")


@pytest.mark.parametrize(("settings", "step"), [(BATCH, 12), (PACKED, 14), (HISTORY, 10)])
def test_an_interruption_changes_nothing(settings, step, tmp_path):
    check((*SMALL, *settings), tmp_path, interrupted_at=step)


def test_two_processes_train_what_one_would(tmp_path):
    """With a network in which no sample knows of another; in BatchNorm's they do."""
    settings = (*SMALL, "model.name=test_mambaout", "ast.target_activation=0.5")
    config = make_config(*settings, f"logging.output_dir={tmp_path}/out")
    ended = ranks(2, lambda rank: train(config)[0], tmp_path / "ranks")
    compare(ended.results()[0], weights_of(config), expected(*settings))
