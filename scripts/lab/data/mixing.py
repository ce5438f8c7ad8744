"""MixUp and CutMix: training on mixtures of the pictures of a step."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.transforms import v2

from lab.config.sections import TrainingConfig
from lab.data.randomness import MIXING_EPOCH, as_seed, host_generator, uniform
from lab.machine.distributed import Dist


class Mixing:
    """Mixes the pictures of a training step, and their labels, by torchvision.

    `training.mixup`: a weighted mean of two pictures (Zhang et al. 2018, "mixup: beyond empirical
    risk minimization"). `training.cutmix`: a rectangle of one picture in another (Yun et al. 2019,
    "CutMix"). With both, each step takes one of them with the same chance. Each picture is mixed
    with the one before it in the batch.

    What is drawn is a function of the seed, the epoch, the step and the process. It is drawn on the
    host, so that the device is not waited for.
    """

    def __init__(self, training: TrainingConfig, classes: int, dist: Dist):
        self.seed = training.seed
        self.dist = dist
        alphas = {v2.MixUp: training.mixup, v2.CutMix: training.cutmix}
        self.choice = v2.RandomChoice(
            [mix(alpha=alpha, num_classes=classes) for mix, alpha in alphas.items() if alpha]
        )
        # MixUp's grey levels are no whole numbers; so for CutMix too, for every step has one type
        self.in_float = training.mixup > 0

    def __call__(
        self, images: Tensor, labels: Tensor, epoch: int, step: int, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """uint8 [batch, 3, H, W], int64 [batch] -> uint8 or float32 [batch, 3, H, W], float32
        [batch, classes]; and rows of numbers [batch, n] of the samples, mixed as their labels are.
        """
        number = torch.tensor([step * self.dist.world + self.dist.rank])
        seed = as_seed(uniform(self.seed, MIXING_EPOCH + epoch, number, 1).item())
        with host_generator() as generator:
            generator.manual_seed(seed)
            mixed = self.choice(images.float() if self.in_float else images, labels)
            if rows is not None:
                generator.manual_seed(seed)
                rows = self.mixed_rows(rows, images.shape[-2:])
        return *mixed, rows

    def takes(self, chance: float, epoch: int, step: int) -> bool:
        """Whether a step is mixed, where it is with this chance. All processes say the same."""
        if chance in (0.0, 1.0):
            return chance > 0
        number = torch.tensor([step])
        return uniform(self.seed, MIXING_EPOCH + epoch, number, 2)[0, 1].item() < chance

    def mixed_rows(self, rows: Tensor, size: Sequence[int]) -> Tensor:
        """size: height and width of the pictures. What is drawn is drawn again, for two blank
        pictures of different classes, whose labels then say their shares.
        """
        _, labels = self.choice(torch.zeros(2, 3, *size), torch.arange(2))
        share = labels[0, 0].item()
        return share * rows + (1 - share) * rows.roll(1, 0)
