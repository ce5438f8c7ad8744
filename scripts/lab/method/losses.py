"""The losses that a network may be trained with: cross-entropy, two that suffer less from wrong
labels, and two that weigh classes and samples in another way.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.config.sections import TrainingConfig
from lab.config.tables import Table
from lab.machine.distributed import Dist
from lab.machine.stateful import Stateful
from lab.method.doubt import FORGET_FROM


class Loss(Stateful):
    """Cross-entropy, smoothed by `training.label_smoothing`.

    A loss may keep a row of numbers a sample. A step reads the rows of its samples (`recall`),
    computes new ones with the loss, and stores them (`remember`). So what is compiled changes no
    memory of its own.
    """

    adapts = False  # whether `remedy` changes from epoch to epoch
    remedy = 1.0  # share of the steps that mix their pictures, where a run mixes any
    contradicted: float | None = None  # see `AsFarAsWrong`

    def __init__(
        self, training: TrainingConfig, samples: int, classes: int, device: torch.device, dist: Dist
    ):
        """samples: how many indices the training set has."""
        self.smoothing = training.label_smoothing
        self.balances = training.class_weights == "balanced"
        self.class_weights: Tensor | None = None  # float32 [classes]; None: all 1
        self.is_plain = type(self) is Loss and not self.smoothing  # nothing but the cross-entropy

    def __call__(
        self, logits: Tensor, labels: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """(the loss of each sample, float32 [batch]; their new rows). logits: float32 [batch,
        classes]; labels: int64 [batch], or of mixed pictures float32 [batch, classes], and then
        rows are mixed too.
        """
        return F.cross_entropy(
            logits, labels, reduction="none", label_smoothing=self.smoothing
        ), None

    def of_batch(
        self, logits: Tensor, labels: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """(what is minimised of each sample, its class's weight in it, float32 [batch]; its plain
        cross-entropy without gradient, nats; its new row). Inputs as of a call.
        """
        likely, weights = self.balanced(labels)
        losses, rows = self(logits, likely, rows)
        plain = losses.detach()
        if not self.is_plain or likely is not labels:
            plain = F.cross_entropy(logits.detach(), labels, reduction="none")
        return losses if weights is None else losses * weights, plain, rows

    def weigh_classes(self, counts: np.ndarray, device: torch.device) -> None:
        """Weigh each class by the inverse of its share from now on, as scikit-learn's
        `class_weight="balanced"` does: the mean over all samples is 1. counts: samples of each.
        """
        numbers = torch.as_tensor(counts, dtype=torch.float32, device=device)
        present = numbers > 0
        self.class_weights = numbers.sum() / (present.sum() * numbers.clamp(min=1))

    def balanced(self, labels: Tensor) -> tuple[Tensor, Tensor | None]:
        """(labels, float32 [batch]) whose losses, times these numbers, are weighted by class; None:
        all 1.

        Of mixed labels, float32 [batch, classes], that is the mixture of the weighted losses of
        their classes: a loss is linear in the shares, so each share is multiplied by its weight.
        """
        if self.class_weights is None:
            return labels, None
        if labels.ndim == 1:
            return labels, self.class_weights[labels]
        shares = labels * self.class_weights
        weights = shares.sum(-1)
        return shares / weights[:, None], weights

    def recall(self, indices: Tensor) -> Tensor | None:
        """The rows of the samples int64 [batch]; None where this loss keeps none."""
        return None

    def remember(self, indices: Tensor, rows: Tensor) -> None:
        """Keep the new rows of the samples int64 [batch]."""

    def seen(self, logits: Tensor, rows: Tensor | None) -> Tensor | None:
        """The new rows of samples that are predicted and not trained on, logits float32 [batch,
        classes]: of pictures that a step then mixes. Their rows are mixed likewise.
        """
        return rows

    def merge(self) -> None:
        """Give all processes the rows that any of them has stored. Collective."""

    def start_epoch(self, progress: float) -> None:
        """Before an epoch. progress: of the schedule, 0 to 1. Collective."""
        self.merge()


class GeneralisedCrossEntropy(Loss):
    """(1 - p^q) / q of the label's probability p, with q = 0.7 (Zhang & Sabuncu 2018, "Generalized
    cross entropy loss for training deep neural networks with noisy labels", equation 6).

    A label that the network finds unlikely has a smaller gradient than with cross-entropy. Of mixed
    labels, float32 [batch, classes], the loss is the mean of the losses of their classes, by share.
    """

    Q = 0.7

    def __call__(
        self, logits: Tensor, labels: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        if labels.ndim == 1:
            likely = -F.cross_entropy(logits, labels, reduction="none")
            return -torch.expm1(self.Q * likely) / self.Q, None
        of_classes = -torch.expm1(self.Q * logits.log_softmax(-1)) / self.Q
        return (labels * of_classes).sum(-1), None


def predicted(logits: Tensor) -> Tensor:
    """The probabilities of the classes, none of them quite 0 or 1."""
    return logits.softmax(-1).clamp(1e-4, 1 - 1e-4)


class EarlyLearning(Loss):
    """Cross-entropy + weight * log(1 - <t, p>) with t a running mean of the sample's own
    predictions p (Liu et al. 2020, "Early-learning regularization prevents memorization of noisy
    labels", equations 6 and 9).

    The network learns right labels first. The added term keeps it near what it predicted then. t
    takes in a share of 1 - DECAY of p at each visit, before it is used. WEIGHT is the
    paper's for CIFAR-10.
    """

    DECAY = 0.7
    WEIGHT = 3.0
    STATE = ("targets",)
    strength: float | Tensor = 1.0  # factor on WEIGHT

    def __init__(
        self, training: TrainingConfig, samples: int, classes: int, device: torch.device, dist: Dist
    ):
        super().__init__(training, samples, classes, device, dist)
        self.dist = dist
        self.targets = torch.zeros(samples, classes, device=device)
        self.fresh = (
            torch.zeros(samples, dtype=torch.bool, device=device) if dist.world > 1 else None
        )

    def __call__(
        self, logits: Tensor, labels: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        losses = self.cross_entropy(logits, labels)
        if labels.ndim == 1:  # a mixture's prediction is that of no sample
            rows = self.seen(logits.detach(), rows)
        held = torch.log1p(-(rows * predicted(logits)).sum(-1))
        return losses + self.WEIGHT * held * self.strength, rows

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        losses, _ = super().__call__(logits, labels)
        return losses

    def seen(self, logits: Tensor, rows: Tensor) -> Tensor:
        return self.updated(rows, predicted(logits))

    def updated(self, rows: Tensor, probabilities: Tensor) -> Tensor:
        """The targets with one more prediction in them; of one that is not finite, as they were.
        Both float32 [batch, classes].
        """
        shares = probabilities / probabilities.sum(-1, keepdim=True)
        finite = shares.isfinite().all(-1, keepdim=True)
        return torch.where(finite, self.DECAY * rows + (1 - self.DECAY) * shares, rows)

    def recall(self, indices: Tensor) -> Tensor:
        return self.targets[indices]

    def remember(self, indices: Tensor, rows: Tensor) -> None:
        self.targets.index_copy_(0, indices, rows)
        if self.fresh is not None:
            self.fresh.index_fill_(0, indices, True)

    def merge(self) -> None:
        """A sample comes once an epoch, to one of the processes. Its new row goes to all."""
        if self.fresh is None:
            return
        owners = self.dist.all_sum(self.fresh.float())
        sums = self.dist.all_sum(self.targets * self.fresh[:, None])
        self.targets.copy_(
            torch.where(owners[:, None] > 0, sums / owners.clamp(min=1)[:, None], self.targets)
        )
        self.fresh.fill_(False)

    def state_dict(self) -> dict[str, Tensor]:
        self.merge()
        return super().state_dict()


class AsFarAsWrong(EarlyLearning):
    """Early learning as far as labels look wrong, `training.noisy_labels`. Where none does it is
    cross-entropy, smoothed by `training.label_smoothing`.

    A network contradicts few right labels among the samples that it is surest of, however often it
    errs on the others. `contradicted` is the share that it contradicts in the SUREST part of them,
    by their targets. `remedy` rises with it from 0 at RIGHT to 1 at WRONG: the added term and the
    share of the steps that are mixed grow with it, and the smoothing goes. All of that is set at
    epochs' starts from JUDGED_FROM of the schedule, when the network has learned something, up to
    FORGET_FROM, and then kept: a label learned by heart is no longer contradicted. It comes in over
    RAMP of the schedule: all of it at once threw a ResNet-18 back to chance.
    """

    SUREST = 0.1
    RIGHT = 0.005
    WRONG = 0.02
    JUDGED_FROM = 0.2
    RAMP = 0.1
    STATE = ("targets", "remedy", "contradicted")
    adapts = True

    def __init__(
        self, training: TrainingConfig, samples: int, classes: int, device: torch.device, dist: Dist
    ):
        super().__init__(training, samples, classes, device, dist)
        self.remedy = 0.0
        self.contradicted: float | None = None  # share, 0 to 1; None before it is known
        self.strength = torch.zeros((), device=device)
        self.labels = torch.full((samples,), -1, device=device)  # by index; -1: not known

    def know_labels(self, labels: np.ndarray) -> None:
        """Take the labels that are trained on, int64 by index; -1 for none, as beyond the last."""
        self.labels[: len(labels)] = torch.from_numpy(labels).to(self.labels)

    def cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        smoothing = self.smoothing * (1 - self.strength)
        losses = F.cross_entropy(logits, labels, reduction="none")
        return losses + smoothing * (-logits.log_softmax(-1).mean(-1) - losses)

    def start_epoch(self, progress: float) -> None:
        super().start_epoch(progress)
        if self.JUDGED_FROM <= progress < FORGET_FROM:
            self.contradicted = self.dist.broadcast(self.contradicted_now())
            above = (self.contradicted - self.RIGHT) / (self.WRONG - self.RIGHT)
            most = (progress - self.JUDGED_FROM) / self.RAMP
            self.apply(min(1.0, max(0.0, above), most))

    def apply(self, remedy: float) -> None:
        self.remedy = remedy
        self.strength.fill_(remedy)

    def contradicted_now(self) -> float:
        sure, seen_as = self.targets.max(-1)
        known = (self.labels >= 0) & (sure > 0)
        count = math.ceil(self.SUREST * int(known.sum()))
        order = torch.where(known, sure, -1.0).sort(descending=True, stable=True).indices[:count]
        return (seen_as[order] != self.labels[order]).double().mean().item() if count else 0.0

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.apply(self.remedy)


class Focal(Loss):
    """Cross-entropy times (1 - p)^GAMMA of the label's probability p (Lin et al. 2017, "Focal loss
    for dense object detection", equation 4, with their GAMMA). What is predicted surely counts
    little.
    """

    GAMMA = 2.0

    def __call__(
        self, logits: Tensor, labels: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        logs = logits.log_softmax(-1)
        shares = F.one_hot(labels, logits.shape[-1]) if labels.ndim == 1 else labels
        return -(shares * (1 - logs.exp()) ** self.GAMMA * logs).sum(-1), None


class BinaryCrossEntropy(Loss):
    """timm's, over each class by itself, then the mean over the classes (Wightman et al. 2021,
    "ResNet strikes back", section 2.2); smoothed by `training.label_smoothing`. Its gradient is
    about as many times smaller than that of cross-entropy as there are classes.
    """

    def __init__(
        self, training: TrainingConfig, samples: int, classes: int, device: torch.device, dist: Dist
    ):
        super().__init__(training, samples, classes, device, dist)
        from timm.loss import BinaryCrossEntropy as ByTimm

        self.by_class = ByTimm(smoothing=self.smoothing, reduction="none")

    def __call__(
        self, logits: Tensor, labels: Tensor, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        return self.by_class(logits, labels).mean(-1), None


def tried_loss(kind: type[Loss]) -> str | None:
    """What is wrong with the losses of two samples of three classes; None where nothing is."""
    loss = kind(TrainingConfig(), 2, 3, torch.device("cpu"), Dist())
    losses, _ = loss(torch.zeros(2, 3), torch.tensor([0, 2]), loss.recall(torch.arange(2)))
    shape = [*losses.shape]
    return None if shape == [2] else f"the losses of 2 samples have the shape {shape}, not [2]"


LOSSES = Table(
    "training.loss",
    Loss,
    {
        "cross_entropy": Loss,
        "generalised_cross_entropy": GeneralisedCrossEntropy,
        "early_learning": EarlyLearning,
        "focal": Focal,
        "binary_cross_entropy": BinaryCrossEntropy,
    },
    tried=tried_loss,
)


def loss_class(training: TrainingConfig) -> type[Loss]:
    return AsFarAsWrong if training.noisy_labels else LOSSES[training.loss]
