"""Networks by name, and what shapes alone tell of them."""

from __future__ import annotations

import contextlib
import copy
import difflib
from itertools import chain

import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from lab.config import ModelConfig
from lab.errors import RequestError, one_line
from lab.hub import quick_hub

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
    with quick_hub() if config.pretrained else contextlib.nullcontext():
        return timm.create_model(config.name, pretrained=config.pretrained, num_classes=num_classes, **size)


def eval_view(model: nn.Module) -> nn.Module:
    """A second module tree over the same parameters and buffers, in eval mode.

    Scoring then neither toggles the mode nor copies weights.
    """
    shared = {id(tensor): tensor for tensor in chain(model.parameters(), model.buffers())}
    return copy.deepcopy(model, shared).eval()


def synchronised(model: nn.Module) -> nn.Module:
    """The model with every BatchNorm over the samples of all ranks. timm's keep their built-in activation."""
    from timm.layers import convert_sync_batchnorm

    return convert_sync_batchnorm(model)


def count_flops(model: nn.Module, image_size: int) -> float:
    """Forward + backward FLOP of one sample, counted on shapes alone (torch.utils.flop_counter)."""
    twin = copy.deepcopy(model).to("meta").train()
    with FlopCounterMode(display=False) as counter:  # two samples: BatchNorm refuses one
        twin(torch.empty(2, 3, image_size, image_size, device="meta")).sum().backward()
    return counter.get_total_flops() / 2


def check_resolution(model: nn.Module, config: ModelConfig, resolution: int) -> None:
    """Raises RequestError where the network takes no images of `resolution` px; tried on shapes alone."""
    twin = copy.deepcopy(model).to("meta").eval()
    try:
        twin(torch.empty(1, 3, resolution, resolution, device="meta"))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise RequestError(f"ast.score_resolution: {config.name} at {resolution} px: {one_line(error)}") from None
