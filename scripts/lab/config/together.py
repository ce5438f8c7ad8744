"""What the values of a config need of each other. No torch: a command tells it at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from pydantic import Field

from lab.base.errors import one_line
from lab.base.reading import spell
from lab.config.keys import DENSE_END, LEAST_TARGET, OTHER_NEEDS, RULE_REPLACES, spelled, unmet
from lab.config.sections import (
    ASTConfig,
    DatasetConfig,
    LoggingConfig,
    MetricsConfig,
    ModelConfig,
    Section,
    TrainingConfig,
)

Check = tuple[object, str]  # a condition, and what is wrong where it is true


class Complaints(ValueError):
    """All that is wrong with a config, a text for each."""

    def __init__(self, texts: Sequence[str]):
        super().__init__("; also ".join(texts))
        self.texts = [*texts]


def failed(*checks: Check) -> list[str]:
    return [complaint for wrong, complaint in checks if wrong]


def complain(texts: Sequence[str]) -> None:
    """Raises ValueError with these texts, if there are any."""
    if texts:
        raise Complaints(texts)


def complaints_of(*calls: Callable[[], object]) -> list[str]:
    """What the calls complain of by a ValueError."""
    found = []
    for call in calls:
        try:
            call()
        except Complaints as error:
            found += error.texts
        except ValueError as error:
            found.append(one_line(error))
    return found


def sparse_span(mode: str, rule: str, epochs: int, warmup_epochs: int, anneal_epochs: int) -> range:
    """The epochs (from 0) of a run of `epochs` that train on a selection; none in mode dense.

    It stops where the dense epochs at the end begin. A rule may have its own number of them.
    """
    own = DENSE_END.get(rule)
    stop = epochs - (anneal_epochs if own is None else math.ceil(own * epochs))
    return range(stop if mode == "dense" else warmup_epochs, stop)


class Sections(Section):
    """A config, but for what its values need of each other (`lab.config.loading.Config`)."""

    imports: list[str] = Field(  # see `lab.config.imports`
        default_factory=list,
        description="your own code: files (path/mine.py) and packages (package.module)",
    )
    model: ModelConfig = Field(default_factory=ModelConfig)
    dataset: DatasetConfig = Field(default_factory=DatasetConfig)
    ast: ASTConfig = Field(default_factory=ASTConfig)
    training: TrainingConfig = Field(default_factory=TrainingConfig)
    metrics: MetricsConfig = Field(default_factory=MetricsConfig)
    logging: LoggingConfig = Field(default_factory=LoggingConfig)

    def sparse_span(self) -> range:
        """The epochs (from 0) that train on a selection rather than on everything."""
        a = self.ast
        return sparse_span(a.mode, a.rule, self.training.epochs, a.warmup_epochs, a.anneal_epochs)

    def is_sparse(self, epoch: int) -> bool:
        """Whether `epoch` (from 0) trains on a selection rather than on everything."""
        return epoch in self.sparse_span()


class Traits(NamedTuple):
    """What the parts of a run say of themselves, as far as keys must suit it."""

    before_loading: bool  # its scores are known before a batch is loaded
    keeps_visits: bool  # its scores are what samples were worth when they were last seen
    own_target: bool  # its rule does not read ast.target_activation
    weighs: bool  # its rule weighs the samples
    keeps_labels: bool  # its doubt remembers what became of each label
    recalls: bool  # its loss remembers each sample, and learns of it by its step alone


def built_in_traits(config: Sections) -> Traits:
    """Of the lab's own parts. The classes say the same (`train_ast.traits_of`)."""
    ast = config.ast
    sparse = ast.mode == "ast"
    stored = sparse and ast.scoring == "history"
    above_mean = sparse and ast.rule == "infobatch"
    return Traits(
        before_loading=stored or not sparse,
        keeps_visits=stored,
        own_target=above_mean,
        weighs=above_mean,
        keeps_labels=sparse and bool(ast.forget_rate),
        recalls=False,
    )


def reuses(config: Sections) -> bool:
    """Whether every loaded batch of a sparse epoch is a step, of the forward that scored it."""
    return config.ast.mode == "ast" and config.ast.reuse_forward is not False


def has_fixed_shape(config: Sections, before_loading: bool) -> bool:
    """Whether all training steps of a kind of epoch are of one number of samples. before_loading:
    see `Traits`.
    """
    return before_loading or config.ast.pack or reuses(config)


def needs_of_reuse(config: Sections) -> list[str]:
    """What other keys would have to be for `ast.reuse_forward`; nothing where it is false or they
    are so.
    """
    if not reuses(config):
        return []
    return list(unmet("ast.reuse_forward", spelled(config.model_dump()), OTHER_NEEDS))


def of_sections(config: Sections) -> list[str]:
    """What no part of a run decides."""
    return [
        *_of_weights_and_data(config),
        *_of_selection(config),
        *_of_training(config),
        *_of_noisy_labels(config),
    ]


def of_parts(config: Sections, traits: Traits) -> list[str]:
    """What the parts of a run decide."""
    return [*_of_shares(config, traits), *_of_steps(config, traits)]


def of_built_in(config: Sections, trains: bool) -> list[str]:
    """What the lab's own parts need. trains: whether the training set must be there."""
    return [
        *(of_dataset(config.dataset) if trains else ()),
        *of_parts(config, built_in_traits(config)),
        *(of_stored_scores(config) if config.ast.scoring == "history" else ()),
        *(of_above_mean(config) if config.ast.rule == "infobatch" else ()),
    ]


def of_dataset(data: DatasetConfig) -> list[str]:
    """What `dataset.type` needs of its section."""
    is_folder = data.type == "folder"
    lacks = not data.val_dir and data.val_fraction is None
    return failed(
        (is_folder and not data.train_dir, "dataset.train_dir: needed with dataset.type=folder"),
        (
            is_folder and lacks,
            "dataset.val_dir: needed with dataset.type=folder, or dataset.val_fraction",
        ),
        (
            data.type == "hf" and not data.name,
            "dataset.name: dataset.type=hf needs a hub id or a local folder",
        ),
        (
            data.type == "csv" and not data.name,
            "dataset.name: dataset.type=csv needs the file",
        ),
    )


def of_stored_scores(config: Sections, replaces: Sequence[str] | None = None) -> list[str]:
    """What ast.scoring=history needs. replaces: of the rule, if it is not the lab's own."""
    ast = config.ast
    if replaces is None:
        replaces = RULE_REPLACES.get(ast.rule, ())
    moves = isinstance(ast.target_activation, str)
    least = LEAST_TARGET if moves else ast.target_activation
    crowded = ast.mode == "ast" and "explore" not in replaces and ast.explore >= least
    complaint = f"{ast.explore:g} or more of all samples, and ast.target_activation"
    return failed((crowded, f"ast.explore: {complaint} is no larger"))


def of_above_mean(config: Sections) -> list[str]:
    weighted = config.ast.mode == "ast" and config.ast.entropy_weight
    return failed((weighted, "ast.entropy_weight: 0 for ast.rule=infobatch, the loss alone"))


def _of_weights_and_data(config: Sections) -> list[str]:
    data = config.dataset
    model = config.model
    has_weights = model.weights is not None
    is_trained = has_weights or model.pretrained
    cropped = data.resolved_augment() == "random_resized_crop"
    on_host = data.augment_policy != "none"
    in_jpeg = data.cache_format == "jpeg"
    two_starts = "with model.pretrained=true there are two to start from; leave out one"
    refitted = "measured is for random weights; trained ones keep their own"
    return failed(
        (is_trained and data.normalise == "measured", f"dataset.normalise: {refitted}"),
        (has_weights and model.pretrained, f"model.weights: {two_starts}"),
        (
            model.freeze and not is_trained,
            "model.freeze: random features are no use; set model.pretrained=true or model.weights",
        ),
        (
            on_host and data.cache != "none",
            f"dataset.augment_policy: {data.augment_policy} needs dataset.cache=none",
        ),
        (
            in_jpeg and data.cache == "disk" and not cropped,
            "dataset.cache_format: jpeg needs dataset.augment=random_resized_crop",
        ),
    )


def _of_selection(config: Sections) -> list[str]:
    ast = config.ast
    side = config.dataset.image_size
    batch_size = config.training.batch_size
    start = ast.min_threshold if ast.initial_threshold == "auto" else ast.initial_threshold
    return failed(
        (ast.mode != "dense" and not config.sparse_span(), _all_dense(config)),
        (
            (ast.score_resolution or side) > side,
            f"ast.score_resolution: at most dataset.image_size={side}",
        ),
        (
            ast.min_active > batch_size,
            f"ast.min_active: at most training.batch_size={batch_size}",
        ),
        (
            start < ast.min_threshold,
            f"ast.initial_threshold: at least ast.min_threshold={ast.min_threshold:g}",
        ),
    )


def _of_training(config: Sections) -> list[str]:
    training = config.training
    log = config.logging.jsonl_path
    return failed(
        (
            training.lr_decay == "time" and not training.max_minutes,
            "training.max_minutes: needed with training.lr_decay=time",
        ),
        (training.min_lr > training.lr, f"training.min_lr: at most training.lr={training.lr:g}"),
        (
            training.nesterov and not training.momentum,
            "training.nesterov: needs training.momentum",
        ),
        (
            training.lr_warmup_epochs > training.epochs,
            f"training.lr_warmup_epochs: at most training.epochs={training.epochs}",
        ),
        (
            log is not None and Path(log).name in ("", ".."),
            f"logging.jsonl_path: expected a file, got {log!r}",
        ),
    )


def _of_noisy_labels(config: Sections) -> list[str]:
    """What `training.noisy_labels` needs."""
    noisy = config.training.noisy_labels
    loss = config.training.loss
    chooses = config.ast.mode == "ast" and not config.ast.forget_rate
    return failed(
        (
            noisy and loss != "early_learning",
            f"training.loss: {loss} keeps no memory by which training.noisy_labels could tell how "
            "many labels look wrong; early_learning does",
        ),
        (
            noisy and chooses,
            "ast.mode: ast chooses wrong labels first, and training.noisy_labels says that there "
            "may be some; set dense, or ast.forget_rate",
        ),
    )


def _all_dense(config: Sections) -> str:
    """Why no epoch is left to train on a selection, and which key to lower."""
    warmup = config.ast.warmup_epochs
    epochs = config.training.epochs
    after = epochs - config.sparse_span().stop
    own = "" if config.ast.rule in DENSE_END else " or ast.anneal_epochs"
    return (
        f"ast.warmup_epochs: with {warmup} dense epochs at the start and {after} at the end, "
        f"none of training.epochs={epochs} is sparse; lower ast.warmup_epochs{own}, or raise "
        "training.epochs"
    )


def _of_shares(config: Sections, traits: Traits) -> list[str]:
    ast = config.ast
    is_auto = isinstance(ast.target_activation, str)
    is_share = not isinstance(ast.forget_rate, str) and ast.mode == "ast"
    both = is_share and not is_auto and not traits.own_target
    too_few = both and ast.forget_rate and ast.forget_rate + ast.target_activation > 1 + 1e-9
    fewer = not is_auto and ast.target_activation > ast.candidates
    narrows = ast.candidates < 1
    return failed(
        (
            is_auto and ast.mode == "random",
            f"ast.target_activation: {ast.target_activation} needs ast.mode=ast",
        ),
        (
            too_few,
            f"ast.forget_rate: leaves fewer than ast.target_activation={ast.target_activation} "
            "of the samples",
        ),
        (
            narrows and ast.forget_rate,
            "ast.candidates: 1 for ast.forget_rate, which is a share of all samples",
        ),
        (
            narrows and config.training.list_suspects,
            "ast.candidates: 1 for training.list_suspects, which judges all samples",
        ),
        (
            narrows and fewer,
            f"ast.candidates: {ast.candidates:g} is fewer than ast.target_activation="
            f"{spell(ast.target_activation)}",
        ),
    )


def _of_steps(config: Sections, traits: Traits) -> list[str]:
    ast = config.ast
    training = config.training
    fixed_shape = has_fixed_shape(config, traits.before_loading)
    unmet_reuse = needs_of_reuse(config)
    mixing = next((key for key in ("mixup", "cutmix") if getattr(training, key)), None)
    keepers = {
        f"training.loss={training.loss}": traits.recalls,
        f"ast.scoring={ast.scoring}": traits.keeps_visits,
        f"ast.forget_rate={ast.forget_rate}": traits.keeps_labels,
    }
    keeper = next((name for name, keeps in keepers.items() if keeps), None)
    return failed(
        (
            unmet_reuse,
            f"ast.reuse_forward: {spell(ast.reuse_forward)} needs {' and '.join(unmet_reuse)}",
        ),
        (
            training.compile != "off" and not fixed_shape,
            "training.compile: needs ast.pack=true, for per-batch steps differ in shape",
        ),
        (
            mixing and keeper,
            f"training.{mixing}: {keeper} remembers each sample, and a mixture has no one label",
        ),
        (
            mixing and traits.weighs,
            f"training.{mixing}: ast.rule={ast.rule} weighs each sample, and a mixture has no one "
            "weight",
        ),
    )
