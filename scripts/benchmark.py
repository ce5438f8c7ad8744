"""Measure what a training step and the input cost, all in one run on one machine.

    python scripts/benchmark.py steps --model resnet50 --image-size 224 \\
        --batch-size 256
    python scripts/benchmark.py steps --model resnet18 --small-stem \\
        --image-size 32 --compile reduce-overhead
    python scripts/benchmark.py steps --model test_resnet --image-size 32 \\
        --batch-size 32 --steps 4
    python scripts/benchmark.py steps --model resnet50 --nproc 2 \\
        --batch-size 512
    python scripts/benchmark.py scaling --steps steps.json --gpus 8 64 512
    python scripts/benchmark.py input --folder data/imagenette2-160/train \\
        --image-size 128
    python scripts/benchmark.py inference --model resnet50 --image-size 224
    python scripts/benchmark.py epoch --folder data/imagenet/train \\
        --stream-steps 60

steps      training loops over one resident batch: the lab's own, and what
           others write by hand
scaling    on paper: what those steps would take on more GPUs with as many
           samples each
input      images per second of each pipeline over a folder of classes
inference  latency of one picture, and pictures a second in the largest batch
           that fits
epoch      wall time of whole epochs of a folder of classes, by kind of cache,
           and how long the GPU waited in them
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

from lab.study.benchmark.options import parse
from lab.study.cli import refuse_early, run_cli

if __name__ == "__main__":
    refuse_early(partial(parse, __doc__))  # before the import of torch, which takes seconds

import numpy as np
import torch

from lab.base.files import require_folder
from lab.base.launch import launch, launched
from lab.config.imports import use
from lab.config.loading import Config
from lab.data.loading import DeviceBatch, EpochPlan
from lab.machine.devices import configure_backends, environment, resolve_device
from lab.models.building import get_model
from lab.study.benchmark import epochs, inference, inputs, timing
from lab.study.benchmark.peers import (
    hand_written_steps,
    masked_loss_steps,
    two_forward_steps,
)
from lab.study.benchmark.scaling import benchmark_scaling, break_even, show_scaling
from lab.study.benchmark.timing import Loop, StepRow, TimedDist, Workload
from train_ast import (
    Data,
    Pool,
    Run,
    Threshold,
    begin_epoch,
    build_dataloaders,
    fixed_shape,
    significance,
    train_one_epoch,
)


def lab_steps(
    workload: Workload, compiled: str, at_score_resolution: bool = False, **ast: Any
) -> Loop:
    """The lab's own epoch loop over the resident batch, packed, with the settings `ast`."""
    config = workload.config.model_copy(deep=True)
    device = workload.images.device
    resolution = workload.score_resolution if at_score_resolution else None
    if ast.get("scoring") == "proxy":  # sees pictures of at most this side
        resolution = min(config.dataset.image_size, 96)
    settings = {"pack": True, "score_resolution": resolution, **ast}
    config.ast = config.ast.model_copy(update=settings)
    config.training.compile = compiled
    if config.ast.reuse_forward:  # the batch is one of candidates
        config.training.batch_size = round(config.ast.target_activation * len(workload.labels))
    configure_backends(fixed_shape(config), device)
    model = get_model(config.model, config.dataset.num_classes, config.dataset.image_size)
    run = Run.build(config, model, device, planned_steps=10**6, dist=workload.dist)
    run.start_epoch(config.ast.warmup_epochs, np.arange(0))
    share = config.ast.target_activation if config.ast.mode == "random" else 1.0
    batch = DeviceBatch(
        workload.images, workload.labels, torch.arange(len(workload.labels), device=device)
    )

    def steps(n: int) -> None:
        run.metrics.step = 0
        n = max(1, round(share * n))
        train_one_epoch(run, islice(repeat(batch), n), n)

    activations = run.selection.activations

    def activation() -> float | None:
        return statistics.mean(activations) if activations else None

    return Loop(steps, activation, lambda: run.selection.scores.epoch_cost(activation() or share))


def choose_active(scores: torch.Tensor, activation: float) -> None:
    """What the host does with the scores of a batch [n] before it knows who is active."""
    config = Config()
    config.ast.target_activation = activation
    config.training.batch_size = len(scores)
    rule = Threshold(config)
    rule.choose(Pool(scores, lambda: torch.rand(len(scores)), 0.0), activation)


class EpochSteps:
    """A run whose epochs `lab.study.benchmark.epochs` times."""

    def __init__(self, config: Config, device: torch.device, data: Data):
        configure_backends(True, device)
        model = get_model(config.model, data.classes, config.dataset.image_size)
        samples = int(data.plan.indices.max()) + 1
        self.device = device
        self.run = Run.build(config, model, device, 10**6, samples)
        self.run.warm_up()
        if self.run.selection.store is not None:
            self.remember_scores(data.plan.indices)
        self.run.start_epoch(1, data.plan.permutation())

    def remember_scores(self, indices: np.ndarray) -> None:
        """Give every sample a random score, as if an epoch had been trained."""
        generator = torch.Generator(self.device).manual_seed(0)
        scores = torch.rand(len(indices), device=self.device, generator=generator)
        self.run.selection.store.record_scores(torch.from_numpy(indices).to(self.device), scores, 0)

    def begin_epoch(self, plan: EpochPlan) -> None:
        self.run.metrics.epoch += 1
        self.run.metrics.step = 0
        begin_epoch(self.run, plan)

    def train(self, batches: Iterable[DeviceBatch], steps: int) -> None:
        self.run.metrics.step = 0
        train_one_epoch(self.run, batches, steps)


ALONE = {"compiles": False, "one_process": True}  # uncompiled, in one process
# One entry is one row, in the order of the table: compiled, then uncompiled.
# lab/study/benchmark/peers.py says what the hand-written loops do.
STEP_ROWS = [
    StepRow("hand-written dense loop", hand_written_steps),
    StepRow("dense loop", partial(lab_steps, mode="dense")),
    StepRow("batch-scored loop, a={activation:g}", partial(lab_steps, mode="ast")),
    StepRow(
        "  scored at {score_resolution} px",
        partial(lab_steps, mode="ast", at_score_resolution=True),
        needs_score_resolution=True,
    ),
    StepRow(
        "forward once, a={activation:g}",
        partial(lab_steps, mode="ast", rule="topk", reuse_forward=True),
    ),
    StepRow(
        "proxy-scored loop, a={activation:g}",
        partial(lab_steps, mode="ast", rule="topk", scoring="proxy"),
    ),
    StepRow("random loop, a={activation:g}", partial(lab_steps, mode="random")),
    StepRow(
        "stored scores, a={activation:g}",
        partial(hand_written_steps, stored=True),
        one_process=True,
    ),
    StepRow("batch-scored loop, not packed", partial(lab_steps, mode="ast", pack=False), **ALONE),
    StepRow("published pattern", partial(masked_loss_steps, ours=False), **ALONE),
    StepRow("  in our settings", partial(masked_loss_steps, ours=True), **ALONE),
    StepRow("two full forwards, masked", partial(two_forward_steps, top_k=False), **ALONE),
    StepRow("two-pass top-k, a={activation:g}", partial(two_forward_steps, top_k=True), **ALONE),
]


def benchmark_steps(args: argparse.Namespace) -> dict[str, Any]:
    """The rows of STEP_ROWS for one model, resolution, batch size and activation. All processes
    return the same.
    """
    config = Config()
    config.model.name = args.model
    config.model.small_stem = args.small_stem
    config.dataset.num_classes = args.classes
    config.dataset.image_size = args.image_size
    config.ast.target_activation = args.activation
    config.ast.kp = 1.0
    config.ast.ki = 0.05
    config.training.batch_size = args.batch_size
    config.training.lr = 0.01
    config.training.device = args.device
    device = resolve_device(config.training)
    dist = TimedDist.join(device)
    lab = {
        "get_model": get_model,
        "significance": significance,
        "score_resolution": args.score_resolution,
    }
    workload = timing.random_workload(config, device, dist, **lab)
    loops = timing.choose_loops(
        STEP_ROWS, workload, ["off"] if args.no_compile else [args.compile, "off"], args.only
    )
    rows = {}
    result = {"processes": dist.world, "batch_size": args.batch_size, "model": args.model}
    result |= {"image_size": args.image_size, **environment(device), "rows": rows}
    for name, row in timing.time_loops(loops, workload, args.steps, args.repeats):
        rows[name] = row
        if name in args.speeds:
            row["speed_up"] = row["images_per_second"] / args.speeds[name]
        timing.write_json(args.json, result)  # a benchmark that is cut short keeps what it measured
    dist.leave()
    dense = min((row["ms"] for name, row in rows.items() if "dense loop" in name), default=None)
    for row in rows.values():
        row["ratio"] = None if dense is None else row["ms"] / dense
    return {**result, "break_even": break_even(rows, args.activation)}


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(__doc__, argv)
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        if path is not None:
            require_folder(path.parent, option, path)
    if args.what == "steps" and args.nproc > 1 and launched()[1] == 1:
        return launch(Path(__file__), args.nproc, 0, sys.argv[1:] if argv is None else argv)
    use(args.imports)
    lab = epochs.Lab(build_dataloaders, EpochSteps)
    work, show = {
        "steps": (benchmark_steps, timing.show_steps),
        "input": (inputs.benchmark_input, inputs.show_input),
        "epoch": (partial(epochs.benchmark_epoch, lab=lab), epochs.show_epoch),
        "inference": (inference.benchmark_inference, inference.show_inference),
        "scaling": (partial(benchmark_scaling, choose=choose_active), show_scaling),
    }[args.what]
    result = work(args)
    if launched()[0] == 0:
        timing.write_json(args.json, result)
        if args.plot:
            timing.plot(args.what, result, args.plot)
        print(show(result))
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
