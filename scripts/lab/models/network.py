"""The network on its device, and what a training, a scoring and a validation step compute with
it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.config.loading import Config
from lab.data.images import resize_weights
from lab.data.mixing import Mixing
from lab.machine.devices import Normalise, compiled, resolve_amp_dtype
from lab.machine.distributed import Dist
from lab.machine.stateful import Stateful
from lab.method.losses import Loss, loss_class
from lab.method.sample_store import Visit
from lab.models.average import WeightAverage
from lab.models.building import (
    building_arguments,
    count_flops,
    eval_view,
    forward_shapes,
    freeze_trunk,
    hold_trunk,
    synchronised,
)
from lab.models.sources import resolved
from lab.models.weights import describe, input_moments


class StepResult(NamedTuple):
    """What a training forward gives, whatever the loss and the rule. On the device."""

    objective: Tensor  # what is minimised: the sum of the losses, weighted where there are weights
    loss: Tensor  # the sum of the plain cross-entropies, nats
    correct: Tensor  # bool [batch]; of mixed labels the one of the largest share counts
    visit: Visit | None  # what the step says of its samples; None where they have no weights
    memory: Tensor | None  # the new rows of a loss that remembers its samples, see `Loss`


def visit_of(logits: Tensor, labels: Tensor, plain: Tensor, measure: Callable) -> Visit:
    """What logits [batch, classes] without gradient say of samples. plain: their cross-entropy."""
    confidence, predicted = logits.float().softmax(-1).max(-1)
    return Visit(measure(logits, labels), plain, confidence, predicted, labels)


def training_forward(
    model: nn.Module, normalise: Normalise, measure: Callable, loss: Loss
) -> Callable[..., StepResult]:
    """What a training step computes, one function to compile: images, labels -> StepResult.

    labels: int64 [batch], or float [batch, classes] where pictures were mixed. weights: float32
    [batch], of the losses; without them no Visit is computed. memory: see `Loss.recall`.
    """

    def forward(
        images: Tensor,
        labels: Tensor,
        weights: Tensor | None = None,
        memory: Tensor | None = None,
    ) -> StepResult:
        with normalise.autocast():
            logits = model(normalise(images))
        correct = logits.argmax(-1) == (labels if labels.ndim == 1 else labels.argmax(-1))
        losses, plain, memory = loss.of_batch(logits.float(), labels, memory)
        if weights is None:
            return StepResult(losses.sum(), plain.sum(), correct, None, memory)
        visit = visit_of(logits.detach(), labels, plain, measure)
        return StepResult((losses * weights).sum(), plain.sum(), correct, visit, memory)

    return forward


def scoring_forward(
    model: nn.Module, normalise: Normalise, measure: Callable, shrink: Tensor | None
) -> Callable:
    """What scoring computes: uint8 images, labels -> float32 [2, batch], significance and 1 for a
    correct prediction.

    shrink: [resolution, side], the weights (`resize_weights`) that take both axes to the scoring
    resolution.
    """

    def forward(images: Tensor, labels: Tensor) -> Tensor:
        images = shrunk(images, shrink)
        with normalise.autocast():
            logits = model(normalise(images))
        correct = logits.argmax(-1) == labels
        return torch.stack([measure(logits, labels), correct.float()])

    return forward


def seeing_forward(
    model: nn.Module, normalise: Normalise, measure: Callable, loss: Loss
) -> Callable[..., tuple[Visit, Tensor | None]]:
    """What the samples of a step say before their pictures are mixed: uint8 images, labels -> their
    Visit, and their new rows of a loss that remembers them. memory: see `Loss.recall`.
    """

    def forward(
        images: Tensor, labels: Tensor, memory: Tensor | None = None
    ) -> tuple[Visit, Tensor | None]:
        with normalise.autocast():
            logits = model(normalise(images))
        logits = logits.float()
        plain = F.cross_entropy(logits, labels, reduction="none")
        return visit_of(logits, labels, plain, measure), loss.seen(logits, memory)

    return forward


def shrunk(images: Tensor, weights: Tensor | None) -> Tensor:
    """Pictures [batch, 3, H, W] at another resolution by `Network.shrink`; as they are where that
    is None.
    """
    return images if weights is None else weights @ images.to(weights.dtype) @ weights.mT


class Network(Stateful):
    """The model on its device, and the functions over whole batches that are compiled: to train,
    score and validate.
    """

    def __init__(
        self,
        model: nn.Module,
        config: Config,
        measure: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
        dist: Dist,
        samples: int = 0,
        classes: int = 0,
    ):
        """measure: logits [batch, classes], labels [batch] -> significance [batch], nats.
        samples: how many indices the training set has.
        """
        training = config.training
        self.model_config = resolved(config.model)
        self.dataset = config.dataset
        self.compile = training.compile
        self.device = device
        self.local_batch = training.batch_size // dist.world  # samples of a batch on this process
        self.synced = training.sync_batchnorm and dist.world > 1
        if config.model.freeze:
            freeze_trunk(model, config.model.name)
        self.base_flop = config.metrics.base_flop_per_sample or count_flops(model, self.side)
        layout = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        model = synchronised(model) if self.synced else model
        self.model = model.to(device, memory_format=layout).train()
        if config.model.freeze:
            hold_trunk(self.model)
        self.amp_dtype = resolve_amp_dtype(training, device)
        self.moments = input_moments(self.model_config, model)
        self.normalise = Normalise(*self.moments.values(), device, layout, self.amp_dtype)
        self.measure = measure
        self.loss = loss_class(training)(training, samples, classes, device, dist)
        step = training_forward(self.model, self.normalise, self.measure, self.loss)
        self.forward = compiled(step, self.compile)
        self.average: WeightAverage | None = None
        if training.weight_average:
            self.average = WeightAverage(self.model, training.weight_average)
        self.scorer = self.scoring_forward()
        self.evaluator = self.scorer
        if self.average is not None:
            self.evaluator = self.scoring_forward(of=self.exported)
        self.mixing: Mixing | None = None
        # of a run that mixes and remembers its samples, by the weights that are validated
        self.seer: Callable[..., tuple[Visit, Tensor | None]] | None = None
        if training.mixup or training.cutmix:
            self.mixing = Mixing(training, self.classes, dist)
            if training.list_suspects or type(self.loss).recall is not Loss.recall:
                view = eval_view(self.exported)
                seeing = seeing_forward(view, self.normalise, measure, self.loss)
                self.seer = compiled(seeing, self.compile)

    @property
    def side(self) -> int:
        """Of the pictures that it trains on, pixels."""
        return self.dataset.image_size

    def state_dict(self) -> dict[str, Any]:
        averaged = None if self.average is None else self.exported.state_dict()
        return {"model": self.model.state_dict(), "averaged": averaged}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        if self.average is not None:
            self.exported.load_state_dict(state["averaged"])

    def local_state(self) -> dict[str, Any]:
        return {"statistics": self.statistics()}

    def load_local_state(self, state: dict[str, Any]) -> None:
        for buffer, value in zip(self.statistics(), state["statistics"], strict=True):
            buffer.copy_(value)

    def merged(self, states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """The means of BatchNorm's statistics over all processes."""
        buffers = zip(*(each["statistics"] for each in states), strict=True)
        return {"statistics": [torch.stack(each).mean(0) for each in buffers]}

    @property
    def exported(self) -> nn.Module:
        """The module whose weights are validated and exported: with `training.weight_average` their
        average.
        """
        return self.model if self.average is None else self.average.model

    def mixes(self, epoch: int, step: int) -> bool:
        """Whether a training step mixes its pictures. A function of the seed, the epoch and the
        step.
        """
        return self.mixing is not None and self.mixing.takes(self.loss.remedy, epoch, step)

    def statistics(self) -> list[Tensor]:
        """The buffers of floating-point numbers, BatchNorm's above all, of the weights and of their
        average.
        """
        buffers = [
            *self.model.buffers(),
            *(() if self.average is None else self.exported.buffers()),
        ]
        return [buffer for buffer in buffers if buffer.is_floating_point()]

    def scoring_forward(
        self,
        resolution: int | None = None,
        of: nn.Module | None = None,
        batch_statistics: bool = False,
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """`scoring_forward` in eval mode with the weights of a module, by default those that are
        trained, at `resolution` pixels or at full size. batch_statistics: see `eval_view`.
        """
        view = eval_view(self.model if of is None else of, batch_statistics)
        forward = scoring_forward(view, self.normalise, self.measure, self.shrink(resolution))
        return compiled(forward, self.compile)

    @cached_property
    def classes(self) -> int:
        """How many classes the network tells apart, found by a forward of shapes alone."""
        return forward_shapes(self.model, self.side, training=False)[-1]

    def shrink(self, resolution: int | None) -> Tensor | None:
        """The weights (`resize_weights`) [resolution, side] that take both axes of a picture to
        `resolution` pixels; None where they have as many.
        """
        side = self.side
        if resolution in (None, side):
            return None
        return resize_weights(resolution, side, self.device)

    def predictor(self) -> Callable[[Tensor], Tensor]:
        """What gives the logits [batch, classes] of uint8 images, as validation computes them; not
        compiled.
        """
        model = eval_view(self.exported)

        def forward(images: Tensor) -> Tensor:
            with self.normalise.autocast():
                return model(self.normalise(images))

        return forward

    @cached_property
    def look_forward(self) -> Callable[[Tensor], Tensor]:
        return self.predictor()

    @torch.no_grad()
    def look(self, images: Tensor, labels: Tensor) -> Visit:
        """What validation would see of uint8 images [batch, 3, H, W], padded to one shape. Nothing
        is trained; BatchNorm's statistics stay.
        """
        n = len(labels)
        padding = images.new_zeros(max(0, self.local_batch - n), *images.shape[1:])
        logits = self.look_forward(torch.cat([images, padding]))[:n].float()
        plain = F.cross_entropy(logits, labels, reduction="none")
        return visit_of(logits, labels, plain, self.measure)

    def normalise_by(self, moments: dict[str, Sequence[float]]) -> None:
        """Normalise pixels by this `mean` and `std` from now on; before anything is compiled."""
        self.moments = moments
        self.normalise.set_moments(**moments)

    def describe(self, classes: Sequence[str]) -> dict[str, Any]:
        """What others need to build the network and to prepare its pictures: see
        `weights.describe`.
        """
        arguments = building_arguments(self.model_config, self.side)
        return describe(
            self.model_config, self.dataset, self.model, classes, self.moments, arguments
        )

    def alike(self) -> list[float]:
        """Numbers that every process must have alike: the sum of all weights."""
        sums = [p.detach().double().sum() for p in self.model.parameters()]
        return [torch.stack(sums).sum().item()]
