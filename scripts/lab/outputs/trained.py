"""A weights folder as a network that predicts, and how it wants its pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2.functional import to_pil_image

from lab.base.errors import RequestError, one_line
from lab.config.imports import changed_code
from lab.config.loading import Config
from lab.config.sections import DatasetConfig, ModelConfig
from lab.data.folders import composed
from lab.data.images import Augmentation
from lab.data.randomness import UNIFORMS_PER_SAMPLE
from lab.machine.distributed import Dist
from lab.models.building import build_model
from lab.models.description import Description, View
from lab.models.network import Network
from lab.models.weights import find_weights, load_weights


class Trained(NamedTuple):
    """A weights folder, ready to predict."""

    network: Network
    classes: list[str]
    view: View  # how the folder says that pictures are prepared
    prepare: Callable[[Sequence[Tensor]], list[Tensor]]  # uint8 [3, H, W] -> [3, size, size]
    remarks: list[str]  # what the weights are, where that is not as one would expect


def folder_settings(path: str) -> dict[str, Any]:
    """The sections of a config that prepares pictures as the weights folder says. Raises
    RequestError naming --weights where it is no such folder.
    """
    view = described(path).view
    augment = "random_resized_crop" if view.crop_mode == "center" else "none"
    return {"dataset": {"image_size": view.size, "augment": augment}}


def described(path: str) -> Description:
    """Raises RequestError naming --weights where no description lies beside the weights."""
    description = find_weights(path, "--weights").description
    if description is None:
        raise RequestError(
            f"--weights: {path}: no config.json in it; expected the weights folder of a run"
        )
    return description


def load_trained(path: str, config: Config, device: torch.device, by_folder: bool) -> Trained:
    """The network of a weights folder, whatever model `config` names.

    by_folder: whether pictures are prepared as the folder says, and not as `config` does. Raises
    RequestError naming --weights where the folder does not hold a whole network.
    """
    description = described(path)
    try:
        classes = description.classes()
        model = ModelConfig(
            name=description.architecture, small_stem=bool(description.small_stem), weights=path
        )
    except ValueError as error:  # pydantic's too
        raise RequestError(f"--weights: {path}: config.json: {one_line(error, 150)}") from None
    training = config.training.model_copy(update={"compile": "off"})
    metrics = config.metrics.model_copy(
        update={"base_flop_per_sample": 1.0}
    )  # or it would be counted
    config = config.model_copy(update={"model": model, "training": training, "metrics": metrics})
    size = config.dataset.image_size
    try:
        built = build_model(model, len(classes), size)
    except RequestError as error:
        raise RequestError(f"--weights: {path}: config.json: {error}") from None
    loaded = load_weights(built, model, size, "--weights", new_head=False)
    network = Network(built, config, lambda *_: None, device, Dist())
    as_lab = description.by_lab and View.of(config.dataset) == description.view
    by_timm = by_folder and not as_lab
    prepare = timm_preparation(description.view) if by_timm else lab_preparation(config.dataset)
    shown = description.view if by_folder else View.of(config.dataset)
    remarks = [*loaded.remarks, *changed_code(description.imports, config.imports)]
    if shown != description.view:
        remarks = [
            *remarks,
            f"pictures are shown as {shown}, and the weights are for {description.view}",
        ]
    return Trained(network, classes, shown, prepare, remarks)


def lab_preparation(config: DatasetConfig) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """As the lab validates."""
    augmentation = Augmentation(config, train=False)

    def prepare(images: Sequence[Tensor]) -> list[Tensor]:
        return augmentation(images, torch.zeros(len(images), UNIFORMS_PER_SAMPLE).double())

    return prepare


def timm_preparation(view: View) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """As timm evaluates, whose order and rounding are not the lab's."""
    from timm.data import create_transform

    size = (3, view.size, view.size)
    ways = view._asdict()
    del ways["size"]
    transform = create_transform(size, use_prefetcher=True, **ways)  # uint8, not normalised

    def prepare(images: Sequence[Tensor]) -> list[Tensor]:
        return [torch.as_tensor(transform(to_pil_image(image))) for image in images]

    return prepare


def class_numbers(trained: Trained, names: Sequence[str]) -> np.ndarray:
    """The network's own number of each class of the data, int64.

    Raises RequestError naming a class that it does not know.
    """
    own = {composed(name): number for number, name in enumerate(trained.classes)}
    if unknown := [name for name in names if composed(name) not in own]:
        raise RequestError(
            f"--weights: class {one_line(repr(unknown[0]), 80)} of the data is not among "
            f"its classes"
        )
    return np.array([own[composed(name)] for name in names], dtype=np.int64)
