"""The network on its device, and what a training, a scoring and a validation step compute with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.config import Config
from lab.data.images import axis_weights
from lab.losses import LOSSES, Loss
from lab.models import count_flops, eval_view, synchronised
from lab.runtime.devices import IMAGENET_MOMENTS, Normalise, compiled, resolve_amp_dtype
from lab.runtime.distributed import Dist
from lab.runtime.sample_store import Visit


def training_forward(model: nn.Module, normalise: Normalise, measure: Callable, loss: Loss) -> Callable:
    """What a training step computes, one function to compile: uint8 images, labels -> (objective, correct [batch],
    summed loss). The objective is the sum of `loss` that is minimised, weighted where there are weights; the summed
    loss is the plain cross-entropy.

    With weights [batch] of the samples a `Visit` follows, with `rows` (see `Loss`) the new rows come last.
    """

    def forward(
        images: Tensor, labels: Tensor, weights: Tensor | None = None, rows: Tensor | None = None
    ) -> tuple[Any, ...]:
        with normalise.autocast():
            logits = model(normalise(images))
        correct, known = logits.argmax(-1) == labels, logits.detach().float()
        losses, rows = loss(logits.float(), labels, rows)
        plain = losses.detach() if loss.is_plain else F.cross_entropy(known, labels, reduction="none")
        kept = () if rows is None else (rows,)
        if weights is None:
            return losses.sum(), correct, plain.sum(), *kept
        confidence, predicted = known.softmax(-1).max(-1)
        visit = Visit(measure(logits.detach(), labels), plain, confidence, predicted, labels)
        return (losses * weights).sum(), correct, plain.sum(), visit, *kept

    return forward


def scoring_forward(model: nn.Module, normalise: Normalise, measure: Callable, shrink: Tensor | None) -> Callable:
    """What scoring computes: uint8 images, labels -> float32 [2, batch], significance and 1 for a correct prediction.

    shrink: [resolution, side], the weights (`axis_weights`) that take both axes to the scoring resolution.
    """

    def forward(images: Tensor, labels: Tensor) -> Tensor:
        if shrink is not None:
            images = shrink @ images.to(shrink.dtype) @ shrink.mT
        with normalise.autocast():
            logits = model(normalise(images))
        correct = logits.argmax(-1) == labels
        return torch.stack([measure(logits, labels), correct.float()])

    return forward


class Network:
    """The model on its device, and the functions over whole batches that are compiled: to train, score and validate."""

    def __init__(
        self, model: nn.Module, config: Config, measure: Callable, device: torch.device, dist: Dist, samples: int = 0,
        classes: int = 0
    ):  # fmt: skip
        """measure: logits [batch, classes], labels [batch] -> significance [batch], nats. samples: how many indices the
        training set has."""
        training = config.training
        self.config, self.device = config, device
        self.local_batch = training.batch_size // dist.world  # samples of a batch on this process
        self.synced = training.sync_batchnorm and dist.world > 1
        self.base_flop = config.metrics.base_flop_per_sample or count_flops(model, config.dataset.image_size)
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        model = synchronised(model) if self.synced else model
        self.model = model.to(device, memory_format=layout).train()
        self.amp_dtype = resolve_amp_dtype(training, device)
        published = getattr(model, "pretrained_cfg", None) or {}  # timm's record of how its weights were trained
        moments = (published.get(name, usual) for name, usual in IMAGENET_MOMENTS.items())
        self.normalise = Normalise(*moments, device, layout, self.amp_dtype)
        self.measure = measure
        self.loss = LOSSES[training.loss](training, samples, classes, device, dist)
        self.forward = compiled(training_forward(self.model, self.normalise, self.measure, self.loss), training.compile)
        self.evaluator = self.scoring_forward()

    def scoring_forward(self, resolution: int | None = None) -> Callable[[Tensor, Tensor], Tensor]:
        """`scoring_forward` with the model's own weights in eval mode, at `resolution` pixels or at full size."""
        training, side, shrink = self.config.training, self.config.dataset.image_size, None
        if resolution is not None:
            whole = torch.tensor([[0.0, side]], device=self.device)
            shrink = axis_weights(whole[:, 0], whole[:, 1], resolution, side)[0]
        forward = scoring_forward(eval_view(self.model), self.normalise, self.measure, shrink)
        return compiled(forward, training.compile_scoring or training.compile)

    def weight_sum(self) -> float:
        """The sum of all weights: processes whose weights differ do not have it alike."""
        return torch.stack([p.detach().double().sum() for p in self.model.parameters()]).sum().item()
