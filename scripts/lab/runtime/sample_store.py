"""What is known of each sample of the training set."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lab.runtime.distributed import Dist


class History:
    """What each sample of the training set was worth when it was last trained on (`ast.scoring: history`).

    Filled for nothing by the training forward, kept on the device: float32 significance, nats, infinite for a sample
    never seen or without a finite loss; int16 epoch of the last visit, -1 for never; uint8 what the running epoch
    makes of it: 0 left out, 1 active, 2 explored. 7 bytes a sample, indexed by the data set's own index.

    Of several processes each keeps a range of the indices, and what the epoch makes of all: 1 + 6 / world bytes a
    sample. What a process records it sends at the epoch's end, and before a checkpoint, to whom it belongs (`merge`).
    """

    def __init__(self, samples: int, explored_weight: float, device: torch.device, dist: Dist | None = None):
        self.explored_weight, self.dist = explored_weight, dist or Dist()
        self.edges = self.dist.edges(samples)
        self.own = slice(self.edges[self.dist.rank], self.edges[self.dist.rank + 1])
        self.significance = torch.full((self.own.stop - self.own.start,), math.inf, device=device)
        self.seen = torch.full_like(self.significance, -1, dtype=torch.int16)
        self.kinds = torch.ones(samples, dtype=torch.uint8, device=device)
        self.to_send: list[tuple[Tensor, Tensor]] = []  # indices and significance, where there are several processes

    def weights(self, indices: Tensor) -> Tensor:
        """Of the loss of each sample, float32 [batch]."""
        return torch.where(self.kinds[indices] == 2, self.explored_weight, 1.0)

    def record(self, indices: Tensor, significance: Tensor, epoch: int) -> None:
        """Keep the batch's significance, [batch], nats."""
        significance = torch.nan_to_num(significance, nan=math.inf, posinf=math.inf)
        if self.dist.world > 1:
            self.to_send.append((indices, significance))
        else:
            self._keep(indices, significance, epoch)

    def _keep(self, indices: Tensor, significance: Tensor, epoch: int) -> None:
        self.significance.index_copy_(0, indices, significance)
        self.seen.index_fill_(0, indices, epoch)  # where `seen[indices] = epoch` would wait for the device

    def merge(self, epoch: int) -> None:
        """Send what was recorded in `epoch`, 12 bytes a sample, to the ranks that keep it. Collective."""
        nothing = self.significance[:0].long(), self.significance[:0]
        indices, significance = (torch.cat(each) for each in zip(nothing, *self.to_send, strict=True))
        self.to_send = []
        owners = torch.searchsorted(torch.tensor(self.edges[1:], device=indices.device), indices, right=True)
        moves = self.dist.gather(owners.bincount(minlength=self.dist.world).tolist()).astype(int)
        order = owners.argsort()
        indices, significance = (self.dist.exchange(each[order], moves) for each in (indices, significance))
        self._keep(indices - self.own.start, significance, epoch)

    def scores(self, order: np.ndarray) -> np.ndarray:
        """The significance of all samples in this `order` of their indices, float32 on the host. Collective."""
        own = self.significance.cpu().numpy()
        if self.dist.world == 1:
            return own[order]
        scores = np.full(len(order), -math.inf, dtype=np.float32)
        at = np.flatnonzero((order >= self.own.start) & (order < self.own.stop))
        scores[at] = own[order[at] - self.own.start]
        return self.dist.all_max(torch.from_numpy(scores)).numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """The store, the whole of it on rank 0. Collective."""
        significance, seen = self.significance, self.seen
        if self.dist.world > 1:
            moves = np.zeros((self.dist.world, self.dist.world), dtype=int)
            moves[:, 0] = np.diff(self.edges)
            significance = self.dist.exchange(significance, moves)
            seen = self.dist.exchange(seen[:, None].view(torch.uint8), moves).view(torch.int16)[:, 0]  # no int16 there
        return {"significance": significance, "seen": seen, "kinds": self.kinds}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a whole store, or this rank's part of it."""
        self.kinds.copy_(state["kinds"])
        self.significance.copy_(state["significance"][self.own])
        self.seen.copy_(state["seen"][self.own])
