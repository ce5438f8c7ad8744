"""The average of the weights over the run, `training.weight_average`."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


class WeightAverage:
    """An exponential moving average of a model's weights and of BatchNorm's statistics (Polyak &
    Juditsky 1992, "Acceleration of stochastic approximation by averaging"), as a second `model` on
    the same device.

    torch's AveragedModel does the same, but keeps its count of steps in a tensor that the host
    waits for. timm's ModelEmaV3 walks through both state dicts at every step: on an H200 that takes
    the host 1.3 ms for ResNet-18 and 1.7 ms for ResNet-50, and this 0.07 and 0.15 ms.
    """

    def __init__(self, model: nn.Module, decay: float):
        """decay: of an optimizer step, 0 to 1."""
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)
        # pairs of an average and what it follows; counts are BatchNorm's, of batches
        self.fractions: list[tuple[Tensor, Tensor]] = []
        self.counts: list[tuple[Tensor, Tensor]] = []
        for average, source in zip(_tensors(self.model), _tensors(model), strict=True):
            pairs = self.fractions if average.is_floating_point() else self.counts
            pairs.append((average, source.detach()))

    @torch.no_grad()
    def update(self, steps: int) -> None:
        """Take in the weights after `steps` optimizer steps.

        Early on the decay is (1 + steps) / (10 + steps), so that the weights a run starts from are
        soon forgotten (TensorFlow's ExponentialMovingAverage with num_updates).
        """
        decay = min(self.decay, (1 + steps) / (10 + steps))
        averages, sources = map(list, zip(*self.fractions, strict=True))
        get_ema_multi_avg_fn(decay)(averages, sources, steps)
        if self.counts:
            averages, sources = map(list, zip(*self.counts, strict=True))
            torch._foreach_copy_(averages, sources)


def _tensors(model: nn.Module) -> Iterator[Tensor]:
    return chain(model.parameters(), model.buffers())
