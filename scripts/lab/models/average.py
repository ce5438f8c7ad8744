"""The average of the weights over the run, `training.weight_average`."""

from __future__ import annotations

import copy
from itertools import chain

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """An exponential moving average of a model's weights and of BatchNorm's statistics (Polyak &
    Juditsky 1992, "Acceleration of stochastic approximation by averaging"), as a second `model` on
    the same device.

    torch's AveragedModel does the same, but keeps its count of steps in a tensor that the host
    waits for.
    """

    def __init__(self, model: nn.Module, decay: float):
        """decay: of an optimizer step, 0 to 1."""
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        both = (chain(module.parameters(), module.buffers()) for module in (self.model, model))
        pairs = [(average, source.detach()) for average, source in zip(*both, strict=True)]
        self.averaged = [pair for pair in pairs if pair[0].is_floating_point()]
        self.copied = [
            pair for pair in pairs if not pair[0].is_floating_point()
        ]  # BatchNorm's counts of batches

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after `steps` optimizer steps.

        Early on the decay is (1 + steps) / (10 + steps), so that the weights a run starts from are
        soon forgotten (TensorFlow's ExponentialMovingAverage with num_updates).
        """
        average = get_ema_multi_avg_fn(min(self.decay, (1 + steps) / (10 + steps)))
        average(*map(list, zip(*self.averaged, strict=True)), steps)
        if self.copied:
            torch._foreach_copy_(*map(list, zip(*self.copied, strict=True)))
