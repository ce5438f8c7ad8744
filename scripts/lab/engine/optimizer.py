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
    groups = _parameter_groups(model, training)
    shared = {"lr": training.lr, "weight_decay": training.weight_decay}
    momentum = {"momentum": training.momentum, "nesterov": training.nesterov}
    fused = {"fused": device.type == "cuda" or None}
    if training.optimizer == "adamw":
        return torch.optim.AdamW(groups, **shared, **fused)
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, **momentum, **shared, **fused)
        if device.type == "cuda" and training.momentum:
            # fused SGD leaves them unset where it skips its first step
            unset = (p for group in optimizer.param_groups for p in group["params"])
            optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in unset})
        return optimizer
    from timm.optim import create_optimizer_v2

    options = {"adam": fused, "muon": momentum}.get(training.optimizer, {})
    try:
        return create_optimizer_v2(groups, training.optimizer, **shared, **options)
    except ValueError as error:
        raise RequestError(
            f"training.optimizer: {training.optimizer}: {one_line(error)}; a newer timm may have it"
        ) from None


def _parameter_groups(model: nn.Module, training: TrainingConfig) -> list[dict[str, Any]]:
    """timm's groups: what is decayed and what is not. With layer_decay these two for each layer,
    with the factor on its learning rate, `lr_scale` (Clark et al. 2020, "ELECTRA", appendix A):
    training.layer_decay to the power of the number of layers after it.
    """
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    # torchvision's ViT has no such method as timm's networks have
    undecayed = {"class_token", "encoder.pos_embedding"}
    undecayed |= set(getattr(model, "no_weight_decay", set)())
    options = {
        "weight_decay": training.weight_decay,
        "no_weight_decay_list": undecayed,
        "fallback_no_weight_decay": training.optimizer == "muon",  # embeddings are no matrices
    }
    if training.layer_decay == 1:
        return param_groups_weight_decay(model, **options)
    groups = param_groups_layer_decay(model, layer_decay=training.layer_decay, **options)
    if len({group["lr_scale"] for group in groups}) < 2:
        raise RequestError(
            "training.layer_decay: timm knows no layers of this network; set it to 1"
        )
    return groups


def copies_of_weights(training: TrainingConfig) -> int:
    """About how many numbers a checkpoint keeps of each weight, beside the weight itself."""
    by_optimizer = {"sgd": int(training.momentum > 0), "muon": 1}
    return by_optimizer.get(training.optimizer, 2) + (training.weight_average > 0)
