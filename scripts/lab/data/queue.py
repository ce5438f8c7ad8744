"""Packing: full batches out of the active samples of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from lab.data.loading import DeviceBatch
from lab.machine.distributed import Dist
from lab.machine.stateful import Stateful


class ActiveQueue(Stateful):
    """Collects samples on the device until a full batch is there, so that every training step has
    one shape.

    Keeps uint8 pixels [pending, 3, H, W], labels and indices. What is pending carries over epochs.

    Of several processes each keeps its own samples and knows how many the others have. Together
    they form the batches that one process would form, spread evenly.
    """

    def __init__(self, batch_size: int, device: torch.device, dist: Dist | None = None):
        self.batch_size = batch_size
        self.device = device
        self.dist = dist or Dist()
        self.clear()

    def __len__(self) -> int:
        return 0 if self.samples is None else len(self.samples.labels)

    def clear(self) -> None:
        self.samples: DeviceBatch | None = None
        self.pending = [0] * self.dist.world  # samples that each rank keeps

    def push(self, batch: DeviceBatch, counts: Sequence[int] = ()) -> DeviceBatch | None:
        """Add samples, at most batch_size over all ranks. Returns the oldest batch_size samples
        once there are so many, else None. counts: how many each rank adds, where there are several.
        """
        counts = counts or [len(batch.labels)]
        if self.samples is not None:
            pairs = zip(self.samples.tensors(), batch.tensors(), strict=True)
            batch = DeviceBatch(*(torch.cat(pair) for pair in pairs))
        room = self.batch_size - sum(self.pending)
        # of each rank: all that is pending, and of the new ones those of the first ranks
        taken = []
        for pending, new in zip(self.pending, counts, strict=True):
            taken.append(pending + min(new, room))
            room -= min(new, room)
        self.pending = [pending + new for pending, new in zip(self.pending, counts, strict=True)]
        if room:
            self.samples = batch
            return None
        self.pending = [pending - gone for pending, gone in zip(self.pending, taken, strict=True)]
        local = taken[self.dist.rank]
        self.samples = DeviceBatch(*(tensor[local:] for tensor in batch.tensors()))
        first = [tensor[:local] for tensor in batch.tensors()]
        return DeviceBatch(*self.dist.balance(taken, first))

    def state_dict(self) -> dict[str, Any]:
        """All that is pending on any rank, and how many samples are each rank's. Collective."""
        samples = None if self.samples is None else self.samples.tensors()
        if self.dist.world > 1 and sum(self.pending):
            parts = self.dist.all_gather_objects(
                None if samples is None else [each.cpu() for each in samples]
            )
            samples = [
                torch.cat(each)
                for each in zip(*(part for part in parts if part is not None), strict=True)
            ]
        return {"samples": samples, "pending": self.pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take this rank's part. Each keeps what it had; where the number of ranks has changed,
        they share evenly.
        """
        self.clear()
        if state["samples"] is not None:
            edges = self.dist.shard_edges(len(state["samples"][1]))
            same = len(state["pending"]) == self.dist.world
            self.pending = list(state["pending"]) if same else np.diff(edges).tolist()
            start = sum(self.pending[: self.dist.rank])
            local = slice(start, start + self.pending[self.dist.rank])
            mine = [tensor[local].to(self.device) for tensor in state["samples"]]
            self.samples = DeviceBatch(*mine)
