"""The config as a whole: what its sections need of each other, and how a file and overrides become
one.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import reprlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, get_args

import yaml
from pydantic import Field, ValidationError, model_serializer, model_validator

from lab.base.errors import RequestError, one_line
from lab.base.reading import BAD_YAML, _Dumper, _Loader, parse_config, read_config
from lab.config.imports import identities, resolved
from lab.config.keys import DENSE_END, NAMES
from lab.config.sections import (
    ASTConfig,
    DatasetConfig,
    LoggingConfig,
    MetricsConfig,
    ModelConfig,
    Section,
    TrainingConfig,
)


def sparse_span(mode: str, rule: str, epochs: int, warmup_epochs: int, anneal_epochs: int) -> range:
    """The epochs (from 0) of a run of `epochs` that train on a selection; none in mode dense.

    It stops where the dense epochs at the end begin. A rule may have its own number of them.
    """
    own = DENSE_END.get(rule)
    stop = epochs - (anneal_epochs if own is None else math.ceil(own * epochs))
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
        complaint = GONE_VALUES.get((key, value), f"expected {expected}, got {value!r}")
        raise ValueError(f"{key}: {complaint}")


class Config(Section):
    imports: list[str] = Field(  # see `lab.config.imports`
        default_factory=list,
        description="code of one's own: files (path/mine.py) and packages (package.module)",
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    ast: ASTConfig = Field(default_factory=ASTConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    @model_validator(mode="after")
    def _fields_fit_together(self) -> Config:
        """What no table of the lab decides; see `load_config` for the rest."""
        for key, names in NAMES.items() if not self.imports else ():
            section, _, name = key.partition(".")
            require_known(key, getattr(getattr(self, section), name), names)
        self._check_weights_and_data()
        self._check_selection()
        self._check_training()
        return self

    @model_serializer(mode="wrap")
    def _without_no_imports(self, dump: Callable[[Config], dict[str, Any]]) -> dict[str, Any]:
        dumped = dump(self)
        if not self.imports:
            dumped.pop("imports", None)
        return dumped

    def _check_weights_and_data(self) -> None:
        d = self.dataset
        has_weights = self.model.weights is not None
        is_trained = has_weights or self.model.pretrained
        cropped = d.resolved_augment() == "random_resized_crop"
        on_host = d.augment_policy != "none"
        in_jpeg = d.cache_format == "jpeg"
        two_starts = "with model.pretrained=true there are two to start from; leave out one"
        refitted = "measured is for random weights; trained ones keep their own"
        first_complaint(
            (is_trained and d.normalise == "measured", f"dataset.normalise: {refitted}"),
            (has_weights and self.model.pretrained, f"model.weights: {two_starts}"),
            (
                self.model.freeze and not is_trained,
                "model.freeze: random features are no use; set model.pretrained=true or "
                "model.weights",
            ),
            (
                on_host and d.cache != "none",
                f"dataset.augment_policy: {d.augment_policy} needs dataset.cache=none",
            ),
            (
                in_jpeg and d.cache == "disk" and not cropped,
                "dataset.cache_format: jpeg needs augment=random_resized_crop",
            ),
        )

    def _check_selection(self) -> None:
        a = self.ast
        side = self.dataset.image_size
        batch_size = self.training.batch_size
        start = a.min_threshold if a.initial_threshold == "auto" else a.initial_threshold
        first_complaint(
            (a.mode != "dense" and not self.sparse_span(), self._all_dense()),
            (
                (a.score_resolution or side) > side,
                f"ast.score_resolution: at most dataset.image_size={side}",
            ),
            (
                a.min_active > batch_size,
                f"ast.min_active: at most training.batch_size={batch_size}",
            ),
            (
                start < a.min_threshold,
                f"ast.initial_threshold: at least ast.min_threshold={a.min_threshold:g}",
            ),
        )

    def _check_training(self) -> None:
        t = self.training
        log = self.logging.jsonl_path
        first_complaint(
            (
                t.lr_decay == "time" and not t.max_minutes,
                "training.max_minutes: needed with training.lr_decay=time",
            ),
            (t.min_lr > t.lr, f"training.min_lr: at most training.lr={t.lr:g}"),
            (t.nesterov and not t.momentum, "training.nesterov: needs training.momentum"),
            (
                t.lr_warmup_epochs > t.epochs,
                f"training.lr_warmup_epochs: at most training.epochs={t.epochs}",
            ),
            (
                log is not None and Path(log).name in ("", ".."),
                f"logging.jsonl_path: expected a file, got {log!r}",
            ),
        )

    def _all_dense(self) -> str:
        """Why no epoch is left to train on a selection, and which key to lower."""
        warmup = self.ast.warmup_epochs
        epochs = self.training.epochs
        after = epochs - self.sparse_span().stop
        own = "" if self.ast.rule in DENSE_END else " or ast.anneal_epochs"
        return (
            f"ast.warmup_epochs: with {warmup} dense epochs at the start and {after} at the end, "
            f"none of training.epochs={epochs} is sparse; lower ast.warmup_epochs{own}, or raise "
            "training.epochs"
        )

    def sparse_span(self) -> range:
        """The epochs (from 0) that train on a selection rather than on everything."""
        a = self.ast
        return sparse_span(a.mode, a.rule, self.training.epochs, a.warmup_epochs, a.anneal_epochs)

    def is_sparse(self, epoch: int) -> bool:
        """Whether `epoch` (from 0) trains on a selection rather than on everything."""
        return epoch in self.sparse_span()


SECTIONS: dict[str, type[Section]] = {
    name: info.annotation for name, info in Config.model_fields.items() if name != "imports"
}


def config_keys() -> dict[str, tuple[str, Any]]:
    """Every dotted key with its (description, default)."""
    return {
        f"{section}.{name}": (info.description or "", info.default)
        for section, part in SECTIONS.items()
        for name, info in part.model_fields.items()
    }


def takes_whole_numbers(key: str) -> bool:
    """Whether a dotted key takes whole numbers and no others."""
    section, _, name = key.partition(".")
    kinds = _kinds(SECTIONS[section].model_fields[name].annotation)
    return int in kinds and float not in kinds


def _kinds(annotation: Any) -> set[Any]:
    """The types that a type hint is made of, and the values of a Literal."""
    parts = get_args(annotation)
    return set().union(*map(_kinds, parts)) if parts else {annotation}


SHORT = reprlib.Repr()  # a config may hold far more than its text is long
SHORT.maxstring = SHORT.maxother = 100
GONE = {  # keys of earlier days, and what to do instead
    "ast.leave_out": "is now called ast.forget_rate",
    "ast.explore_weight_cap": "is gone: an explored sample weighs 1",
    "ast.proxy_every": "is gone: a proxy learns from one scored batch in four",
    "ast.proxy_resolution": "is now ast.score_resolution",
    "ast.score_ahead": "is gone: batches are scored ahead wherever that helps",
    "dataset.cache_dir": "is gone: the environment variable HF_HOME says where downloads are kept",
    "training.amp_dtype": "is now training.mixed_precision=bfloat16 or float16",
    "training.compile_scoring": "is gone: training.compile holds for scoring too",
    "training.loss_weight": "is gone: early_learning has the weight of its paper, 3",
    "training.max_nonfinite_steps": "is gone: a loss that is not finite ends the run",
}
GONE_VALUES = {  # likewise
    ("ast.target_activation", "unseen"): "unseen is gone: auto judges by pictures kept out",
}


def dump_config(config: Config) -> str:
    """The config as YAML; `load_config` reads the same from it."""
    return yaml.dump(config.model_dump(), Dumper=_Dumper, sort_keys=False)


def takes_text(section: str, name: str) -> tuple[bool, bool]:
    """(whether the values of a key are text, whether it may be null); (False, False) for an unknown
    key.
    """
    part = SECTIONS.get(section)
    info = part and part.model_fields.get(name)
    if not info:
        return False, False
    kinds = _kinds(info.annotation)
    is_text = all(kind in (str, NoneType) or isinstance(kind, str) for kind in kinds)
    return is_text, NoneType in kinds


def parse_override(override: str) -> tuple[str, str, Any]:
    """(section, name, value) of "section.name=value".

    Text is taken as it is written; null is null for a key that may be null. Other values are read
    as in a YAML file. Raises RequestError naming the override where it is malformed.
    """
    key, equals, written = override.partition("=")
    section, dot, name = key.partition(".")
    if key == "imports":
        raise RequestError(f"override {override!r}: write --import {written or 'FILE'}")
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
    check: Callable[[Config, Sequence[str]], None] | None = None,
    imports: Sequence[str] = (),
) -> Config:
    """Read a YAML or JSON config and lay `overrides` ("training.lr=0.05", see `parse_override`)
    over it.

    text: the file's text, where it has been read before. check: raises ValueError for what the
    lab's tables do not know (`train_ast.check_config`), and runs the imports before. imports: of
    `--import`, added to the file's own. Raises RequestError, one line naming the
    file or the override and the key, for a file that is missing, empty or no mapping, an unknown
    key (with the nearest known one) and a value of the wrong type or range: all of them at once.
    """
    if text is None:
        text = read_config(path) if path else "{}"
    raw = parse_config(path, text)
    for override in overrides:
        section, name, value = parse_override(override)
        part = raw[section] = {} if raw.get(section) is None else raw[section]
        if isinstance(part, dict):  # otherwise the validation below names the section
            part[name] = value
    raw["imports"] = _all_imports(path, raw.get("imports"), imports)
    try:
        config = Config.model_validate({k: {} if v is None else v for k, v in raw.items()})
        if check is not None:
            check(config, [override.partition("=")[0] for override in overrides])
    except ValidationError as error:
        complaints = _explain(error)
    except ValueError as error:
        complaints = [one_line(error)]
    else:
        return config
    raise RequestError(_all_of(complaints, overrides, path or "config"))


def _all_imports(path: str | Path | None, own: Any, more: Sequence[str]) -> Any:
    """The imports of a config's text and those of `--import`, with their hashes. `own` as it is
    where it is no list of texts, which the validation then says.
    """
    if own is not None and not (isinstance(own, list) and all(isinstance(e, str) for e in own)):
        return own
    found: list[str] = []
    for source, texts in ((f"{path or 'config'}: imports", own or []), ("--import", more)):
        try:
            found = resolved([*found, *texts])
        except ValueError as error:
            raise RequestError(f"{source}: {one_line(error)}") from None
    return found


MOST_SHOWN = 5  # complaints about one config


def _all_of(complaints: Sequence[str], overrides: Sequence[str], path: str | Path) -> str:
    """Complaints as one line, each after the override or the file that it is about."""
    texts = []
    source = None
    for complaint in complaints[:MOST_SHOWN]:
        found = _blamed(complaint, overrides) or path
        texts.append(complaint if found == source else f"{found}: {complaint}")
        source = found
    more = len(complaints) - MOST_SHOWN
    return "; also ".join([*texts, *([f"{more} more"] if more > 0 else [])])


def _blamed(complaint: str, overrides: Sequence[str]) -> str | None:
    """The override that a complaint is about: the last one of the key it begins with, or of one
    that it names.
    """
    first = complaint.partition(":")[0]
    keys = [override.partition("=")[0] for override in overrides]
    named = [first in (key, key.partition(".")[0]) for key in keys]
    if not any(named):
        named = [
            re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.])", complaint) is not None
            for key in keys
        ]
    found = [override for override, is_named in zip(overrides, named, strict=True) if is_named]
    return f"override {one_line(repr(found[-1]), 200)}" if found else None


def _explain(error: ValidationError) -> list[str]:
    """Pydantic's complaints, a line for each key: what was expected, or the nearest key."""
    by_key: dict[tuple, list] = {}
    for each in error.errors():
        by_key.setdefault(each["loc"][:2], []).append(each)
    return [_explain_key(found) for found in by_key.values()]


def _explain_key(wrong: Sequence[Mapping[str, Any]]) -> str:
    """wrong: pydantic's complaints about one key."""
    first = wrong[0]
    if first["type"] == "value_error":
        return one_line(first["ctx"]["error"])
    key = ".".join(str(part)[:100] for part in first["loc"][:2])
    if key in GONE:
        return f"{key}: {GONE[key]}"
    if first["type"] == "extra_forbidden":
        return f"{key}: unknown key{_nearest(key)}"
    hint = (
        "; in quotes it is text"
        if first["type"] == "string_type" and not isinstance(first["input"], dict | list)
        else ""
    )
    expected = " or ".join(
        e["msg"].replace("Input should be ", "").replace("Input should", "") for e in wrong
    )
    return (
        f"{key}: expected {one_line(expected)}, got "
        f"{one_line(SHORT.repr(first['input']))[:80]}{hint}"
    )


USUAL_NAMES = {  # what others call a key of ours
    "amp": "mixed_precision",
    "arch": "name",
    "bs": "batch_size",
    "data_dir": "train_dir",
    "decay": "weight_decay",
    "learning_rate": "lr",
    "num_epochs": "epochs",
    "path": "train_dir",
    "root": "train_dir",
    "scheduler": "lr_schedule",
    "wd": "weight_decay",
    "workers": "num_workers",
}


def _leaves(keys: Iterable[str]) -> dict[str, str]:
    """Keys by their last part, and by its usual other names."""
    leaves = {key.rpartition(".")[2]: key for key in keys}
    return {n: leaves[own] for n, own in USUAL_NAMES.items() if own in leaves} | leaves


def _nearest(key: str) -> str:
    """A hint at the known key that `key` is close to; one of the same section comes first."""
    key = key[:100].replace("-", "_")
    section, _, leaf = key.rpartition(".")
    known = [*config_keys(), *Config.model_fields]
    leaves = _leaves(known)
    own = _leaves(name for name in config_keys() if name.startswith(f"{section}."))
    near = [own[leaf]] if leaf in own else []
    worded = [name for name in own if f"_{leaf}_" in f"_{name}_"]  # it is a word of these
    near = near or [own[name] for name in sorted(worded, key=len)[:1]]
    near = near or [own[name] for name in difflib.get_close_matches(leaf, own, 1, 0.6)]
    near = near or difflib.get_close_matches(key, known, 1, 0.75)
    near = near or [leaves[name] for name in difflib.get_close_matches(leaf, leaves, 1, 0.6)]
    near = near or difflib.get_close_matches(key, known, 1, 0.0)
    return f"; did you mean {near[0]}?" if near else ""


# What changes no figure of a run: where its files lie, how many processes read its pictures, and
# how long it waits for them.
NO_FIGURE = {
    "logging": True,
    "dataset": {"cache_folder", "worker_timeout"},
    "training": {"num_workers"},
}


def run_id(config: Config) -> str:
    """Which run a config is: a hash of what differs from the defaults, the seed included, without
    what changes no figure. Of imports the names and the texts count, not where they lie.

    A results file's `config` gives the same hash once it is read as a Config.
    """
    dumped = config.model_dump(exclude=NO_FIGURE, exclude_defaults=True)
    differing = {section: values for section, values in dumped.items() if values}
    if config.imports:
        differing["imports"] = identities(config.imports)
    canonical = json.dumps(differing, sort_keys=True, default=str)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def checkpoint_folder(config: Config) -> Path:
    return Path(config.logging.output_dir) / "checkpoints" / run_id(config)
