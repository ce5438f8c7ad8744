"""Trained weights as a folder that other programs read, and weights to start from.

A folder holds `model.safetensors` and `config.json`, in the form that timm's `local-dir:` source
reads: the architecture, the class names, and how a picture has to be prepared. There is no pickle
in it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from lab.base.errors import RequestError, one_line
from lab.base.files import replace_file, replace_text
from lab.config.imports import IMPORTS, options_beside
from lab.config.sections import DatasetConfig, ModelConfig
from lab.machine.devices import IMAGENET_MOMENTS
from lab.models.description import FACTS, Description, View, digest_of, read_description
from lab.models.state_dict import UNUSED, find_network, read_tensors, unsound

WEIGHTS = "model.safetensors"
# of a folder, in the order in which timm looks for them
FILES = (WEIGHTS, "pytorch_model.bin", "pytorch_model.pth", "model.pth")
CHECKPOINTS = ("best.pt", "last.pt")  # of a run; its weights folder lies beside them
DIGEST = "description"  # in the header of the weights: the hash of the config.json of their own


class Source(NamedTuple):
    """What `model.weights` names."""

    path: Path  # the file
    description: Description | None  # of the config.json beside it
    remark: str | None = None  # on a config.json that is not used


def find_weights(path: str, key: str = "model.weights", of: str | None = None) -> Source:
    """The file that a path means: itself, or that of a folder, and the description beside it.

    of: the name of the network that is to have them. A config.json beside a file of another name
    may be of anything, and is then used only where it describes that network; without `of` it is
    needed. Raises RequestError naming `key` where there is no such file, or where the config.json
    of a folder is no description.
    """
    file = Path(path)
    if os.path.isdir(file):
        file = next((file / name for name in FILES if os.path.isfile(file / name)), file / WEIGHTS)
    if not os.path.isfile(file):
        raise RequestError(
            f"{key}: {file}: no such file; expected a weights folder, a .safetensors or "
            f"a state_dict"
        )
    beside = file.with_name(FACTS)
    if file.name in CHECKPOINTS and not beside.is_file():
        beside = file.parent / "weights" / FACTS
    if not beside.is_file():
        return Source(file, None)
    sure = of is None or file.name in (*FILES, *CHECKPOINTS)
    try:
        description = read_description(beside, key)
    except RequestError:
        if sure:
            raise
        return Source(file, None, f"{beside} describes no weights and is not used")
    if sure or description.name == of.partition(".")[0]:
        return Source(file, description)
    return Source(
        file, None, f"{beside} describes {one_line(description.name, 60)}, and is not used"
    )


def how_to_import(imports: Sequence[str], folder: Path) -> str:
    """What a refusal says of code that is beside weights in a folder, or is not there any more."""
    names = ", ".join(one_line(each.partition("@")[0], 60) for each in imports)
    options = options_beside(folder)
    return f"; the code {names} came with it and is not run by itself: if you trust it, {options}"


def heads_of(model: nn.Module) -> list[nn.Module]:
    """The modules that turn features into classes; none where the model does not say."""
    find = getattr(model, "get_classifier", None)  # timm's
    heads = find() if find else getattr(model, "heads", getattr(model, "fc", None))  # torchvision's
    heads = heads if isinstance(heads, list | tuple) else [heads]
    return [head for head in heads if isinstance(head, nn.Module)]


def head_names(model: nn.Module) -> set[str]:
    """The names of their parameters."""
    own = {id(p) for head in heads_of(model) for p in head.parameters()}
    return {name for name, parameter in model.named_parameters() if id(parameter) in own}


class Loaded(NamedTuple):
    """What was loaded into a network."""

    line: str
    remarks: list[str]  # what is not as one would expect


def load_weights(
    model: nn.Module,
    config: ModelConfig,
    image_size: int,
    key: str = "model.weights",
    new_head: bool = True,
) -> Loaded:
    """Start `model` from `model.weights`.

    image_size: pixels, of the pictures that the model was built for. new_head: whether a head for
    another number of classes, or one that is missing, stays new. Raises RequestError naming `key`
    where the file does not fit the model, or holds what is no number.
    """
    source = find_weights(config.weights, key, config.name)
    here = model.state_dict()
    content = read_tensors(source.path, key)
    try:
        found = find_network(content, here)
    except ValueError as error:
        raise _misfit(source, config, key, str(error)) from None
    there = {
        name: tensor
        for name, tensor in found.tensors.items()
        if not (name.endswith(UNUSED) and _odd(tensor, here.get(name)))
    }
    head = head_names(model)
    fits = {name for name in head if name in there and there[name].shape == here[name].shape}
    new = [name for name in here if name in head] if new_head and not fits else []
    rest = {name: tensor for name, tensor in there.items() if name not in new}
    complaints = _complaints(rest, here, head if new else set(), new)
    if complaints:
        more = f" (and {len(complaints) - 1} more)" if len(complaints) > 1 else ""
        hint = _size_hint(source, there, here, image_size)
        raise _misfit(source, config, key, f"{one_line(complaints[0], 200)}{more}{hint}")
    for name, tensor in rest.items():
        if bad := unsound(name, tensor, here[name]):
            raise RequestError(f"{key}: {source.path}: {one_line(bad, 200)}")
    model.load_state_dict(rest, strict=False)
    remarks = [*found.remarks, *_remarks(source)]
    if new:
        why = "for another number of classes" if head & there.keys() else "there is none in it"
        remarks.append(f"not loaded: {', '.join(new)}: the head is new, {why}")
    line = "; ".join([f"{key}: {len(rest)} tensors of {one_line(source.path)}", *remarks])
    return Loaded(line, remarks)


def _odd(tensor: Tensor, own: Tensor | None) -> bool:
    """Whether a counter is none of the network's, or not in its form: no forward reads it."""
    return own is None or tensor.shape != own.shape or tensor.dtype != own.dtype


def _complaints(
    there: Mapping[str, Tensor], here: Mapping[str, Tensor], head: set[str], new: Sequence[str]
) -> list[str]:
    """Why tensors do not fit those of a network, one line each. head: names that need not fit."""
    shapes = [(name, [*there[name].shape], [*here[name].shape]) for name in here if name in there]
    found = [f"{name} is {old} there and {own} here" for name, old, own in shapes if old != own]
    missing = (name for name in here if name not in there and name not in new)
    found += [f"{name} is missing" for name in missing if not name.endswith(UNUSED)]
    return found + [
        f"{name} is no part of the network"
        for name in there
        if name not in here and name not in head
    ]


def _misfit(source: Source, config: ModelConfig, key: str, why: str) -> RequestError:
    made = source.description.name if source.description else None
    whose = ""
    if made not in (None, config.name.partition(".")[0]):
        whose = f"they are of {one_line(made, 60)}; "
    return RequestError(f"{key}: {source.path}: not of model.name={config.name}: {whose}{why}")


def _size_hint(
    source: Source, there: Mapping[str, Tensor], here: Mapping[str, Tensor], image_size: int
) -> str:
    """For which pictures weights are that do not fit, where that can be told."""
    size = source.description.view.size if source.description else None
    for name, tensor in here.items():
        other = there.get(name)
        if size or "pos_emb" not in name or other is None or tensor.ndim != 3:
            continue
        for prefix in range(3):  # tokens before those of the patches
            old = math.sqrt(max(0, other.shape[1] - prefix))
            own = math.sqrt(max(0, tensor.shape[1] - prefix))
            if old * own and old.is_integer() and own.is_integer():
                size = round(image_size * old / own)
                break
    if size in (None, image_size):
        return ""
    return f"; they are for pictures of {size} px: set dataset.image_size={size}"


def _remarks(source: Source) -> list[str]:
    """What is said of the description of weights."""
    remarks = [source.remark] if source.remark else []
    if source.description is None:
        return [*remarks, "pictures are normalised as ImageNet's, for no config.json says how"]
    if source.path.suffix != ".safetensors":
        return remarks
    with safe_open(source.path, "pt") as file:
        digest = (file.metadata() or {}).get(DIGEST)
    if digest not in (None, source.description.digest):
        remarks.append(f"{FACTS} is not the one that was written with them")
    return remarks


def input_moments(config: ModelConfig, model: nn.Module) -> dict[str, Sequence[float]]:
    """By `mean` and `std`, the normalisation of the pixels (of values from 0 to 1), three numbers
    each.

    Weights that are loaded keep the one that they were trained with: that of the config.json beside
    them, or the one published for the model. Random weights take ImageNet's, or those of
    `dataset.normalise: measured`, which are known later, once there are pictures.
    """
    if config.weights is not None:
        description = find_weights(config.weights, of=config.name).description
        return dict(IMAGENET_MOMENTS) if description is None else description.moments
    known = (getattr(model, "pretrained_cfg", None) if config.pretrained else None) or {}
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
    view = View.of(dataset)
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
            "input_size": [3, view.size, view.size],
            "interpolation": view.interpolation,
            "crop_pct": view.crop_pct,
            "crop_mode": view.crop_mode,
            **{name: list(values) for name, values in moments.items()},
        },
    }


class WeightsFolder:
    """Writes the best weights of a run, each file whole, and never those of one run beside the
    facts of another.
    """

    def __init__(
        self, folder: Path, facts: Mapping[str, Any], code: Mapping[str, bytes] | None = None
    ):
        """code: by name, the texts of the files that the config imports."""
        self.folder = folder
        self.code = code or {}
        self.text = json.dumps(facts, indent=2) + "\n"
        self.digest = digest_of(json.loads(self.text))
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
            for name, text in self.code.items():
                (self.folder / IMPORTS / name).parent.mkdir(parents=True, exist_ok=True)
                replace_file(self.folder / IMPORTS / name, partial(Path.write_bytes, data=text))
            self.checked = True
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}
        header = {"format": "pt", DIGEST: self.digest}
        header |= {key: str(value) for key, value in about.items()}
        replace_file(weights, lambda part: part.write_bytes(save(tensors, metadata=header)))
