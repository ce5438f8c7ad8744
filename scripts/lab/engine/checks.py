"""What is said, or refused, before a run takes its first step."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn

from lab.base.console import print_rank0
from lab.base.errors import RequestError
from lab.config.loading import Config
from lab.data.loading import EpochPlan
from lab.models.building import takes_one_sample

# control steps to settle with kp=1 and ki=0.2, at a density of 0.4 samples an inter-quartile range
SETTLING = 20


def check_start(config: Config, model: nn.Module, plan: EpochPlan, scores_batches: bool) -> None:
    """Print what is worth knowing of the plan. Raises RequestError where a step would be of a
    single sample that the network's BatchNorm cannot normalise.

    scores_batches: whether loaded batches are scored, so that each has another number of active
    samples.
    """
    complaint = next(single_samples(config, plan, scores_batches), None)
    if complaint is not None and not takes_one_sample(model, config.dataset.image_size):
        raise RequestError(
            f"{complaint}, and BatchNorm in {config.model.name} cannot normalise a single one"
        )
    for line in notes(config, plan):
        print_rank0(line)


def single_samples(config: Config, plan: EpochPlan, scores_batches: bool) -> Iterator[str]:
    """Why a step may hold a single sample on a process, naming the key."""
    training = config.training
    ast = config.ast
    world = 1 if training.sync_batchnorm else plan.dist.world
    where = " on each of the processes" if world > 1 else ""
    if training.batch_size // world == 1:
        yield f"training.batch_size: {training.batch_size} is a step of one sample{where}"
    for epoch in range(training.epochs):
        samples = plan.planned_samples(epoch)
        chosen = config.is_sparse(epoch) and plan.share(epoch) < 1
        if chosen and ast.mode != "random":  # then ast.min_active is the floor
            continue
        if samples < training.batch_size and 1 in (samples // world, -(-samples // world)):
            key = "ast.target_activation" if chosen else "training.batch_size"
            yield (
                f"{key}: epoch {epoch + 1} is a single step of {samples} of "
                f"{len(plan.indices)} samples{where}"
            )
    before_loading = ast.mode == "ast" and ast.scoring == "history"
    varies = scores_batches and not ast.pack and ast.reuse_forward is False
    if ast.min_active < 2 and (before_loading or varies):
        yield f"ast.min_active: {ast.min_active} lets a step train on one sample, 2 does not"


def notes(config: Config, plan: EpochPlan) -> Iterator[str]:
    """Lines on what a plan leaves out, and on a controller that is slow for its epochs."""
    ast = config.ast
    batch = config.training.batch_size
    left_out = len(plan.indices) - plan.dense_samples
    steps = -(-plan.dense_samples // batch)
    if left_out:
        yield (
            f"note: {len(plan.indices):,} training samples are {steps:,} batches of {batch:,}: "
            f"each epoch leaves out another {left_out:,} of them"
        )
    steady = not ast.kp or ast.target_activation == 1
    if ast.mode != "ast" or ast.rule != "pi" or ast.threshold_unit != "iqr" or steady:
        return
    gain = min(1.0, max(ast.kp, round(SETTLING / steps, 2)))
    if ast.kp < gain:
        more = "" if steps >= SETTLING else f", after some {-(-SETTLING // steps)} sparse epochs"
        yield (
            f"note: an epoch has {steps} control steps, few for ast.kp={ast.kp:g}: the first "
            f"sparse epochs may miss ast.target_activation={ast.target_activation}; "
            f"ast.kp={gain:g} ast.ki={0.2 * gain**2:.2g} would hold it{more}"
        )
