"""The optimizer and its learning rate schedule."""

from __future__ import annotations

import math
from itertools import chain

import torch
from torch import nn

from lab.sections import TrainingConfig


def lr_at(progress: float, training: TrainingConfig, warmup: float) -> float:
    """Learning rate at `progress` (0 to 1) of the run: linear over its first part `warmup`, then half a cosine down to
    min_lr (Loshchilov & Hutter 2017, SGDR, equation 5, one cycle)."""
    if progress < warmup:
        return training.lr * progress / warmup
    decayed = (progress - warmup) / max(1e-12, 1 - warmup)
    return training.min_lr + (training.lr - training.min_lr) * (1 + math.cos(math.pi * min(1.0, decayed))) / 2


def build_optimizer(model: nn.Module, training: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """SGD or AdamW, fused on a GPU. Not decayed are tensors of one dimension (norms, biases), and what the network
    says should not be: of a ViT the class token and the position embedding."""
    excepted = {"class_token", "encoder.pos_embedding"}  # torchvision's names; timm's networks have a method
    excepted |= set(getattr(model, "no_weight_decay", set)())
    trained = [(p.ndim <= 1 or name in excepted, p) for name, p in model.named_parameters() if p.requires_grad]
    flat, rest = ([p for is_flat, p in trained if is_flat is wanted] for wanted in (True, False))
    groups = [{"params": rest}, {"params": flat, "weight_decay": 0.0}]
    shared = {"lr": training.lr, "weight_decay": training.weight_decay, "fused": device.type == "cuda" or None}
    if training.optimizer == "sgd":
        optimizer = torch.optim.SGD(groups, momentum=training.momentum, nesterov=training.nesterov, **shared)
        if device.type == "cuda" and training.momentum:  # fused SGD leaves them unset where it skips its first step
            optimizer.state.update({p: {"momentum_buffer": torch.zeros_like(p)} for p in chain(flat, rest)})
        return optimizer
    return torch.optim.AdamW(groups, **shared)
