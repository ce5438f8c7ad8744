"""AST-LAB: Adaptive Sparse Training for image classification, the whole lab in one file.

Run it:
    python scripts/train_ast.py --config configs/digits_smoke.yaml
    python scripts/train_ast.py --config configs/cifar10_resnet18_ast.yaml ast.target_activation=0.5
    python scripts/run_experiment.py --config configs/imagenet_resnet50_ast.yaml --epochs 50 --target-activation 0.3

The law: a sample is active, and only then back-propagated, where
    loss + entropy_weight * entropy(logits) > threshold
and after every step, with error = activation - target,
    threshold += (kp * error + ki * sum of errors) * spread.
A run writes <output_dir>/final_results_<timestamp>.json and, if asked, one JSON line an epoch.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import difflib
import io
import json
import logging
import math
import os
import platform
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import yaml
from dotenv import load_dotenv
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm


class RequestError(Exception):
    """What was asked for cannot be done: shown as one line, exit code 2."""


class TrainingFailed(Exception):
    """The run itself went wrong: shown as one line, exit code 1."""


# ------------------------------------------------------------------------------------------------ Config


Compile = Literal["off", "default", "reduce-overhead"]


class Section(BaseModel):
    """A part of the config: unknown keys, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class ModelConfig(Section):
    name: str = Field("resnet18", description="resnet18, resnet50, vit_b_16 (torchvision) or any timm model")
    pretrained: bool = Field(False, description="start from published ImageNet weights (downloads them)")
    small_stem: bool = Field(False, description="torchvision ResNets at 32-64 px: 3x3 stem, no max-pool")


class DatasetConfig(Section):
    type: Literal["digits", "folder", "hf"] = Field("digits", description="embedded digits, ImageFolder, datasets")
    train_dir: str | None = Field(None, description="folder: one sub-folder of images a class")
    val_dir: str | None = Field(None, description="folder: the same classes, for validation")
    name: str | None = Field(None, description="hf: hub id, or a local folder of parquet files")
    subset: str | None = Field(None, description="hf: configuration of the dataset, where it has several")
    revision: str | None = Field(None, description="hf: branch, tag or commit on the hub")
    split_train: str = Field("train", description="hf: split to train on")
    split_val: str = Field("validation", description="hf: split to validate on")
    image_key: str | None = Field(None, description="hf: image column; null: the only column of images")
    label_key: str | None = Field(None, description="hf: label column; null: the only class label column")
    cache_dir: str | None = Field(None, description="hf: where downloads are kept; null: the library's own")
    num_classes: int | None = Field(None, ge=2, description="checked against the data; null: taken from it")
    image_size: int = Field(32, ge=1, description="side of the square model input, pixels")
    augment: Literal["auto", "none", "pad_crop", "random_resized_crop"] = Field(
        "auto", description="auto: none for digits, pad_crop up to 64 px, random_resized_crop above"
    )
    cache: Literal["none", "device"] = Field(
        "none", description="device: decode once, keep the pixels on the training device, crop and flip there"
    )
    cache_resolution: int | None = Field(
        None, ge=1, description="side of the kept pictures, pixels; null: image_size, or 8/7 of it to crop from"
    )
    max_train_samples: int | None = Field(None, ge=1, description="train on a fixed random subset of this size")
    max_val_samples: int | None = Field(None, ge=1, description="validate on a fixed random subset of this size")

    def resolved_augment(self) -> str:
        """What `augment: auto` stands for."""
        by_size = "pad_crop" if self.image_size <= 64 else "random_resized_crop"
        return self.augment if self.augment != "auto" else "none" if self.type == "digits" else by_size


class ASTConfig(Section):
    mode: Literal["ast", "dense", "random"] = Field("ast", description="sparse, the baseline, or the control")
    scoring: Literal["batch"] = Field("batch", description="batch: score every loaded sample by a forward")
    score_resolution: int | None = Field(
        None, ge=1, description="side at which the same view is scored, pixels; null: dataset.image_size"
    )
    score_ahead: bool = Field(
        True, description="score a batch before the one before it is trained on: the GPU never waits for the host"
    )
    pack: bool = Field(False, description="collect active samples into full batches before a training step")
    target_activation: float = Field(0.25, gt=0, le=1, description="share of samples to be active, 0 to 1")
    kp: float = Field(0.1, ge=0, description="proportional gain, threshold units per unit of activation error")
    ki: float = Field(0.01, ge=0, description="integral gain, threshold units per unit of summed error")
    kp_warmup_epochs: float = Field(0, ge=0, description="sparse epochs over which kp rises from 0")
    ki_warmup_epochs: float = Field(0, ge=0, description="sparse epochs over which ki rises from 0")
    initial_threshold: float | Literal["auto"] = Field(
        "auto", description="nats; auto: the (1 - target) quantile of the first scored batch"
    )
    min_threshold: float = Field(0.0, description="lower bound of the threshold, nats")
    threshold_unit: Literal["iqr", "raw"] = Field(
        "iqr", description="what the gains move: running inter-quartile ranges of the significance, or nats"
    )
    entropy_weight: float = Field(1.0, ge=0, description="weight of the entropy in loss + weight * entropy")
    min_active: int = Field(2, ge=0, description="train on at least this many samples of a batch, the top ones")
    warmup_epochs: int = Field(1, ge=0, description="dense epochs before the sparse (or random) ones")
    anneal_epochs: int = Field(0, ge=0, description="dense epochs after them")


class TrainingConfig(Section):
    epochs: int = Field(10, ge=1, description="passes over the training set")
    batch_size: int = Field(128, ge=1, description="samples a step")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="norms and biases are not decayed")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine decay")
    lr_warmup_epochs: float = Field(0, ge=0, description="epochs over which the rate rises from 0")
    lr_decay: Literal["epochs", "time"] = Field(
        "epochs", description="time: the schedule and the run end after max_minutes of training, validation left out"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum")
    weight_decay: float = Field(5e-4, ge=0, description="L2 penalty (sgd) or decoupled decay (adamw)")
    label_smoothing: float = Field(0.0, ge=0, lt=1, description="of the training loss, not of the significance")
    grad_clip_norm: float | None = Field(None, gt=0, description="largest gradient norm; null: no clipping")
    grad_accum_steps: int = Field(1, ge=1, description="forward passes an optimizer step")
    mixed_precision: bool = Field(True, description="autocast and, for float16, a GradScaler")
    amp_dtype: Literal["auto", "bfloat16", "float16"] = Field(
        "auto", description="auto: bfloat16 where the GPU has it, else float16; float32 on a CPU"
    )
    device: Literal["auto", "cuda", "cpu"] = Field("auto", description="auto: a GPU where there is one")
    compile: Compile = Field(
        "off", description="torch.compile mode of the training step; reduce-overhead: CUDA graphs; needs one shape"
    )
    compile_scoring: Compile | None = Field(
        None, description="the same for scoring and validation; null: as training.compile"
    )
    num_workers: int | None = Field(None, ge=0, description="loader processes; null: one a core, at most 16")
    max_minutes: float | None = Field(None, gt=0, description="cap on the run's wall time, minutes; see lr_decay")
    early_stop_patience: int | None = Field(None, ge=1, description="stop after so many epochs without a new best")
    seed: int = Field(0, ge=0, lt=2**63, description="of weights, order, augmentation and random selection")


class MetricsConfig(Section):
    base_flop_per_sample: float | None = Field(
        None, gt=0, description="forward + backward FLOP of one sample; null: counted from the model"
    )
    gpu_tdp_watts: float = Field(250.0, gt=0, description="for the energy proxy, watts")


class LoggingConfig(Section):
    output_dir: str = Field("results", description="where final_results_<timestamp>.json goes")
    jsonl_path: str | None = Field(None, description="append one JSON line an epoch to this file")
    tensorboard: bool = Field(False, description="write the same as scalars to <output_dir>/tensorboard/<timestamp>")


class Config(Section):
    model: ModelConfig = Field(default_factory=ModelConfig)
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    ast: ASTConfig = Field(default_factory=ASTConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Config:
        d, a, t = self.dataset, self.ast, self.training
        no_sparse = a.mode != "dense" and a.warmup_epochs + a.anneal_epochs >= t.epochs
        varying = t.compile != "off" and a.mode == "ast" and not a.pack
        scored_at = a.score_resolution or d.image_size
        cropped = d.resolved_augment() == "random_resized_crop"
        start = a.min_threshold if a.initial_threshold == "auto" else a.initial_threshold
        for wrong, complaint in (
            (d.type == "folder" and not d.train_dir, "dataset.train_dir: needed with dataset.type=folder"),
            (d.type == "folder" and not d.val_dir, "dataset.val_dir: needed with dataset.type=folder"),
            (d.type == "hf" and not d.name, "dataset.name: dataset.type=hf needs a hub id or a local folder"),
            (no_sparse, f"ast.warmup_epochs: with anneal_epochs it makes all of training.epochs={t.epochs} dense"),
            (varying, "training.compile: needs ast.pack=true, for per-batch steps differ in shape"),
            (scored_at > d.image_size, f"ast.score_resolution: larger than dataset.image_size={d.image_size}"),
            (d.cache_resolution and d.cache == "none", "dataset.cache_resolution: needs dataset.cache=device"),
            (d.cache_resolution and not cropped, "dataset.cache_resolution: only with augment=random_resized_crop"),
            (t.lr_decay == "time" and not t.max_minutes, "training.max_minutes: needed with training.lr_decay=time"),
            (a.min_active > t.batch_size, "ast.min_active: larger than training.batch_size"),
            (start < a.min_threshold, "ast.initial_threshold: below ast.min_threshold"),
            (t.min_lr > t.lr, "training.min_lr: larger than training.lr"),
            (t.lr_warmup_epochs > t.epochs, "training.lr_warmup_epochs: more than training.epochs"),
        ):
            if wrong:
                raise ValueError(complaint)
        return self

    def is_sparse(self, epoch: int) -> bool:
        """Whether `epoch` (from 0) trains on a selection rather than on everything."""
        first, end = self.ast.warmup_epochs, self.training.epochs - self.ast.anneal_epochs
        return self.ast.mode != "dense" and first <= epoch < end


def config_keys() -> dict[str, tuple[str, Any]]:
    """Every dotted key with its (description, default)."""
    return {
        f"{section}.{name}": (info.description or "", info.default)
        for section, part in Config.model_fields.items()
        for name, info in part.annotation.model_fields.items()
    }


class _Loader(yaml.SafeLoader):
    """YAML's safe loader, except that as in YAML 1.2 1e-3 is a number and `off` a word, and no key comes twice."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [key.value for key, _ in node.value]
        if twice := next((key for key in keys if keys.count(key) > 1), None):
            raise yaml.constructor.ConstructorError(None, None, f"key {twice!r} stands there twice", node.start_mark)
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if first in "tTfF" or not tag.endswith("bool")]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML or JSON config and lay `overrides` ("training.lr=0.05") over it.

    Raises RequestError, one line naming the file or the key, for a file that is missing or no mapping, an
    unknown key (with the nearest known one) and a value of the wrong type or range.
    """
    raw: dict = {}
    try:
        raw = (yaml.load(Path(path).read_text(encoding="utf-8"), Loader=_Loader) if path else None) or {}
    except OSError as error:
        raise RequestError(f"{path}: cannot read the config: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise RequestError(f"{path}: not valid YAML or JSON: {_one_line(error)}") from None
    if not isinstance(raw, dict):
        raise RequestError(f"{path}: expected a mapping of sections, got {type(raw).__name__}")
    for override in overrides:
        key, equals, text = override.partition("=")
        section, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise RequestError(f"override {override!r}: expected section.key=value{_nearest(key)}")
        try:
            value = yaml.load(text, Loader=_Loader)
        except (yaml.YAMLError, ValueError) as error:
            raise RequestError(f"override {override!r}: not a valid value: {_one_line(error)}") from None
        part = raw[section] = {} if raw.get(section) is None else raw[section]
        if isinstance(part, dict):  # otherwise the validation below names the section
            part[name] = value
    try:
        return Config.model_validate({k: {} if v is None else v for k, v in raw.items()})
    except ValidationError as error:
        raise RequestError(f"{path or 'config'}: {_explain(error)}") from None


def _explain(error: ValidationError) -> str:
    """The first of pydantic's complaints as one line: key, what was expected, nearest key."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return _one_line(first["ctx"]["error"])
    key = ".".join(str(part) for part in first["loc"][:2])
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(key)}"
    wrong = [e for e in error.errors() if e["loc"][:2] == first["loc"][:2]]
    expected = " or ".join(e["msg"].replace("Input should be ", "").replace("Input should", "") for e in wrong)
    return f"{key}: expected {_one_line(expected)}, got {_one_line(repr(first['input']))[:80]}"


def _nearest(key: str) -> str:
    known = [*config_keys(), *Config.model_fields]
    leaves = {name.rpartition(".")[2]: name for name in known}
    leaf = difflib.get_close_matches(key.rpartition(".")[2], leaves, 1, 0.6)
    near = difflib.get_close_matches(key, known, 1, 0.75) or [leaves[name] for name in leaf]
    near = near or difflib.get_close_matches(key, known, 1, 0.0)
    return f"; did you mean {near[0]}?" if near else ""


def _one_line(error: object) -> str:
    return " ".join(str(error).split()) or type(error).__name__


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


# ------------------------------------------------------------------------------------------------ Forward


class ActiveQueue:
    """Packing: collects active samples on the device until a full batch is there, so that every training
    step has one shape. Keeps uint8 pixels, [pending, 3, H, W]; what is pending carries over epochs."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.images: Tensor | None = None
        self.labels: Tensor | None = None

    def __len__(self) -> int:
        return 0 if self.labels is None else len(self.labels)

    def clear(self) -> None:
        self.images = self.labels = None

    def push(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor] | None:
        """Add at most batch_size samples; the oldest batch_size ones once they are there, else None."""
        if self.labels is not None:
            images, labels = torch.cat([self.images, images]), torch.cat([self.labels, labels])
        full, b = len(labels) >= self.batch_size, self.batch_size
        self.images, self.labels = (images[b:], labels[b:]) if full else (images, labels)
        return (images[:b], labels[:b]) if full else None


def training_forward(model: nn.Module, normalise: Normalise, smoothing: float) -> Callable:
    """What a training step computes, as one function to compile: uint8 images, labels -> (summed loss, hits)."""

    def forward(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        with normalise.autocast():
            logits = model(normalise(images))
        loss = F.cross_entropy(logits.float(), labels, reduction="sum", label_smoothing=smoothing)
        return loss, (logits.argmax(-1) == labels).sum()

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


def compiled(function: Callable, mode: str) -> Callable:
    """torch.compile for calls of one shape. With reduce-overhead (CUDA graphs) a result lives until the next call."""
    if mode == "off":
        return function
    fast = torch.compile(function, dynamic=False, mode=mode)

    def call(*inputs: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        return fast(*inputs)

    return call if mode == "reduce-overhead" else fast


class Scores(NamedTuple):
    facts: Tensor  # float32 [2, batch] on the host, or on its way there: significance in nats, and 1 for a hit
    arrived: torch.cuda.Event | None

    def read(self) -> tuple[Tensor, int]:
        """(significance [batch] on the host, number of hits). Waits for the scoring forward, if it must."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.facts[0], int(self.facts[1].sum())


@torch.no_grad()
def score(run: Run, images: Tensor, labels: Tensor) -> Scores:
    """Start scoring a batch: no gradient, eval mode, running statistics untouched. The device is not waited for."""
    facts = run.scorer(images, labels)
    if not facts.is_cuda:
        return Scores(facts, None)
    host, arrived = torch.empty(facts.shape, pin_memory=True), torch.cuda.Event()
    host.copy_(facts, non_blocking=True)
    arrived.record()
    return Scores(host, arrived)


def score_ahead(run: Run, batches: Iterable[tuple[Tensor, Tensor]]) -> Iterator[tuple[Tensor, Tensor, Scores | None]]:
    """Every batch with its scores, the next one's scoring already started (`ast.score_ahead`).

    The device has work while the host reads scores and chooses. The price: scores come from the weights before
    the previous batch was trained on. The threshold is not delayed, for the choice is made on the host.
    """
    waiting: list[tuple[Tensor, Tensor, Scores | None]] = []
    depth = 1 if run.scoring and run.config.ast.score_ahead else 0
    for images, labels in batches:
        waiting.append((images, labels, score(run, images, labels) if run.scoring else None))
        if len(waiting) > depth:
            yield waiting.pop(0)
    yield from waiting


def ast_forward(run: Run, images: Tensor, labels: Tensor, scores: Scores | None = None) -> int | None:
    """Score a loaded batch, choose the active samples, steer the threshold, train on the active ones alone.

    images: uint8 [batch, 3, H, W] on the device; `scores`: theirs, where `score_ahead` has them. Returns the
    number of samples back-propagated, 0 if none was active, None while packing waits for a full batch. Raises
    TrainingFailed where a score is not finite.
    """
    ast, controller = run.config.ast, run.controller
    values, hits = (scores or score(run, images, labels)).read()
    run.ledger.scored += len(labels)
    run.meter.add_hits(hits, len(labels))
    if controller.threshold is None:  # hand-over from a dense phase, or lost: see below
        controller.start(torch.quantile(values, 1 - ast.target_activation).item())
    chosen = select_active(values, controller.threshold, ast.min_active)
    if not chosen.finite:
        raise TrainingFailed(f"non-finite significance in epoch {run.epoch + 1}, step {run.step + 1}")
    run.activations.append(chosen.activation)
    run.thresholds.append(controller.threshold)
    run.iqr = chosen.iqr if run.iqr is None else 0.9 * run.iqr + 0.1 * chosen.iqr
    controller.update(chosen.activation, run.iqr if ast.threshold_unit == "iqr" else 1.0)
    if ast.initial_threshold == "auto" and run.is_lost(chosen.activation, len(labels)):
        controller.threshold = None  # the scores have left the threshold behind: start again from their quantile
    indices = to_device(chosen.indices, run.device)
    active = (images[indices], labels[indices])
    ready = run.queue.push(*active) if ast.pack else active
    return None if ready is None else train_step(run, *ready)


def train_step(run: Run, images: Tensor, labels: Tensor) -> int:
    """Forward and backward over `images`, added to the window's gradient. Returns how many samples those are.

    The divisor of the summed loss is the first forward's sample count; `optimizer_step` corrects it to the
    whole window's, so that the gradient is the mean over all samples of the window, whatever came when.
    """
    n = len(labels)
    if n == 0:
        return 0
    loss, hits = run.forward(images, labels)
    run.window_divisor = run.window_divisor or n
    run.scaler.scale(loss / run.window_divisor).backward()
    run.window_samples += n
    run.meter.add_loss(loss.detach(), n, run.step)
    if not run.scoring:  # scoring has counted the predictions of this step already
        run.meter.add_hits(hits, n)
    return n


def optimizer_step(run: Run) -> None:
    """Step on the mean gradient of the window, and clear it. The schedule advances by the loop steps it took.

    A step that the GradScaler skips (overflow in float16) advances neither the schedule nor the ledger.
    """
    training = run.config.training
    if run.window_samples != run.window_divisor:
        for parameter in run.model.parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(run.window_divisor / run.window_samples)
    run.lr = lr_at(run.progress(), training)
    for group in run.optimizer.param_groups:
        group["lr"] = run.lr
    if training.grad_clip_norm is not None:
        run.scaler.unscale_(run.optimizer)
        nn.utils.clip_grad_norm_(run.model.parameters(), training.grad_clip_norm)
    scale = run.scaler.get_scale()  # a device read, in float16 alone
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=not run.grads_stay)
    if run.scaler.get_scale() >= scale:
        run.ledger.trained += run.window_samples
        run.ledger.steps += 1
        run.scheduled += run.unscheduled
    run.window_samples = run.window_divisor = run.unscheduled = 0


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
        raise RequestError(f"model.pretrained: no weights of {config.name}: {_one_line(error)}; {hint}") from None
    except (ValueError, AssertionError) as error:
        raise RequestError(f"model.name: {config.name} at {image_size} px: {_one_line(error)}") from None


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


def check_resolution(model: nn.Module, config: ModelConfig, resolution: int) -> None:
    """Raises RequestError where the network takes no images of `resolution` px; tried on shapes alone."""
    twin = copy.deepcopy(model).to("meta").eval()
    try:
        twin(torch.empty(1, 3, resolution, resolution, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise RequestError(f"ast.score_resolution: {config.name} at {resolution} px: {_one_line(error)}") from None


def eval_view(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters and buffers, in eval mode: nothing to copy or to toggle."""
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared).eval()


def count_flops(model: nn.Module, image_size: int) -> float:
    """Forward + backward FLOP of one sample, counted on shapes alone (torch.utils.flop_counter)."""
    twin = copy.deepcopy(model).to("meta").train()
    with FlopCounterMode(display=False) as counter:  # two samples: BatchNorm refuses one
        twin(torch.empty(2, 3, image_size, image_size, device="meta")).sum().backward()
    return counter.get_total_flops() / 2


# ------------------------------------------------------------------------------------------------ Data


class Batch(NamedTuple):
    images: Tensor  # uint8 [batch, 3, H, W]
    labels: Tensor  # int64 [batch]
    unreadable: list[str]  # what could not be decoded, by name, with the reason


Loader = Iterable[Batch]


def decode_image(data: bytes) -> Tensor:
    """uint8 [3, H, W] from the bytes of an image file: torchvision.io, and Pillow for formats it has not.

    Raises ValueError where neither can read it.
    """
    try:
        encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
        image = torchvision.io.decode_image(encoded, torchvision.io.ImageReadMode.RGB)
    except (RuntimeError, ValueError, AttributeError):  # AttributeError: torchvision is to give up decoding
        from PIL import Image

        try:
            with Image.open(io.BytesIO(data)) as opened:
                return v2.functional.pil_to_tensor(opened.convert("RGB"))
        except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
            raise ValueError(f"not a readable image ({_one_line(error)})") from None
    image = image[0] if image.ndim == 4 else image  # the first frame of an animation
    return image if image.dtype == torch.uint8 else v2.functional.to_dtype(image, torch.uint8, scale=True)


class ImageDataset(Dataset):
    """Item (index, draws) is (uint8 image [3, size, size], label), or a string that says why it cannot be read.

    `samples[index]` is (what holds the image: a path, bytes or a uint8 tensor [3, H, W]; label); `draws` are the
    random numbers of its augmentation, see `EpochPlan`.
    """

    def __init__(self, samples: Sequence[tuple[Path | bytes | Tensor, int]], classes: list[str]):
        self.samples, self.classes = samples, classes
        self.view: View | None = None  # what `build_datasets` adds

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Path | bytes | Tensor, int]:
        return self.samples[index]

    def load(self, index: int) -> tuple[Tensor, int] | str:
        """The picture as it is, uint8 [3, H, W], and its label; a string that says why it cannot be read."""
        source = None
        try:
            source, label = self.read(index)
            data = source.read_bytes() if isinstance(source, Path) else source
            return data if isinstance(data, Tensor) else decode_image(data), label
        except (OSError, ValueError) as error:
            return f"{source if isinstance(source, Path) else f'sample {index}'}: {_one_line(error)}"

    def __getitem__(self, key: tuple[int, np.ndarray]) -> tuple[Tensor, int] | str:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, np.ndarray]]) -> list[tuple[Tensor, int] | str]:
        """The items of `keys`, four at a time: boxes cost less drawn together, and pictures are cut while in cache."""
        samples: list[tuple[Tensor, int] | str] = []
        for start in range(0, len(keys), 4):
            chunk = keys[start : start + 4]
            loaded = [self.load(index) for index, _ in chunk]
            good = [i for i, sample in enumerate(loaded) if not isinstance(sample, str)]
            draws = torch.from_numpy(np.stack([chunk[i][1] for i in good])) if good else torch.empty(0, DRAWS)
            for i, image in zip(good, self.view([loaded[i][0] for i in good], draws), strict=True):
                loaded[i] = (image, loaded[i][1])
            samples += loaded
        return samples


def collate(samples: list[tuple[Tensor, int] | str]) -> Batch:
    good = [sample for sample in samples if not isinstance(sample, str)]
    images = default_collate([image for image, _ in good]) if good else torch.empty(0, dtype=torch.uint8)
    labels = torch.tensor([label for _, label in good], dtype=torch.int64)
    return Batch(images, labels, [sample for sample in samples if isinstance(sample, str)])


def folder_dataset(key: str, folder: str, classes: list[str] | None = None) -> ImageDataset:
    """ImageFolder layout, <folder>/<class>/<image>. `classes` fixes the labels; None: the folder's own.

    Raises RequestError naming the config `key` where folders, classes or images are missing.
    """
    try:
        found = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    except OSError as error:
        raise RequestError(f"{key}: {folder}: {error.strerror}") from None
    classes = found if classes is None else classes
    if not found:
        raise RequestError(f"{key}: {folder}: no class folders in it; expected <folder>/<class>/<image>")
    if unknown := sorted(set(found) - set(classes)):
        raise RequestError(f"{key}: {folder}: class {unknown[0]!r} is not among the training classes")
    labels = {name: label for label, name in enumerate(classes)}
    extensions = torchvision.datasets.folder.IMG_EXTENSIONS
    samples = torchvision.datasets.folder.make_dataset(folder, labels, extensions, allow_empty=True)
    if not samples:
        raise RequestError(f"{key}: {folder}: no images in its class folders")
    return ImageDataset([(Path(path), label) for path, label in samples], classes)


class HFDataset(ImageDataset):
    """A split of a Hugging Face dataset; its image and label columns are found from the features."""

    def __init__(self, rows: Any, config: DatasetConfig):
        import datasets

        self.image_key = _column("image_key", config.image_key, rows.features, datasets.Image)
        self.label_key = _column("label_key", config.label_key, rows.features, datasets.ClassLabel)
        feature = rows.features[self.label_key]
        if not str(getattr(feature, "dtype", "")).startswith(("int", "uint")):
            raise RequestError(f"dataset.label_key: column {self.label_key!r} holds no class labels or integers")
        names = getattr(feature, "names", None) or [str(c) for c in range(max(rows[self.label_key], default=-1) + 1)]
        if isinstance(rows.features[self.image_key], datasets.Image):
            rows = rows.cast_column(self.image_key, datasets.Image(decode=False))  # left as bytes
        super().__init__(rows.select_columns([self.image_key, self.label_key]), names)

    def read(self, index: int) -> tuple[Path | bytes, int]:
        row = self.samples[index]
        image, label = row[self.image_key], row[self.label_key]
        if not isinstance(label, int) or not 0 <= label < len(self.classes):
            raise ValueError(f"label {label!r} is no class")
        if not isinstance(image, dict) or not (image.get("bytes") or image.get("path")):
            raise ValueError(f"no image in column {self.image_key!r}")
        return image.get("bytes") or Path(image["path"]), label


def _column(key: str, asked: str | None, features: Any, kind: type) -> str:
    usual = key.removesuffix("_key")
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    found = [asked] if asked is not None else found or [name for name in features if name == usual]
    if len(found) != 1 or found[0] not in features:
        problem = "cannot tell the column" if asked is None else f"no column {asked!r}"
        raise RequestError(f"dataset.{key}: {problem}; set it to one of {', '.join(features)}")
    return found[0]


def digits_dataset(part: Literal["train", "val"]) -> ImageDataset:
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels (Alpaydin & Kaynak, UCI 1998): nothing to download.

    A fixed stratified fifth is for validation.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=0.2, random_state=0, stratify=labels)
    grey = torch.from_numpy(np.round(pixels * (255 / 16)).astype(np.uint8)).view(-1, 1, 8, 8).expand(-1, 3, -1, -1)
    chosen = parts[0 if part == "train" else 1]
    return ImageDataset([(grey[i], int(labels[i])) for i in chosen], [str(digit) for digit in range(10)])


DRAWS = 23  # random numbers a sample's augmentation may use


def uniform(seed: int, epoch: int, indices: Tensor, draws: int) -> Tensor:
    """Random numbers in [0, 1) as a function of (seed, epoch, sample index) alone: [n] -> float64 [n, draws].

    SplitMix64's output function (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number generators",
    figure 17) over a counter, in int64 arithmetic, so that CPU and GPU draw the same.
    """

    def shifted(x: Tensor, bits: int) -> Tensor:  # logical shift: int64's own keeps the sign
        return (x >> bits) & ((1 << (64 - bits)) - 1)

    def mix(x: Tensor) -> Tensor:
        x = (x ^ shifted(x, 30)) * -0x40A7B892E31B1A47  # 0xBF58476D1CE4E5B9
        x = (x ^ shifted(x, 27)) * -0x6B2FB644ECCEEE15  # 0x94D049BB133111EB
        return x ^ shifted(x, 31)

    golden = -0x61C8864680B583EB  # 0x9E3779B97F4A7C15
    key = mix(mix(torch.tensor([seed], device=indices.device) + golden) + epoch)
    counter = torch.arange(1, draws + 1, device=indices.device) * golden
    return shifted(mix(mix(key + indices.long())[:, None] + counter), 11).double() * 2.0**-53


def random_crops(draws: Tensor, aspects: Tensor, sides: Tensor) -> Tensor:
    """Boxes [n, 4] (top, left, height, width, whole pixels) that cover 8 to 100 % of a picture at ratios from 3:4 to
    4:3 (Szegedy et al. 2015, section 6; as torchvision's RandomResizedCrop: ten tries, then the middle).

    draws: [n, 22], uniform; aspects: [n], height over width of the pictures; sides: [n, 2], height and width at
    which they are kept.
    """
    area, ratio = 0.08 + 0.92 * draws[:, :10], torch.exp(math.log(4 / 3) * (2 * draws[:, 10:20] - 1))
    tries = torch.stack([area / ratio / aspects[:, None], area * ratio * aspects[:, None]], 1).sqrt()  # [n, 2, 10]
    fits = (tries <= 1).all(1)
    found, first = fits.any(1, keepdim=True), fits.int().argmax(1)[:, None, None].expand(-1, 2, 1)
    middle = torch.stack([4 / 3 / aspects, 4 / 3 * aspects], 1).clamp(max=1)
    lengths = (torch.where(found, tries.gather(2, first)[..., 0], middle) * sides).round().clamp(min=1)
    starts = torch.where(found, draws[:, 20:22] * (sides - lengths + 1), (sides - lengths) / 2).floor()
    return torch.cat([starts, lengths], 1)


CENTRE = 0.875  # side of the validation crop over the picture's shorter side, where training crops at random


def centre_crops(aspects: Tensor, sides: Tensor) -> Tensor:
    """Boxes [n, 4], likewise, of the square in the middle of each picture."""
    lengths = (CENTRE * sides * torch.stack([1 / aspects, aspects], 1).clamp(max=1)).round().clamp(min=1)
    return torch.cat([((sides - lengths) / 2).floor(), lengths], 1)


class View:
    """What the network sees of a picture: uint8 [3, H, W] -> uint8 [3, size, size]; the device normalises it.

    random_resized_crop: a random crop and mirror; the middle for validation. pad_crop: the whole picture resized to
    `size`, shifted over black and mirrored (He et al. 2016, section 4.2); not shifted for validation. none: resized.
    """

    def __init__(self, config: DatasetConfig, train: bool):
        augment, self.size = config.resolved_augment(), config.image_size
        self.crops, self.random = augment == "random_resized_crop", train and augment != "none"
        self.margin = max(1, self.size // 8)  # of the shift, pixels: 4 at 32

    def boxes(self, draws: Tensor, aspects: Tensor, sides: Tensor) -> tuple[Tensor, Tensor]:
        """Boxes [n, 4] and mirrors [n]; arguments as of `random_crops`, with [n, DRAWS] draws."""
        mirror = (draws[:, 22] < 0.5) & self.random
        if self.crops:
            return random_crops(draws, aspects, sides) if self.random else centre_crops(aspects, sides), mirror
        starts = ((draws[:, :2] * (2 * self.margin + 1)).floor() - self.margin) * self.random
        return torch.cat([starts, torch.full_like(starts, self.size)], 1), mirror

    def __call__(self, images: Sequence[Tensor], draws: Tensor) -> list[Tensor]:
        """Each picture by its row of `draws` [n, DRAWS]."""
        if not self.crops:
            images = [image if image.shape[1:] == (self.size,) * 2 else _resize(image, self.size) for image in images]
        if not images or not (self.crops or self.random):
            return list(images)
        sides = torch.tensor([image.shape[1:] for image in images], dtype=torch.float64)
        boxes, mirrors = self.boxes(draws, sides[:, 0] / sides[:, 1], sides)
        return [self._cut(*each) for each in zip(images, boxes.int().tolist(), mirrors.tolist(), strict=True)]

    def _cut(self, image: Tensor, box: Sequence[int], mirror: bool) -> Tensor:
        top, left, height, width = box
        if not self.crops:
            image, top, left = F.pad(image, [self.margin] * 4), top + self.margin, left + self.margin
        image = image[:, top : top + height, left : left + width]
        image = _resize(image, self.size) if self.crops else image
        return image.flip(-1) if mirror else image


def _resize(image: Tensor, size: int) -> Tensor:
    """uint8 [3, H, W] -> [3, size, size], bilinear with antialiasing; fast in the layout that decoders leave."""
    image = image[None].contiguous(memory_format=torch.channels_last)
    return F.interpolate(image, (size, size), mode="bilinear", antialias=True)[0]


class EpochPlan(Sampler):
    """Which samples an epoch loads, and in which order: chunks of (index, draws) keys, batch_size each.

    The order is a function of (seed, epoch), the draws that augment a sample one of (seed, epoch, index): neither
    workers nor restarts nor a cache change what it looks like. `share(epoch)` below 1 draws a random part before
    anything is loaded. The last, smaller chunk is left out where a full one exists: every step has one shape.
    """

    def __init__(self, indices: np.ndarray, batch_size: int, seed: int, share: Callable[[int], float]):
        self.indices, self.batch_size, self.seed, self.share = indices, batch_size, seed, share
        self.epoch = 0

    def chosen(self, epoch: int) -> int:
        """How many samples `epoch` loads."""
        drawn = max(1, round(self.share(epoch) * len(self.indices)))
        return drawn - drawn % self.batch_size or drawn

    def steps(self, epoch: int) -> int:
        return math.ceil(self.chosen(epoch) / self.batch_size)

    @property
    def considered(self) -> int:
        """How many samples a dense epoch loads."""
        return len(self.indices) - len(self.indices) % self.batch_size or len(self.indices)

    def __len__(self) -> int:
        return self.steps(self.epoch)

    def order(self) -> np.ndarray:
        """The indices this epoch loads, in order."""
        return np.random.default_rng((self.seed, self.epoch)).permutation(self.indices)[: self.chosen(self.epoch)]

    def __iter__(self) -> Iterator[list[tuple[int, np.ndarray]]]:
        order = self.order()
        for start in range(0, len(order), self.batch_size):
            chunk = order[start : start + self.batch_size]
            draws = uniform(self.seed, self.epoch, torch.from_numpy(chunk), DRAWS)
            yield list(zip(chunk.tolist(), draws.numpy(), strict=True))


def axis_weights(start: Tensor, length: Tensor, size: int, side: int, mirror: Tensor | None = None) -> Tensor:
    """Weights [batch, size, side] that crop one axis of `side` pixels to [start, start + length) and resize that to
    `size`: bilinear with antialiasing as in Pillow and torchvision, a triangle over max(1, length / size) pixels.

    start, length: float [batch], whole pixels; what lies outside the picture counts as black. mirror: bool
    [batch], turns the axis round.
    """
    start, length = start.float()[:, None, None], length.float()[:, None, None]
    scale = length / size
    outputs = torch.arange(size, device=start.device) + 0.5
    if mirror is not None:
        outputs = torch.where(mirror[:, None], size - outputs, outputs)
    pixels = torch.arange(side, device=start.device) + 0.5 - start
    weights = (1 - (pixels - outputs.view(-1, size, 1) * scale).abs() / scale.clamp(min=1)).clamp(min=0)
    weights = weights * ((pixels > 0) & (pixels < length))
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)
    return weights.to(torch.float16 if start.is_cuda else torch.float32)  # float16 holds every grey level exactly


def crop_resize(images: Tensor, boxes: Tensor, mirror: Tensor, size: int) -> Tensor:
    """Crop, resize and mirror every picture by its own numbers: uint8 [batch, 3, S, S] -> uint8 [batch, 3, size, size].

    boxes: float [batch, 4], top, left, height and width in pixels; mirror: bool [batch].
    """
    side = images.shape[-1]
    rows = axis_weights(boxes[:, 0], boxes[:, 2], size, side)
    columns = axis_weights(boxes[:, 1], boxes[:, 3], size, side, mirror)
    narrow = images.to(columns.dtype).flatten(1, 2) @ columns.mT
    return (rows[:, None] @ narrow.unflatten(1, (3, side))).round().clamp(0, 255).to(torch.uint8)


class _Kept(Dataset):
    """Item `index` is (uint8 [3, side, side], label, height over width), or a string; see ImageDataset."""

    def __init__(self, dataset: ImageDataset, side: int):
        self.dataset, self.side = dataset, side

    def __getitem__(self, index: int) -> tuple[Tensor, int, float] | str:
        loaded = self.dataset.load(index)
        if isinstance(loaded, str):
            return loaded
        image, label = loaded
        kept = image if image.shape[1:] == (self.side, self.side) else _resize(image, self.side)
        return kept, label, image.shape[1] / image.shape[2]


class ResidentLoader:
    """A data set decoded once and kept on the device: uint8 [n, 3, side, side]. Yields batches in the order of
    `plan`, or, without one, in the order of `indices` and not augmented.

    Pictures to be cropped at random are kept as squares, both axes resized, with the ratio of their sides: a crop is
    drawn in the shape of the original and maps to the square axis by axis. Augmentation happens on the device and is
    a function of (seed, epoch, index). `shared`: options of the DataLoader that decodes. Raises RequestError naming
    the first unreadable image.
    """

    def __init__(self, dataset: ImageDataset, indices: np.ndarray, plan: EpochPlan | None, config: Config,
                 device: torch.device, shared: dict[str, Any]):  # fmt: skip
        self.plan, self.indices, self.batch_size = plan, indices, config.training.batch_size
        self.view, self.side = dataset.view, kept_side(config.dataset)
        n, self.keys = len(indices), torch.from_numpy(indices).to(device)
        self.images = torch.empty(n, 3, self.side, self.side, dtype=torch.uint8, device=device)
        self.labels = torch.empty(n, dtype=torch.int64, device=device)
        self.aspects = torch.empty(n, dtype=torch.float64, device=device)
        decoder = DataLoader(_Kept(dataset, self.side), 256, sampler=indices.tolist(), **shared)
        done = 0
        for samples in tqdm(decoder, desc="decoding", unit="batch", leave=False, disable=None):
            if bad := next((sample for sample in samples if isinstance(sample, str)), None):
                raise RequestError(f"dataset: {bad}")
            images, labels, aspects = zip(*samples, strict=True)
            part = slice(done, done + len(samples))
            self.images[part], self.labels[part] = torch.stack(images).to(device), torch.tensor(labels).to(device)
            self.aspects[part], done = torch.tensor(aspects).to(device), part.stop
        mode = "off" if plan is None or config.training.compile == "off" else "default"
        self.crop = compiled(partial(crop_resize, size=self.view.size), mode)
        if mode != "off":  # compile before the clock of the training starts
            next(iter(self))

    def __iter__(self) -> Iterator[Batch]:
        order = self.indices if self.plan is None else self.plan.order()
        rows = torch.from_numpy(np.searchsorted(self.indices, order)).to(self.images.device)
        for block in rows.split(64 * self.batch_size):  # few, large launches for what every crop needs to know
            views = self.views(block)
            parts = zip(*(tensor.split(self.batch_size) for tensor in (block, *views)), strict=True)
            for part, *view in parts:
                images = self.images[part]
                yield Batch(self.crop(images, *view) if view else images, self.labels[part], [])

    def views(self, rows: Tensor) -> tuple[Tensor, Tensor] | tuple[()]:
        """Boxes [n, 4] and mirrors [n] of `rows` this epoch; nothing where pictures are used as they are kept."""
        if not self.view.crops and not self.view.random:
            return ()
        seed, epoch = (self.plan.seed, self.plan.epoch) if self.plan else (0, 0)
        sides = torch.full((1, 2), self.side, dtype=torch.float64, device=rows.device)
        return self.view.boxes(uniform(seed, epoch, self.keys[rows], DRAWS), self.aspects[rows], sides)


def kept_side(config: DatasetConfig) -> int:
    """Side of the pictures a ResidentLoader keeps, pixels."""
    cropped = config.resolved_augment() == "random_resized_crop"
    return config.cache_resolution or (round(config.image_size / CENTRE) if cropped else config.image_size)


def require_memory(samples: int, side: int, device: torch.device) -> None:
    """Say how much `dataset.cache: device` takes. Raises RequestError where nine tenths of what is free are less."""
    needed, free = samples * (3 * side**2 + 24), free_memory(device)
    size = f"{samples:,} pictures of {side} px need {needed / 2**30:,.2f} GiB"
    if needed > 0.9 * free:
        hint = "set dataset.cache=none, or a smaller dataset.cache_resolution or dataset.max_train_samples"
        raise RequestError(f"dataset.cache: {size}, and {device} has {free / 2**30:,.2f} GiB free; {hint}")
    print(f"dataset.cache: {size} on {device}", flush=True)


def free_memory(device: torch.device) -> int:
    """Bytes a program can still have on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(facts["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def build_datasets(config: DatasetConfig) -> tuple[ImageDataset, ImageDataset]:
    """Training and validation set, their classes checked against each other and dataset.num_classes.

    Raises RequestError naming the key where data is missing or does not fit.
    """
    if config.type == "folder":
        train = folder_dataset("dataset.train_dir", config.train_dir)
        val = folder_dataset("dataset.val_dir", config.val_dir, train.classes)
    elif config.type == "hf":
        train, val = (HFDataset(_load_hf(config, key), config) for key in ("split_train", "split_val"))
    else:
        train, val = digits_dataset("train"), digits_dataset("val")
    if config.num_classes not in (None, len(train.classes)):
        raise RequestError(f"dataset.num_classes: {config.num_classes}, but the data has {len(train.classes)} classes")
    if len(train.classes) < 2 or len(val.classes) > len(train.classes):
        raise RequestError(f"dataset: {len(train.classes)} training and {len(val.classes)} validation classes")
    if not len(train) or not len(val):
        raise RequestError(f"dataset: {len(train)} training and {len(val)} validation samples")
    train.view, val.view = View(config, train=True), View(config, train=False)
    return train, val


def _load_hf(config: DatasetConfig, key: Literal["split_train", "split_val"]) -> Any:
    import datasets

    name, split = config.name, getattr(config, key)
    if name.startswith((".", "/")) and not Path(name).exists():
        raise RequestError(f"dataset.name: {name}: no such folder")
    options = {"split": split, "revision": config.revision, "cache_dir": config.cache_dir}
    try:
        return datasets.load_dataset(name, config.subset, **options)
    except Exception as error:  # the library raises dozens of kinds, all of them about the request or the network
        why = f"{type(error).__name__}: {_one_line(error)[:300]}"
        if isinstance(error, ValueError) and "split" in str(error).lower():
            raise RequestError(f"dataset.{key}: no split {split!r} in {name}: {why}") from None
        hint = "check the name, subset and revision, the network and HF_TOKEN in .env, or give a local folder"
        raise RequestError(f"dataset.name: cannot load {name!r} ({why}); {hint}") from None


def _subset(size: int, limit: int | None) -> np.ndarray:
    """Indices of a random subset, the same for every seed, of at most `limit` samples."""
    if limit is None or limit >= size:
        return np.arange(size)
    return np.sort(np.random.default_rng(0).permutation(size)[:limit])


def _ignore_sigint(_: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process ends the run, and its workers with it


def build_dataloaders(config: Config, device: torch.device) -> tuple[Loader, Loader, EpochPlan, int]:
    """Training loader, validation loader, the plan that drives the first, and the number of classes."""
    dataset, training = config.dataset, config.training
    train, val = build_datasets(dataset)
    workers = training.num_workers
    if workers is None:  # digits are in memory already
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        workers = 0 if dataset.type == "digits" else min(16, cores)
    share = config.ast.target_activation if config.ast.mode == "random" else 1.0
    indices, val_indices = _subset(len(train), dataset.max_train_samples), _subset(len(val), dataset.max_val_samples)
    plan = EpochPlan(indices, training.batch_size, training.seed, lambda e: share if config.is_sparse(e) else 1.0)
    shared = {"num_workers": workers, "worker_init_fn": _ignore_sigint}
    if dataset.cache == "device":
        require_memory(len(indices) + len(val_indices), kept_side(dataset), device)
        shared["collate_fn"] = list
        resident = partial(ResidentLoader, config=config, device=device, shared=shared)
        return resident(train, indices, plan), resident(val, val_indices, None), plan, len(train.classes)
    keys = [(index, np.zeros(DRAWS)) for index in val_indices.tolist()]
    chunks = [keys[start : start + training.batch_size] for start in range(0, len(keys), training.batch_size)]
    shared |= {"collate_fn": collate, "pin_memory": device.type == "cuda", "persistent_workers": workers > 0}
    streaming = partial(DataLoader, **shared)
    return streaming(train, batch_sampler=plan), streaming(val, batch_sampler=chunks), plan, len(train.classes)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def device_batches(loader: Loader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The loader's batches on `device`, each copied there while the one before it is worked on.

    Raises RequestError naming the first unreadable image.
    """
    copier = torch.cuda.Stream(device) if device.type == "cuda" else None
    ahead: tuple[Tensor, Tensor, torch.cuda.Event] | None = None
    for batch in loader:
        if batch.unreadable:
            raise RequestError(f"dataset: {batch.unreadable[0]}")
        if copier is None or batch.images.is_cuda:
            yield batch.images, batch.labels
            continue
        with torch.cuda.stream(copier):
            images, labels = batch.images.to(device, non_blocking=True), batch.labels.to(device, non_blocking=True)
            copied = copier.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = images, labels, copied
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(images: Tensor, labels: Tensor, copied: torch.cuda.Event) -> tuple[Tensor, Tensor]:
    """Order the current stream after a copy made on another, and tell the allocator who uses it."""
    stream = torch.cuda.current_stream(images.device)
    stream.wait_event(copied)
    images.record_stream(stream), labels.record_stream(stream)
    return images, labels


# ------------------------------------------------------------------------------------------------ Metrics

HISTORY_KEYS = (
    *("epoch", "train_acc", "val_acc", "activation_rate", "threshold", "energy_savings"),
    *("step_time_ms", "est_energy_kj", "est_flops_g"),
    *("lr", "train_loss", "samples_loaded", "samples_scored", "samples_trained", "optimizer_steps"),
    *("train_seconds", "energy_kj", "total_flops_g"),
)


@dataclass
class Ledger:
    """What was really done, in samples and optimizer steps."""

    loaded: int = 0
    scored: int = 0
    trained: int = 0
    steps: int = 0

    def dense_equivalents(self, scoring_cost: float = 1 / 3) -> float:
        """Forward + backward passes this work amounts to; a scoring forward is `scoring_cost` of one."""
        return self.trained + self.scored * scoring_cost

    def since(self, earlier: Ledger) -> Ledger:
        return Ledger(*(now - then for now, then in zip(asdict(self).values(), asdict(earlier).values(), strict=True)))


class Meter:
    """Sums of loss and hits, kept on the device so that counting never waits for it."""

    def __init__(self, device: torch.device, epoch: int):
        self.epoch = epoch
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)  # loss, hits, 1 + first non-finite step
        self.hits = self.trained = self.predicted = 0  # hits: those the host has counted

    def add_loss(self, loss: Tensor, samples: int, step: int) -> None:
        """`loss`: summed over the samples, on the device."""
        self.sums[0] += loss
        self.sums[2] = torch.where((self.sums[2] == 0) & ~loss.isfinite(), step + 1, self.sums[2])
        self.trained += samples

    def add_hits(self, hits: Tensor | int, samples: int) -> None:
        if isinstance(hits, int):
            self.hits += hits
        else:
            self.sums[1] += hits
        self.predicted += samples

    def read(self) -> tuple[float | None, float | None]:
        """(mean loss of the trained, accuracy of the predicted in percent), None without any.

        Costs one device-to-host read. Raises TrainingFailed naming the first step with a non-finite loss.
        """
        loss, hits, bad_step = self.sums.tolist()
        if bad_step:
            raise TrainingFailed(f"non-finite loss in epoch {self.epoch + 1}, step {int(bad_step)}")
        accuracy = 100 * (hits + self.hits) / self.predicted if self.predicted else None
        return (loss / self.trained if self.trained else None), accuracy


class EnergyMeter:
    """Energy the GPU has drawn, from NVML's counter; `read_kj` is None where there is no such counter."""

    def __init__(self, device: torch.device):
        self._read: Callable[[], float] | None = None
        if device.type != "cuda":
            return
        import pynvml

        try:
            pynvml.nvmlInit()
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
            pynvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # older cards have none: found out here
            self._read = partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        except pynvml.NVMLError as error:
            print(f"energy is not measured, energy_kj stays null: NVML says {_one_line(error)}", flush=True)

    def read_kj(self) -> float | None:
        return None if self._read is None else self._read() / 1e6  # the counter is in millijoules


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Append one line, flushed to the disk before returning."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(row, allow_nan=False) + "\n")
        file.flush()
        os.fsync(file.fileno())


def open_tensorboard(outputs: LoggingConfig) -> Any | None:
    """torch's SummaryWriter into a folder of its own, None where none is asked for.

    Raises RequestError, saying what to install, where the package is missing.
    """
    if not outputs.tensorboard:
        return None
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise RequestError("logging.tensorboard: needs a package that is not there: pip install tensorboard") from None
    return SummaryWriter(Path(outputs.output_dir) / "tensorboard" / f"{datetime.now():%Y%m%d_%H%M%S}_{os.getpid()}")


def add_scalars(board: Any, row: dict[str, Any]) -> None:
    """The epoch's row of the history to TensorBoard, what was measured of it."""
    for key, value in row.items():
        if value is not None:
            board.add_scalar(key, value, row["epoch"])
    board.flush()


# ------------------------------------------------------------------------------------------------ Train


def lr_at(progress: float, training: TrainingConfig) -> float:
    """Learning rate at `progress` (0 to 1) of the run: linear warm-up, then half a cosine down to min_lr
    (Loshchilov & Hutter 2017, SGDR, equation 5, one cycle)."""
    warmup = training.lr_warmup_epochs / training.epochs
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
        return torch.optim.SGD(groups, momentum=training.momentum, **shared)
    return torch.optim.AdamW(groups, **shared)


def resolve_device(training: TrainingConfig) -> torch.device:
    """The device to train on. Raises RequestError for `cuda` where there is none."""
    if training.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("training.device: cuda, but torch sees no GPU here; set training.device=cpu or auto")
    return torch.device("cpu" if training.device == "cpu" or not torch.cuda.is_available() else "cuda")


def resolve_amp_dtype(training: TrainingConfig, device: torch.device) -> torch.dtype | None:
    """The autocast type, None for plain float32."""
    if not training.mixed_precision or (training.amp_dtype == "auto" and device.type == "cpu"):
        return None
    if training.amp_dtype != "auto":
        return getattr(torch, training.amp_dtype)
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def configure_backends(ast: ASTConfig, device: torch.device) -> None:
    """On a GPU: TF32 where float32 remains, and cuDNN autotuning where shapes repeat, for unpacked sparse steps
    have a new one nearly every time."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = ast.pack or ast.mode != "ast"
        torch.set_float32_matmul_precision("high")


class Stop:
    """Why the run should end before its last epoch: a signal, or the wall-clock cap."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.deadline = math.inf  # time.monotonic() seconds

    def watch_signals(self) -> None:
        """SIGINT and SIGTERM end the run after the current step; a second one ends it at once."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def status(self, reserve_seconds: float = 0.0) -> str | None:
        """`interrupted` or `time_capped` (with `reserve_seconds` still needed), else None."""
        if self.signal is not None:
            return "interrupted"
        return "time_capped" if time.monotonic() + reserve_seconds >= self.deadline else None


class Normalise:
    """uint8 [batch, 3, H, W] to the float32 the model was built for, and the autocast it runs under."""

    def __init__(
        self,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        layout: torch.memory_format,
        dtype: torch.dtype | None,
    ):
        self.mean, self.std = (torch.tensor(v, device=device).mul(255).view(1, 3, 1, 1) for v in (mean, std))
        self.kind, self.layout, self.dtype = device.type, layout, dtype

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.kind, self.dtype or torch.bfloat16, enabled=self.dtype is not None)

    def __call__(self, images: Tensor) -> Tensor:
        return (images.to(torch.float32, memory_format=self.layout) - self.mean) / self.std


class Run:
    """Everything a training step needs and changes: model, optimizer, controller, queue, ledger, history."""

    def __init__(self, config: Config, model: nn.Module, device: torch.device, planned_steps: int):
        ast, training = config.ast, config.training
        self.config, self.device, self.planned_steps = config, device, planned_steps
        self.base_flop = config.metrics.base_flop_per_sample or count_flops(model, config.dataset.image_size)
        self.layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.model = model.to(device, memory_format=self.layout).train()
        self.amp_dtype = resolve_amp_dtype(training, device)
        published = getattr(model, "pretrained_cfg", None) or {}  # timm says how its weights were trained
        moments = (published.get("mean", (0.485, 0.456, 0.406)), published.get("std", (0.229, 0.224, 0.225)))
        self.normalise = Normalise(*moments, device, self.layout, self.amp_dtype)
        self.forward = compiled(
            training_forward(self.model, self.normalise, training.label_smoothing), training.compile
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
        self.queue = ActiveQueue(training.batch_size)
        self.streak = 0.0  # log probability of the current run of all or none active
        self.iqr: float | None = None  # running inter-quartile range of the significance, nats
        self.energy = EnergyMeter(device)
        self.ledger = Ledger()
        self.history: dict[str, list] = {key: [] for key in HISTORY_KEYS}
        self.epochs_completed, self.train_seconds, self.eval_seconds = 0, 0.0, 0.0
        self.board: Any | None = None  # TensorBoard's writer
        self.epoch_started: float | None = None  # time.monotonic() seconds, while an epoch trains
        self.energy_kj = None if self.energy.read_kj() is None else 0.0
        self.lr = lr_at(0.0, training)
        self.scheduled = self.unscheduled = 0  # loop steps whose gradient was applied (they drive the rate), and since
        self.window_samples = self.window_divisor = 0
        self.start_epoch(0)

    def start_epoch(self, epoch: int) -> None:
        sparse = self.config.ast.mode == "ast" and self.config.is_sparse(epoch)
        if not sparse:
            self.queue.clear()
        self.epoch, self.step, self.scoring = epoch, 0, sparse
        self.controller.frozen = not sparse
        self.meter = Meter(self.device, epoch)
        self.activations: list[float] = []
        self.thresholds: list[float] = []

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
            return self.training_seconds() / (60 * self.config.training.max_minutes)
        return (self.scheduled + self.unscheduled / 2) / self.planned_steps

    def training_seconds(self) -> float:
        """Training time so far, that of the running epoch included."""
        running = 0.0 if self.epoch_started is None else time.monotonic() - self.epoch_started
        return self.train_seconds + running

    def out_of_time(self) -> bool:
        """Whether a schedule over time has come to its end."""
        return self.config.training.lr_decay == "time" and self.progress() >= 1


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def train_one_epoch(run: Run, batches: Iterator[tuple[Tensor, Tensor]], steps: int, stop: Stop) -> bool:
    """Train on `batches`; False where `stop` ended the epoch early. Raises TrainingFailed on a non-finite loss."""
    any_active_in_accum, forwards = False, 0
    sparse_before = run.epoch - run.config.ast.warmup_epochs
    with _progress(run, steps) as heartbeat:
        for images, labels, scores in score_ahead(run, batches):
            run.ledger.loaded += len(labels)
            if run.scoring:
                run.controller.epoch = sparse_before + run.step / steps
                trained = ast_forward(run, images, labels, scores)
            else:
                trained = train_step(run, images, labels)
            run.step, run.unscheduled = run.step + 1, run.unscheduled + 1
            if trained is not None:
                forwards += 1
                any_active_in_accum |= trained > 0
            window_full = forwards == run.config.training.grad_accum_steps
            if window_full and any_active_in_accum:
                optimizer_step(run)
            if window_full:
                any_active_in_accum, forwards = False, 0
            heartbeat(len(labels))
            if run.out_of_time() or stop.status(run.eval_seconds):
                break
        if any_active_in_accum:
            optimizer_step(run)
    return run.step == steps


@contextlib.contextmanager
def _progress(run: Run, steps: int) -> Iterator[Callable[[int], None]]:
    """A bar over the epoch's steps; its heartbeat reads the device about once a second, not every step."""
    label = f"epoch {run.epoch + 1}/{run.config.training.epochs}"
    started = shown = time.monotonic()
    images = 0
    with tqdm(total=steps, desc=label, unit="step", leave=False, disable=None, dynamic_ncols=True) as bar:

        def heartbeat(loaded: int) -> None:
            nonlocal shown, images
            images += loaded
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
    side, buffers = run.config.dataset.image_size, [buffer.clone() for buffer in run.model.buffers()]
    images = torch.zeros(run.config.training.batch_size, 3, side, side, dtype=torch.uint8, device=run.device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=run.device)
    try:
        with torch.random.fork_rng():
            for _ in range(3):  # a CUDA graph is recorded in the second pass and replayed from the third
                with torch.no_grad():
                    run.scorer(images, labels), run.evaluator(images, labels)
                run.forward(images, labels)[0].backward()
                run.optimizer.zero_grad(set_to_none=not run.grads_stay)
    except torch._dynamo.exc.TorchDynamoException as error:
        why = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        hint = "install a C++ compiler (and triton for a GPU), or set training.compile=off"
        raise RequestError(f"training.compile: nothing can be compiled here ({_one_line(why)}); {hint}") from None
    for buffer, before in zip(run.model.buffers(), buffers, strict=True):
        buffer.copy_(before)


@torch.no_grad()
def evaluate(run: Run, loader: Iterable[Batch]) -> float:
    """Validation accuracy in percent, every sample counted once; a last, smaller batch is padded to one shape."""
    hits, count = torch.zeros((), device=run.device), 0
    for images, labels in device_batches(loader, run.device):
        padding = run.config.training.batch_size - len(labels)
        whole = (torch.cat([tensor, tensor.new_zeros(padding, *tensor.shape[1:])]) for tensor in (images, labels))
        hits += run.evaluator(*whole)[1, : len(labels)].sum()
        count += len(labels)
    return 100 * hits.item() / count


def close_epoch(run: Run, before: Ledger, seconds: float, val_acc: float, considered: float) -> dict[str, Any]:
    """Add the epoch's row to the history and return it. `considered`: samples a dense epoch would have trained on."""
    done, metrics = run.ledger.since(before), run.config.metrics
    loss, train_acc = run.meter.read()
    run.train_seconds += seconds
    row = {
        "epoch": run.epoch + 1,
        "train_acc": train_acc,
        "val_acc": val_acc,
        "activation_rate": statistics.fmean(run.activations) if run.scoring else done.loaded / considered,
        "threshold": statistics.fmean(run.thresholds) if run.scoring else None,
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


def train(config: Config, stop: Stop | None = None) -> tuple[dict[str, Any], Path]:
    """Run a config to its end and save the results: (the result, its file).

    Raises RequestError before anything is trained where the request is wrong. Whatever ends the training
    later, the epochs finished until then are saved first, with `status` failed and the `error`.
    """
    started, stop = time.monotonic(), stop or Stop()
    if config.training.max_minutes is not None and config.training.lr_decay == "epochs":
        stop.deadline = started + 60 * config.training.max_minutes
    device = resolve_device(config.training)
    prepare_outputs(config.logging)
    board = open_tensorboard(config.logging)
    torch.manual_seed(config.training.seed)
    configure_backends(config.ast, device)
    train_loader, val_loader, plan, num_classes = build_dataloaders(config, device)
    model = get_model(config.model, num_classes, config.dataset.image_size)
    run = Run(config, model, device, sum(plan.steps(epoch) for epoch in range(config.training.epochs)))
    run.board = board
    outcome = {"status": "failed"}
    if device.type == "cuda" or config.training.compile != "off":
        warm_up(run)
    try:
        outcome = {"status": fit(run, train_loader, val_loader, plan, stop)}
    except Exception as error:
        outcome["error"] = _one_line(error)
        raise
    finally:
        result = build_result(run, outcome, time.monotonic() - started)
        path = save_results(result, config.logging.output_dir)
        print(summary(result), f"results: {path}", sep="\n", flush=True)
    return result, path


def fit(run: Run, train_loader: Loader, val_loader: Loader, plan: EpochPlan, stop: Stop) -> str:
    """Train and validate epoch by epoch. Returns completed, early_stopped, time_capped or interrupted."""
    training, best = run.config.training, (-1.0, 0)
    print(epoch_line(run.config), flush=True)
    for epoch in range(training.epochs):
        plan.epoch, before = epoch, copy.copy(run.ledger)
        run.start_epoch(epoch)
        synchronize(run.device)
        run.epoch_started, drawn = time.monotonic(), run.energy.read_kj()
        whole = train_one_epoch(run, device_batches(train_loader, run.device), len(plan), stop)
        synchronize(run.device)
        seconds, run.epoch_started = time.monotonic() - run.epoch_started, None
        if drawn is not None:
            run.energy_kj += run.energy.read_kj() - drawn
        if stop.status() == "interrupted" and not whole:
            return "interrupted"
        started = time.monotonic()
        val_acc = evaluate(run, val_loader)
        run.eval_seconds = time.monotonic() - started
        row = close_epoch(run, before, seconds, val_acc, plan.considered * run.step / len(plan))
        run.epochs_completed += whole
        print(epoch_line(run.config, row), flush=True)
        if run.config.logging.jsonl_path is not None:
            append_jsonl(run.config.logging.jsonl_path, row)
        if run.board is not None:
            add_scalars(run.board, row)
        best = max(best, (val_acc, -epoch))
        if run.epochs_completed == training.epochs or run.out_of_time():
            return "completed"
        if status := stop.status(run.eval_seconds):
            return status
        if training.early_stop_patience is not None and epoch + best[1] >= training.early_stop_patience:
            return "early_stopped"
    return "completed"


def prepare_outputs(outputs: LoggingConfig) -> None:
    """Make the output folders. Raises RequestError where nothing could be written at the end."""
    for key, path in (("output_dir", outputs.output_dir), ("jsonl_path", outputs.jsonl_path)):
        try:
            if path is not None:
                folder = Path(path) if key == "output_dir" else Path(path).parent
                folder.mkdir(parents=True, exist_ok=True)
                with tempfile.TemporaryFile(dir=folder):
                    pass
        except OSError as error:
            raise RequestError(f"logging.{key}: cannot write to {path}: {error.strerror}") from None


def environment(device: torch.device) -> dict[str, Any]:
    """Versions, machine and commit a result came from; never environment variables."""
    folder = str(Path(__file__).resolve().parent)
    command = ["git", "-C", folder, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    commit = None
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        commit = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()
    gpu = {"cuda": torch.version.cuda, "gpu": torch.cuda.get_device_name(device)} if device.type == "cuda" else {}
    versions = {"python": platform.python_version(), "torch": torch.__version__, "torchvision": torchvision.__version__}
    return {**versions, "cuda": None, "gpu": None, **gpu, "platform": platform.platform(), "git_commit": commit}


def build_result(run: Run, outcome: dict[str, str], seconds: float) -> dict[str, Any]:
    """The contents of a results file: the documented keys first, then how they came about."""
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
        "config": run.config.model_dump(),
        "environment": environment(run.device),
    }


def save_results(result: dict[str, Any], output_dir: str | Path) -> Path:
    """Write final_results_<timestamp>.json whole or not at all, under a name nobody has taken."""
    stamp, text = datetime.now().strftime("%Y%m%d_%H%M%S"), results_text(result)
    for tail in chain([""], (f"_{n}" for n in count(1))):
        path = Path(output_dir) / f"final_results_{stamp}{tail}.json"
        with contextlib.suppress(FileExistsError):
            path.open("x").close()  # claims the name
            break
    write_whole(text, path)
    return path


def results_text(result: dict[str, Any]) -> str:
    """What stands in a results file. Raises ValueError for NaN or infinity."""
    return json.dumps(result, indent=2, allow_nan=False) + "\n"


def write_whole(text: str, path: Path) -> None:
    """Write a file, or replace it, whole or not at all."""
    part = path.with_suffix(f".{os.getpid()}.part")
    with part.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(part, path)


EPOCH_COLUMNS = {  # title: (history key, format); the width is the format's
    "loss": ("train_loss", "7.3f"),
    "train %": ("train_acc", "8.2f"),
    "val %": ("val_acc", "7.2f"),
    "active": ("activation_rate", "7.3f"),
    "threshold": ("threshold", "10.4f"),
    "lr": ("lr", "9.6f"),
    "loaded": ("samples_loaded", "10,"),
    "trained": ("samples_trained", "10,"),
    "ms/step": ("step_time_ms", "8.1f"),
    "saved": ("energy_savings", "7.1%"),
}


def epoch_line(config: Config, row: dict[str, Any] | None = None) -> str:
    """A row of the table that grows while a run goes on, or its header; `saved` is FLOPs against a dense epoch."""
    line = f"{'epoch':>9} {'phase':>6}"
    if row is not None:
        phase = config.ast.mode if config.is_sparse(row["epoch"] - 1) else "dense"
        line = f"{row['epoch']:>5}/{config.training.epochs:<3} {phase:>6}"
    for title, (key, spec) in EPOCH_COLUMNS.items():
        value = title if row is None else "-" if row[key] is None else format(row[key], spec)
        line += " " + value.rjust(len(format(0, spec)))
    return line


def summary(result: dict[str, Any]) -> str:
    """The table at the end of a run."""
    ledger, energy, final = result["ledger"], result["energy_kj"], result["final_accuracy"]
    best = f"best {result['best_accuracy']:.2f} % in epoch {result['best_epoch']}"
    rows = {
        "status": result["status"] + (f": {result['error']}" if "error" in result else ""),
        "accuracy": "-" if final is None else f"{best}, final {final:.2f} %",
        "epochs": f"{result['epochs_completed']} of {result['config']['training']['epochs']}",
        "time": f"{result['train_seconds']:.1f} s training, {3600 * result['total_time_hours']:.1f} s in all",
        "samples": f"{ledger['loaded']:,} loaded, {ledger['scored']:,} scored, {ledger['trained']:,} trained",
        "optimizer steps": f"{ledger['steps']:,}",
        "GPU energy": "not measured" if energy is None else f"{energy:.3f} kJ in training",
    }
    return "\n".join(["", *(f"{name:<16} {value}" for name, value in rows.items())])


# ------------------------------------------------------------------------------------------------ Main


def run_cli(main: Callable[[], int]) -> int:
    """Run a script's `main`: a wrong request is one line on stderr and exit code 2, a failed run 1."""
    load_dotenv()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would bury the one line
    try:
        return main()
    except RequestError as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 2
    except TrainingFailed as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def execute(config: Config) -> int:
    """Train `config` as a command does: signals watched, results saved. Returns the exit code."""
    stop = Stop()
    stop.watch_signals()
    result, _ = train(config, stop)
    return 128 + stop.signal if result["status"] == "interrupted" else 0


def options_help() -> str:
    """Every config key with its default and meaning, for --help."""
    return "\n".join(
        f"  {key} (default {'null' if default is None else str(default).lower()})\n      {description}"
        for key, (description, default) in config_keys().items()
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description="Train one config. run_experiment.py does the same and has more flags.",
        epilog="config keys:\n" + options_help(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML or JSON config")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.lr=0.05")
    args = parser.parse_args(argv)
    return execute(load_config(args.config, args.overrides))


if __name__ == "__main__":
    sys.exit(run_cli(main))
