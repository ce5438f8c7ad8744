"""AST-LAB: Adaptive Sparse Training for image classification, the whole lab in one file.

Run it:
    python scripts/train_ast.py --config configs/digits_smoke.yaml
    python scripts/train_ast.py --config configs/cifar10_resnet18_ast.yaml ast.target_activation=0.5
    python scripts/run_experiment.py --config configs/imagenet_resnet50_ast.yaml --epochs 50 --target-activation 0.3
    torchrun --nproc-per-node 8 scripts/train_ast.py --config configs/imagenet_resnet50_ast.yaml

The law: a sample is active, and only then back-propagated, where
    loss + entropy_weight * entropy(logits) > threshold
and after every step, with error = activation - target,
    threshold += (kp * error + ki * sum of errors) * spread.
A run writes <output_dir>/final_results_<timestamp>.json and, if asked, one JSON line an epoch. What it needs to go on
bit for bit after an interruption (`run_experiment.py --resume auto`) is in <output_dir>/checkpoints/<run>/last.pt.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from lab.cli import RESUME_HELP, command_parser, run_cli
from lab.config import Config, DatasetConfig, ModelConfig, TrainingConfig, checkpoint_folder, load_config
from lab.console import epoch_line, print_rank0, progress_bar, summary
from lab.data.cache import SHARED_PICTURES, ResidentLoader, require_memory
from lab.data.datasets import (
    BadImages,
    Batch,
    ImageDataset,
    collate,
    digits_dataset,
    find_column,
    folder_dataset,
    load_hub_split,
)
from lab.data.images import View, axis_weights, kept_side
from lab.data.loading import EpochPlan, Loaded, Loader, as_is, device_batches
from lab.data.randomness import DRAWS, label_shifts, random_subset
from lab.errors import RequestError, TrainingFailed, one_line
from lab.files import align_jsonl, append_jsonl, replace_text
from lab.runtime.checkpoint import CAPPED, Checkpoints, claimed, find_checkpoint, load_checkpoint
from lab.runtime.clock import Stop, explained
from lab.runtime.devices import (
    IMAGENET_MOMENTS,
    Normalise,
    check_resolution,
    compiled,
    configure_backends,
    count_flops,
    environment,
    eval_view,
    resolve_amp_dtype,
    resolve_device,
    synchronised,
    synchronize,
    to_device,
)
from lab.runtime.distributed import Dist, asking_interval, meet
from lab.runtime.meters import EnergyMeter, Ledger, Meter
from lab.runtime.outputs import add_scalars, open_tensorboard, prepare_outputs, save_results
from lab.runtime.sample_store import History
from lab.runtime.workers import WorkerLoader, ending_workers

# ------------------------------------------------------------------------------------------------ Config


# ------------------------------------------------------------------------------------------------ Control


@dataclass
class PIController:
    """Holds the activation rate at `target` by moving the threshold (discrete PI control of its increment).

    error = activation - target, so that too many active samples raise the threshold:
    threshold += (kp * error + ki * sum of errors) * spread, kept within [min_threshold, max_threshold].
    Anti-windup by conditional integration (Astrom & Hagglund, "PID Controllers", 1995, section 3.5): the sum
    does not grow while the threshold sits on a bound and the error pushes it further out.
    """

    target: float  # share of samples to be active
    kp: float = 0.1
    ki: float = 0.01
    min_threshold: float = 0.0  # nats
    max_threshold: float = math.inf
    kp_warmup_epochs: float = 0
    ki_warmup_epochs: float = 0
    threshold: float | None = None  # nats; None until start() hands one over
    integral: float = 0.0  # sum of errors
    epoch: float = 0.0  # sparse epochs so far, with fraction: drives the ramps
    frozen: bool = False  # set in dense phases

    def start(self, threshold: float) -> None:
        """Hand over from a dense phase: begin at `threshold` (nats) with no memory of earlier errors."""
        self.threshold = min(max(threshold, self.min_threshold), self.max_threshold)
        self.integral = 0.0

    def gains(self) -> tuple[float, float]:
        """kp and ki now: each rises linearly from 0 over its warm-up."""
        kp = self.kp * min(1.0, self.epoch / self.kp_warmup_epochs) if self.kp_warmup_epochs else self.kp
        ki = self.ki * min(1.0, self.epoch / self.ki_warmup_epochs) if self.ki_warmup_epochs else self.ki
        return kp, ki

    def update(self, activation: float, spread: float = 1.0) -> float:
        """One control step: the new threshold after a batch of which a share `activation` was active."""
        if self.frozen:
            return self.threshold
        error = activation - self.target
        outward = (error > 0 and self.threshold >= self.max_threshold) or (
            error < 0 and self.threshold <= self.min_threshold
        )
        if not outward:
            self.integral += error
        kp, ki = self.gains()
        moved = self.threshold + (kp * error + ki * self.integral) * spread
        self.threshold = min(max(moved, self.min_threshold), self.max_threshold)
        return self.threshold

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("threshold", "integral", "epoch", "frozen")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name in self.state_dict():
            setattr(self, name, state[name])


# ------------------------------------------------------------------------------- Significance and selection


def per_sample_entropy(logits: Tensor) -> Tensor:
    """Shannon entropy of softmax(logits), nats, in float32. [batch, classes] -> [batch]."""
    return torch.special.entr(logits.float().softmax(-1)).sum(-1)


def significance(logits: Tensor, labels: Tensor, entropy_weight: float) -> Tensor:
    """Cross-entropy + entropy_weight * entropy, nats, in float32. [batch, classes], [batch] -> [batch]."""
    logits = logits.float()
    return F.cross_entropy(logits, labels, reduction="none") + entropy_weight * per_sample_entropy(logits)


class Selection(NamedTuple):
    indices: Tensor  # int64 [active], ascending: the samples to train on
    activation: float  # share of the scores above the threshold, before the min_active floor
    iqr: float  # inter-quartile range of the scores, nats
    finite: bool  # whether every score is


def select_active(scores: Tensor, threshold: float, min_active: int = 0) -> Selection:
    """The samples whose score is above `threshold`, or the top `min_active` where those are fewer.

    scores: [batch], nats. The active samples are the top-k of one stable sort, k being their number, so that of
    equal scores the earlier sample comes first.
    """
    n = len(scores)
    ranked, order = scores.sort(descending=True, stable=True)
    above = (scores > threshold).sum()
    facts = torch.stack([above.float(), ranked[n // 4], ranked[(3 * n) // 4], scores.isfinite().all().float()])
    count, upper, lower, finite = facts.tolist()
    k = min(max(int(count), min_active), n)
    return Selection(order[:k].sort().values, count / n, upper - lower, bool(finite))


class Choice(NamedTuple):
    kinds: np.ndarray  # uint8 [n]: 0 left out, 1 active, 2 explored
    threshold: float  # mean over the epoch, nats


def choose_by_threshold(
    scores: np.ndarray, drawn: np.ndarray, controller: PIController, chunk: int, in_iqr: bool, leave_out: float = 0.0
) -> Choice:
    """Which samples an epoch trains on: those over the threshold or never seen, and those drawn to explore.

    scores: float32 [n], nats, in the order of the epoch, infinite for never seen; drawn: bool [n], who returns though
    not over it; leave_out: share of the samples, those of the highest scores, that count as not over it. Walks the
    order in chunks and steers the threshold after each by the share it took, as after a batch, so that the share of all
    samples is held at the target. Nothing is loaded for it: a sample comes once an epoch, so that its stored score is
    the same now as it would be when its turn comes.
    """
    some = scores[: 2**16]  # the order is random: any part of it is a fair sample
    some = some[np.isfinite(some)]
    some = some if len(some) else np.zeros(1, dtype=np.float32)
    lower, upper, ceiling = np.quantile(some, [0.25, 0.75, 1 - leave_out])
    spread = float(upper - lower) if in_iqr else 1.0
    if controller.threshold is None:  # hand-over: what exploration adds is the threshold's to leave out
        explored = float(drawn.mean())
        share = leave_out + (controller.target - explored) / max(1e-9, 1 - explored)
        controller.start(float(np.quantile(some, 1 - min(1.0, max(0.0, share)))))
    if leave_out:
        scores = np.where((scores > ceiling) & np.isfinite(scores), -math.inf, scores)
    kinds = drawn.astype(np.uint8) * 2
    before, thresholds = controller.epoch, []
    for start in range(0, len(scores), chunk):
        part = kinds[start : start + chunk]
        part[scores[start : start + chunk] > controller.threshold] = 1
        thresholds.append(controller.threshold)
        controller.epoch = before + start / len(scores)
        controller.update(int(np.count_nonzero(part)) / len(part), spread)
    return Choice(kinds, statistics.fmean(thresholds))


def choose_by_mean(scores: np.ndarray, drawn: np.ndarray) -> Choice:
    """InfoBatch (Qin et al. 2024, "InfoBatch: lossless training speed up by unbiased dynamic data pruning", section 3):
    below the mean of the stored losses a sample stays with probability 1/2, and then counts twice.

    scores: float32 [n], nats; drawn: bool [n], true for one in two.
    """
    known = scores[np.isfinite(scores)]
    mean = float(known.mean(dtype=np.float64)) if len(known) else 0.0
    return Choice(np.where(scores < mean, drawn.astype(np.uint8) * 2, np.uint8(1)), mean)


# ------------------------------------------------------------------------------------------------ Forward


class ActiveQueue:
    """Packing: collects active samples on the device until a full batch is there, so that every training
    step has one shape. Keeps uint8 pixels, [pending, 3, H, W]; what is pending carries over epochs.

    Of several processes each keeps its own samples, and knows how many the others have: together they take the batches
    that one process would take, `batch_size / world` each. What one has too many goes to those who have too few.
    """

    def __init__(self, batch_size: int, dist: Dist | None = None):
        self.batch_size, self.dist = batch_size, dist or Dist()
        self.clear()

    def __len__(self) -> int:
        return 0 if self.labels is None else len(self.labels)

    def clear(self) -> None:
        self.images: Tensor | None = None
        self.labels: Tensor | None = None
        self.pending = [0] * self.dist.world  # samples that each rank keeps

    def put(self, images: Tensor | None, labels: Tensor | None, pending: Sequence[int] = ()) -> None:
        """Fill an empty queue with this rank's part of the samples (at most batch_size) that all have together: each
        keeps its number of `pending` where those are of as many ranks, else they share evenly."""
        self.clear()
        if labels is not None:
            even = np.diff(self.dist.edges(len(labels))).tolist()
            self.pending = list(pending) if len(pending) == self.dist.world else even
            start = sum(self.pending[: self.dist.rank])
            own = slice(start, start + self.pending[self.dist.rank])
            self.images, self.labels = images[own], labels[own]

    def contents(self) -> tuple[Tensor | None, Tensor | None, list[int]]:
        """(images, labels, how many are each rank's) of all that waits on any rank, for each of them."""
        own = self.images, self.labels
        if self.dist.world > 1 and sum(self.pending):
            parts = self.dist.gather_objects([None if each is None else each.cpu() for each in own])
            own = (torch.cat(each) for each in zip(*(part for part in parts if part[1] is not None), strict=True))
        return *own, self.pending

    def push(self, images: Tensor, labels: Tensor, counts: Sequence[int] = ()) -> tuple[Tensor, Tensor] | None:
        """Add samples, at most batch_size on all ranks together; the oldest batch_size ones once they are there, else
        None. `counts`: how many each rank adds, where there are several."""
        if self.labels is not None:
            images, labels = torch.cat([self.images, images]), torch.cat([self.labels, labels])
        room, taken = self.batch_size - sum(self.pending), []
        counts = counts or [len(labels) - self.pending[0]]
        for pending, new in zip(self.pending, counts, strict=True):  # of the new ones, those of the first ranks
            taken.append(pending + min(new, room))
            room -= min(new, room)
        self.pending = [pending + new for pending, new in zip(self.pending, counts, strict=True)]
        if room:
            self.images, self.labels = images, labels
            return None
        self.pending = [pending - gone for pending, gone in zip(self.pending, taken, strict=True)]
        own = taken[self.dist.rank]
        self.images, self.labels = images[own:], labels[own:]
        return self.dist.even_out(taken, images[:own], labels[:own])


def training_forward(model: nn.Module, normalise: Normalise, smoothing: float, entropy_weight: float) -> Callable:
    """What a training step computes, as one function to compile: uint8 images, labels -> (summed loss, hits).

    With the weights of the samples, [batch], the loss is the weighted sum, and their significance comes third.
    """

    def forward(images: Tensor, labels: Tensor, weights: Tensor | None = None) -> tuple[Tensor, ...]:
        with normalise.autocast():
            logits = model(normalise(images))
        hits = (logits.argmax(-1) == labels).sum()
        if weights is None:
            return F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing), hits
        losses = F.cross_entropy(logits.float(), labels, reduction="none", label_smoothing=smoothing)
        return (losses * weights).sum(), hits, significance(logits.detach(), labels, entropy_weight)

    return forward


def scoring_forward(model: nn.Module, normalise: Normalise, entropy_weight: float, shrink: Tensor | None) -> Callable:
    """What scoring computes, likewise: images, labels -> float32 [2, batch], the significance and whether it hit.

    `shrink` [resolution, side]: the weights (`axis_weights`) that take both axes to the scoring resolution.
    """

    def forward(images: Tensor, labels: Tensor) -> Tensor:
        if shrink is not None:
            images = shrink @ images.to(shrink.dtype) @ shrink.mT
        with normalise.autocast():
            logits = model(normalise(images))
        hits = logits.argmax(-1) == labels
        return torch.stack([significance(logits, labels, entropy_weight), hits.float()])

    return forward


class Scores(NamedTuple):
    facts: Tensor  # float32 [2, batch] on the host, or on its way there: significance in nats, and 1 for a hit;
    # of several processes the batches of all, in the order of their ranks
    arrived: torch.cuda.Event | None

    def wait(self) -> Tensor:
        """The facts, once they are there: waits for the scoring forward, if it must."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.facts

    def read(self) -> tuple[Tensor, int]:
        """(significance [batch] on the host, number of hits)."""
        significances, hits = self.wait()
        if len(significances) and significances.min() == -math.inf:  # what filled up a rank's smaller part
            significances, hits = self.facts[:, significances != -math.inf]
        return significances, int(hits.sum())


@torch.no_grad()
def score(run: Run, images: Tensor, labels: Tensor) -> Scores:
    """Start scoring a batch: no gradient, eval mode, running statistics untouched. The device is not waited for."""
    facts = run.dist.join_columns(run.scorer(images, labels), run.local_batch)
    if not facts.is_cuda:
        return Scores(facts, None)
    host, arrived = torch.empty(facts.shape, pin_memory=True), torch.cuda.Event()
    host.copy_(facts, non_blocking=True)
    arrived.record()
    return Scores(host, arrived)


def score_ahead(run: Run, batches: Iterable[Loaded]) -> Iterator[tuple[Loaded, Scores | None]]:
    """Every batch with its scores, the next one's scoring already started (`ast.score_ahead`).

    The device has work while the host reads scores and chooses. The price: scores come from the weights before
    the previous batch was trained on. The threshold is not delayed, for the choice is made on the host.
    """
    waiting: list[tuple[Loaded, Scores | None]] = []
    depth = 1 if run.scoring and run.config.ast.score_ahead else 0
    kept, run.ahead = run.ahead, None  # of a checkpoint: the weights that gave these scores are gone
    for batch in batches:
        scores = kept or (score(run, *batch[:2]) if run.scoring else None)
        waiting.append((batch, scores))
        kept = None
        if len(waiting) > depth:
            ready = waiting.pop(0)
            run.ahead = scores if waiting else None
            yield ready
    run.ahead = None
    yield from waiting


def ast_forward(run: Run, images: Tensor, labels: Tensor, scores: Scores | None = None) -> int | None:
    """Score a loaded batch, choose the active samples, steer the threshold, train on the active ones alone.

    images: uint8 [batch, 3, H, W] on the device; `scores`: theirs, where `score_ahead` has them. Returns the
    number of samples back-propagated, 0 if none was active, None while packing waits for a full batch. A batch
    whose scores are not all finite is left out; raises TrainingFailed after `training.max_nonfinite_steps` of them.

    Of several processes each has its part of the batch and the scores of all of it: all choose the same, move the
    threshold alike, and train on an even part of the active ones. Returned is the number of all.
    """
    ast, controller = run.config.ast, run.controller
    values, hits = (scores or score(run, images, labels)).read()
    if run.dist.rank == 0:
        run.ledger.scored += len(values)
        run.meter.add_hits(hits, len(values))
    starting = controller.threshold is None
    if starting:  # hand-over from a dense phase, or lost: see below
        controller.start(torch.quantile(values, 1 - ast.target_activation).item())
    if ast.rule == "topk":  # Kawaguchi & Lu 2020, "Ordered SGD": the largest losses of each batch
        top = max(1, round(ast.target_activation * len(values)))
        chosen = select_active(values, math.inf, top)._replace(activation=top / len(values))
    else:
        chosen = select_active(values, controller.threshold, ast.min_active)
    if not chosen.finite:
        controller.threshold = None if starting else controller.threshold
        if run.dist.rank == 0:
            run.meter.leave_out(run.step)
        return 0
    run.activations.append(chosen.activation)
    run.thresholds.append(controller.threshold)
    run.iqr = chosen.iqr if run.iqr is None else 0.9 * run.iqr + 0.1 * chosen.iqr
    controller.update(chosen.activation, run.iqr if ast.threshold_unit == "iqr" else 1.0)
    if ast.initial_threshold == "auto" and run.is_lost(chosen.activation, len(values)):
        controller.threshold = None  # the scores have left the threshold behind: start again from their quantile
    own, counts = run.dist.own_part(chosen.indices, len(values))
    indices = to_device(own, run.device)
    active = (images[indices], labels[indices])
    ready = run.queue.push(*active, counts) if ast.pack else run.dist.even_out(counts, *active)
    if ready is None:
        return None
    trained = run.config.training.batch_size if ast.pack else sum(counts)
    if trained:
        train_step(run, *ready)
    return trained


def train_step(run: Run, images: Tensor, labels: Tensor, indices: Tensor | None = None) -> int:
    """Forward and backward over `images`, added to the window's gradient. Returns how many samples those are.

    With `ast.scoring: history` what each sample is worth is recorded under its `indices`, and explored ones weigh more.

    The divisor of the summed loss is the first forward's sample count (with synchronised BatchNorm a rank's part of
    `training.batch_size`); `optimizer_step` corrects it to the whole window's, so that the gradient is the mean over
    all samples of the window, whatever came when.
    """
    n = len(labels)
    if n == 0 and not run.synced:  # synchronised BatchNorm wants every rank, this one with nothing
        return 0
    statistics_before = [buffer.clone() for buffer in run.statistics]
    if run.past is None:
        loss, hits = run.forward(images, labels)
    else:
        loss, hits, scores = run.forward(images, labels, run.past.weights(indices))
        run.past.record(indices, scores, run.epoch)
    # synchronised, a sample's loss reaches the gradients of other ranks: all must count it alike
    change_divisor(run, run.local_batch if run.synced else run.window_divisor or max(1, n))
    run.scaler.scale(loss / run.window_divisor).backward()
    run.window_samples += n
    bad = run.meter.add_loss(loss.detach(), n, run.step)
    run.window_bad = bad if run.window_bad is None else run.window_bad | bad
    for buffer, before in zip(run.statistics, statistics_before, strict=True):
        buffer.copy_(torch.where(bad, before, buffer))
    if not run.scoring:  # scoring has counted the predictions of this step already
        run.meter.add_hits(hits, n)
    return n


def change_divisor(run: Run, divisor: int) -> None:
    """Let the window's gradient so far be the summed loss's over `divisor`."""
    if run.window_divisor not in (0, divisor):
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(run.window_divisor / divisor)
    run.window_divisor = divisor


def optimizer_step(run: Run) -> None:
    """Step on the mean gradient of the window, and clear it. The schedule advances by the loop steps it took.

    A step that the GradScaler skips (overflow in float16) advances neither the schedule nor the ledger. One with a
    loss that is not finite changes no weight: known on the device alone, it leaves the ledger when the meter is read.
    """
    training = run.config.training
    forgiving = training.max_nonfinite_steps > 0 and not run.scaler.is_enabled()
    if run.dist.world > 1:
        merge_gradients(run)
    else:
        change_divisor(run, run.window_samples)
    if forgiving:
        run.meter.add_skipped(run.window_bad, run.window_samples)
    run.lr = lr_at(run.progress(), training, run.lr_warmup)
    for group in run.optimizer.param_groups:
        group["lr"] = run.lr
    if training.grad_clip_norm is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), training.grad_clip_norm)
    scale = run.scaler.get_scale()  # a device read, in float16 alone
    if forgiving and run.device.type == "cuda":
        run.optimizer.grad_scale, run.optimizer.found_inf = None, run.window_bad.float()  # fused optimizers obey it
    if not forgiving or run.device.type == "cuda" or not run.window_bad:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=not run.grads_stay)
    if run.scaler.get_scale() >= scale:
        run.ledger.trained += run.window_samples
        run.ledger.steps += 1
        run.scheduled += run.unscheduled
    run.window_samples = run.window_divisor = run.unscheduled = 0
    run.window_bad = None


def merge_gradients(run: Run) -> Tensor:
    """Make every rank's gradient that of one process: the mean over the window's samples on all ranks, in one
    all-reduce. Returns how many those are, on the device.

    Each rank's gradient is its sum over `window_divisor`; a rank whose window has no sample adds nothing. Whether a
    loss was not finite comes along, and is then known to all.
    """
    parameters = [p for p in run.model.parameters() if p.requires_grad]
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    # as they lie in memory, channels_last or not: autograd gives a gradient its parameter's strides, on every rank
    gradients = [p.grad.as_strided((p.numel(),), (1,)) for p in parameters]
    bad = torch.zeros((), device=run.device) if run.window_bad is None else run.window_bad.float()
    facts = torch.stack([torch.full((), float(run.window_samples), device=run.device), bad])
    flat = torch.cat([*gradients, facts])
    merged = flat[:-2].mul_(run.window_divisor)
    samples, bad = run.dist.all_sum(flat)[-2:]
    torch._foreach_copy_(gradients, merged.div_(samples).split([len(g) for g in gradients]))
    run.window_bad = bad > 0
    return samples


# ------------------------------------------------------------------------------------------------ Model

TORCHVISION_MODELS = ("resnet18", "resnet50", "vit_b_16")


def get_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    """Build the network with a head for `num_classes`.

    Raises RequestError for an unknown name, an image size the network cannot take, weights that cannot be
    fetched and a small stem on anything but a torchvision ResNet.
    """
    if config.small_stem and config.name not in ("resnet18", "resnet50"):
        raise RequestError(f"model.small_stem: only for resnet18 and resnet50, not for {config.name}")
    build = _torchvision_model if config.name in TORCHVISION_MODELS else _timm_model
    try:
        return build(config, num_classes, image_size)
    except OSError as error:  # URLError and the hub's errors are OSErrors
        hint = "check the network or set model.pretrained=false"
        raise RequestError(f"model.pretrained: no weights of {config.name}: {one_line(error)}; {hint}") from None
    except (ValueError, AssertionError) as error:
        raise RequestError(f"model.name: {config.name} at {image_size} px: {one_line(error)}") from None


def _torchvision_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    is_vit = config.name == "vit_b_16"
    size = {"image_size": image_size} if is_vit else {}
    model = torchvision.models.get_model(config.name, weights="DEFAULT" if config.pretrained else None, **size)
    if is_vit:
        model.heads.head = nn.Linear(model.heads.head.in_features, num_classes)
        return model
    model.fc = nn.Linear(model.fc.in_features, num_classes)
    if config.small_stem:  # He et al. 2016, section 4.2: CIFAR-sized images keep their resolution
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
    return model


def _timm_model(config: ModelConfig, num_classes: int, image_size: int) -> nn.Module:
    import timm  # a second to import, so only where it is needed

    if not timm.is_model(config.name):
        near = difflib.get_close_matches(config.name, [*timm.list_models(), *TORCHVISION_MODELS], 1, 0.0)
        raise RequestError(f"model.name: no model {config.name!r}; did you mean {near[0]}?")
    published = timm.get_pretrained_cfg(config.name)
    size = {"img_size": image_size} if published and published.fixed_input_size else {}
    return timm.create_model(config.name, pretrained=config.pretrained, num_classes=num_classes, **size)


# ------------------------------------------------------------------------------------------------ Data


class HFDataset(ImageDataset):
    """A split of a Hugging Face dataset; its image and label columns are found from the features."""

    def __init__(self, rows: Any, config: DatasetConfig):
        import datasets

        self.image_key = find_column("image_key", config.image_key, rows.features, datasets.Image)
        self.label_key = find_column("label_key", config.label_key, rows.features, datasets.ClassLabel)
        feature = rows.features[self.label_key]
        if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
            raise RequestError(f"dataset.label_key: column {self.label_key!r} holds no class labels or integers")
        names = getattr(feature, "names", None) or [str(c) for c in range(max(rows[self.label_key], default=-1) + 1)]
        if isinstance(rows.features[self.image_key], datasets.Image):
            rows = rows.cast_column(self.image_key, datasets.Image(decode=False))  # left as bytes
        super().__init__(rows.select_columns([self.image_key, self.label_key]), names)
        self.origin = f"{config.name} [{rows.split}] "

    def labels(self) -> Iterable[int]:
        return (-1 if label is None else label for label in self.samples[self.label_key])

    def read(self, index: int) -> tuple[Path | bytes, int]:
        row = self.samples[index]
        image, label = row[self.image_key], row[self.label_key]
        if not isinstance(label, int) or not 0 <= label < len(self.classes):
            raise ValueError(f"label {label!r} is no class")
        if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
            raise ValueError(f"no image in column {self.image_key!r}")
        return image.get("bytes") or Path(image["path"]), label


def build_datasets(config: DatasetConfig) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation set, their classes checked against each other and dataset.num_classes.

    Raises RequestError naming the key where data is missing or does not fit.
    """
    if config.type == "folder":
        train = folder_dataset("dataset.train_dir", config.train_dir)
        val = folder_dataset("dataset.val_dir", config.val_dir, train.classes)
    elif config.type == "hf":
        train, val = (HFDataset(load_hub_split(config, key), config) for key in ("split_train", "split_val"))
    else:
        train, val = digits_dataset("train"), digits_dataset("val")
    if config.num_classes not in (None, len(train.classes)):
        raise RequestError(f"dataset.num_classes: {config.num_classes}, but the data has {len(train.classes)} classes")
    if len(train.classes) < 2 or len(val.classes) > len(train.classes):
        raise RequestError(f"dataset: {len(train.classes)} training and {len(val.classes)} validation classes")
    if not len(train) or not len(val):
        raise RequestError(f"dataset: {len(train)} training and {len(val)} validation samples")
    train.view, val.view = View(config, train=True), View(config, train=False)
    train.stand_ins = val.stand_ins = config.max_bad_images
    return train, val


def build_dataloaders(
    config: Config, device: torch.device, dist: Dist | None = None
) -> tuple[Loader, Loader, EpochPlan, int]:
    """Training loader, validation loader, the plan that drives the first, and the number of classes.

    Of several processes each has its part of every training batch, and of the validation set, in batches of its share.
    """
    dataset, training, dist = config.dataset, config.training, dist or Dist()
    train, val = build_datasets(dataset)
    if dist.world > 1:
        dist.require_same("dataset: the processes see different data", [train.fingerprint(), val.fingerprint()])
    workers = training.num_workers
    if workers is None:  # digits are in memory already
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        cores = max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))
        workers = 0 if dataset.type == "digits" else min(16, cores)
    train.shifts = label_shifts(len(train), len(train.classes), dataset.label_noise, training.seed)
    indices, val_indices = (
        random_subset(len(train), dataset.max_train_samples),
        random_subset(len(val), dataset.max_val_samples),
    )
    indices = np.concatenate([indices + copy * len(train) for copy in range(dataset.repeat)])
    if len(indices) < dist.world:
        raise RequestError(f"dataset: {len(indices)} training samples for {dist.world} processes")
    val_indices, local_batch = dist.part(val_indices), training.batch_size // dist.world
    plan = EpochPlan(indices, training.batch_size, training.seed, config.share, dist)
    shared = {"num_workers": workers}
    shared["generator"] = torch.Generator()  # the loaders draw from it, and leave the model's random numbers alone
    if dataset.cache == "device":
        if not SHARED_PICTURES:
            require_memory(len(dist.part(indices)) + len(val_indices), kept_side(dataset), device)
        shared["collate_fn"] = as_is
        resident = partial(ResidentLoader, config=config, device=device, shared=shared)
        kept = resident(train, indices, plan), resident(val, val_indices, None, batch_size=local_batch)
        return *kept, plan, len(train.classes)
    keys = [(index, np.zeros(DRAWS)) for index in val_indices.tolist()]
    chunks = [keys[start : start + local_batch] for start in range(0, len(keys), local_batch)]
    shared |= {"collate_fn": collate, "pin_memory": device.type == "cuda", "persistent_workers": workers > 0}
    streaming = partial(WorkerLoader, **shared)
    return streaming(train, batch_sampler=plan), streaming(val, batch_sampler=chunks), plan, len(train.classes)


# ------------------------------------------------------------------------------------------- Distributed


# ------------------------------------------------------------------------------------------------ Metrics

HISTORY_KEYS = (
    *("epoch", "train_acc", "val_acc", "activation_rate", "threshold", "energy_savings"),
    *("step_time_ms", "est_energy_kj", "est_flops_g"),
    *("lr", "train_loss", "samples_loaded", "samples_scored", "samples_trained", "optimizer_steps"),
    *("train_seconds", "energy_kj", "total_flops_g"),
)


# -------------------------------------------------------------------------------------------- Checkpoint


# ------------------------------------------------------------------------------------------------ Train


def lr_at(progress: float, training: TrainingConfig, warmup: float) -> float:
    """Learning rate at `progress` (0 to 1) of the run: linear over its first part `warmup`, then half a cosine down to
    min_lr (Loshchilov & Hutter 2017, SGDR, equation 5, one cycle)."""
    if progress < warmup:
        return training.lr * progress / warmup
    decayed = (progress - warmup) / max(1e-12, 1 - warmup)
    return training.min_lr + (training.lr - training.min_lr) * (1 + math.cos(math.pi * min(1.0, decayed))) / 2


def build_optimizer(model: nn.Module, training: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """SGD or AdamW, fused on a GPU; tensors of one dimension (norms, biases) are not decayed."""
    flat = [p for p in model.parameters() if p.requires_grad and p.ndim <= 1]
    rest = [p for p in model.parameters() if p.requires_grad and p.ndim > 1]
    groups = [{"params": rest}, {"params": flat, "weight_decay": 0.0}]
    shared = {"lr": training.lr, "weight_decay": training.weight_decay, "fused": device.type == "cuda" or None}
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=training.momentum, nesterov=training.nesterov, **shared)
        if device.type == "cuda" and training.momentum:  # fused SGD leaves them unset where it skips its first step
            optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in chain(flat, rest)})
        return optimizer
    return torch.optim.AdamW(groups, **shared)


class Run:
    """Everything a training step needs and changes: model, optimizer, controller, queue, ledger, history."""

    def __init__(self, config: Config, model: nn.Module, device: torch.device, planned_steps: int, samples: int = 0,
                 dist: Dist | None = None):  # fmt: skip
        """planned_steps: loop steps of the whole run; samples: how many indices the training set has."""
        ast, training = config.ast, config.training
        self.dist = dist or Dist()
        self.local_batch = training.batch_size // self.dist.world
        self.synced = training.sync_batchnorm and self.dist.world > 1
        self.config, self.device, self.planned_steps = config, device, planned_steps
        self.base_flop = config.metrics.base_flop_per_sample or count_flops(model, config.dataset.image_size)
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        model = synchronised(model) if self.synced else model
        self.model = model.to(device, memory_format=self.layout).train()
        self.amp_dtype = resolve_amp_dtype(training, device)
        published = getattr(model, "pretrained_cfg", None) or {}  # timm says how its weights were trained
        moments = (published.get(name, usual) for name, usual in IMAGENET_MOMENTS.items())
        self.normalise = Normalise(*moments, device, self.layout, self.amp_dtype)
        self.forward = compiled(
            training_forward(self.model, self.normalise, training.label_smoothing, ast.entropy_weight), training.compile
        )
        self.scorer = self.evaluator = self._scorer(None)
        resolution = ast.score_resolution or config.dataset.image_size
        self.scoring_cost = (resolution / config.dataset.image_size) ** 2 / 3  # of a sample's forward + backward
        if resolution != config.dataset.image_size and ast.mode == "ast":
            check_resolution(model, config.model, resolution)
            self.scorer = self._scorer(resolution)
        # CUDA graphs write gradients where the last replay wrote them: what accumulates must lie elsewhere
        self.grads_stay = training.compile == "reduce-overhead" and training.grad_accum_steps > 1
        if self.grads_stay:
            for parameter in self.model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype == torch.float16)
        self.optimizer = build_optimizer(self.model, training, device)
        self.controller = PIController(
            target=ast.target_activation,
            threshold=None if ast.initial_threshold == "auto" else ast.initial_threshold,
            **ast.model_dump(include={"kp", "ki", "min_threshold", "kp_warmup_epochs", "ki_warmup_epochs"}),
        )
        self.past: History | None = None
        if ast.mode == "ast" and ast.scoring == "history":
            weight = min(ast.explore_weight_cap, 1 / ast.explore) if ast.explore else 1.0
            self.past = History(samples, 2.0 if ast.rule == "infobatch" else weight, device, self.dist)
        self.queue = ActiveQueue(training.batch_size, self.dist)
        self.streak = 0.0  # log probability of the current run of all or none active
        self.iqr: float | None = None  # running inter-quartile range of the significance, nats
        self.energy = EnergyMeter(device)
        self.ledger = Ledger()
        self.history: dict[str, list] = {key: [] for key in HISTORY_KEYS}
        self.epochs_completed, self.train_seconds, self.eval_seconds = 0, 0.0, 0.0
        self.eval_steps = 0  # batches of the validation
        self.nonfinite_steps = 0  # of the finished epochs
        self.bad_images = BadImages(config.dataset.max_bad_images)
        self.board: Any | None = None  # TensorBoard's writer
        # now: at the end, a dead loader worker would break into its subprocess
        self.environment = environment(device) | {"processes": self.dist.world}
        self.checkpoints: Checkpoints | None = None
        self.saved_at: tuple[int, int] | None = None  # epoch and step of this session's newest checkpoint
        self.started, self.earlier_seconds = time.monotonic(), 0.0  # of this session, and all before it
        self.epoch_started: float | None = None  # time.monotonic() seconds, while an epoch trains
        self.agreed_seconds = 0.0  # of training, when last asked: what several processes go by
        self.asked: Callable[[], np.ndarray] | None = None  # see `agree`
        self.energy_kj, self.energy_read = None if self.energy.read_kj() is None else 0.0, None
        self.lr_warmup = config.lr_warmup_share()
        self.lr = lr_at(0.0, training, self.lr_warmup)
        self.scheduled = self.unscheduled = 0  # loop steps whose gradient was applied (they drive the rate), and since
        self.pace = 1.0  # planned steps a step of this epoch: a choice takes a few more or fewer samples than planned
        self.window_samples = self.window_divisor = self.window_forwards = 0
        self.window_bad: Tensor | None = None  # whether a loss of the window is not finite, on the device
        forgiving = training.max_nonfinite_steps > 0
        self.statistics = [b for b in self.model.buffers() if b.is_floating_point()] if forgiving else []
        self.ahead: Scores | None = None  # of the batch scored but not yet trained on
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        sparse = self.config.ast.mode == "ast" and self.config.is_sparse(epoch)
        if not sparse:
            self.queue.clear()
        self.epoch, self.step, self.scoring = epoch, 0, sparse and self.past is None
        self.controller.frozen = not sparse
        self.meter = self.new_meter()
        self.ledger_before, self.epoch_seconds = copy.copy(self.ledger), 0.0
        self.activations: list[float] = []
        self.thresholds: list[float] = []

    def new_meter(self) -> Meter:
        """For the current epoch, allowing what the earlier ones have left of `training.max_nonfinite_steps`."""
        return Meter(self.device, self.epoch, self.config.training.max_nonfinite_steps - self.nonfinite_steps)

    def choose(self, plan: EpochPlan) -> None:
        """Choose what the epoch trains on by what is stored of each sample, all of it where the epoch is dense."""
        if self.past is None:
            return
        if not self.config.is_sparse(self.epoch):
            self.past.kinds.fill_(1)
            return
        ast, order = self.config.ast, plan.shuffled()
        scores = self.past.scores(order)
        draws = np.random.default_rng((plan.seed, plan.epoch, 1)).random(len(order), dtype=np.float32)
        if ast.rule == "infobatch":
            choice = choose_by_mean(scores, draws < 0.5)
        else:
            self.controller.epoch = float(self.epoch - ast.warmup_epochs)
            chunk = self.config.training.batch_size
            unit, drawn = ast.threshold_unit == "iqr", draws < ast.explore
            choice = choose_by_threshold(scores, drawn, self.controller, chunk, unit, ast.leave_out)
        kinds = np.zeros(len(self.past.kinds), dtype=np.uint8)
        kinds[order] = choice.kinds
        self.past.kinds.copy_(torch.from_numpy(kinds))
        self.activations, self.thresholds = [int(np.count_nonzero(kinds)) / len(order)], [choice.threshold]

    def settle(self) -> None:
        """Take the optimizer steps that a loss which is not finite has voided out of the ledger. Ends the meter."""
        bad_steps, skipped, untrained = self.meter.skipped()
        self.nonfinite_steps += bad_steps
        self.ledger.steps, self.ledger.trained = self.ledger.steps - skipped, self.ledger.trained - untrained
        self.meter = self.new_meter()

    def is_lost(self, activation: float, samples: int) -> bool:
        """Whether so many samples in a row were all active, or all inactive, that chance (1e-6) cannot explain it."""
        target = self.config.ast.target_activation
        odds = {0.0: 1 - target, 1.0: target}.get(activation, 1.0)
        self.streak = self.streak + samples * math.log(odds) if 0 < odds < 1 else 0.0
        lost = self.streak < math.log(1e-6)
        self.streak = 0.0 if lost else self.streak
        return lost

    def _scorer(self, resolution: int | None) -> Callable:
        """The eval-mode forward over the model's own parameters, compiled as the config says."""
        training, side, shrink = self.config.training, self.config.dataset.image_size, None
        if resolution is not None:
            whole = torch.tensor([[0.0, side]], device=self.device)
            shrink = axis_weights(whole[:, 0], whole[:, 1], resolution, side)[0]
        forward = scoring_forward(eval_view(self.model), self.normalise, self.config.ast.entropy_weight, shrink)
        return compiled(forward, training.compile_scoring or training.compile)

    def progress(self) -> float:
        """How far the schedule is, 0 to 1: by loop steps whose gradient was applied, or by training time."""
        if self.config.training.lr_decay == "time":
            seconds = self.agreed_seconds if self.dist.world > 1 else self.training_seconds()
            return seconds / (60 * self.config.training.max_minutes)
        return (self.scheduled + self.unscheduled / 2) / self.planned_steps

    def training_seconds(self) -> float:
        """Training time so far, that of the running epoch included."""
        running = 0.0 if self.epoch_started is None else time.monotonic() - self.epoch_started
        return self.train_seconds + self.epoch_seconds + running

    def elapsed(self) -> float:
        """Seconds since the start, those of the sessions before a resumption included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def start_clock(self) -> None:
        synchronize(self.device)
        self.epoch_started, self.energy_read = time.monotonic(), self.energy.read_kj()

    def stop_clock(self) -> None:
        """Count the time and the energy since the clock was started."""
        synchronize(self.device)
        self.epoch_seconds, self.epoch_started = self.epoch_seconds + time.monotonic() - self.epoch_started, None
        if self.energy_read is not None:
            self.energy_kj, self.energy_read = self.energy_kj + self.energy.read_kj() - self.energy_read, None

    def reserve(self) -> float:
        """Seconds to keep for the last validation and the files: what the one before took, or, before the first one,
        what as many training steps would, but no more than half of max_minutes."""
        if self.eval_seconds or self.config.training.max_minutes is None or self.epoch_started is None:
            return self.eval_seconds
        elapsed = time.monotonic() - self.epoch_started
        return min(self.eval_steps * elapsed / max(1, self.step), 30 * self.config.training.max_minutes)

    def out_of_time(self) -> bool:
        """Whether a schedule over time has come to its end."""
        return self.config.training.lr_decay == "time" and self.progress() >= 1

    def agree(self, stop: Stop, last: bool) -> tuple[bool, bool, bool]:
        """(end for a signal, end for the time, checkpoint now): alike on all ranks, yes where one of them says so.

        Several processes ask after a step and go on; the answer counts when they ask the next time, a step later. After
        the epoch's `last` step they wait for it. It takes the longer the more they are: so many ask more seldom.
        """
        capped = self.out_of_time() or stop.status(self.reserve()) == "time_capped"
        due = capped or self.checkpoint_due()
        if self.dist.world == 1:
            return stop.signal is not None, capped, due
        if not last and self.step % asking_interval(self.dist.world):
            return False, False, False
        answers = [np.array([[0, 0, 0, self.agreed_seconds]])]
        if self.asked is not None:
            answers.append(self.asked())
        due = due and not answers[-1][:, 2].any()  # it comes now
        question = [stop.signal or 0, capped, due, self.training_seconds()]
        if last:
            answers.append(self.dist.gather(question))
        number, capped, due, self.agreed_seconds = np.concatenate(answers).max(0).tolist()
        capped = capped > 0 or self.out_of_time()
        if number:
            stop.signal = int(number)
        self.asked = None if number or capped or last else self.dist.gather_later(question)
        return number > 0, capped, capped or due > 0

    def average_statistics(self) -> None:
        """Give every rank the mean of all ranks' running statistics."""
        floats = [buffer for buffer in self.model.buffers() if buffer.is_floating_point()]
        if self.dist.world > 1 and floats:
            flat = self.dist.all_sum(torch.cat([buffer.flatten() for buffer in floats])) / self.dist.world
            for buffer, part in zip(floats, flat.split([buffer.numel() for buffer in floats]), strict=True):
                buffer.copy_(part.view_as(buffer))

    def pool(self) -> None:
        """Move to rank 0 what the ranks counted and gathered by themselves since the last time: ledger, meter,
        energy, open window. Recorded significances and running statistics all ranks then have alike.

        Raises TrainingFailed where the ranks are not in the same state.
        """
        if self.dist.world == 1:
            return
        self.average_statistics()
        if self.past is not None:
            self.past.merge(self.epoch)
        first, ledger, meter = self.dist.rank == 0, self.ledger, self.meter
        if self.dist.gather([self.window_samples])[:, 0].any():
            self.pool_window()
        counted = [ledger.loaded, ledger.scored, ledger.trained, meter.hits, meter.trained, meter.predicted]
        weights = torch.stack([p.detach().double().sum() for p in self.model.parameters()]).sum().item()
        alike = [self.controller.threshold or 0.0, self.controller.integral, self.lr, self.scheduled, weights]
        rows = self.dist.gather([*counted, self.energy_kj or 0.0, *meter.sums.tolist(), *alike])
        states = rows[:, -len(alike) :]
        if not np.array_equal(states, states[:1].repeat(len(states), 0), equal_nan=True):
            raise TrainingFailed(f"the processes have drifted apart in epoch {self.epoch + 1}, step {self.step}")
        sums = rows[:, len(counted) + 1 : -len(alike)]
        met, skipped = sums[:, 3][sums[:, 3] > 0], sums[:, 5].max()  # all ranks skip the same steps
        totals = rows.sum(0) * first
        numbers = [int(total) for total in totals[: len(counted)]]
        ledger.loaded, ledger.scored, ledger.trained, meter.hits, meter.trained, meter.predicted = numbers
        self.energy_kj = None if self.energy_kj is None else float(totals[len(counted)])
        sums = sums.sum(0)
        sums[3], sums[5] = met.min() if len(met) else 0, skipped  # the first step with a loss that is not finite
        meter.sums.copy_(torch.from_numpy(sums * first))
        for found in self.dist.gather_objects(self.bad_images.found) if self.bad_images.limit else ():
            if first:
                self.bad_images.add(found)

    def pool_window(self) -> None:
        """Move the open window's gradient to rank 0; on the others the window is open and empty."""
        self.window_samples = self.window_divisor = int(merge_gradients(self))
        if self.dist.rank:
            self.empty_window()

    def empty_window(self) -> None:
        """Forget the open window's gradient; its memory stays."""
        self.window_samples = self.window_divisor = 0
        for parameter in self.model.parameters():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def random_states(self) -> list[Tensor | None]:
        """Of the generators that dropout draws from: the host's, and the device's."""
        cuda = self.device.type == "cuda"
        return [torch.get_rng_state(), torch.cuda.get_rng_state(self.device) if cuda else None]

    PLAIN = (
        *("epoch", "step", "scoring", "streak", "iqr", "lr", "scheduled", "unscheduled", "activations", "thresholds"),
        *("window_samples", "window_divisor", "window_forwards", "history", "epochs_completed", "nonfinite_steps"),
        *("train_seconds", "epoch_seconds", "eval_seconds", "energy_kj"),
    )
    PARTS = ("model", "optimizer", "scaler", "controller", "meter")

    def state_dict(self) -> dict[str, Any]:
        """Everything that the steps to come depend on. Raises TrainingFailed rather than keep a non-finite loss.

        The running clock is stopped and started, so that the time so far is counted. Of several processes all call
        it, and rank 0 gets what all have; what is active and waits in their queues is among it.
        """
        clocked = self.epoch_started is not None
        if clocked:
            self.stop_clock()
        self.pool()
        self.meter.read()
        if clocked:
            self.start_clock()
        return {
            "config": self.config.model_dump(),
            **{name: getattr(self, name) for name in self.PLAIN},
            **{name: getattr(self, name).state_dict() for name in self.PARTS},
            "ledger": asdict(self.ledger),
            "ledger_before": asdict(self.ledger_before),
            "queue": self.queue.contents(),
            "past": None if self.past is None else self.past.state_dict(),
            "gradients": [p.grad for p in self.model.parameters()] if self.window_samples else None,
            "window_bad": self.window_bad,
            "ahead": None if self.ahead is None else self.ahead.wait(),
            "bad_images": self.bad_images.found,
            "elapsed": self.elapsed(),
            "random": self.random_states(),
            **({"ranks": self.dist.gather_objects(self.random_states())} if self.dist.world > 1 else {}),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was taken, with as many processes as there are now. Raises KeyError, ValueError,
        RuntimeError and such for a wrong one."""
        for name in self.PLAIN:
            setattr(self, name, state[name])
        self.meter = self.new_meter()
        for name in self.PARTS:
            getattr(self, name).load_state_dict(state[name])
        self.ledger, self.ledger_before = Ledger(**state["ledger"]), Ledger(**state["ledger_before"])
        if self.past is not None:
            self.past.load_state_dict(state["past"])
        images, labels, pending = state["queue"]
        tensors = images, labels, state["window_bad"]
        images, labels, self.window_bad = (t if t is None else t.to(self.device) for t in tensors)
        self.queue.put(images, labels, pending)
        for parameter, gradient in zip(self.model.parameters(), state["gradients"] or []):  # noqa: B905
            if parameter.grad is None:
                parameter.grad = None if gradient is None else torch.empty_like(parameter).copy_(gradient)
            elif gradient is not None:
                parameter.grad.copy_(gradient)
        self.ahead = None if state["ahead"] is None else Scores(state["ahead"], None)
        self.bad_images.add(state["bad_images"])
        if self.step == 0:
            self.start_epoch(self.epoch)
        self.earlier_seconds = state["elapsed"]
        self.agreed_seconds = self.train_seconds + self.epoch_seconds
        generator, cuda_generator = state["random"]
        if len(state.get("ranks", ())) == self.dist.world > 1:
            generator, cuda_generator = state["ranks"][self.dist.rank]
        torch.set_rng_state(generator)
        if cuda_generator is not None and self.device.type == "cuda":
            torch.cuda.set_rng_state(cuda_generator, self.device)
        if self.dist.rank:
            self.count_from_nothing(other_world=len(state.get("ranks", ())) != self.dist.world)

    def count_from_nothing(self, other_world: bool) -> None:
        """What a rank other than 0 does with a checkpoint: rank 0 has what was counted until then."""
        self.ledger.loaded = self.ledger.scored = self.ledger.trained = 0
        self.meter, self.energy_kj = self.new_meter(), None if self.energy_kj is None else 0.0
        self.empty_window()
        if other_world:
            torch.manual_seed(self.config.training.seed + 1000003 * self.dist.rank + self.epoch)

    def save(self, best: bool = False) -> None:
        """Write a checkpoint, where the run keeps any; of several processes rank 0 does, with what all have."""
        if self.checkpoints is None and self.dist.world == 1:
            return
        state, self.saved_at = self.state_dict(), (self.epoch, self.step)
        if self.checkpoints is not None:
            self.checkpoints.save(state, self.device, best)

    def log(self, row: dict[str, Any], whole: bool = True) -> None:
        """Append the epoch's row to the log, where one is asked for; of an epoch cut short the line is kept beside the
        checkpoint too, for a resumption to take back."""
        if self.config.logging.jsonl_path is None or self.dist.rank:
            return
        if not whole:
            replace_text(self.checkpoints.capped, json.dumps(row) + "\n")
        append_jsonl(self.config.logging.jsonl_path, row)

    def checkpoint_due(self) -> bool:
        minutes = self.config.logging.checkpoint_minutes if self.dist.rank == 0 else None
        return minutes is not None and time.monotonic() - self.checkpoints.saved >= 60 * minutes


def train_one_epoch(run: Run, batches: Iterable[Loaded], steps: int, stop: Stop) -> bool:
    """Train on `batches`, the rest of `steps`; False where `stop` ended the epoch early.

    An open accumulation window ends with the epoch, and with a time cap, which checkpoints before; after a signal it
    is left for the checkpoint. Raises TrainingFailed on a non-finite loss too many.
    """
    any_active_in_accum = bool(run.dist.gather([run.window_samples]).any())
    signalled = False
    sparse_before = run.epoch - run.config.ast.warmup_epochs
    with _progress(run, steps) as heartbeat:
        for batch, scores in score_ahead(run, () if run.out_of_time() else batches):  # () once it is resumed
            run.ledger.loaded += len(batch.labels)
            if run.scoring:
                run.controller.epoch = sparse_before + run.step / steps
                trained = ast_forward(run, batch.images, batch.labels, scores)
            else:
                trained = train_step(run, *batch) or int(run.dist.world > 1)  # another rank has some
            run.step, run.unscheduled = run.step + 1, run.unscheduled + run.pace
            if trained is not None:
                run.window_forwards += 1
                any_active_in_accum |= trained > 0
            window_full = run.window_forwards == run.config.training.grad_accum_steps
            if window_full and any_active_in_accum:
                optimizer_step(run)
            if window_full:
                any_active_in_accum, run.window_forwards = False, 0
            heartbeat(len(batch.labels))
            signalled, capped, due = run.agree(stop, last=run.step == steps)
            if due:
                run.save()
            if capped or signalled:
                break
        if any_active_in_accum and not signalled:
            optimizer_step(run)
            run.window_forwards = 0
    return run.step == steps


@contextlib.contextmanager
def _progress(run: Run, steps: int) -> Iterator[Callable[[int], None]]:
    """A bar over the epoch's steps; its heartbeat reads the device about once a second, not every step."""
    label = f"epoch {run.epoch + 1}/{run.config.training.epochs}"
    started = shown = time.monotonic()
    images = 0
    with progress_bar(total=steps, desc=label, unit="step") as bar:

        def heartbeat(loaded: int) -> None:
            nonlocal shown, images
            images += loaded * run.dist.world
            now = time.monotonic()
            if now - shown < 1.0 and run.step < steps:
                return
            loss, _ = run.meter.read()
            shown, facts = now, {"loss": f"{loss:.3f}" if loss is not None else "-"}
            if run.activations:
                facts |= {"activation": f"{run.activations[-1]:.3f}", "threshold": f"{run.thresholds[-1]:.3f}"}
            bar.set_postfix(facts | {"images/s": f"{images / max(now - started, 1e-9):,.0f}"}, refresh=False)
            bar.update(run.step - bar.n)

        yield heartbeat


def warm_up(run: Run) -> None:
    """Compile and autotune before the clock starts: passes of each kind over blank images, leaving no trace.

    Raises RequestError where torch.compile was asked for and nothing can be compiled on this machine.
    """
    training, side = run.config.training, run.config.dataset.image_size
    buffers = [buffer.clone() for buffer in run.model.buffers()]
    graphs = "reduce-overhead" in (training.compile, training.compile_scoring)
    images = torch.zeros(run.local_batch, 3, side, side, dtype=torch.uint8, device=run.device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=run.device)
    weights = () if run.past is None else (run.past.weights(labels),)
    try:
        with torch.random.fork_rng():
            for _ in range(3 if graphs else 1):  # a CUDA graph is recorded in the second pass, replayed from the third
                with torch.no_grad():
                    for forward in {run.scorer, run.evaluator}:  # one and the same, but for score_resolution
                        forward(images, labels)
                run.forward(images, labels, *weights)[0].backward()
                run.optimizer.zero_grad(set_to_none=not run.grads_stay)
    except torch._dynamo.exc.TorchDynamoException as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "install a C++ compiler (and triton for a GPU), or set training.compile=off"
        raise RequestError(f"training.compile: nothing can be compiled here ({one_line(why)}); {hint}") from None
    for buffer, before in zip(run.model.buffers(), buffers, strict=True):
        buffer.copy_(before)


@torch.no_grad()
def evaluate(run: Run, loader: Iterable[Batch], stop: Stop | None = None) -> float | None:
    """Validation accuracy in percent, every sample counted once; a last, smaller batch is padded to one shape. Of
    several processes each forwards its part, and all get the whole's accuracy.

    None where a signal came before its end, or where it outlasts training.max_minutes by more than a tenth of that.
    """
    hits, count, cut = torch.zeros((), device=run.device), 0, False
    end = math.inf if stop is None else stop.deadline + 6 * (run.config.training.max_minutes or math.inf)
    for images, labels, _ in device_batches(loader, run.device, run.bad_images):
        if cut := (stop is not None and stop.signal is not None) or time.monotonic() > end:
            break
        padding = run.local_batch - len(labels)
        whole = (torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])]) for tensor in (images, labels))
        hits += run.evaluator(*whole)[1, : len(labels)].sum()
        count += len(labels)
    rows = run.dist.gather([hits.item(), count, cut, 0 if stop is None else stop.signal or 0])
    hits, count, cut, _ = rows.sum(0).tolist()
    if cut:
        if number := int(rows[:, 3].max()):
            stop.signal = number
        return None
    return 100 * hits / count


def close_epoch(run: Run, val_acc: float, considered: float) -> dict[str, Any]:
    """Add the epoch's row to the history and return it. `considered`: samples a dense epoch would have trained on."""
    metrics, seconds = run.config.metrics, run.epoch_seconds
    run.pool()
    loss, train_acc = run.meter.read()
    run.settle()
    done = run.ledger.since(run.ledger_before)
    run.train_seconds, run.epoch_seconds = run.train_seconds + seconds, 0.0
    row = {
        "epoch": run.epoch + 1,
        "train_acc": train_acc,
        "val_acc": val_acc,
        "activation_rate": statistics.fmean(run.activations) if run.activations else done.loaded / considered,
        "threshold": statistics.fmean(run.thresholds) if run.thresholds else None,
        "energy_savings": 1 - done.dense_equivalents(run.scoring_cost) / considered,
        "step_time_ms": 1000 * seconds / run.step,
        "est_energy_kj": run.train_seconds * metrics.gpu_tdp_watts / 1000,
        "est_flops_g": run.base_flop * run.ledger.trained / 1e9,
        "lr": run.lr,
        "train_loss": loss,
        "samples_loaded": done.loaded,
        "samples_scored": done.scored,
        "samples_trained": done.trained,
        "optimizer_steps": done.steps,
        "train_seconds": run.train_seconds,
        "energy_kj": run.energy_kj,
        "total_flops_g": run.base_flop * run.ledger.dense_equivalents(run.scoring_cost) / 1e9,
    }
    for key in HISTORY_KEYS:
        run.history[key].append(row[key])
    return row


def train(config: Config, stop: Stop | None = None, resume: str | None = None) -> tuple[dict[str, Any], Path]:
    """Run a config to its end and save the results: (the result, its file).

    `resume`: the checkpoint to go on from, a path, or `auto` for the config's own where there is one. Raises
    RequestError before anything is trained where the request is wrong. Whatever ends the training later, the epochs
    finished until then are saved first, with `status` failed and the `error`.
    """
    started, stop = time.monotonic(), stop or Stop()
    if config.training.max_minutes is not None and config.training.lr_decay == "epochs":
        stop.deadline = started + 60 * config.training.max_minutes
    device = resolve_device(config.training)
    dist = meet(config, device)
    if dist.rank == 0:
        prepare_outputs(config.logging)
    with claimed(checkpoint_folder(config)) if dist.rank == 0 else contextlib.nullcontext():
        outcome = train_claimed(config, device, stop, resume, started, dist)
    dist.leave()
    return outcome


def train_claimed(
    config: Config, device: torch.device, stop: Stop, resume: str | None, started: float, dist: Dist
) -> tuple[dict[str, Any], Path]:
    """`train`, since `started` (time.monotonic() seconds), in a checkpoint folder that is this run's own."""
    checkpoint = dist.first(find_checkpoint(config, resume))
    state = None if checkpoint is None else load_checkpoint(checkpoint, config)
    board = open_tensorboard(config.logging) if dist.rank == 0 else None
    torch.manual_seed(config.training.seed)
    configure_backends(config.ast, device)
    train_loader, val_loader, plan, num_classes = build_dataloaders(config, device, dist)
    model = get_model(config.model, num_classes, config.dataset.image_size)
    planned = sum(plan.steps(epoch) for epoch in range(config.training.epochs))
    run = Run(config, model, device, planned, int(plan.indices.max()) + 1, dist)
    if dist.rank:  # dropout is each rank's own
        torch.manual_seed(config.training.seed + 1000003 * dist.rank)
    run.board, run.started = board, started
    if device.type == "cuda" or config.training.compile != "off":
        warm_up(run)
    if resume is not None:
        begin_again(run, checkpoint, state)
    if dist.rank == 0:
        run.checkpoints = Checkpoints(checkpoint_folder(config))
        run.checkpoints.require_space(state_bytes(run))
    outcome, stop.training = {"status": "failed"}, True
    try:
        with ending_workers():
            outcome = {"status": fit(run, train_loader, val_loader, plan, stop)}
        if run.checkpoints is not None:
            run.checkpoints.wait()
    except Exception as error:
        known = explained(error, config)
        outcome = {"status": "failed", "error": one_line(known)}
        if known is not error:
            raise known from None
        raise
    finally:
        result, path = build_result(run, outcome, run.elapsed()), None
        if run.checkpoints is not None:
            run.checkpoints.close()
            path = save_results(result, config.logging.output_dir)
            print_rank0(f"{summary(result)}\nresults: {path}")
    return dist.first((result, path))


def begin_again(run: Run, path: Path | None, state: dict[str, Any] | None) -> None:
    """Put a checkpoint's `state` into a fresh run, and its log in order. Raises RequestError where it does not fit."""
    if state is None:
        print_rank0("--resume auto: there is no checkpoint of this config, the run starts afresh")
        return
    try:
        run.load_state_dict(state)
        if run.config.logging.jsonl_path is not None and run.dist.rank == 0:
            align_jsonl(Path(run.config.logging.jsonl_path), run.history, path.with_name(CAPPED))
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        why = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise RequestError(f"{path}: a checkpoint that does not fit this model and data ({why})") from None
    except OSError as error:
        log = run.config.logging.jsonl_path
        raise RequestError(f"logging.jsonl_path: cannot put {log} in order: {error.strerror}") from None
    print_rank0(f"resumed from {path}: epoch {run.epoch + 1}, step {run.step}")


def state_bytes(run: Run) -> int:
    """About how large a checkpoint is: weights, buffers and what the optimizer keeps of each weight."""
    training = run.config.training
    kept = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
    sizes = {True: 0, False: 0}
    for tensor in run.model.state_dict(keep_vars=True).values():
        sizes[tensor.requires_grad] += tensor.nbytes
    return (1 + kept) * sizes[True] + sizes[False]


def fit(run: Run, train_loader: Loader, val_loader: Loader, plan: EpochPlan, stop: Stop) -> str:
    """Train and validate epoch by epoch. Returns completed, early_stopped, time_capped or interrupted."""
    print_rank0(epoch_line(run.config))
    run.eval_steps = len(val_loader)
    while (status := agreed_end(run, stop)) is None:
        run.start_clock()
        begin_epoch(run, plan)
        whole = train_one_epoch(run, device_batches(train_loader, run.device, run.bad_images), len(plan), stop)
        run.stop_clock()
        run.average_statistics()
        started = time.monotonic()
        val_acc = None if signalled(run, stop) else evaluate(run, val_loader, stop)
        if val_acc is None:
            status = "interrupted" if stop.signal is not None else "time_capped"
            if status == "time_capped":
                print_rank0("training.max_minutes are over: the last validation did not fit in and was left")
            break
        run.eval_seconds = time.monotonic() - started
        row = close_epoch(run, val_acc, plan.considered * run.step / len(plan))
        run.epochs_completed += whole
        print_rank0(epoch_line(run.config, row))
        if run.board is not None:
            add_scalars(run.board, row)
        if not whole:  # the checkpoint is the one before the cap
            if run.checkpoints is not None:
                run.checkpoints.then(run.log, row, whole)
            return "completed" if run.out_of_time() else "time_capped"
        run.epoch, run.step = run.epoch + 1, 0
        run.save(best=val_acc == max(run.history["val_acc"]) > max(run.history["val_acc"][:-1], default=-1.0))
        if run.checkpoints is not None:
            run.checkpoints.then(run.log, row)
    if status in ("interrupted", "time_capped") and run.saved_at != (run.epoch, run.step):
        run.save()
    return status


def begin_epoch(run: Run, plan: EpochPlan) -> None:
    """Take `plan` to where the run stands; at an epoch's start, choose what it trains on."""
    plan.begin(run.epoch, run.step)
    if run.step == 0:
        run.start_epoch(run.epoch)
        run.choose(plan)
    if run.past is not None and run.config.is_sparse(run.epoch):
        plan.begin(run.epoch, run.step, run.past.kinds.cpu().numpy())
    run.pace = plan.steps(run.epoch) / len(plan)


def signalled(run: Run, stop: Stop) -> bool:
    """Whether a signal is to end the run; all ranks then know."""
    stop.signal = int(run.dist.gather([stop.signal or 0]).max()) or stop.signal
    return stop.signal is not None


def agreed_end(run: Run, stop: Stop) -> str | None:
    """`ended` as rank 0 sees it."""
    status, number = run.dist.first((ended(run, stop), stop.signal))
    stop.signal = stop.signal or number
    return status


def ended(run: Run, stop: Stop) -> str | None:
    """Why no further epoch is to begin, None where one is."""
    accuracies, patience = run.history["val_acc"], run.config.training.early_stop_patience
    if run.epoch >= run.config.training.epochs or (run.out_of_time() and run.step == 0):
        return "completed"
    if status := stop.status(run.eval_seconds):
        return status
    waited = len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0
    return "early_stopped" if patience is not None and waited >= patience else None


def build_result(run: Run, outcome: dict[str, str], seconds: float) -> dict[str, Any]:
    """The contents of a results file: the documented keys first, then how they came about."""
    with contextlib.suppress(RuntimeError):  # of an unfinished epoch; a device that failed cannot say
        run.settle()
    accuracies = run.history["val_acc"]
    best = max(accuracies, default=0.0)
    return {
        "best_accuracy": best,
        "total_time_hours": seconds / 3600,
        "epochs_completed": run.epochs_completed,
        "training_history": run.history,
        **outcome,
        "seed": run.config.training.seed,
        "best_epoch": accuracies.index(best) + 1 if accuracies else None,
        "final_accuracy": accuracies[-1] if accuracies else None,
        "train_seconds": run.train_seconds,
        "energy_kj": run.energy_kj,
        "base_flop_per_sample": run.base_flop,
        "ledger": asdict(run.ledger),
        "nonfinite_steps": run.nonfinite_steps,
        "bad_images": run.bad_images.found,
        "config": run.config.model_dump(),
        "environment": run.environment,
    }


# ------------------------------------------------------------------------------------------------ Main


def execute(config: Config, resume: str | None = None) -> int:
    """Train `config` as a command does: signals watched, results saved. Returns the exit code."""
    stop = Stop()
    stop.watch_signals()
    result, _ = train(config, stop, resume)
    return 128 + stop.signal if result["status"] == "interrupted" else 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser("Train one config. run_experiment.py does the same and has more flags.", config_help=True)
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML or JSON config")
    parser.add_argument("--resume", metavar="PATH|auto", help=RESUME_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.lr=0.05")
    args = parser.parse_intermixed_args(argv)
    return execute(load_config(args.config, args.overrides), args.resume)


if __name__ == "__main__":
    sys.exit(run_cli(main))
