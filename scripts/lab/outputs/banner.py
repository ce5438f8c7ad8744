"""What a run says of itself: at its start, and after its first epoch where it will take long."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from lab.base.console import aligned, print_rank0
from lab.config.loading import Config, checkpoint_folder
from lab.config.sections import TrainingConfig
from lab.data.cache.device import CachedLoader
from lab.data.loading import EpochPlan
from lab.machine.clock import Clock

LONG_HOURS = 1.0  # a run on a CPU that takes longer says so


class Facts(NamedTuple):
    """What a run knows of itself when it begins."""

    gpu: str | None
    processes: int
    parameters: int
    base_flop: float  # of a forward and backward over one sample


def own_pictures(loader: Any) -> int:
    """How many pictures of the validation set this process has."""
    if isinstance(loader, CachedLoader):
        return len(loader.indices)
    return sum(map(len, loader.batch_sampler))


def announce(
    config: Config, facts: Facts, plan: EpochPlan, classes: int, val_pictures: int
) -> None:
    """Print the device, the model, the data, the schedule and where results go."""
    threads = torch.get_num_threads()
    device = facts.gpu or f"CPU, {threads} thread{'s' * (threads > 1)}"
    batch = min(config.training.batch_size, len(plan.indices))
    steps = -(-plan.dense_samples // batch)
    rows = {
        "device": device if facts.processes == 1 else f"{facts.processes} x {device}",
        "model": f"{config.model.name}, {facts.parameters / 1e6:,.2f} M parameters, "
        f"{facts.base_flop / 1e9:.3g} GFLOP per picture (forward and backward)",
        "data": f"{config.dataset.type}, {classes:,} classes, {len(plan.all_indices):,} pictures "
        f"in training, {val_pictures:,} in validation",
        "schedule": schedule(config, f"{steps:,} step{'s' * (steps > 1)} of {batch:,} pictures"),
        "mode": mode(config),
        **({"imports": ", ".join(config.imports)} if config.imports else {}),
        "results": f"{config.logging.output_dir}, checkpoints in {checkpoint_folder(config)}",
    }
    print_rank0(f"{aligned(rows)}\n")


def schedule(config: Config, steps: str) -> str:
    """How long the run trains. steps: of an epoch that loads everything, in words."""
    training = config.training
    minutes = config.training.max_minutes
    text = f"{training.epochs:,} epoch{'s' * (training.epochs > 1)} of {steps}"
    if training.lr_decay == "time":
        return f"{minutes:.3g} minutes of training, in epochs of {steps}"
    return text if minutes is None else f"{text}, at most {minutes:.3g} minutes"


def mode(config: Config) -> str:
    """What is trained on, and in which epochs."""
    ast = config.ast
    span = config.sparse_span()
    if ast.mode == "dense":
        return "dense: every epoch trains on all samples"
    where = (
        f"in epochs {span.start + 1} to {span.stop}" if len(span) > 1 else f"in epoch {span.stop}"
    )
    if ast.mode == "random":
        return f"random: a share of {ast.target_activation} {where}, all samples in the others"
    target = ast.target_activation
    target = target if isinstance(target, str) else f"{target:g}"
    share = "its own share" if ast.rule == "infobatch" else f"target activation {target}"
    return f"ast: {share} {where}, scoring={ast.scoring}, rule={ast.rule}"


def seconds_left(
    clock: Clock, history: Sequence[float], sparse: Callable[[int], bool], done: float
) -> float:
    """How long the rest of the run takes, with its validations. An epoch is taken to be as long as
    the last one of its kind, sparse or dense; without one, as long as this one.

    history: train_seconds of each finished epoch, cumulative. sparse: whether an epoch is, by its
    number from 0. done: epochs that are trained, with the part of the one that runs, above 0.
    """
    training = clock.training
    cap = max(0.0, clock.stop.deadline - time.monotonic())
    if training.lr_decay == "time":
        return max(0.0, 60 * training.max_minutes - clock.training_seconds())
    epoch = math.ceil(done) - 1
    share = done - epoch
    ends = [0.0, *history]
    seconds = {sparse(e): ends[e + 1] - ends[e] for e in range(len(history))}
    here = (clock.training_seconds() - clock.train_seconds) / share
    seconds[sparse(epoch)] = here
    later = sum(seconds.get(sparse(e), here) for e in range(epoch + 1, training.epochs))
    validations = clock.eval_seconds * (training.epochs - epoch)
    return min(cap, here * (1 - share) + later + validations)


def say_if_long(training: TrainingConfig, epoch_seconds: float) -> None:
    """Say how long all epochs of a run on a CPU will take, if that is over LONG_HOURS.

    epoch_seconds: of the first one, validation included.
    """
    if training.lr_decay == "time":
        return
    hours = training.epochs * epoch_seconds / 3600
    hours = min(hours, (training.max_minutes or float("inf")) / 60)
    if hours > LONG_HOURS:
        print_rank0(
            f"note: on this CPU all {training.epochs} epochs take about {hours:.1f} hours; a GPU, "
            "a lower training.epochs, dataset.image_size or dataset.max_train_samples makes it "
            "shorter"
        )
