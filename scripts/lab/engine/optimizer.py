"""The optimizer of a run: its parameter groups, and its rate in each."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from lab.base.errors import RequestError, one_line
from lab.config.sections import TrainingConfig


def build_optimizer(
    model: nn.Module, training: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of the config, fused on a GPU where it can be.

    Not decayed are tensors of one dimension (norms, biases), and what the network says should not
    be: of a ViT the class token and the position embedding. Raises RequestError for an optimizer
    that this timm does not have, and for layer_decay where the network's layers are not known.
    """
    groups = (
        _layer_groups(model, training) if training.layer_decay < 1 else _groups(model, training)
    )
    shared = {"lr": training.lr, "weight_decay": training.weight_decay}
    fused = {"fused": device.type == "cuda" or None}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, **shared, **fused)
    if training.optimizer == "sgd":
        momentum = {"momentum": training.momentum, "nesterov": training.nesterov}
        optimizer = torch.optim.SGD(groups, **momentum, **shared, **fused)
        if (
            device.type == "cuda" and training.momentum
        ):  # fused SGD leaves them unset where it skips its first step
            unset = (p for group in optimizer.param_groups for p in group["params"])
            optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in unset})
        return optimizer
    from timm.optim import create_optimizer_v2

    own: dict[str, Any] = fused if training.optimizer == "adam" else {}
    if training.optimizer == "muon":
        own = {"momentum": training.momentum, "nesterov": training.nesterov}
        groups = [{**group, "use_fallback": group["weight_decay"] == 0} for group in groups]
    try:
        return create_optimizer_v2(groups, training.optimizer, **shared, **own)
    except ValueError as error:
        hint = "a newer timm may have it"
        raise RequestError(
            f"training.optimizer: {training.optimizer}: {one_line(error)}; {hint}"
        ) from None


def _excepted(model: nn.Module) -> set[str]:
    """The names of parameters with more than one dimension that are not decayed."""
    own = {
        "class_token",
        "encoder.pos_embedding",
    }  # torchvision's names; timm's networks have a method
    return own | set(getattr(model, "no_weight_decay", set)())


def _groups(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """What is decayed, and what is not."""
    excepted = _excepted(model)
    trained = [
        (p.ndim <= 1 or name in excepted, p)
        for name, p in model.named_parameters()
        if p.requires_grad
    ]
    flat, rest = ([p for is_flat, p in trained if is_flat is wanted] for wanted in (True, False))
    return [
        {"params": rest, "weight_decay": training.weight_decay},
        {"params": flat, "weight_decay": 0.0},
    ]


def _layer_groups(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """The same for each layer, with the factor on its learning rate, `lr_scale` (Clark et al. 2020,
    "ELECTRA", appendix A): training.layer_decay to the power of the number of layers after it.
    """
    from timm.optim import param_groups_layer_decay

    options = {"no_weight_decay_list": _excepted(model), "layer_decay": training.layer_decay}
    groups = param_groups_layer_decay(model, training.weight_decay, **options)
    if len({group["lr_scale"] for group in groups}) < 2:
        raise RequestError(
            "training.layer_decay: timm knows no layers of this network; set it to 1"
        )
    return groups


def copies_of_weights(training: TrainingConfig) -> int:
    """About how many numbers a checkpoint keeps of each weight, beside the weight itself."""
    by_optimizer = {"sgd": int(training.momentum > 0), "muon": 1}
    return by_optimizer.get(training.optimizer, 2) + (training.weight_average > 0)
