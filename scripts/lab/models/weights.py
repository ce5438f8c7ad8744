"""Trained weights as a folder that other programs read, and weights to start from.

A folder holds `model.safetensors` and `config.json`, in the form that timm's `local-dir:` source
reads: the architecture, the class names, and how a picture has to be prepared. There is no pickle
in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from lab.base.errors import RequestError, one_line
from lab.base.files import replace_file, replace_text
from lab.config.sections import DatasetConfig, ModelConfig
from lab.data.images import CENTRE
from lab.machine.devices import IMAGENET_MOMENTS

WEIGHTS = "model.safetensors"
FACTS = "config.json"
WRAPPERS = ("state_dict", "model")  # keys under which a file may hold its state_dict
PREFIXES = (
    "module.",
    "_orig_mod.",
)  # DistributedDataParallel and torch.compile put them before each name


class Source(NamedTuple):
    """What `model.weights` names."""

    path: Path  # the file
    facts: dict[str, Any]  # the config.json beside it, empty where there is none


def find_weights(path: str, key: str = "model.weights") -> Source:
    """The file that a path means: itself, or the model.safetensors of a folder.

    Raises RequestError naming `key` where there is no such file, or where the config.json beside it
    is none.
    """
    file = Path(path)
    if file.is_dir():
        file = file / WEIGHTS
    if not file.is_file():
        raise RequestError(
            f"{key}: {file}: no such file; expected a weights folder, a .safetensors or "
            f"a state_dict"
        )
    beside = file.with_name(FACTS)
    try:
        facts = json.loads(beside.read_text(encoding="utf-8")) if beside.is_file() else {}
        moments = [facts["pretrained_cfg"][name] for name in IMAGENET_MOMENTS] if facts else []
        wrong = [
            m
            for m in moments
            if len(m) != 3 or not all(isinstance(value, int | float) for value in m)
        ]
        names = facts.get("label_names", [])
        wrong += [facts] * (bool(facts) and not isinstance(facts["architecture"], str))
        wrong += [names] * (
            not isinstance(names, list) or not all(isinstance(name, str) for name in names)
        )
    except OSError as error:
        raise RequestError(f"{key}: {beside}: cannot read it: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise RequestError(
            f"{key}: {beside}: no description of weights ({one_line(repr(error), 100)})"
        ) from None
    if wrong:
        raise RequestError(
            f"{key}: {beside}: no description of weights ({one_line(repr(wrong[0]), 100)})"
        )
    return Source(file, facts)


def read_weights(path: Path, key: str = "model.weights") -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of a file of torch.save, by name; on the host. No code
    in it is run.

    Raises RequestError naming `key` where the file is damaged or holds no state_dict.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
        for name in WRAPPERS:
            state = state[name] if isinstance(state.get(name), dict) else state
    except OSError as error:
        raise RequestError(
            f"{key}: {path}: cannot read it: {error.strerror or one_line(error)}"
        ) from None
    except (
        Exception
    ) as error:  # torch's and safetensors' readers raise almost anything on what is none of theirs
        if type(error).__name__ == "UnpicklingError":
            why = "damaged, or it holds more than tensors, which is not loaded"
            raise RequestError(f"{key}: {path}: {why}") from None
        kind = "safetensors" if isinstance(error, SafetensorError) else "state_dict"
        raise RequestError(
            f"{key}: {path}: damaged, or no {kind} file ({one_line(error, 150)})"
        ) from None
    for prefix in PREFIXES:
        if state and all(isinstance(name, str) and name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise RequestError(f"{key}: {path}: no state_dict: expected tensors by name")
    return state


def head_names(model: nn.Module) -> set[str]:
    """The names of the parameters that turn features into classes; none where the model does not
    say.
    """
    find = getattr(model, "get_classifier", None)  # timm's
    heads = find() if find else getattr(model, "heads", getattr(model, "fc", None))  # torchvision's
    heads = heads if isinstance(heads, list | tuple) else [heads]
    own = {id(p) for head in heads if isinstance(head, nn.Module) for p in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


def load_weights(model: nn.Module, config: ModelConfig, key: str = "model.weights") -> str:
    """Start `model` from `model.weights`. A head for another number of classes, or one that is
    missing, stays new.

    Returns one line on what was loaded and what was not. Raises RequestError naming `key` where the
    file does not fit the model.
    """
    source = find_weights(config.weights, key)
    there = read_weights(source.path, key)
    here = model.state_dict()
    head = head_names(model)
    new = [
        name
        for name in here
        if name in head and (name not in there or there[name].shape != here[name].shape)
    ]
    rest = {name: tensor for name, tensor in there.items() if name not in new}
    shapes = [
        (name, list(rest[name].shape), list(here[name].shape)) for name in here if name in rest
    ]
    complaints = [
        f"{name} is {old} there and {own} here" for name, old, own in shapes if old != own
    ]
    complaints += [f"{name} is missing" for name in here if name not in rest and name not in new]
    complaints += [
        f"{name} is no part of the network"
        for name in rest
        if name not in here and name not in head
    ]
    if complaints:
        made = source.facts.get("architecture")
        whose = (
            f"they are of {one_line(made, 60)}; "
            if made not in (None, config.name.partition(".")[0])
            else ""
        )
        more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
        why = f"{whose}{one_line(complaints[0], 200)}{more}"
        raise RequestError(f"{key}: {source.path}: not of model.name={config.name}: {why}")
    model.load_state_dict(rest, strict=False)
    left = (
        f"; not loaded: {', '.join(new)}: the head is new, for another number of classes"
        if new
        else ""
    )
    return f"{key}: {len(rest)} tensors of {source.path}{left}"


def input_moments(config: ModelConfig, model: nn.Module) -> dict[str, Sequence[float]]:
    """By `mean` and `std`, the normalisation of the pixels (of values from 0 to 1), three numbers
    each.

    Weights that are loaded keep the one that they were trained with: that of the config.json beside
    them, or the one published for the model. Random weights take ImageNet's, or those of
    `dataset.normalise: measured`, which are known later, once there are pictures.
    """
    facts = (
        find_weights(config.weights).facts.get("pretrained_cfg")
        if config.weights is not None
        else None
    )
    known = facts or (getattr(model, "pretrained_cfg", None) if config.pretrained else None) or {}
    return {name: tuple(known.get(name) or usual) for name, usual in IMAGENET_MOMENTS.items()}


def describe(
    config: ModelConfig,
    dataset: DatasetConfig,
    model: nn.Module,
    classes: Sequence[str],
    moments: Mapping[str, Any],
    model_args: Mapping[str, Any],
) -> dict[str, Any]:
    """The contents of config.json: what timm and others need to build the network and to prepare
    its pictures.

    moments: of `input_moments`. model_args: what the model was built with beside its number of
    classes.
    """
    published = getattr(model, "pretrained_cfg", None) or {}
    crops = dataset.resolved_augment() == "random_resized_crop"
    own = {
        key: published[key]
        for key in ("classifier", "first_conv", "fixed_input_size")
        if published.get(key)
    }
    return {
        "architecture": config.name.partition(".")[
            0
        ],  # timm's name without the tag of somebody's weights
        "num_classes": len(classes),
        "label_names": list(classes),
        "model_args": dict(model_args),
        "small_stem": config.small_stem,
        "pretrained_cfg": {
            **own,
            "input_size": [3, dataset.image_size, dataset.image_size],
            "interpolation": "bilinear",
            "crop_pct": CENTRE if crops else 1.0,  # of the shorter side
            "crop_mode": "center" if crops else "squash",  # squash: the whole picture, made square
            **{name: list(values) for name, values in moments.items()},
        },
    }


class WeightsFolder:
    """Writes the best weights of a run, each file whole, and never those of one run beside the
    facts of another.
    """

    def __init__(self, folder: Path, facts: Mapping[str, Any]):
        self.folder = folder
        self.text = json.dumps(facts, indent=2) + "\n"
        self.checked = False

    def write(self, state: Mapping[str, Tensor], about: Mapping[str, Any]) -> None:
        """Replace the weights by a `state_dict` on the host. about: goes into the header of the
        file, as text.

        config.json is the same for all epochs of a run. Where an earlier run has left another one,
        its weights are removed before. Raises OSError naming the file where the disk does not take
        it.
        """
        weights = self.folder / WEIGHTS
        facts = self.folder / FACTS
        if not self.checked:
            self.folder.mkdir(exist_ok=True)
            for left in self.folder.glob("*.part"):  # of a process that was killed while it wrote
                left.unlink(missing_ok=True)
            if (
                not facts.exists()
                or facts.read_text(encoding="utf-8", errors="replace") != self.text
            ):
                weights.unlink(missing_ok=True)
                replace_text(facts, self.text)
            self.checked = True
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        header = {"format": "pt", **{key: str(value) for key, value in about.items()}}
        replace_file(weights, lambda part: part.write_bytes(save(tensors, metadata=header)))
