"""Sums and counts of what was done: loss, correct predictions, samples, joules."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.base.console import print_rank0
from lab.base.errors import RequestError, TrainingFailed, one_line
from lab.machine.stateful import Stateful


@dataclass
class Ledger(Stateful):
    """Work done, in samples and optimizer steps."""

    STATE: ClassVar[tuple[str, ...]] = ("loaded", "scored", "trained", "steps")

    loaded: int = 0
    scored: int = 0
    trained: int = 0
    steps: int = 0

    def dense_equivalents(self, scoring_cost: float = 1 / 3) -> float:
        """The forward + backward passes this work amounts to. A scored sample costs `scoring_cost`
        of one.
        """
        return self.trained + self.scored * scoring_cost

    def since(self, earlier: Ledger) -> Ledger:
        return Ledger(
            *(
                now - then
                for now, then in zip(asdict(self).values(), asdict(earlier).values(), strict=True)
            )
        )


class Meter(Stateful):
    """Sums of loss and correct predictions over an epoch. They stay on the device, so counting
    never waits for it.

    allowed: how many steps with a loss or score that is not finite the rest of the run may have.
    """

    STATE = ("sums", "correct", "trained", "predicted")

    def __init__(self, device: torch.device, epoch: int, allowed: int = 0):
        self.epoch = epoch
        self.allowed = allowed
        # loss, correct, non-finite steps, 1 + the first of them, their samples, optimizer steps
        # skipped, their samples
        self.sums = torch.zeros(7, dtype=torch.float64, device=device)
        self.correct = self.trained = self.predicted = 0  # correct: those counted on the host

    def add_loss(
        self, loss: Tensor, samples: int, step: int, objective: Tensor | None = None
    ) -> Tensor:
        """Add a loss summed over `samples`. Returns, on the device, whether it is not finite, or
        the objective that was minimised (None: the loss).
        """
        bad = ~(loss if objective is None else loss + objective).isfinite()
        self.sums[0] += loss.masked_fill(bad, 0.0)
        self._add_bad(bad, samples, step)
        self.trained += samples
        return bad

    def skip_batch(self, step: int) -> None:
        """Count a batch whose scores are not finite. Raises TrainingFailed where it is one too
        many.
        """
        self._add_bad(torch.ones((), dtype=torch.bool, device=self.sums.device), 0, step)
        self.read()

    def _add_bad(self, bad: Tensor, samples: int, step: int) -> None:
        self.sums[3] = torch.where((self.sums[3] == 0) & bad, step + 1, self.sums[3])
        self.sums[2] += bad
        if self.allowed:  # else the first one ends the run
            self.sums[4] += bad * samples

    def add_skipped(self, bad: Tensor, samples: int) -> None:
        """Count an optimizer step over `samples` as skipped where `bad`, on the device, is true."""
        self.sums[5] += bad
        self.sums[6] += bad * samples

    def add_correct(self, correct: Tensor | int, samples: int) -> None:
        """Add the number of correct predictions among `samples`, counted on the device or on the
        host.
        """
        if isinstance(correct, int):
            self.correct += correct
        else:
            self.sums[1] += correct
        self.predicted += samples

    def skipped(self) -> tuple[int, int, int]:
        """(non-finite steps, optimizer steps skipped for them, their samples). A device-to-host
        read.
        """
        return tuple(int(self.sums[i]) for i in (2, 5, 6))

    def read(self) -> tuple[float | None, float | None]:
        """(mean loss of the trained, accuracy of the predicted in percent), None without any.

        One device-to-host read. Raises TrainingFailed, naming the epoch's first step with a loss or
        score that is not finite, once there are more of them than `allowed`.
        """
        loss, correct, bad_steps, first, bad_samples, *_ = self.sums.tolist()
        if bad_steps > self.allowed:
            raise TrainingFailed(f"non-finite loss in epoch {self.epoch + 1}, step {int(first)}")
        trained = self.trained - bad_samples
        accuracy = 100 * (correct + self.correct) / self.predicted if self.predicted else None
        return (loss / trained if trained else None), accuracy


def merged_sums(sums: np.ndarray) -> np.ndarray:
    """`Meter.sums` of one process out of those of several, float64 [world, 7] -> [7]."""
    merged = sums.sum(0)
    first_bad = sums[:, 3][sums[:, 3] > 0]
    # all skip the same steps
    merged[3] = first_bad.min() if len(first_bad) else 0
    merged[5] = sums[:, 5].max()
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
            handle = pynvml.nvmlDeviceGetHandleByUUID(
                f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            )
            pynvml.nvmlDeviceGetTotalEnergyConsumption(
                handle
            )  # older cards have none: found out here
            self._read = partial(pynvml.nvmlDeviceGetTotalEnergyConsumption, handle)
        except pynvml.NVMLError as error:
            print_rank0(
                f"energy is not measured, energy_kj stays null: NVML says {one_line(error)}"
            )

    def read_kj(self) -> float | None:
        return None if self._read is None else self._read() / 1e6  # the counter is in millijoules
