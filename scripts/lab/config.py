"""The config: every key with its unit, meaning and default, and how a file and overrides become one."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from pydantic_core import PydanticCustomError

from lab.errors import RequestError, one_line
from lab.reading import BAD_YAML, _Dumper, _Loader, parse_config, read_config

Compile = Literal["off", "default", "reduce-overhead"]


class Section(BaseModel):
    """A part of the config: unknown keys, wrong types, NaN and infinity are refused."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _sound_text(cls, value: Any) -> Any:
        """Text that no file or library could take is refused here."""
        if isinstance(value, str) and (not value or "\0" in value or _surrogate(value)):
            raise PydanticCustomError("text", "text in UTF-8 without zero bytes, and not empty (no value: null)")
        return value


class ModelConfig(Section):
    name: str = Field("resnet18", description="resnet18, resnet50, vit_b_16 (torchvision) or any timm model")
    pretrained: bool = Field(False, description="start from published ImageNet weights (downloads them)")
    small_stem: bool = Field(False, description="torchvision ResNets at 32-64 px: 3x3 stem, no max-pool")


class DatasetConfig(Section):
    type: str = Field("digits", description="digits (embedded), folder (ImageFolder), hf (Hugging Face datasets)")
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
    padding: Literal["black", "reflect"] = Field("black", description="pad_crop: what lies beyond the picture's edge")
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
        return auto_augment(self.type, self.image_size) if self.augment == "auto" else self.augment


class ASTConfig(Section):
    mode: Literal["ast", "dense", "random"] = Field("ast", description="sparse, the baseline, or the control")
    measure: str = Field("loss_entropy", description="significance; loss_entropy: loss + entropy_weight * entropy")
    scoring: str = Field(
        "batch", description="batch: score every loaded sample by a forward; history: by its loss when last trained on"
    )
    rule: str = Field(
        "pi",
        description="which samples are active; pi: those over the controlled threshold; topk (with batch): the top "
        "share of each batch; infobatch (with history): those over the mean, and half of the others, which "
        "the schedule plans as 0.75 of the set, whatever target_activation says",
    )
    forget_rate: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="history: share of the samples, of highest significance, that is not trained on: wrong labels",
    )
    explore: float = Field(
        0.1, ge=0, lt=1, description="history: chance of a sample below the threshold to be trained on all the same"
    )
    explore_weight_cap: float = Field(
        1.0,
        ge=1,
        description="history: weight of such a sample is 1 / explore, at most this; 1: none. At 1 / explore or more "
        "the gradient is that of all samples times 1 / activation, for it is divided by the number trained on",
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
    min_active: int = Field(
        2, ge=0, description="train on at least this many samples of a batch (history: of an epoch), the top"
    )
    warmup_epochs: int = Field(1, ge=0, description="dense epochs before the sparse (or random) ones")
    anneal_epochs: int = Field(0, ge=0, description="dense epochs after them")


class TrainingConfig(Section):
    epochs: int = Field(10, ge=1, description="passes over the training set")
    batch_size: int = Field(128, ge=1, description="samples a step, of all processes together")
    optimizer: Literal["sgd", "adamw"] = Field(
        "sgd", description="norms, biases and a ViT's class token and positions are not decayed"
    )
    lr: float = Field(0.1, gt=0, description="peak learning rate")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the cosine decay")
    lr_warmup_epochs: float = Field(
        0,
        ge=0,
        description="epochs over which the rate rises from 0; lr_decay=time: their share of the planned steps, as a "
        "share of max_minutes",
    )
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
        None,
        gt=0,
        description="forward + backward FLOP of one sample; null: counted from the model, two a multiply-add, no input "
        "gradient in the first layer (ResNet-50 at 224 px: 24.3e9; the often quoted 7.8e9 is a forward alone)",
    )
    gpu_tdp_watts: float = Field(250.0, gt=0, description="for the energy proxy, watts of one GPU (of one process)")


class LoggingConfig(Section):
    output_dir: str = Field("results", description="where final_results_<timestamp>.json goes")
    jsonl_path: str | None = Field(None, description="append one JSON line an epoch to this file")
    checkpoint_minutes: float | None = Field(
        None, gt=0, description="checkpoint so often within an epoch too, minutes; null: at epoch ends alone"
    )
    tensorboard: bool = Field(False, description="write the same as scalars to <output_dir>/tensorboard/<timestamp>")


def _surrogate(text: str) -> bool:
    """Whether half a character is in it: from JSON, or from an argument that is not UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def auto_augment(kind: str, image_size: int) -> str:
    """What `dataset.augment: auto` stands for. kind: `dataset.type`; image_size: pixels."""
    return "none" if kind == "digits" else "pad_crop" if image_size <= 64 else "random_resized_crop"


def sparse_span(mode: str, rule: str, epochs: int, warmup_epochs: int, anneal_epochs: int) -> range:
    """The epochs (from 0) of a run of `epochs` that train on a selection; none in mode dense.

    It stops where the dense epochs at the end begin. InfoBatch has its own number of them, an eighth of the run.
    """
    stop = epochs - (math.ceil(epochs / 8) if rule == "infobatch" else anneal_epochs)
    return range(stop if mode == "dense" else warmup_epochs, stop)


def first_complaint(*checks: tuple[object, str]) -> None:
    """Raises ValueError with the first text whose condition is true."""
    for wrong, complaint in checks:
        if wrong:
            raise ValueError(complaint)


def require_known(key: str, value: str, known: Iterable[str]) -> None:
    """Raises ValueError naming `key` where its value is not among the known ones."""
    if value not in (names := list(known)):
        expected = " or ".join(filter(None, [", ".join(map(repr, names[:-1])), repr(names[-1])]))
        raise ValueError(f"{key}: expected {expected}, got {value!r}")


class Config(Section):
    model: ModelConfig = Field(default_factory=ModelConfig)
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    ast: ASTConfig = Field(default_factory=ASTConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Config:
        """What no table of the lab decides; see `load_config` for the rest."""
        d, a, t, log = self.dataset, self.ast, self.training, self.logging.jsonl_path
        no_sparse = a.mode != "dense" and not self.sparse_span()
        scored_at = a.score_resolution or d.image_size
        cropped = d.resolved_augment() == "random_resized_crop"
        start = a.min_threshold if a.initial_threshold == "auto" else a.initial_threshold
        first_complaint(
            (no_sparse, f"ast.warmup_epochs: with anneal_epochs it makes all of training.epochs={t.epochs} dense"),
            (scored_at > d.image_size, f"ast.score_resolution: larger than dataset.image_size={d.image_size}"),
            (d.cache_resolution and d.cache == "none", "dataset.cache_resolution: needs dataset.cache=device"),
            (d.cache_resolution and not cropped, "dataset.cache_resolution: only with augment=random_resized_crop"),
            (t.lr_decay == "time" and not t.max_minutes, "training.max_minutes: needed with training.lr_decay=time"),
            (a.min_active > t.batch_size, "ast.min_active: larger than training.batch_size"),
            (start < a.min_threshold, "ast.initial_threshold: below ast.min_threshold"),
            (t.min_lr > t.lr, "training.min_lr: larger than training.lr"),
            (t.nesterov and not t.momentum, "training.nesterov: needs training.momentum"),
            (t.lr_warmup_epochs > t.epochs, "training.lr_warmup_epochs: more than training.epochs"),
            (log is not None and Path(log).name in ("", ".."), f"logging.jsonl_path: expected a file, got {log!r}"),
        )
        return self

    def sparse_span(self) -> range:
        """The epochs (from 0) that train on a selection rather than on everything."""
        a = self.ast
        return sparse_span(a.mode, a.rule, self.training.epochs, a.warmup_epochs, a.anneal_epochs)

    def is_sparse(self, epoch: int) -> bool:
        """Whether `epoch` (from 0) trains on a selection rather than on everything."""
        return epoch in self.sparse_span()


def config_keys() -> dict[str, tuple[str, Any]]:
    """Every dotted key with its (description, default)."""
    return {
        f"{section}.{name}": (info.description or "", info.default)
        for section, part in Config.model_fields.items()
        for name, info in part.annotation.model_fields.items()
    }


SHORT = reprlib.Repr()  # a config may hold far more than its text is long
SHORT.maxstring = SHORT.maxother = 100
RENAMED = {"ast.leave_out": "ast.forget_rate"}


def dump_config(config: Config) -> str:
    """The config as YAML; `load_config` reads the same from it."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)


def takes_text(section: str, name: str) -> tuple[bool, bool]:
    """(whether the values of a key are text, whether it may be null); (False, False) for an unknown key."""
    part = Config.model_fields.get(section)
    info = part and part.annotation.model_fields.get(name)
    if not info:
        return False, False
    kinds = [info.annotation]
    for _ in range(2):  # a union, and the words of a Literal
        kinds = [kind for each in kinds for kind in (get_args(each) or [each])]
    return all(kind in (str, NoneType) or isinstance(kind, str) for kind in kinds), NoneType in kinds


def parse_override(override: str) -> tuple[str, str, Any]:
    """(section, name, value) of "section.name=value".

    Text is taken as it is written; null is null for a key that may be null. Other values are read as in a YAML file.
    Raises RequestError naming the override where it is malformed.
    """
    key, equals, written = override.partition("=")
    section, dot, name = key.partition(".")
    if not (equals and dot and name):
        raise RequestError(f"override {override!r}: expected section.key=value{_nearest(key)}")
    is_text, may_be_null = takes_text(section, name)
    if is_text:
        return section, name, None if may_be_null and written == "null" else written
    try:
        node = yaml.compose(written, Loader=_Loader)
        plain = isinstance(node, yaml.ScalarNode) and node.style is None and node.value == written
        return section, name, yaml.load(written, Loader=_Loader) if plain else written
    except BAD_YAML as error:
        raise RequestError(f"override {override!r}: not a valid value: {one_line(error)}") from None


def load_config(
    path: str | Path | None,
    overrides: Sequence[str] = (),
    text: str | None = None,
    check: Callable[[Config], None] | None = None,
) -> Config:
    """Read a YAML or JSON config and lay `overrides` ("training.lr=0.05", see `parse_override`) over it.

    text: the file's text, where it has been read before. check: raises ValueError for what the lab's tables do not know
    (`train_ast.check_config`). Raises RequestError, one line naming the file or the override and the key, for a file
    that is missing, empty or no mapping, an unknown key (with the nearest known one) and a value of the wrong type or
    range.
    """
    if text is None:
        text = read_config(path) if path else "{}"
    raw = parse_config(path, text)
    for override in overrides:
        section, name, value = parse_override(override)
        part = raw[section] = {} if raw.get(section) is None else raw[section]
        if isinstance(part, dict):  # otherwise the validation below names the section
            part[name] = value
    try:
        config = Config.model_validate({k: {} if v is None else v for k, v in raw.items()})
        if check is not None:
            check(config)
    except ValidationError as error:
        complaint = _explain(error)
    except ValueError as error:
        complaint = one_line(error)
    else:
        return config
    raise RequestError(f"{_blamed(complaint, overrides) or path or 'config'}: {complaint}")


def _blamed(complaint: str, overrides: Sequence[str]) -> str | None:
    """The override that a complaint is about: the last one of the key it begins with, or of one that it names."""
    first = complaint.partition(":")[0]
    keys = [override.partition("=")[0] for override in overrides]
    named = [first in (key, key.partition(".")[0]) for key in keys]
    if not any(named):
        named = [re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", complaint) is not None for key in keys]
    found = [override for override, is_named in zip(overrides, named, strict=True) if is_named]
    return f"override {one_line(repr(found[-1]), 200)}" if found else None


def _explain(error: ValidationError) -> str:
    """The first of pydantic's complaints as one line: key, what was expected, nearest key."""
    first = error.errors()[0]
    if first["type"] == "value_error":
        return one_line(first["ctx"]["error"])
    key = ".".join(str(part)[:100] for part in first["loc"][:2])
    if key in RENAMED:
        return f"{key}: is now called {RENAMED[key]}"
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(key)}"
    wrong = [e for e in error.errors() if e["loc"][:2] == first["loc"][:2]]
    hint = (
        "; in quotes it is text"
        if first["type"] == "string_type" and not isinstance(first["input"], dict | list)
        else ""
    )
    expected = " or ".join(e["msg"].replace("Input should be ", "").replace("Input should", "") for e in wrong)
    return f"{key}: expected {one_line(expected)}, got {one_line(SHORT.repr(first['input']))[:80]}{hint}"


def _nearest(key: str) -> str:
    """A hint at the known key that `key` is close to; one of the same section comes first."""
    key = key[:100]
    section, _, leaf = key.rpartition(".")
    known = [*config_keys(), *Config.model_fields]
    leaves = {name.rpartition(".")[2]: name for name in known}
    own = {name.rpartition(".")[2]: name for name in config_keys() if section and name.startswith(f"{section}.")}
    near = [own[name] for name in difflib.get_close_matches(leaf, own, 1, 0.6)]
    near = near or difflib.get_close_matches(key, known, 1, 0.75)
    near = near or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
    near = near or difflib.get_close_matches(key, known, 1, 0.0)
    return f"; did you mean {near[0]}?" if near else ""


def run_id(config: Config) -> str:
    """Which run a config is: a hash of what differs from the defaults, the seed included, logging left out.

    A results file's `config` gives the same hash once it is read as a Config.
    """
    differing = config.model_dump(exclude={"logging"}, exclude_defaults=True)
    canonical = json.dumps(differing, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def checkpoint_folder(config: Config) -> Path:
    return Path(config.logging.output_dir) / "checkpoints" / run_id(config)
