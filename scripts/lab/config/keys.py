"""Which part of a run reads which config key: for the refusal, the help and the analysis. No torch.

The parts of a selection say in KEYS what they read, and quote this page. A key that stands nowhere
here is read by every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lab.base.reading import spell
from lab.config.sections import auto_augment

Needs = dict[str, tuple[str, ...]]  # by other key, the values of which it must have one

SCORING_KEYS = {  # of `ast`, by ast.scoring
    "batch": ("score_resolution", "score_statistics", "pack", "candidates"),
    "proxy": ("proxy_model", "score_resolution", "pack", "candidates"),
    "history": ("explore",),
}
RULE_KEYS = {  # of `ast`, by ast.rule
    "pi": (
        "kp",
        "ki",
        "kp_warmup_epochs",
        "ki_warmup_epochs",
        "initial_threshold",
        "min_threshold",
        "threshold_unit",
    ),
    "topk": (),
    "infobatch": (),
}
# Keys of other parts that say nothing beside a rule, because it has its own answer.
RULE_REPLACES: dict[str, tuple[str, ...]] = {
    "infobatch": ("target_activation", "explore", "anneal_epochs"),
}
# Keys of `ast` that say nothing where the training forward is the one that scores.
REUSE_REPLACES = ("score_resolution", "score_statistics", "pack")
# Share of the epochs that a rule keeps dense at the end, in place of ast.anneal_epochs.
DENSE_END = {"infobatch": 1 / 8}
LEAST_TARGET = 0.5  # of a target that is set at the end of each epoch

OTHER_NEEDS: dict[str, Needs] = {
    "dataset.train_dir": {"dataset.type": ("folder",)},
    "dataset.val_dir": {"dataset.type": ("folder",), "dataset.val_fraction": ("null",)},
    "dataset.val_fraction": {"dataset.type": ("folder", "hf", "csv")},
    **{f"dataset.{key}": {"dataset.type": ("hf",)} for key in ("subset", "revision")},
    **{
        f"dataset.{key}": {"dataset.type": ("hf", "csv")}
        for key in ("name", "split_train", "image_key", "label_key")
    },
    "dataset.split_val": {"dataset.type": ("hf", "csv"), "dataset.val_fraction": ("null",)},
    "dataset.padding": {"dataset.augment": ("pad_crop",)},
    "dataset.cache_folder": {"dataset.cache": ("device", "disk")},
    "dataset.cache_format": {"dataset.cache": ("disk",)},
    "dataset.cache_resolution": {
        "dataset.cache": ("device", "disk"),
        "dataset.augment": ("random_resized_crop",),
    },
    "ast.reuse_forward": {"ast.scoring": ("batch",), "ast.rule": ("pi", "topk")},
    "training.momentum": {"training.optimizer": ("sgd", "muon")},
    "training.nesterov": {"training.optimizer": ("sgd", "muon")},
    "training.min_lr": {"training.lr_schedule": ("cosine", "linear", "step")},
    "training.layer_decay": {"model.freeze": ("false",)},
    "training.label_smoothing": {
        "training.loss": ("cross_entropy", "early_learning", "binary_cross_entropy")
    },
}

NAMES = {  # by the key that names a part, the built-in ones; `lab.config.tables.names_of`
    "dataset.type": ("digits", "folder", "hf", "csv"),
    "dataset.augment_policy": ("none", "rand_augment", "trivial_augment"),
    "ast.measure": ("loss_entropy",),
    "ast.scoring": tuple(SCORING_KEYS),
    "ast.rule": tuple(RULE_KEYS),
    "ast.target_activation": ("auto",),
    "ast.forget_rate": ("auto",),
    "training.lr_schedule": ("cosine", "linear", "constant", "step"),
    "training.loss": (
        *("cross_entropy", "generalised_cross_entropy", "early_learning", "focal"),
        "binary_cross_entropy",
    ),
}
BUILT_IN = {  # of another name nothing is known: networks and optimizers may be timm's
    **NAMES,
    "model.name": ("resnet18", "resnet50", "vit_b_16", "small_conv"),
    "training.optimizer": ("sgd", "adam", "adamw", "lamb", "muon"),
}


def all_needs(
    scorings: Mapping[str, Sequence[str]] = SCORING_KEYS,
    rules: Mapping[str, Sequence[str]] = RULE_KEYS,
    replaced: Mapping[str, Sequence[str]] = RULE_REPLACES,
) -> dict[str, Needs]:
    """By key, what other keys must be for a run to read it.

    scorings, rules: by name, the keys of `ast` that a part reads; replaced: by rule, the keys that
    say nothing beside it.
    """
    needs = dict(OTHER_NEEDS)
    for part, readers in (("ast.scoring", scorings), ("ast.rule", rules)):
        for leaf in dict.fromkeys(leaf for keys in readers.values() for leaf in keys):
            names = tuple(name for name, keys in readers.items() if leaf in keys)
            needs[f"ast.{leaf}"] = {part: names}
    for leaf in REUSE_REPLACES:
        needs[f"ast.{leaf}"] = {**needs.get(f"ast.{leaf}", {}), "ast.reuse_forward": ("false",)}
    for leaf in dict.fromkeys(leaf for keys in replaced.values() for leaf in keys):
        others = tuple(name for name in rules if leaf not in replaced.get(name, ()))
        needs[f"ast.{leaf}"] = {**needs.get(f"ast.{leaf}", {}), "ast.rule": others}
    return needs


def of_known_parts(
    needs: Mapping[str, Needs], settings: Mapping[str, str], known: Mapping[str, Sequence[str]]
) -> dict[str, Needs]:
    """The needs, without those of a part whose name is not among the `known` ones: it may read any
    key.
    """
    return {
        key: {
            other: values
            for other, values in each.items()
            if settings.get(other) in known.get(other, settings.values())
        }
        for key, each in needs.items()
    }


def spelled(config: Mapping[str, Any]) -> dict[str, str]:
    """The values of the sections of a config, by dotted key, as text."""
    return {
        f"{section}.{key}": spell(value)
        for section, values in config.items()
        if isinstance(values, Mapping)
        for key, value in values.items()
    }


def unmet(key: str, settings: Mapping[str, str], needs: Mapping[str, Needs]) -> Iterator[str]:
    """What would have to be for `key` to be read, "ast.rule=pi"; nothing where it is read.

    settings: of a config, as text by dotted key.
    """
    for other, values in needs.get(key, {}).items():
        value = settings.get(other)
        if other == "dataset.augment" and value == "auto":
            size = settings.get("dataset.image_size", "")
            size = int(size) if size.isdecimal() else 0  # of a damaged results file any text
            value = auto_augment(settings.get("dataset.type", ""), size)
        if value not in values:
            yield f"{other}={' or '.join(values)}"


def idle_keys(
    settings: Mapping[str, str], defaults: Mapping[str, str], needs: Mapping[str, Needs]
) -> dict[str, str]:
    """The keys that a config sets to other values than the defaults and that nothing reads, each
    with what it would need.

    Dense and random runs read all keys of `ast`: those of the run that they are compared with.
    """
    sparse = settings.get("ast.mode") == "ast"
    found = {}
    for key, value in settings.items():
        if value == defaults.get(key) or (key.startswith("ast.") and not sparse):
            continue
        missing = list(unmet(key, settings, needs))
        if missing:
            found[key] = " and ".join(missing)
    return found
