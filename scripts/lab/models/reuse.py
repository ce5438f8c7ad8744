"""Training on some rows of the forward that scored their batch: see `forward_once`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lab.data.loading import DeviceBatch
from lab.method.sample_store import Visit
from lab.models.forward_once import CannotTrace, ForwardOnce, Rows, filled, row_forward
from lab.models.network import Network, StepResult

GRID = 16  # at most so many sizes of a backward are compiled: each takes seconds
MARGIN = 1.125  # over the expected number of rows, where the rule does not fix it


class ReusedForward:
    """A forward over whole batches, and the backward of some of their rows.

    The forward is a training forward: it updates BatchNorm's running statistics, and its dropout
    masks are those of the backward.
    """

    def __init__(self, network: Network, total: int, rows: int, more: Sequence[int] = ()):
        """total: samples of a batch; rows: how many of them are expected to be chosen; more: other
        numbers that will be. Traces, checks and compiles. Raises CannotTrace with the reason.
        """
        if network.mixing is not None:
            raise CannotTrace("a picture mixed by training.mixup or cutmix has no score of its own")
        generator = torch.Generator().manual_seed(0)
        size = (total, 3, network.side, network.side)
        images = torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)
        labels = torch.arange(total) % 2
        example = [images.to(network.device), labels.to(network.device)]
        memory = network.loss.recall(torch.zeros_like(example[1]))
        example += [] if memory is None else [memory]
        self.loss = network.loss
        self.total = total
        compute = row_forward(network.normalise, network.measure, network.loss)
        self.expected = min(max(1, rows), total)
        self.once = ForwardOnce.build(
            network.model, compute, example, self.expected, network.compile
        )
        for count in more:
            self.once.prepare(self.capacity(count))

    def fits(self, batch: DeviceBatch) -> bool:
        """Whether a batch has the shape that was traced: pictures may be missing."""
        return len(batch.labels) == self.total

    def forward(self, batch: DeviceBatch) -> Rows:
        """Forward a batch; what it saved is kept until `backward` or the next forward."""
        memory = self.loss.recall(batch.indices)
        inputs = [batch.images, batch.labels]
        return self.once.forward(*inputs, *([] if memory is None else [memory]))

    def capacity(self, count: int) -> int:
        """How many rows the backward of so many chosen ones has, with padding. It depends on the
        count alone: a resumed run computes what the uninterrupted one does.
        """
        if count <= self.expected:
            return self.expected
        step = max(1, self.total // GRID)
        return min(self.total, math.ceil(count / step) * step)

    def backward(self, rows: Tensor, weights: Tensor) -> None:
        """Add the gradient of sum(weights * losses[rows]) to the parameters' `.grad`.

        rows: int64, different ones; weights: float32, one each.
        """
        size = self.capacity(len(rows))
        self.once.prepare(size)  # traced and compiled where it is met for the first time
        if size > len(rows):
            padded, real = filled(rows, size, self.total)
            real[: len(rows)] = weights
            rows = padded
            weights = real
        self.once.backward(rows, weights)


def result_of(told: Rows, rows: Tensor, labels: Tensor, weights: Tensor | None) -> StepResult:
    """The result of a training step over these rows. labels: int64, of the rows; weights: float32,
    of their losses.
    """
    losses = told.losses[rows]
    plain = told.plain[rows]
    memory = None if told.targets is None else told.targets[rows]
    correct = told.correct[rows]
    if weights is None:
        return StepResult(losses.sum(), plain.sum(), correct, None, memory)
    visit = Visit(
        told.significance[rows], plain, told.confidence[rows], told.predicted[rows], labels
    )
    return StepResult((losses * weights).sum(), plain.sum(), correct, visit, memory)
