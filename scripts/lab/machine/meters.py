"""Sums and counts of what was done: loss, correct predictions, samples, joules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.base.console import print_rank0
from lab.base.errors import RequestError, TrainingFailed, one_line
from lab.machine.distributed import Dist
from lab.machine.stateful import Stateful


@dataclass
class Ledger(Stateful):
    """Work done, in samples and optimizer steps."""

    SAMPLES: ClassVar[tuple[str, ...]] = (
        *("loaded", "scored", "trained", "reused", "padding"),
        *("learned", "looked", "seen", "judged"),
    )
    STATE: ClassVar[tuple[str, ...]] = (*SAMPLES, "steps")

    loaded: int = 0
    scored: int = 0
    trained: int = 0
    steps: int = 0
    reused: int = 0  # of the trained, those whose forward was the scoring one
    padding: int = 0  # rows of weight 0 that went backward, to fill up a shape
    learned: int = 0  # samples that the proxy was trained on
    looked: int = 0  # samples that the network predicted, and that no step had
    seen: int = 0  # samples that were predicted before their pictures were mixed
    judged: int = 0  # of the scored, those that the network itself predicted, for a target

    def add_judged(self, samples: int) -> None:
        self.scored += samples
        self.judged += samples

    def reduce_to_rank0(self, dist: Dist) -> None:
        """Move to rank 0 the samples that all processes have counted. Collective."""
        totals = dist.all_gather([getattr(self, name) for name in self.SAMPLES]).sum(0)
        mine = totals if dist.rank == 0 else totals * 0
        for name, count in zip(self.SAMPLES, mine, strict=True):
            setattr(self, name, int(count))

    def merged(self, states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """All count the same optimizer steps, and each its own samples."""
        sums = {name: sum(each[name] for each in states) for name in self.SAMPLES}
        counts = sums if rank == 0 else dict.fromkeys(sums, 0)
        return {**counts, "steps": states[0]["steps"]}

    def dense_equivalents(self, scoring_cost: float = 1 / 3, learning_cost: float = 0.0) -> float:
        """The forward + backward passes this work amounts to. A scored sample costs `scoring_cost`
        of one, one that the proxy learns from `learning_cost` more, a forward of the network a
        third.
        """
        backward = 2 / 3
        repeated = self.trained - (1 - backward) * self.reused + backward * self.padding
        repeated += (1 - backward) * (self.looked + self.seen + self.judged)
        by_scores = self.scored - self.judged
        return repeated + by_scores * scoring_cost + self.learned * learning_cost

    def since(self, earlier: Ledger) -> Ledger:
        return Ledger(**{name: getattr(self, name) - getattr(earlier, name) for name in self.STATE})


class Meter(Stateful):
    """Sums of loss and correct predictions over an epoch. They stay on the device, so counting
    never waits for it.
    """

    STATE = ("sums", "correct", "trained", "predicted")

    def __init__(self, device: torch.device, epoch: int):
        self.epoch = epoch
        # loss; correct predictions; 1 + the first step with a loss that is not finite, 0 for none
        self.sums = torch.zeros(3, dtype=torch.float64, device=device)
        self.correct = 0  # those counted on the host
        self.trained = 0
        self.predicted = 0

    def add_loss(self, loss: Tensor, objective: Tensor, samples: int, step: int) -> None:
        """Add a loss summed over `samples`, minimised through `objective`. step: from 0."""
        bad = ~(loss + objective).isfinite()
        self.sums[0] += loss.masked_fill(bad, 0.0)
        self.sums[2] = torch.where((self.sums[2] == 0) & bad, step + 1, self.sums[2])
        self.trained += samples

    def add_correct(self, correct: Tensor | int, samples: int) -> None:
        """Add the number of correct predictions among `samples`, counted on the device or on the
        host.
        """
        if isinstance(correct, int):
            self.correct += correct
        else:
            self.sums[1] += correct
        self.predicted += samples

    def read(self) -> tuple[float | None, float | None]:
        """(mean loss of the trained, accuracy of the predicted in percent), None without any.

        One device-to-host read. Raises TrainingFailed naming the epoch's first step with a loss
        that is not finite.
        """
        loss, correct, first_bad = self.sums.tolist()
        if first_bad:
            raise TrainingFailed(
                f"non-finite loss in epoch {self.epoch + 1}, step {int(first_bad)}"
            )
        accuracy = None
        if self.predicted:
            accuracy = 100 * (correct + self.correct) / self.predicted
        return (loss / self.trained if self.trained else None), accuracy

    def reduce_to_rank0(self, dist: Dist) -> None:
        """Move to rank 0 what all processes have counted. Collective."""
        rows = dist.all_gather([self.correct, self.trained, self.predicted, *self.sums.tolist()])
        mine = rows if dist.rank == 0 else rows[:0]
        totals = mine[:, :3].sum(0)
        self.correct = int(totals[0])
        self.trained = int(totals[1])
        self.predicted = int(totals[2])
        self.sums.copy_(torch.from_numpy(merged_sums(mine[:, 3:])))

    def merged(self, states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """Added up on rank 0, nothing elsewhere."""
        mine = states if rank == 0 else []
        counts = ("correct", "trained", "predicted")
        sums = np.stack([each["sums"].cpu().numpy() for each in states])[: len(mine)]
        return {
            **{name: sum(each[name] for each in mine) for name in counts},
            "sums": torch.from_numpy(merged_sums(sums)),
        }


def merged_sums(sums: np.ndarray) -> np.ndarray:
    """`Meter.sums` of one process out of those of several, float64 [processes, 3] -> [3]."""
    merged = sums.sum(0)
    bad = sums[:, 2][sums[:, 2] > 0]
    merged[2] = bad.min() if len(bad) else 0
    return merged


class ClassCounts(NamedTuple):
    """How many samples of each class were validated, and how many of them predicted correctly."""

    correct: list[int]
    count: list[int]

    @classmethod
    def of(cls, parts: Sequence[np.ndarray]) -> ClassCounts:
        """parts: of each process, int64 [3, n]: the labels, 1 for each that was predicted, 1 for
        each with finite logits. Raises TrainingFailed where one has others, and RequestError where
        there is none.
        """
        labels, correct, finite = np.concatenate(parts, 1)
        if not len(labels):
            raise RequestError("dataset: no picture of the validation set can be read")
        if bad := int((finite == 0).sum()):
            raise TrainingFailed(
                f"validation: the logits of {bad:,} of {len(labels):,} pictures are not finite"
            )
        count = np.bincount(labels)
        return cls(np.bincount(labels[correct > 0], minlength=len(count)).tolist(), count.tolist())

    def accuracy(self) -> float:
        """In percent."""
        return 100 * sum(self.correct) / sum(self.count)


class EnergyMeter:
    """Energy the GPU has drawn, from NVML's counter. `read_kj` gives None where there is no such
    counter.
    """

    def __init__(self, device: torch.device):
        self._read: Callable[[], float] | None = None
        if device.type != "cuda":
            return
        import pynvml

        try:
            pynvml.nvmlInit()
            uuid = torch.cuda.get_device_properties(device).uuid
            handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
            read = partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
            read()  # fails here on older cards, which have no counter
            self._read = read
        except pynvml.NVMLError as error:
            print_rank0(
                f"energy is not measured, energy_kj stays null: NVML says {one_line(error)}"
            )

    def read_kj(self) -> float | None:
        return None if self._read is None else self._read() / 1e6  # the counter is in millijoules
