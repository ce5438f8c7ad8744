"""The losses that a network may be trained with: cross-entropy, two that suffer less from wrong
labels, and two that weigh classes and samples in another way.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lab.config.sections import TrainingConfig
from lab.config.tables import Table
from lab.machine.distributed import Dist
from lab.machine.stateful import Stateful


class Loss(Stateful):
    """Cross-entropy, smoothed by `training.label_smoothing`.

    A loss may keep a row of numbers a sample. A step reads the rows of its samples (`recall`),
    computes new ones with the loss, and stores them (`remember`). So what is compiled changes no
    memory of its own.
    """

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
        classes].
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
        losses, rows = self(logits, labels, rows)
        plain = losses.detach()
        if not self.is_plain:
            plain = F.cross_entropy(logits.detach(), labels, reduction="none")
        return self.balanced(losses, labels), plain, rows

    def weigh_classes(self, counts: np.ndarray, device: torch.device) -> None:
        """Weigh each class by the inverse of its share from now on, as scikit-learn's
        `class_weight="balanced"` does: the mean over all samples is 1. counts: samples of each.
        """
        numbers = torch.as_tensor(counts, dtype=torch.float32, device=device)
        present = numbers > 0
        self.class_weights = numbers.sum() / (present.sum() * numbers.clamp(min=1))

    def balanced(self, losses: Tensor, labels: Tensor) -> Tensor:
        """The losses float32 [batch] times the weights of their classes; of mixed labels, float32
        [batch, classes], times the mean weight.
        """
        if self.class_weights is None:
            return losses
        weights = self.class_weights
        return losses * (weights[labels] if labels.ndim == 1 else labels @ weights)

    def recall(self, indices: Tensor) -> Tensor | None:
        """The rows of the samples int64 [batch]; None where this loss keeps none."""
        return None

    def remember(self, indices: Tensor, rows: Tensor) -> None:
        """Keep the new rows of the samples int64 [batch]."""

    def merge(self) -> None:
        """Give all processes the rows that any of them has stored. Collective."""


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
        losses, _ = super().__call__(logits, labels)
        probabilities = logits.softmax(-1).clamp(1e-4, 1 - 1e-4)
        rows = self.updated(rows, probabilities.detach())
        return losses + self.WEIGHT * torch.log1p(-(rows * probabilities).sum(-1)), rows

    def updated(self, rows: Tensor, probabilities: Tensor) -> Tensor:
        """The targets with one more prediction in them; of one that is not finite, as they were.
        Both float32 [batch, classes].
        """
        predicted = probabilities / probabilities.sum(-1, keepdim=True)
        finite = predicted.isfinite().all(-1, keepdim=True)
        return torch.where(finite, self.DECAY * rows + (1 - self.DECAY) * predicted, rows)

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
