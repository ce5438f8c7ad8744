"""The significance of every training sample, as of its last visit."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from lab.runtime.distributed import Dist


class SampleStore:
    """What each sample of the training set was worth when it was last trained on, on the device.

    significance: float32, nats; infinite for a sample never seen or without a finite loss. seen: int16, epoch of the
    last visit, -1 for never. 6 bytes a sample, indexed by the data set's own index.

    Of several processes each keeps a range of the indices, 6 / world bytes a sample. What a process records is sent to
    the rank that keeps it when the store is read or saved.
    """

    def __init__(self, samples: int, device: torch.device, dist: Dist | None = None):
        self.dist = dist or Dist()
        self.edges = self.dist.shard_edges(samples)
        self.own = slice(self.edges[self.dist.rank], self.edges[self.dist.rank + 1])
        self.significance = torch.full((self.own.stop - self.own.start,), math.inf, device=device)
        self.seen = torch.full_like(self.significance, -1, dtype=torch.int16)
        self.unsent: list[tuple[Tensor, Tensor]] = []  # (indices, significance) recorded by one of several processes
        self.unsent_epoch = -1

    def record(self, indices: Tensor, significance: Tensor, epoch: int) -> None:
        """Keep the batch's significance, float32 [batch], nats, of the samples int64 [batch]."""
        significance = torch.nan_to_num(significance, nan=math.inf, posinf=math.inf)
        if self.dist.world > 1:
            self.unsent.append((indices, significance))
            self.unsent_epoch = epoch
        else:
            self._keep(indices, significance, epoch)

    def _keep(self, indices: Tensor, significance: Tensor, epoch: int) -> None:
        self.significance.index_copy_(0, indices, significance)
        self.seen.index_fill_(0, indices, epoch)  # `seen[indices] = epoch` would wait for the device

    def merge(self) -> None:
        """Send what was recorded since the last merge, 12 bytes a sample, to the ranks that keep it. Collective; at
        least once an epoch."""
        if self.dist.world == 1:
            return
        nothing = self.significance[:0].long(), self.significance[:0]
        indices, significance = (torch.cat(each) for each in zip(nothing, *self.unsent, strict=True))
        self.unsent = []
        owners = torch.searchsorted(torch.tensor(self.edges[1:], device=indices.device), indices, right=True)
        moves = self.dist.all_gather(owners.bincount(minlength=self.dist.world).tolist()).astype(int)
        epoch = int(self.dist.all_gather([self.unsent_epoch]).max())  # a rank may have recorded nothing
        order = owners.argsort()
        indices, significance = (self.dist.all_to_all(each[order], moves) for each in (indices, significance))
        self._keep(indices - self.own.start, significance, epoch)

    def scores(self, order: np.ndarray) -> np.ndarray:
        """The significance of all samples in this `order` of their indices, float32 on the host. Collective."""
        self.merge()
        own = self.significance.cpu().numpy()
        if self.dist.world == 1:
            return own[order]
        scores = np.full(len(order), -math.inf, dtype=np.float32)
        at = np.flatnonzero((order >= self.own.start) & (order < self.own.stop))
        scores[at] = own[order[at] - self.own.start]
        return self.dist.all_max(torch.from_numpy(scores)).numpy()

    def state_dict(self) -> dict[str, Tensor]:
        """The store, the whole of it on rank 0. Collective."""
        self.merge()
        significance, seen = self.significance, self.seen
        if self.dist.world > 1:
            moves = np.zeros((self.dist.world, self.dist.world), dtype=int)
            moves[:, 0] = np.diff(self.edges)
            significance = self.dist.all_to_all(significance, moves)
            as_bytes = seen[:, None].view(torch.uint8)  # NCCL and gloo send no int16
            seen = self.dist.all_to_all(as_bytes, moves).view(torch.int16)[:, 0]
        return {"significance": significance, "seen": seen}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a whole store; this rank keeps its range of it."""
        self.significance.copy_(state["significance"][self.own])
        self.seen.copy_(state["seen"][self.own])
