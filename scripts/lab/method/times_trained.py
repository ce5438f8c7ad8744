"""How often each sample was trained on."""

from __future__ import annotations

import torch
from torch import Tensor

from lab.machine.distributed import Dist


class TimesTrained:
    """Counts, on the device, how often each sample of the training set was back-propagated: int32,
    4 bytes a sample.

    Counting waits for nothing. Of several processes each counts by itself. `merge` moves the counts
    of all to rank 0. A step counts even where its weights were not changed, because its loss was
    not finite.
    """

    def __init__(self, samples: int, device: torch.device, dist: Dist | None = None):
        """samples: how many indices the training set has; 0 counts nothing."""
        self.dist = dist or Dist()
        self.times = torch.zeros(samples, dtype=torch.int32, device=device)
        self.once = torch.ones((), dtype=torch.int32, device=device)

    def add(self, indices: Tensor) -> None:
        """Count the samples of a training step, int64 [batch]."""
        if len(self.times):
            self.times.index_add_(0, indices, self.once.expand(len(indices)))

    def merge(self) -> None:
        """Move the counts of all processes to rank 0. Collective."""
        if self.dist.world > 1:
            self.dist.all_sum(self.times)
            if self.dist.rank:
                self.times.zero_()

    def state_dict(self) -> dict[str, Tensor]:
        """The counts, those of all processes on rank 0. Collective."""
        self.merge()
        return {"times": self.times}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take the counts of all processes. Rank 0 goes on with them, the others from zero."""
        self.times.zero_()
        if self.dist.rank == 0:
            self.times.copy_(state["times"])
