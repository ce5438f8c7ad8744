"""Whose label may be wrong: who is left out before a rule chooses, `ast.forget_rate`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from lab.machine.distributed import Dist
from lab.machine.stateful import Stateful
from lab.method.sample_store import SampleStore

STREAK = 4  # visits in a row at which the network has to predict the same other class
FORGET_FROM = 0.5  # share of the schedule after which samples are left out
# share of the schedule up to which only those are left out that the network is sure of
CERTAIN_UNTIL = 0.75
# share of the samples left out that an epoch looks at again, without training on them
REVISIT = 0.25

LEFT_OUT = -1.0  # in place of a weight: the epoch does not load the sample
LOOKED_AT = 0.0  # likewise: it forwards the sample, and does not train on it


class LabelDoubt(Stateful):
    """Who is left out because the label may be wrong. This class doubts nobody."""

    KEYS: ClassVar[tuple[str, ...]] = ("forget_rate",)
    keeps_labels: ClassVar[bool] = False  # whether visits are stored with what became of labels
    share: float = 0.0  # of every pool that is left out
    weights: Tensor | None = None  # float16 by index, on the host, of the whole epoch; None: all 1

    def __init__(
        self, rate: float | str, samples: int, seed: int, device: torch.device, dist: Dist
    ):
        """rate: `ast.forget_rate`. samples: how many indices the training set has."""

    def start_epoch(
        self, epoch: int, order: np.ndarray, progress: float, store: SampleStore | None
    ) -> None:
        """Before an epoch of any kind. Collective.

        order: int64, all indices in the order of the epoch. progress: of the schedule, 0 to 1.
        """

    def keep(self, scores: Tensor) -> Tensor | None:
        """The rows of a pool that the rule may choose, int64, ascending; None: all of them.

        scores: [n], nats. A tensor on a device is not waited for.
        """
        return None

    def note(self, left_out: Tensor, indices: Tensor, local: slice) -> None:
        """Take down who of a pool was left out in the end, bool [n].

        indices: int64, of those of this process, the rows `local` of the pool.
        """

    def forgotten(self) -> float | None:
        """The share of this epoch's samples that was left out; None: nobody is doubted."""
        return None

    def mispredicted(self, all_predicted: bool) -> float:
        """The share of this epoch's samples that were left out and predicted all the same: wrongly,
        or they would be kept. all_predicted: whether every sample of a pool was predicted.
        """
        return 0.0

    def left_out(self) -> np.ndarray | None:
        """Who was left out last, bool by index; None: nobody is doubted. Collective."""
        return None

    def looks(self, order: np.ndarray) -> np.ndarray:
        """Those of int64 [n] samples that this epoch looks at without training on them, in that
        order.
        """
        return order[:0]


class HighestScores(LabelDoubt):
    """A share of the highest scores of each pool (Shen & Sanghavi 2019, "Learning with bad training
    data via iterative trimmed loss minimization").
    """

    STATE = ("epoch", "last_left_out", "pooled", "left")
    keeps_labels = True

    def __init__(
        self, rate: float | str, samples: int, seed: int, device: torch.device, dist: Dist
    ):
        self.share = rate
        self.dist = dist
        self.epoch = 0
        self.pooled = 0  # samples of this epoch's pools
        self.left = torch.zeros((), dtype=torch.int64, device=device)  # of them left out
        # by index, the epoch in which it was left out last; -1: never
        self.last_left_out = torch.full((samples,), -1, dtype=torch.int32, device=device)

    def start_epoch(
        self, epoch: int, order: np.ndarray, progress: float, store: SampleStore | None
    ) -> None:
        self.epoch = epoch
        self.pooled = 0
        self.left.zero_()

    def keep(self, scores: Tensor) -> Tensor:
        n = len(scores)
        # rounded by what was left out before, so that small batches add up to the share
        before = math.floor(self.share * self.pooled)
        count = math.floor(self.share * (self.pooled + n)) - before
        if scores.is_cpu:  # of stored ones, a sample never seen is nobody to doubt
            count = min(count, int(scores.isfinite().sum()))
            scores = scores.nan_to_num(posinf=-math.inf)
        order = scores.sort(descending=True, stable=True).indices
        return order[count:].sort().values

    def note(self, left_out: Tensor, indices: Tensor, local: slice) -> None:
        self.pooled += len(left_out)
        self.left += left_out.sum().to(self.left.device)
        mine = left_out[local].to(indices.device)
        before = self.last_left_out[indices]
        self.last_left_out.index_copy_(0, indices, torch.where(mine, self.epoch, before))

    def forgotten(self) -> float:
        return self.left.item() / self.pooled if self.pooled else 0.0

    def mispredicted(self, all_predicted: bool) -> float:
        return self.forgotten() if all_predicted else 0.0

    def left_out(self) -> np.ndarray:
        self.merge()
        last = self.last_left_out.cpu().numpy()
        return (last == last.max()) & (last >= 0)

    def merge(self) -> None:
        """Give all processes what each has taken down: a sample comes to one of them an epoch.
        Collective.
        """
        self.dist.all_max(self.last_left_out)

    def state_dict(self) -> dict[str, Any]:
        self.merge()
        return super().state_dict()


class UnlikelyLabels(LabelDoubt):
    """From FORGET_FROM of the schedule on, those whose label the network does not believe: see
    `doubted`.

    A few of them, drawn by the seed, the epoch and the index, are looked at again before the
    epoch's training steps. A sample comes back once the network predicts its label.
    """

    STATE = ("weights", "share_out")
    keeps_labels = True

    def __init__(
        self, rate: float | str, samples: int, seed: int, device: torch.device, dist: Dist
    ):
        self.seed = seed
        self.share_out = 0.0
        self.weights = torch.ones(samples, dtype=torch.float16)

    def start_epoch(
        self, epoch: int, order: np.ndarray, progress: float, store: SampleStore | None
    ) -> None:
        self.share_out = 0.0
        if progress < FORGET_FROM:
            return
        out = doubted(store.on_host(), self.left_out(), progress)
        again = np.random.default_rng((self.seed, epoch, 2)).random(len(out)) < REVISIT
        weights = np.where(out, np.where(again, LOOKED_AT, LEFT_OUT), 1.0)
        self.weights.copy_(torch.from_numpy(weights))
        self.share_out = float(out[order].mean())

    def forgotten(self) -> float:
        return self.share_out

    def looks(self, order: np.ndarray) -> np.ndarray:
        return order[self.weights.numpy()[order] == LOOKED_AT]

    def left_out(self) -> np.ndarray:
        return self.weights.numpy() != 1


def doubted(columns: Mapping[str, np.ndarray], before: np.ndarray, progress: float) -> np.ndarray:
    """Which samples have a label that is not kept, bool [samples].

    columns: of `SampleStore.on_host`, with labels. A label is not believed where the network has
    predicted one and the same other class at the last STREAK visits. Up to CERTAIN_UNTIL of the
    schedule it must also have been as sure of that class as it is, on average, of the labels of
    that class: what is left out early is not learned, so that an early mistake costs more than a
    late one. The comparison with a class's mean confidence is that of confident learning (Northcutt
    et al. 2021, "Confident learning: estimating uncertainty in dataset labels", section 3.1).

    before: bool [samples], which were not believed so far. Of these a label is believed again as
    soon as the network predicts it. progress: of the schedule, 0 to 1.
    """
    wrong = columns["streak"] >= STREAK
    if progress < CERTAIN_UNTIL:
        wrong &= columns["confidence"] >= class_bars(columns)[columns["predicted"]]
    return wrong | (before & (columns["streak"] > 0))


def class_bars(columns: Mapping[str, np.ndarray]) -> np.ndarray:
    """The mean probability of their label over the samples of each class, float64 [largest class +
    1].

    The probability of a sample is that of its mean loss. Infinite for a class without samples.
    """
    seen = columns["given"] >= 0
    classes = int(max(columns["given"].max(initial=0), columns["predicted"].max(initial=0))) + 1
    counts = np.bincount(columns["given"][seen], minlength=classes)
    sums = np.bincount(
        columns["given"][seen], np.exp(-columns["loss"][seen].astype(np.float64)), minlength=classes
    )
    return np.where(counts > 0, sums / np.maximum(counts, 1), np.inf)
