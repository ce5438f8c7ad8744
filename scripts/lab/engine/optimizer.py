"""The optimizer of a run: its parameter groups, and its rate in each."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lab.base.errors import RequestError, one_line
from lab.config.sections import TrainingConfig
from lab.config.tables import Table

Groups = Sequence[dict[str, Any]]  # of parameters, each with its weight_decay


def build_optimizer(
    model: nn.Module, training: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """The optimizer of the config, fused on a GPU where it can be.

    Not decayed are tensors of one dimension (norms, biases), and what the network says should not
    be: of a ViT the class token and the position embedding. Raises RequestError for an optimizer
    that cannot be had here, and for layer_decay where the network's layers are not known.
    """
    groups = _parameter_groups(model, training)
    return OPTIMIZERS.get(training.optimizer, by_timm)(groups, training, device)


def sgd(groups: Groups, training: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer over groups of parameters. The lab sets the rate of each group at each step."""
    fused = device.type == "cuda" or None
    momentum = {"momentum": training.momentum, "nesterov": training.nesterov}
    optimizer = torch.optim.SGD(
        groups, training.lr, weight_decay=training.weight_decay, fused=fused, **momentum
    )
    if fused and training.momentum:
        # fused SGD leaves them unset where it skips its first step
        unset = (p for group in optimizer.param_groups for p in group["params"])
        optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in unset})
    return optimizer


def adamw(groups: Groups, training: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    fused = device.type == "cuda" or None
    return torch.optim.AdamW(groups, training.lr, weight_decay=training.weight_decay, fused=fused)


def by_timm(
    groups: Groups, training: TrainingConfig, device: torch.device
) -> torch.optim.Optimizer:
    """Any optimizer of timm, with its own defaults for what the config does not say."""
    from timm.optim import create_optimizer_v2

    name = training.optimizer
    options: dict[str, Any] = {}
    if name == "adam":
        options["fused"] = device.type == "cuda" or None
    if name == "muon" or reads_momentum(name):
        options["momentum"] = training.momentum
    if name == "muon":
        options["nesterov"] = training.nesterov
    try:
        return create_optimizer_v2(
            groups, name, lr=training.lr, weight_decay=training.weight_decay, **options
        )
    except Exception as error:  # some need packages, or a GPU, and say so in their own ways
        why = f"{type(error).__name__}: {one_line(error)}"
        hint = "" if taken(name) else "; a newer timm may have it"
        raise RequestError(f"training.optimizer: {name}: {why}{hint}") from None


def taken(name: str) -> bool:
    """Whether timm has an optimizer of this name."""
    from timm.optim import list_optimizers

    return name in list_optimizers()


OPTIMIZERS = Table(
    "training.optimizer",
    sgd,
    {"sgd": sgd, "adamw": adamw, **dict.fromkeys(("adam", "lamb", "muon"), by_timm)},
    taken=taken,
)  # the others are timm's


def reads_momentum(name: str) -> bool:
    """Whether an optimizer of timm takes training.momentum."""
    from timm.optim import get_optimizer_info

    return get_optimizer_info(name).has_momentum


def check_optimizer(training: TrainingConfig) -> None:
    """Raises ValueError naming the key for a name that neither the lab nor timm has, and for an
    optimizer of timm that a step of the lab does not suit.
    """
    name = training.optimizer
    if name in OPTIMIZERS:
        return
    from timm.optim import get_optimizer_info, list_optimizers

    if name not in list_optimizers():
        near = difflib.get_close_matches(name, [*OPTIMIZERS, *list_optimizers()], 1, 0.0)
        raise ValueError(f"training.optimizer: no {name!r}; did you mean {near[0]}?")
    if get_optimizer_info(name).second_order:
        raise ValueError(f"training.optimizer: {name} needs second derivatives, which no step has")


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
        "fallback_no_weight_decay": "muon" in training.optimizer,  # embeddings are no matrices
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
