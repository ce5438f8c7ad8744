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

import argparse
import contextlib
import copy
import difflib
import errno
import hashlib
import io
import json
import logging
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import chain, count, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import torchvision
import yaml
from dotenv import load_dotenv
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import Tensor, distributed, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


class RequestError(Exception):
    """What was asked for cannot be done: shown as one line, exit code 2."""


class TrainingFailed(Exception):
    """The run itself went wrong: shown as one line, exit code 1."""


class PeerLost(TrainingFailed):
    """Another process of the run has ended, or does not answer. `code`: the exit code it gave, if it said why."""

    def __init__(self, why: str, code: int = 1):
        super().__init__(why)
        self.code = code


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
    max_bad_images: int = Field(
        0, ge=0, description="images that may be unreadable: the next sample stands in, the results list them"
    )
    max_train_samples: int | None = Field(None, ge=1, description="train on a fixed random subset of this size")
    repeat: int = Field(1, ge=1, description="every training image so many times in the set: redundant data, to study")
    label_noise: float = Field(
        0.0, ge=0, lt=1, description="share of the training labels replaced by another class at random, to study"
    )
    max_val_samples: int | None = Field(None, ge=1, description="validate on a fixed random subset of this size")

    def resolved_augment(self) -> str:
        """What `augment: auto` stands for."""
        by_size = "pad_crop" if self.image_size <= 64 else "random_resized_crop"
        return self.augment if self.augment != "auto" else "none" if self.type == "digits" else by_size


class ASTConfig(Section):
    mode: Literal["ast", "dense", "random"] = Field("ast", description="sparse, the baseline, or the control")
    scoring: Literal["batch", "history"] = Field(
        "batch", description="batch: score every loaded sample by a forward; history: by its loss when last trained on"
    )
    rule: Literal["pi", "topk", "infobatch"] = Field(
        "pi",
        description="who is active: over the controlled threshold, or by a rule: topk (batch), infobatch (history)",
    )
    leave_out: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="history: share of the samples, of highest significance, left out: mislabelled ones",
    )
    explore: float = Field(
        0.1, ge=0, lt=1, description="history: chance of a sample below the threshold to be trained on all the same"
    )
    explore_weight_cap: float = Field(
        1.0, ge=1, description="history: weight of such a sample is 1 / explore, at most this; 1: none"
    )
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
    batch_size: int = Field(128, ge=1, description="samples a step, of all processes together")
    optimizer: Literal["sgd", "adamw"] = Field("sgd", description="norms and biases are not decayed")
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine decay")
    lr_warmup_epochs: float = Field(0, ge=0, description="epochs over which the rate rises from 0")
    lr_decay: Literal["epochs", "time"] = Field(
        "epochs", description="time: the schedule and the run end after max_minutes of training, validation left out"
    )
    momentum: float = Field(0.9, ge=0, lt=1, description="SGD momentum")
    nesterov: bool = Field(False, description="SGD: Nesterov's form of momentum")
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
    sync_batchnorm: bool = Field(
        False, description="several GPUs: BatchNorm over the samples of all of them, not each GPU's own"
    )
    num_workers: int | None = Field(None, ge=0, description="loader processes; null: one a core, at most 16")
    max_minutes: float | None = Field(
        None, gt=0, description="cap on wall time from start or resumption to the results, minutes; see lr_decay"
    )
    max_nonfinite_steps: int = Field(
        0, ge=0, description="steps with a loss that is not finite to leave out before the run is given up"
    )
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
    checkpoint_minutes: float | None = Field(
        None, gt=0, description="checkpoint so often within an epoch too, minutes; null: at epoch ends alone"
    )
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
        no_sparse = a.mode != "dense" and a.warmup_epochs + self.dense_end() >= t.epochs
        varying = t.compile != "off" and a.mode == "ast" and a.scoring == "batch" and not a.pack
        history = a.mode == "ast" and a.scoring == "history"
        crowded = history and a.rule == "pi" and a.explore >= a.target_activation
        too_few = history and a.rule == "pi" and a.leave_out + a.target_activation > 1 + 1e-9
        biased = history and a.rule == "pi" and a.explore == 0 and a.explore_weight_cap > 1
        needs = {"topk": "batch", "infobatch": "history"}.get(a.rule, a.scoring)
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
            (a.scoring != needs, f"ast.rule: {a.rule} needs ast.scoring={needs}"),
            (
                a.rule == "infobatch" and a.entropy_weight,
                "ast.entropy_weight: 0 for ast.rule=infobatch, the loss alone",
            ),
            (
                a.rule == "infobatch" and a.anneal_epochs,
                "ast.anneal_epochs: 0 for ast.rule=infobatch, its own is an eighth",
            ),
            (crowded, f"ast.explore: {a.explore:g} or more of all samples, and ast.target_activation is no larger"),
            (too_few, f"ast.leave_out: leaves fewer than ast.target_activation={a.target_activation:g} of the samples"),
            (biased, "ast.explore_weight_cap: with ast.explore=0 no weight makes up for the samples left out"),
            (history and a.score_resolution, "ast.score_resolution: ast.scoring=history makes no forward to score"),
            (start < a.min_threshold, "ast.initial_threshold: below ast.min_threshold"),
            (t.min_lr > t.lr, "training.min_lr: larger than training.lr"),
            (t.nesterov and not t.momentum, "training.nesterov: needs training.momentum"),
            (t.lr_warmup_epochs > t.epochs, "training.lr_warmup_epochs: more than training.epochs"),
        ):
            if wrong:
                raise ValueError(complaint)
        return self

    def is_sparse(self, epoch: int) -> bool:
        """Whether `epoch` (from 0) trains on a selection rather than on everything."""
        first, end = self.ast.warmup_epochs, self.training.epochs - self.dense_end()
        return self.ast.mode != "dense" and first <= epoch < end

    def share(self, epoch: int) -> float:
        """Which share of the samples `epoch` is planned to load."""
        chosen_before = self.ast.mode == "random" or self.ast.scoring == "history"
        return self.ast.target_activation if chosen_before and self.is_sparse(epoch) else 1.0

    def lr_warmup_share(self) -> float:
        """Which share of the planned steps training.lr_warmup_epochs are."""
        before = np.cumsum([0.0, *(self.share(epoch) for epoch in range(self.training.epochs))])
        return float(np.interp(self.training.lr_warmup_epochs, np.arange(len(before)), before / before[-1]))

    def dense_end(self) -> int:
        """How many epochs at the end are dense; InfoBatch (see `choose_by_mean`) says an eighth."""
        return math.ceil(self.training.epochs / 8) if self.ast.rule == "infobatch" else self.ast.anneal_epochs


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


# What a wrong tag such as `!!bool x` raises is of no kind of YAML's own
BAD_YAML = (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError)


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
    except BAD_YAML as error:
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
        except BAD_YAML as error:
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


class History:
    """What each sample of the training set was worth when it was last trained on (`ast.scoring: history`).

    Filled for nothing by the training forward, kept on the device: float32 significance, nats, infinite for a sample
    never seen or without a finite loss; int16 epoch of the last visit, -1 for never; uint8 what the running epoch
    makes of it: 0 left out, 1 active, 2 explored. 7 bytes a sample, indexed by the data set's own index.

    Of several processes each keeps a range of the indices, and what the epoch makes of all: 1 + 6 / world bytes a
    sample. What a process records it sends at the epoch's end, and before a checkpoint, to whom it belongs (`merge`).
    """

    def __init__(self, samples: int, explored_weight: float, device: torch.device, dist: Dist | None = None):
        self.explored_weight, self.dist = explored_weight, dist or Dist()
        self.edges = self.dist.edges(samples)
        self.own = slice(self.edges[self.dist.rank], self.edges[self.dist.rank + 1])
        self.significance = torch.full((self.own.stop - self.own.start,), math.inf, device=device)
        self.seen = torch.full_like(self.significance, -1, dtype=torch.int16)
        self.kinds = torch.ones(samples, dtype=torch.uint8, device=device)
        self.to_send: list[tuple[Tensor, Tensor]] = []  # indices and significance, where there are several processes

    def weights(self, indices: Tensor) -> Tensor:
        """Of the loss of each sample, float32 [batch]."""
        return torch.where(self.kinds[indices] == 2, self.explored_weight, 1.0)

    def record(self, indices: Tensor, significance: Tensor, epoch: int) -> None:
        """Keep the batch's significance, [batch], nats."""
        significance = torch.nan_to_num(significance, nan=math.inf, posinf=math.inf)
        if self.dist.world > 1:
            self.to_send.append((indices, significance))
        else:
            self._keep(indices, significance, epoch)

    def _keep(self, indices: Tensor, significance: Tensor, epoch: int) -> None:
        self.significance.index_copy_(0, indices, significance)
        self.seen.index_fill_(0, indices, epoch)  # where `seen[indices] = epoch` would wait for the device

    def merge(self, epoch: int) -> None:
        """Send what was recorded in `epoch`, 12 bytes a sample, to the ranks that keep it. Collective."""
        nothing = self.significance[:0].long(), self.significance[:0]
        indices, significance = (torch.cat(each) for each in zip(nothing, *self.to_send, strict=True))
        self.to_send = []
        owners = torch.searchsorted(torch.tensor(self.edges[1:], device=indices.device), indices, right=True)
        moves = self.dist.gather(owners.bincount(minlength=self.dist.world).tolist()).astype(int)
        order = owners.argsort()
        indices, significance = (self.dist.exchange(each[order], moves) for each in (indices, significance))
        self._keep(indices - self.own.start, significance, epoch)

    def scores(self, order: np.ndarray) -> np.ndarray:
        """The significance of all samples in this `order` of their indices, float32 on the host. Collective."""
        own = self.significance.cpu().numpy()
        if self.dist.world == 1:
            return own[order]
        scores = np.full(len(order), -math.inf, dtype=np.float32)
        at = np.flatnonzero((order >= self.own.start) & (order < self.own.stop))
        scores[at] = own[order[at] - self.own.start]
        return self.dist.all_max(torch.from_numpy(scores)).numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """The store, the whole of it on rank 0. Collective."""
        significance, seen = self.significance, self.seen
        if self.dist.world > 1:
            moves = np.zeros((self.dist.world, self.dist.world), dtype=int)
            moves[:, 0] = np.diff(self.edges)
            significance = self.dist.exchange(significance, moves)
            seen = self.dist.exchange(seen[:, None].view(torch.uint8), moves).view(torch.int16)[:, 0]  # no int16 there
        return {"significance": significance, "seen": seen, "kinds": self.kinds}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a whole store, or this rank's part of it."""
        self.kinds.copy_(state["kinds"])
        self.significance.copy_(state["significance"][self.own])
        self.seen.copy_(state["seen"][self.own])


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


def synchronised(model: nn.Module) -> nn.Module:
    """The model with every BatchNorm over the samples of all ranks; timm's keep the activation that is part of them."""
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


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
    unreadable: list[str]  # what could not be decoded, by name, with the reason; other samples stand in for it
    indices: Tensor  # int64 [batch], of the samples asked for


class Loaded(NamedTuple):
    """A batch on the device."""

    images: Tensor  # uint8 [batch, 3, H, W]
    labels: Tensor  # int64 [batch]
    indices: Tensor  # int64 [batch], which samples of the data set


Loader = Iterable[Batch]


class BadImages:
    """The images that could not be read, each counted once, in the order they were met."""

    def __init__(self, limit: int):
        self.limit, self.found = limit, []

    def add(self, unreadable: Iterable[str]) -> None:
        """Raises RequestError naming the first image beyond `limit`."""
        known = {text.partition(": ")[0]: text for text in [*unreadable, *self.found]}  # reasons may change
        self.found += [text for name, text in known.items() if not any(t.startswith(f"{name}: ") for t in self.found)]
        if len(self.found) > self.limit:
            allowed = f"; dataset.max_bad_images={self.limit} allows no more" if self.limit else ""
            raise RequestError(f"dataset: {self.found[self.limit]}{allowed}")


def decode_image(data: bytes) -> Tensor:
    """uint8 [3, H, W] from the bytes of an image file: torchvision.io for JPEG, Pillow for the rest, because
    torchvision's PNG decoder ends the whole process on some damaged files.

    Raises ValueError where neither can read it.
    """
    if data[:3] == b"\xff\xd8\xff":
        with contextlib.suppress(RuntimeError, ValueError, AttributeError):  # AttributeError: it is to be given up
            encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)
            return torchvision.io.decode_image(encoded, torchvision.io.ImageReadMode.RGB)
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as opened:
            if opened.mode.startswith("I"):  # 16 bits a pixel, which conversion would clip
                opened = Image.fromarray((np.asarray(opened) // 256).astype(np.uint8))
            return v2.functional.pil_to_tensor(opened.convert("RGB"))
    except Exception as error:  # Pillow's decoders raise almost anything on hostile bytes
        why = re.sub(r" <_io\.BytesIO.*?>", "", _one_line(error))  # an address, another one every time
        raise ValueError(f"not a readable image ({why})") from None


class Sample(NamedTuple):
    image: Tensor | None  # uint8 [3, H, W]; None where nothing could be read
    label: int
    unreadable: list[str]  # what this one stands in for, by name, with the reason
    index: int  # as it was asked for


class ImageDataset(Dataset):
    """Item (index, draws) is a Sample of side `size`: the index's own or, where that cannot be read, a later one.

    `samples[index]` is (what holds the image: a path, bytes or a uint8 tensor [3, H, W]; label); `draws` are the
    random numbers of its augmentation, see `EpochPlan`.
    """

    def __init__(self, samples: Sequence[tuple[Path | bytes | Tensor, int]], classes: list[str]):
        self.samples, self.classes = samples, classes
        self.view: View | None = None  # what `build_datasets` adds
        self.stand_ins = 0  # and this: dataset.max_bad_images
        self.shifts: np.ndarray | None = None  # by how many classes `dataset.label_noise` moves each label
        self.origin = ""  # what a sample that is no file is named after

    def __len__(self) -> int:
        return len(self.samples)

    def read(self, index: int) -> tuple[Path | bytes | Tensor, int]:
        return self.samples[index]

    def load(self, index: int) -> Sample:
        """The picture as it is, or the first readable one of the `stand_ins` after it. Beyond the last index it goes
        on with the first (`dataset.repeat`)."""
        unreadable = []
        for at in range(index, index + self.stand_ins + 1):
            at, source = at % len(self), None
            try:
                source, label = self.read(at)
                data = source.read_bytes() if isinstance(source, Path) else source
                image = data if isinstance(data, Tensor) else decode_image(data)
                return Sample(image, label, unreadable, index)
            except (OSError, ValueError) as error:
                name = source if isinstance(source, Path) else f"{self.origin}sample {at}"
                unreadable.append(f"{name}: {_one_line(error)}")
        return Sample(None, -1, unreadable, index)

    def noisy(self, labels: Sequence[int], indices: Sequence[int]) -> np.ndarray:
        """The labels as `dataset.label_noise` has them, int64 [n], of the samples at `indices`."""
        labels = np.asarray(labels, dtype=np.int64)
        if self.shifts is None:
            return labels
        return (labels + self.shifts[np.asarray(indices) % len(self)]) % len(self.classes)

    def labels(self) -> Iterable[int]:
        return (label for _, label in self.samples)

    def fingerprint(self) -> str:
        """A hash of what tells this data from other: names of classes and files, labels."""
        digest = hashlib.sha256(json.dumps([len(self), self.classes]).encode())
        digest.update(np.fromiter(self.labels(), np.int64).tobytes())
        for source, _ in self.samples if isinstance(self.samples, list) else ():
            digest.update(source.name.encode() if isinstance(source, Path) else b"")
        return digest.hexdigest()

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Sample:
        return self.__getitems__([key])[0]

    def __getitems__(self, keys: Sequence[tuple[int, np.ndarray]]) -> list[Sample]:
        """The items of `keys`, four at a time: boxes cost less drawn together, and pictures are cut while in cache."""
        samples: list[Sample] = []
        for start in range(0, len(keys), 4):
            chunk = keys[start : start + 4]
            loaded = [self.load(index) for index, _ in chunk]
            if self.shifts is not None:
                labels = self.noisy([sample.label for sample in loaded], [index for index, _ in chunk])
                loaded = [sample._replace(label=int(label)) for sample, label in zip(loaded, labels, strict=True)]
            good = [i for i, sample in enumerate(loaded) if sample.image is not None]
            draws = torch.from_numpy(np.stack([chunk[i][1] for i in good])) if good else torch.empty(0, DRAWS)
            for i, image in zip(good, self.view([loaded[i].image for i in good], draws), strict=True):
                loaded[i] = loaded[i]._replace(image=image)
            samples += loaded
        return samples


def collate(samples: list[Sample]) -> Batch:
    good = [sample for sample in samples if sample.image is not None]
    images = default_collate([sample.image for sample in good]) if good else torch.empty(0, dtype=torch.uint8)
    labels, indices = (torch.tensor([s[at] for s in good], dtype=torch.int64) for at in (1, 3))
    return Batch(images, labels, [bad for sample in samples for bad in sample.unreadable], indices)


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
    workers nor restarts nor a cache change what it looks like. `share(epoch)` below 1 is the part of the samples to be
    loaded: a random one, unless `chosen` says which. The last, smaller chunk is left out where a full one exists: every
    step has one shape. A resumed epoch begins at chunk `start`. Of several processes each goes through its part of
    every chunk: their number does not change what a step is made of.
    """

    def __init__(
        self, indices: np.ndarray, batch_size: int, seed: int, share: Callable[[int], float], dist: Dist | None = None
    ):
        self.indices, self.batch_size, self.seed, self.share = indices, batch_size, seed, share
        self.dist = dist or Dist()
        self._shuffled: tuple[int, np.ndarray] = (-1, indices)  # epoch, its order
        self.begin(0)

    def begin(self, epoch: int, start: int = 0, chosen: np.ndarray | None = None) -> None:
        """Go to chunk `start` of `epoch`. chosen: uint8 by index, not 0 for the samples to load."""
        self.epoch, self.start, self.chosen = epoch, start, chosen

    def whole(self, samples: int) -> int:
        """So many samples without the last, smaller chunk."""
        return samples - samples % self.batch_size or samples

    def planned(self, epoch: int) -> int:
        """How many samples `epoch` is planned to load; what a choice takes may differ a little."""
        return self.whole(max(1, round(self.share(epoch) * len(self.indices))))

    def steps(self, epoch: int) -> int:
        """How many chunks those are."""
        return math.ceil(self.planned(epoch) / self.batch_size)

    @property
    def considered(self) -> int:
        """How many samples a dense epoch loads."""
        return self.whole(len(self.indices))

    def __len__(self) -> int:
        if self.chosen is None:
            return self.steps(self.epoch)
        return math.ceil(self.whole(np.count_nonzero(self.chosen[self.indices])) / self.batch_size)

    def shuffled(self) -> np.ndarray:
        """All indices in the order of this epoch."""
        if self._shuffled[0] != self.epoch:
            self._shuffled = self.epoch, np.random.default_rng((self.seed, self.epoch)).permutation(self.indices)
        return self._shuffled[1]

    def order(self) -> np.ndarray:
        """The indices this epoch loads, in order."""
        order = self.shuffled()
        if self.chosen is None:
            return order[: self.planned(self.epoch)]
        order = order[self.chosen[order] > 0]
        return order[: self.whole(len(order))]

    def __iter__(self) -> Iterator[list[tuple[int, np.ndarray]]]:
        order = self.order()
        for start in range(self.start * self.batch_size, len(order), self.batch_size):
            chunk = self.dist.part(order[start : start + self.batch_size])
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
    """The items of `indices` are (a Batch of side `side`, their heights over widths), to be sent as one; see
    ImageDataset."""

    def __init__(self, dataset: ImageDataset, side: int):
        self.dataset, self.side = dataset, side

    def __getitems__(self, indices: Sequence[int]) -> tuple[Batch, Tensor]:
        samples, aspects = [self.dataset.load(index) for index in indices], []
        for i, sample in enumerate(samples):
            if (image := sample.image) is None:
                continue
            kept = image if image.shape[1:] == (self.side, self.side) else _resize(image, self.side)
            samples[i] = sample._replace(image=kept)
            aspects.append(image.shape[1] / image.shape[2])
        return collate(samples), torch.tensor(aspects, dtype=torch.float64)


# What runs in one process have decoded, by data set; None where a process has one run (see run_sweep.py --one-process)
SHARED_PICTURES: dict[tuple, tuple[Tensor, np.ndarray, Tensor]] | None = None


class Share(NamedTuple):
    """A process's part in a batch of resident pictures."""

    rows: np.ndarray  # int64: those it yields
    kept: np.ndarray  # int64: those it has the pictures of, counted from its first one
    moves: np.ndarray | None  # int [world, world]: how many pictures go from whom to whom


class ResidentLoader:
    """A data set decoded once and kept on the device: uint8 [n, 3, side, side]. Yields batches in the order of
    `plan`, or, without one, in the order of `indices` and not augmented.

    Pictures to be cropped at random are kept as squares, both axes resized, with the ratio of their sides: a crop is
    drawn in the shape of the original and maps to the square axis by axis. Augmentation happens on the device and is
    a function of (seed, epoch, index). `shared`: options of the DataLoader that decodes. Raises RequestError naming
    the first unreadable image beyond `dataset.max_bad_images`.

    Of several processes each keeps a range of the pictures. A batch takes from each what it has of it, more from one
    and fewer from another; those that one has too many go to who has too few before they are cropped.
    """

    def __init__(self, dataset: ImageDataset, indices: np.ndarray, plan: EpochPlan | None, config: Config,
                 device: torch.device, shared: dict[str, Any], batch_size: int | None = None):  # fmt: skip
        batch_size = batch_size or config.training.batch_size
        self.plan, self.indices, self.batch_size = plan, indices, batch_size
        self.dist = plan.dist if plan else Dist()  # without a plan `indices` are this process's alone
        self.edges = self.dist.edges(len(indices))
        self.view, self.side = dataset.view, kept_side(config.dataset)
        self.keys = torch.from_numpy(indices).to(device)
        self.bad = BadImages(config.dataset.max_bad_images)
        which = (plan is None, str(device), config.dataset.model_dump_json(exclude={"label_noise"}))
        kept = (SHARED_PICTURES or {}).get(which) or self._decode(dataset, device, shared)
        if SHARED_PICTURES is not None:
            SHARED_PICTURES[which] = kept
            if len(SHARED_PICTURES) > 4:  # two data sets
                del SHARED_PICTURES[next(iter(SHARED_PICTURES))]
        self.images, labels, self.aspects = kept
        self.labels = torch.from_numpy(dataset.noisy(labels, indices)).to(device)
        mode = "off" if plan is None or config.training.compile == "off" else "default"
        self.crop = compiled(partial(crop_resize, size=self.view.size), mode)
        if mode != "off":  # compile before the clock of the training starts
            next(iter(self))

    def _decode(
        self, dataset: ImageDataset, device: torch.device, shared: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray, Tensor]:
        """This process's pictures [own, 3, side, side] on the device, and of all samples the labels [n] on the host
        and the heights over widths [n] on the device."""
        own = self.dist.part(self.indices)
        images = torch.empty(len(own), 3, self.side, self.side, dtype=torch.uint8, device=device)
        labels, aspects, done = np.empty(len(own), dtype=np.int64), np.empty(len(own)), 0
        decoder = DataLoader(_Kept(dataset, self.side), 256, sampler=own.tolist(), **shared)
        for batch, shapes in tqdm(decoder, desc="decoding", unit="batch", leave=False, disable=quiet()):
            self.bad.add(batch.unreadable)
            part = slice(done, done + len(shapes))
            images[part], labels[part], aspects[part] = batch.images.to(device), batch.labels.numpy(), shapes.numpy()
            done = part.stop
        everyone = zip(*self.dist.gather_objects((labels, aspects)), strict=True)
        labels, aspects = (np.concatenate(each) for each in everyone)
        return images, labels, torch.from_numpy(aspects).to(device)

    def __len__(self) -> int:
        return len(self.plan) if self.plan else math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = self.indices if self.plan is None else self.plan.order()
        order = np.searchsorted(self.indices, order)
        starts = range(self.batch_size * (self.plan.start if self.plan else 0), len(order), self.batch_size)
        shares = (self._share(order[start : start + self.batch_size]) for start in starts)
        while block := [*islice(shares, 64)]:  # few, large launches for the crops' numbers
            sizes = [[len(share[i]) for share in block] for i in (0, 1)]
            rows, own = (torch.from_numpy(np.concatenate([share[i] for share in block])) for i in (0, 1))
            rows, own = to_device(rows, self.images.device), to_device(own, self.images.device).split(sizes[1])
            views = (view.split(sizes[0]) for view in (rows, *self.views(rows)))
            for share, kept, part, *view in zip(block, own, *views, strict=True):
                images = self.images[kept]
                if share.moves is not None:
                    images = self.dist.exchange(images, share.moves)
                images = self.crop(images, *view) if view and len(part) else images
                yield Batch(images, self.labels[part], self.bad.found, self.keys[part])

    def _share(self, batch: np.ndarray) -> Share:
        """What this process has to do with the `batch`, rows of `indices`."""
        if self.dist.world == 1:
            return Share(batch, batch, None)
        keeper = np.searchsorted(self.edges[1:], batch, side="right")
        parts = [batch[keeper == rank] for rank in range(self.dist.world)]
        kept, moves = parts[self.dist.rank], self.dist.evening([len(part) for part in parts])
        if moves is None:
            return Share(kept, kept - self.edges[self.dist.rank], None)
        ends = moves.cumsum(1)[:, self.dist.rank]
        got = [part[end - n : end] for part, end, n in zip(parts, ends, moves[:, self.dist.rank], strict=True)]
        return Share(np.concatenate(got), kept - self.edges[self.dist.rank], moves)

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
    tell(f"dataset.cache: {size} on {device}")


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
    train.stand_ins = val.stand_ins = config.max_bad_images
    return train, val


def _load_hf(config: DatasetConfig, key: Literal["split_train", "split_val"]) -> Any:
    import datasets

    logging.getLogger("datasets").setLevel(logging.CRITICAL)  # what it has to say is in the one line
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


def as_is(batch: Any) -> Any:
    return batch


def label_shifts(samples: int, classes: int, share: float, seed: int) -> np.ndarray | None:
    """By how many classes each label moves for symmetric label noise: to any other class alike, [samples], int64.

    None without noise. A function of the seed and the sample's index.
    """
    if not share:
        return None
    draws = uniform(seed, 2**40, torch.arange(samples), 2).numpy()  # an epoch that never comes
    return np.where(draws[:, 0] < share, 1 + draws[:, 1] * (classes - 1), 0).astype(np.int64)


def _ignore_signals(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process ends the run, and its workers with it
        signal.signal(number, signal.SIG_IGN)


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
    indices, val_indices = _subset(len(train), dataset.max_train_samples), _subset(len(val), dataset.max_val_samples)
    indices = np.concatenate([indices + copy * len(train) for copy in range(dataset.repeat)])
    if len(indices) < dist.world:
        raise RequestError(f"dataset: {len(indices)} training samples for {dist.world} processes")
    val_indices, local_batch = dist.part(val_indices), training.batch_size // dist.world
    plan = EpochPlan(indices, training.batch_size, training.seed, config.share, dist)
    shared = {"num_workers": workers, "worker_init_fn": _ignore_signals}
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
    streaming = partial(DataLoader, **shared)
    return streaming(train, batch_sampler=plan), streaming(val, batch_sampler=chunks), plan, len(train.classes)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on `device` that the host does not wait for."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


def device_batches(loader: Loader, device: torch.device, bad_images: BadImages | None = None) -> Iterator[Loaded]:
    """The loader's batches on `device`, each copied there while the one before it is worked on.

    Raises RequestError naming the first unreadable image that `bad_images` does not allow; None allows none.
    """
    bad_images = bad_images or BadImages(0)
    copier = torch.cuda.Stream(device) if device.type == "cuda" else None
    ahead: tuple[Loaded, torch.cuda.Event] | None = None
    for batch in loader:
        bad_images.add(batch.unreadable)
        loaded = Loaded(batch.images, batch.labels, batch.indices)
        if copier is None or batch.images.is_cuda:
            yield loaded
            continue
        with torch.cuda.stream(copier):
            loaded = Loaded(*(tensor.to(device, non_blocking=True) for tensor in loaded))
            copied = copier.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = loaded, copied
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: Loaded, copied: torch.cuda.Event) -> Loaded:
    """Order the current stream after a copy made on another, and tell the allocator who uses it."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(stream)
    return batch


# ------------------------------------------------------------------------------------------- Distributed

CONTACT_SECONDS = 300.0  # how long a process waits for the others before it gives the run up
MEETINGS = count()  # of these processes: a run may follow another, and each has a name of its own in the store


def launched() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun sets them; (0, 1, 0) without it."""
    world = int(os.environ.get("WORLD_SIZE", 1))
    if world == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return 0, 1, 0
    return int(os.environ["RANK"]), world, int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))


def quiet() -> bool | None:
    """Whether this process is to show no bar; None: only on a terminal."""
    return True if launched()[0] else None


def connect(seconds: float, host: bool = False) -> distributed.Store:
    """The store where the processes of a run meet: torchrun's own, or, with `host`, rank 0's where there is none.

    torchrun keeps its store over restarts, so that each attempt writes under a name of its own. Raises RuntimeError
    where nobody answers within so many seconds.
    """
    address, port, wait = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=seconds)
    torchruns = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    host = host and not torchruns and launched()[0] == 0
    store = distributed.TCPStore(address, port, is_master=host, timeout=wait, wait_for_workers=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if torchruns else "0"
    return distributed.PrefixStore(f"ast-lab/{attempt}", store)


class Failures:
    """Who of a run's processes failed first, and why: kept in the store, so that it is said once."""

    def __init__(self) -> None:
        self.store, self.key = connect(5), "failure"

    def claim(self, code: int, why: str) -> bool:
        """Whether this process is the first one to fail; then `why` is kept for the others."""
        first = self.store.add(f"{self.key}/count", 1) == 1
        if first:
            self.store.set(self.key, json.dumps([code, why]))
        return first

    def reported(self) -> tuple[int, str] | None:
        """(exit code, message) of the process that failed first; None where it said nothing."""
        for _ in range(30):  # it may lose contact before it has said so
            if self.store.check([self.key]):
                return tuple(json.loads(self.store.get(self.key)))
            time.sleep(0.1)
        return None


def says_why(code: int, why: str) -> bool:
    """Whether this process is to say why the run failed: the first of them to fail, or the only one."""
    rank, world, _ = launched()
    try:
        return world == 1 or Failures().claim(code, why)
    except (RuntimeError, KeyError):  # no store: rank 0 had it
        return rank == 0


def asking_interval(world: int) -> int:
    """After how many steps so many processes ask each other whether to go on (`Run.agree`): up to 15 after each."""
    return max(1, world // 8)


class Dist:
    """The processes that work on a run together, and this one's rank among them; one alone does nothing here.

    What the host decides on goes through gloo and never waits for the device; gradients, scores and samples stay on
    the device (NCCL on GPUs). Every method but `edges`, `part`, `own_part` and `evening` is collective: all ranks call
    it, in the same order. Raises PeerLost where another process has ended or does not answer for CONTACT_SECONDS.
    """

    def __init__(self, rank: int = 0, world: int = 1):
        self.rank, self.world = rank, world
        # connections for what goes on beside other collectives; in torch 2.6 gloo can hang with both on the same
        self.beside: distributed.ProcessGroup | None = None

    @classmethod
    def join(cls, device: torch.device) -> Dist:
        """Meet the other processes that torchrun has started."""
        rank, world, _ = launched()
        dist = cls(rank, world)
        if world > 1 and not distributed.is_initialized():
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            with dist._contact():
                distributed.init_process_group(
                    backend,
                    store=distributed.PrefixStore(str(next(MEETINGS)), connect(CONTACT_SECONDS, host=True)),
                    rank=rank,
                    world_size=world,
                    timeout=timedelta(seconds=CONTACT_SECONDS),
                )
                dist.beside = distributed.new_group(timeout=timedelta(seconds=CONTACT_SECONDS), backend="gloo")
        return dist

    def leave(self) -> None:
        """Close the connections, once all ranks are here.

        torch 2.6 joins gloo's threads while it holds the GIL, which a thread wants to let go of its last tensors: they
        get the time for it.
        """
        if self.world > 1:
            self.gather([0])
            self.beside = None
            time.sleep(0.1)
            distributed.destroy_process_group()

    @contextlib.contextmanager
    def _contact(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, ValueError) as error:
            with contextlib.suppress(RuntimeError, KeyError):
                if (report := Failures().reported()) is not None:
                    raise PeerLost(report[1], report[0]) from None
            why = re.sub(r"\[[^]]*]:?(\d+: )? *", "", _one_line(error))[:120]
            raise PeerLost(f"another process of the run has ended or does not answer: {why}") from None

    def edges(self, n: int) -> list[int]:
        """Where each rank's part of n things begins, and n: the parts differ by one at most."""
        return [n * rank // self.world for rank in range(self.world + 1)]

    def part(self, things: Any) -> Any:
        """This rank's part of an array, tensor or list."""
        edges = self.edges(len(things))
        return things[edges[self.rank] : edges[self.rank + 1]]

    def own_part(self, chosen: Tensor, n: int) -> tuple[Tensor, list[int]]:
        """Of the chosen, int64, ascending, out of n: (those in this rank's part, counted from its start; how many
        each rank has)."""
        edges = torch.tensor(self.edges(n))
        cuts = torch.searchsorted(chosen, edges).tolist()
        return chosen[cuts[self.rank] : cuts[self.rank + 1]] - edges[self.rank], np.diff(cuts).tolist()

    def all_sum(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by the sum of all ranks'."""
        if self.world > 1:
            with self._contact():
                distributed.all_reduce(tensor)
        return tensor

    def all_max(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by the largest of all ranks', element by element."""
        if self.world > 1:
            with self._contact():
                distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor

    def gather(self, values: Sequence[float]) -> np.ndarray:
        """Every rank's numbers, float64 [world, n]."""
        return self.gather_later(values)()

    def gather_later(self, values: Sequence[float]) -> Callable[[], np.ndarray]:
        """Start to `gather`, and go on. Returns what waits for the numbers."""
        own = torch.tensor([float(value) for value in values], dtype=torch.float64)
        if self.world == 1:
            return lambda: own.numpy()[None]
        rows = [torch.empty_like(own) for _ in range(self.world)]
        with self._contact():
            work = distributed.all_gather(rows, own, async_op=True, group=self.beside)

        def wait() -> np.ndarray:
            with self._contact():
                work.wait()
            return torch.stack(rows).numpy()

        return wait

    def gather_objects(self, thing: Any) -> list[Any]:
        """Every rank's `thing`, for what is asked once an epoch."""
        things = [thing] * self.world
        if self.world > 1:
            with self._contact():
                distributed.all_gather_object(things, thing)
        return things

    def first(self, thing: Any) -> Any:
        """Rank 0's `thing`."""
        return self.gather_objects(thing if self.rank == 0 else None)[0]

    def require_same(self, complaint: str, thing: Any) -> None:
        """Raises RequestError on every rank, naming one that differs from rank 0, unless all have the same `thing`."""
        things = self.gather_objects(thing)
        if differing := [rank for rank, each in enumerate(things) if each != things[0]]:
            raise RequestError(f"{complaint}, rank {differing[0]} other than rank 0")

    def join_columns(self, facts: Tensor, size: int) -> Tensor:
        """[rows, n] of every rank beside each other, [rows, world * size]; n < size is filled up with -inf."""
        if self.world == 1:
            return facts
        facts = F.pad(facts, (0, size - facts.shape[1]), value=-math.inf).contiguous()
        parts = [torch.empty_like(facts) for _ in range(self.world)]
        with self._contact():
            distributed.all_gather(parts, facts)
        return torch.cat(parts, 1)

    def exchange(self, tensor: Tensor, moves: np.ndarray) -> Tensor:
        """Send rows of this rank's `tensor` to the others, and get theirs, in the order of the ranks.

        moves: int [world, world], how many rows each rank (first index) has for each (second). The first
        `moves[rank, 0]` of this rank's rows go to rank 0, the next ones to rank 1, and so on.
        """
        gets, sends = moves[:, self.rank].tolist(), moves[self.rank].tolist()
        received = tensor.new_empty(sum(gets), *tensor.shape[1:])
        with self._contact():
            distributed.all_to_all_single(received, tensor.contiguous(), gets, sends)
        return received

    def evening(self, counts: Sequence[int]) -> np.ndarray | None:
        """The moves (see `exchange`) after which all ranks have as many samples, or one more: from those that have more
        than their part to those that have less. `counts`: how many each has. None where nothing has to move."""
        shares = np.diff(self.edges(sum(counts)))
        kept = np.minimum(counts, shares)
        if (kept == shares).all():
            return None
        over, under = (np.cumsum(each - kept) for each in (np.asarray(counts), shares))  # both end at the same sum
        first = np.maximum.outer(over - (counts - kept), under - (shares - kept))
        return np.diag(kept) + np.maximum(0, np.minimum.outer(over, under) - first)

    def even_out(self, counts: Sequence[int], *tensors: Tensor) -> tuple[Tensor, ...]:
        """Spread samples evenly over the ranks, each of which has its number of `counts`."""
        moves = None if self.world == 1 else self.evening(counts)
        return tensors if moves is None else tuple(self.exchange(tensor, moves) for tensor in tensors)


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
    """Sums of loss and hits over an epoch, kept on the device so that counting never waits for it.

    `allowed`: how many steps with a loss or score that is not finite the rest of the run may have.
    """

    def __init__(self, device: torch.device, epoch: int, allowed: int = 0):
        self.epoch, self.allowed = epoch, allowed
        # loss, hits, non-finite steps, 1 + the first of them, their samples, optimizer steps skipped, their samples
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)
        self.hits = self.trained = self.predicted = 0  # hits: those the host has counted

    def add_loss(self, loss: Tensor, samples: int, step: int) -> Tensor:
        """`loss`: summed over the samples, on the device. Returns whether it is not finite, on the device too."""
        bad = ~loss.isfinite()
        self.sums[0] += loss.masked_fill(bad, 0.0)
        self._add_bad(bad, samples, step)
        self.trained += samples
        return bad

    def leave_out(self, step: int) -> None:
        """Count a batch whose scores are not finite. Raises TrainingFailed where it is one too many."""
        self._add_bad(torch.ones((), dtype=torch.bool, device=self.sums.device), 0, step)
        self.read()

    def _add_bad(self, bad: Tensor, samples: int, step: int) -> None:
        self.sums[3] = torch.where((self.sums[3] == 0) & bad, step + 1, self.sums[3])
        self.sums[2] += bad
        if self.allowed:  # else the first one ends the run
            self.sums[4] += bad * samples

    def add_skipped(self, bad: Tensor, samples: int) -> None:
        """Count an optimizer step over so many samples as skipped where `bad`, on the device, is true."""
        self.sums[5] += bad
        self.sums[6] += bad * samples

    def add_hits(self, hits: Tensor | int, samples: int) -> None:
        if isinstance(hits, int):
            self.hits += hits
        else:
            self.sums[1] += hits
        self.predicted += samples

    def skipped(self) -> tuple[int, int, int]:
        """(non-finite steps, optimizer steps skipped for them, their samples). A device-to-host read."""
        return tuple(int(self.sums[i]) for i in (2, 5, 6))

    def read(self) -> tuple[float | None, float | None]:
        """(mean loss of the trained, accuracy of the predicted in percent), None without any.

        Costs one device-to-host read. Raises TrainingFailed, naming the epoch's first step with a loss or score
        that is not finite, once there are more of them than `allowed`.
        """
        loss, hits, bad_steps, first, bad_samples, *_ = self.sums.tolist()
        if bad_steps > self.allowed:
            raise TrainingFailed(f"non-finite loss in epoch {self.epoch + 1}, step {int(first)}")
        trained = self.trained - bad_samples
        accuracy = 100 * (hits + self.hits) / self.predicted if self.predicted else None
        return (loss / trained if trained else None), accuracy

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in ("sums", "hits", "trained", "predicted")}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.sums.copy_(state["sums"])
        self.hits, self.trained, self.predicted = (state[name] for name in ("hits", "trained", "predicted"))


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
            tell(f"energy is not measured, energy_kj stays null: NVML says {_one_line(error)}")

    def read_kj(self) -> float | None:
        return None if self._read is None else self._read() / 1e6  # the counter is in millijoules


def append_jsonl(path: str | Path, row: dict[str, Any]) -> None:
    """Append one line, flushed to the disk before returning. Raises OSError, naming the file, where the disk does not
    take all of it; nothing of it then stays."""
    line = (json.dumps(row, allow_nan=False) + "\n").encode()
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        try:
            while line:  # a disk that fills up takes a part
                line = line[file.write(line) :]
            os.fsync(file.fileno())
        except OSError as error:
            with contextlib.suppress(OSError):
                file.truncate(end)
            raise OSError(error.errno, error.strerror, str(path)) from None


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


# -------------------------------------------------------------------------------------------- Checkpoint

MAY_CHANGE = ("training.epochs", "training.max_minutes", "training.num_workers", "training.early_stop_patience")
MAGIC = b"AST-LAB checkpoint, sha256: "
CAPPED = "capped.json"  # beside the checkpoint: what was logged of an epoch that it has not finished


def run_id(config: Config) -> str:
    """Which run a config is: a hash of what differs from the defaults, the seed included, logging left out.

    A results file's `config` gives the same hash once it is read as a Config.
    """
    differing = config.model_dump(exclude={"logging"}, exclude_defaults=True)
    canonical = json.dumps(differing, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def checkpoint_folder(config: Config) -> Path:
    return Path(config.logging.output_dir) / "checkpoints" / run_id(config)


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Have `write` make a file beside `path`, and put it in its place once it is whole and on the disk."""
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    try:
        write(part)
        with part.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Have the names in `folder` on the disk too, where the system can do that."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def file_digest(path: Path, size: int) -> bytes:
    """SHA-256, in hexadecimal, of the first `size` bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(min(2**20, size)):
            digest.update(block)
            size -= len(block)
    return digest.hexdigest().encode()


def save_checkpoint(state: dict[str, Any], path: Path, best: bool = False) -> None:
    """Write `state` to `path`, whole or not at all, followed by its SHA-256; the best one to best.pt beside it too.

    Raises OSError where the disk does not take it; what stood at `path` then still does.
    """

    def write(part: Path) -> None:
        with part.open("wb") as file:
            torch.save(state, file)
        digest = file_digest(part, part.stat().st_size)
        with part.open("ab") as file:
            file.write(MAGIC + digest)

    def link(part: Path) -> None:
        try:
            os.link(path, part)  # costs nothing, and nobody writes into a checkpoint
        except OSError:
            shutil.copyfile(path, part)

    replace_file(path, write)
    if best:
        replace_file(path.with_name("best.pt"), link)


def load_checkpoint(path: Path, config: Config) -> dict[str, Any]:
    """What `save_checkpoint` wrote, tensors on the host. No code in it is run (`weights_only`).

    Raises RequestError for a file that cannot be read, is not whole or altered, or belongs to another config: that
    names the keys that differ. Those of MAY_CHANGE and logging may.
    """
    try:
        size = path.stat().st_size - len(MAGIC) - 64
        with path.open("rb") as file:
            file.seek(max(size, 0))
            whole = size > 0 and file.read() == MAGIC + file_digest(path, size)
        if not whole:
            raise RequestError(f"{path}: damaged, or no checkpoint of this lab; best.pt beside it may be whole")
        state = torch.load(path, map_location="cpu", weights_only=True)
        saved = Config.model_validate(state["config"]).model_dump()
    except OSError as error:
        raise RequestError(f"{path}: cannot read the checkpoint: {error.strerror or _one_line(error)}") from None
    except RequestError:
        raise
    except Exception as error:  # the pickle machine raises almost anything on what it refuses
        raise RequestError(f"{path}: no checkpoint of this lab: {_one_line(error)[:200]}") from None
    asked = config.model_dump()
    keys = [key for key in config_keys() if key not in MAY_CHANGE and not key.startswith("logging.")]
    values = [(key, *(each[key.split(".")[0]][key.split(".")[1]] for each in (saved, asked))) for key in keys]
    if differing := [f"{key} ({old} there, {new} asked for)" for key, old, new in values if old != new]:
        raise RequestError(f"{path}: a checkpoint of another config: {', '.join(differing)}")
    return state


def host_copy(state: Any) -> Any:
    """A copy of nested dicts, lists and tensors that later steps do not touch; the caller synchronises."""
    if isinstance(state, Tensor):
        copied = torch.empty_like(state, device="cpu", pin_memory=state.is_cuda)
        return copied.copy_(state.detach(), non_blocking=True)
    if isinstance(state, dict):
        return {key: host_copy(value) for key, value in state.items()}
    return [host_copy(value) for value in state] if isinstance(state, list | tuple) else state


class Checkpoints:
    """Writes a run's checkpoints on a thread of its own, one at a time, while the training goes on."""

    def __init__(self, folder: Path):
        """Raises RequestError where `folder` cannot be made or written to."""
        self.folder, self.last, self.capped = folder, folder / "last.pt", folder / CAPPED
        require_folder(folder, "logging.output_dir", folder)
        for left in folder.glob("*.part"):  # of a process that was killed while it wrote
            left.unlink(missing_ok=True)
        self.writer = ThreadPoolExecutor(1, "checkpoint")
        self.pending: list[Future] = []
        self.saved = time.monotonic()

    def require_space(self, size: int) -> None:
        """Raises RequestError where the disk has no room for three files of `size` bytes: last, best, and the next."""
        there = sum(file.stat().st_size for file in self.folder.glob("*.pt"))
        needed, free = 3 * size - there, shutil.disk_usage(self.folder).free
        if needed > free:
            room = f"{needed / 2**20:,.0f} MiB, and {free / 2**20:,.0f} MiB are free there"
            raise RequestError(f"logging.output_dir: the checkpoints in {self.folder} need {room}")

    def save(self, state: dict[str, Any], device: torch.device, best: bool = False) -> None:
        """Copy `state`, write it in the background. Raises TrainingFailed where the one before was not written."""
        self.wait()
        copied = host_copy(state)
        synchronize(device)
        self.pending.append(self.writer.submit(save_checkpoint, copied, self.last, best))
        self.then(self.capped.unlink, True)
        self.saved = time.monotonic()

    def then(self, write: Callable, *arguments: Any) -> None:
        """Have `write` called once what was saved is on the disk: a log never knows more than the checkpoint."""
        self.pending.append(self.writer.submit(write, *arguments))

    def wait(self) -> None:
        """Until what was saved is on the disk. Raises TrainingFailed where it cannot be."""
        pending, self.pending = self.pending, []
        try:
            for each in pending:
                each.result()
        except (OSError, RuntimeError) as error:  # torch's writer says "unexpected pos", having met what the disk said
            met = error if isinstance(error, OSError) else error.__context__
            why = getattr(met, "strerror", None) or _one_line(error)
            path = getattr(met, "filename", None) or self.last
            raise TrainingFailed(f"{path}: cannot write, the checkpoint before is whole: {why}") from None

    def close(self) -> None:
        """Until the disk has what was saved, or has refused it; nothing can be saved any more."""
        self.writer.shutdown()


@contextlib.contextmanager
def claimed(folder: Path) -> Iterator[None]:
    """Keep the checkpoint `folder` to this process. Raises RequestError where another one has it, or where it cannot
    be made or written to.

    The lock is of the process alone, not of its loader workers, and the kernel takes it back however that ends.
    Where nothing came of the run, the folder goes again.
    """
    made, lock = not folder.exists(), folder / "lock"
    require_folder(folder, "logging.output_dir", folder)
    with lock.open("ab") as file:
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):  # else the file system has no locks
                todo = "wait for it to end, or set another logging.output_dir"
                raise RequestError(f"{folder}: another process is running this config into it; {todo}") from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                if made and [*folder.iterdir()] == [lock]:
                    lock.unlink(), folder.rmdir(), folder.parent.rmdir()


def find_checkpoint(config: Config, resume: str | None) -> Path | None:
    """The file that `--resume` means: a path, a folder's last.pt, or with `auto` the config's own if there is one."""
    if resume is None:
        return None
    path = checkpoint_folder(config) if resume == "auto" else Path(resume)
    path = path / "last.pt" if resume == "auto" or path.is_dir() else path
    return path if resume != "auto" or path.exists() else None


def align_jsonl(path: Path, history: dict[str, list], capped: Path | None = None) -> None:
    """Make a resumed run's log hold each epoch of `history` once: no line torn, lost or from beyond the checkpoint,
    nor the one that the file `capped` holds, where there is one.

    Lines of earlier and later runs in the same file stay.
    """
    text, gone = (
        each.read_text(encoding="utf-8", errors="replace") if each is not None and each.exists() else ""
        for each in (path, capped)
    )
    lines = [line for line in text.splitlines(keepends=True) if line.endswith("\n") and line != gone]
    own = [json.dumps(dict(zip(history, row, strict=True))) + "\n" for row in zip(*history.values(), strict=True)]
    start = max((i for i, line in enumerate(lines) if own and line == own[0]), default=len(lines))
    later = [i for i in range(start + 1, len(lines)) if lines[i].startswith('{"epoch": 1,')]
    lines[start : later[0] if later else len(lines)] = own
    replace_file(path, lambda part: part.write_text("".join(lines), encoding="utf-8"))


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


def resolve_device(training: TrainingConfig) -> torch.device:
    """The device to train on, of several processes each its own. Raises RequestError for `cuda` where there is none,
    or where there are fewer GPUs than processes."""
    if training.device == "cuda" and not torch.cuda.is_available():
        raise RequestError("training.device: cuda, but torch sees no GPU here; set training.device=cpu or auto")
    if training.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    _, world, local = launched()
    if world == 1:
        return torch.device("cuda")
    if (processes := int(os.environ.get("LOCAL_WORLD_SIZE", local + 1))) > torch.cuda.device_count():
        raise RequestError(f"training.device: {processes} processes and {torch.cuda.device_count()} GPUs here")
    torch.cuda.set_device(local)
    return torch.device("cuda", local)


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
        torch.backends.cudnn.benchmark = ast.pack or ast.mode != "ast" or ast.scoring == "history"
        torch.set_float32_matmul_precision("high")


class Stop:
    """Why the run should end before its last epoch: a signal, or the wall-clock cap."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.training = False  # before that there is nothing to save
        self.deadline = math.inf  # time.monotonic() seconds

    def watch_signals(self) -> None:
        """SIGINT and SIGTERM end the run after the current step, or at once where none was made; a second one does."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        if not self.training:
            sys.stdout.flush()
            if launched()[0] == 0:
                os.write(2, b"ended before the first step\n")
            os._exit(128 + number)  # an exception can get lost in an import that is under way
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def status(self, reserve_seconds: float = 0.0) -> str | None:
        """`interrupted` or `time_capped` (with `reserve_seconds` still needed), else None."""
        if self.signal is not None:
            return "interrupted"
        return "time_capped" if time.monotonic() + reserve_seconds >= self.deadline else None


IMAGENET_MOMENTS = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}  # of its pixels, 0 to 1


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
            line = json.dumps(row) + "\n"
            replace_file(self.checkpoints.capped, lambda part: part.write_text(line, encoding="utf-8"))
        append_jsonl(self.config.logging.jsonl_path, row)

    def checkpoint_due(self) -> bool:
        minutes = self.config.logging.checkpoint_minutes if self.dist.rank == 0 else None
        return minutes is not None and time.monotonic() - self.checkpoints.saved >= 60 * minutes


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
    with tqdm(total=steps, desc=label, unit="step", leave=False, disable=quiet(), dynamic_ncols=True) as bar:

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
        raise RequestError(f"training.compile: nothing can be compiled here ({_one_line(why)}); {hint}") from None
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


def meet(config: Config, device: torch.device) -> Dist:
    """Join the processes of this run, where there are several. Raises RequestError where they do not fit together."""
    _, world, _ = launched()
    if config.training.batch_size % world:
        raise RequestError(f"training.batch_size: {config.training.batch_size} is no multiple of {world} processes")
    if world > 1 and config.training.sync_batchnorm and device.type == "cpu":
        raise RequestError("training.sync_batchnorm: several processes need GPUs for it, torch has none for the CPU")
    dist = Dist.join(device)
    if world > 1:
        whole = config.model_dump(exclude={"logging"})
        dist.require_same("the processes were given different configs", [whole, str(checkpoint_folder(config))])
        share = config.training.batch_size // world
        tell(f"{world} processes, {share} samples a step each of training.batch_size={config.training.batch_size}")
    return dist


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
        outcome = {"status": fit(run, train_loader, val_loader, plan, stop)}
        if run.checkpoints is not None:
            run.checkpoints.wait()
    except Exception as error:
        known = explained(error, config)
        outcome = {"status": "failed", "error": _one_line(known)}
        if known is not error:
            raise known from None
        raise
    finally:
        result, path = build_result(run, outcome, run.elapsed()), None
        if run.checkpoints is not None:
            run.checkpoints.close()
            path = save_results(result, config.logging.output_dir)
            tell(f"{summary(result)}\nresults: {path}")
    return dist.first((result, path))


def begin_again(run: Run, path: Path | None, state: dict[str, Any] | None) -> None:
    """Put a checkpoint's `state` into a fresh run, and its log in order. Raises RequestError where it does not fit."""
    if state is None:
        tell("--resume auto: there is no checkpoint of this config, the run starts afresh")
        return
    try:
        run.load_state_dict(state)
        if run.config.logging.jsonl_path is not None and run.dist.rank == 0:
            align_jsonl(Path(run.config.logging.jsonl_path), run.history, path.with_name(CAPPED))
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        why = f"{type(error).__name__}: {_one_line(error)[:200]}"
        raise RequestError(f"{path}: a checkpoint that does not fit this model and data ({why})") from None
    except OSError as error:
        log = run.config.logging.jsonl_path
        raise RequestError(f"logging.jsonl_path: cannot put {log} in order: {error.strerror}") from None
    tell(f"resumed from {path}: epoch {run.epoch + 1}, step {run.step}")


def state_bytes(run: Run) -> int:
    """About how large a checkpoint is: weights, buffers and what the optimizer keeps of each weight."""
    training = run.config.training
    kept = 2 if training.optimizer == "adamw" else int(training.momentum > 0)
    sizes = {True: 0, False: 0}
    for tensor in run.model.state_dict(keep_vars=True).values():
        sizes[tensor.requires_grad] += tensor.nbytes
    return (1 + kept) * sizes[True] + sizes[False]


def explained(error: Exception, config: Config) -> Exception:
    """`error` as the one line a user can act on, where it is of a kind that is known to end runs."""
    text, folder = _one_line(error), config.logging.output_dir
    if "DataLoader worker" in text:
        hint = "out of memory? lower training.num_workers or training.batch_size"
        return TrainingFailed(f"a loader worker died: {text}; {hint}")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return TrainingFailed(f"out of memory: {text[:200]}; lower training.batch_size")
    if isinstance(error, OSError):
        return TrainingFailed(f"{error.filename or folder}: {error.strerror or text}")
    return error


def fit(run: Run, train_loader: Loader, val_loader: Loader, plan: EpochPlan, stop: Stop) -> str:
    """Train and validate epoch by epoch. Returns completed, early_stopped, time_capped or interrupted."""
    tell(epoch_line(run.config))
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
                tell("training.max_minutes are over: the last validation did not fit in and was left")
            break
        run.eval_seconds = time.monotonic() - started
        row = close_epoch(run, val_acc, plan.considered * run.step / len(plan))
        run.epochs_completed += whole
        tell(epoch_line(run.config, row))
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
    if run.epoch == run.config.training.epochs or (run.out_of_time() and run.step == 0):
        return "completed"
    if status := stop.status(run.eval_seconds):
        return status
    waited = len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0
    return "early_stopped" if patience is not None and waited >= patience else None


def prepare_outputs(outputs: LoggingConfig) -> None:
    """Make the output folders. Raises RequestError where nothing could be written at the end."""
    require_folder(Path(outputs.output_dir), "logging.output_dir", outputs.output_dir)
    if outputs.jsonl_path is not None:
        require_folder(Path(outputs.jsonl_path).parent, "logging.jsonl_path", outputs.jsonl_path)


def require_folder(folder: Path, key: str, path: str | Path) -> None:
    """Make `folder`. Raises RequestError naming `key` and `path` where it cannot be made or written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(2**16))  # a full disk takes names
    except OSError as error:
        raise RequestError(f"{key}: cannot write to {path}: {error.strerror}") from None


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


def save_results(result: dict[str, Any], output_dir: str | Path) -> Path:
    """Write final_results_<timestamp>.json whole or not at all, under a name nobody has taken.

    Raises TrainingFailed where the disk does not take it.
    """
    stamp, whole = datetime.now().strftime("%Y%m%d_%H%M%S"), Path(output_dir) / f"final_results.{os.getpid()}"
    write_result(result, whole)
    for tail in chain([""], (f"_{n}" for n in count(1))):
        path = Path(output_dir) / f"final_results_{stamp}{tail}.json"
        try:
            os.link(whole, path)  # claims the name and fills the file in one
        except OSError as error:
            if isinstance(error, FileExistsError) or path.exists():
                continue
            os.replace(whole, path)  # a file system without hard links
        break
    whole.unlink(missing_ok=True)
    return path


def write_result(result: dict[str, Any], path: Path) -> None:
    """Replace a results file, whole or not at all. Raises TrainingFailed where the disk does not take it."""
    text = json.dumps(result, indent=2, allow_nan=False) + "\n"
    try:
        replace_file(path, lambda part: part.write_text(text, encoding="utf-8"))
    except OSError as error:
        behind = f"; {result['error']}" if "error" in result else ""
        raise TrainingFailed(f"{path}: cannot write the results: {error.strerror}{behind}") from None


def tell(text: str) -> None:
    """Print for those who watch a run; a full disk or a closed pipe behind that does not end it."""
    if launched()[0]:  # rank 0 speaks for the others
        return
    with contextlib.suppress(OSError):
        print(text, flush=True)


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
    """Run a script's `main`: a wrong request is one line on stderr and exit code 2, a failed run or a disk that does
    not take its output 1."""
    load_dotenv()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # its retries would bury the one line
    try:
        code = main()
        sys.stdout.flush()
    except (RequestError, TrainingFailed) as error:
        failure = 2 if isinstance(error, RequestError) else getattr(error, "code", 1), _one_line(error)
    except OSError as error:
        failure = 1, f"{error.filename or 'standard output'}: {error.strerror or _one_line(error)}"
    except KeyboardInterrupt:
        return 130
    else:
        return code
    if says_why(*failure):
        print(f"error: {failure[1]}", file=sys.stderr)
    return failure[0]


def execute(config: Config, resume: str | None = None) -> int:
    """Train `config` as a command does: signals watched, results saved. Returns the exit code."""
    stop = Stop()
    stop.watch_signals()
    result, _ = train(config, stop, resume)
    return 128 + stop.signal if result["status"] == "interrupted" else 0


RESUME_HELP = "go on from a checkpoint; auto: from this config's own, if there is one"


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
    parser.add_argument("--resume", metavar="PATH|auto", help=RESUME_HELP)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.lr=0.05")
    args = parser.parse_intermixed_args(argv)
    return execute(load_config(args.config, args.overrides), args.resume)


if __name__ == "__main__":
    sys.exit(run_cli(main))
