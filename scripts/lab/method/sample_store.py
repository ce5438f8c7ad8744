"""What every training sample was worth when it was last trained on, and what the network made of
its label.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.machine.distributed import Dist

LEAST = 1e-6  # nats: what a score of 0 is taken for, so that doubling it tells
MEMORY = 4  # visits that the running means of loss and confidence are taken over
# columns of what fair visits say of labels, see `SampleStore`
JUDGED = ("visits", "likely", "rival", "rival_likely", "votes")


class Visit(NamedTuple):
    """What a training forward says of its samples, each [batch]."""

    significance: Tensor  # float32, nats
    loss: Tensor  # float32, nats: the plain cross-entropy of the given label
    confidence: Tensor  # float32, 0 to 1: the probability of the predicted class
    predicted: Tensor  # int64
    given: Tensor  # int64: the labels trained on


def in_turns(indices: Tensor, turns: Tensor) -> Iterator[Tensor]:
    """The positions of the samples int64 [n], int64 each: the first visit of every sample, then the
    second of those that have one, and so on. turns: [n], when each visit was.
    """
    order = turns.argsort(stable=True)
    order = order[indices[order].argsort(stable=True)]
    samples = indices[order]
    places = torch.arange(len(order), device=order.device)
    begins = torch.ones_like(samples, dtype=torch.bool)
    begins[1:] = samples[1:] != samples[:-1]
    visits = places - torch.where(begins, places, 0).cummax(0).values
    for number in range(int(visits.max()) + 1 if len(order) else 0):
        yield order[visits == number]


class SampleStore:
    """What each sample of the training set was worth when it was last trained on, on the device.

    significance: float32, nats; infinite for a sample never seen or without a finite loss.
    last_epoch: int16, epoch of the last visit, -1 for never. 6 bytes a sample, indexed by the data
    set's own index.

    With `labels`, 37 bytes more. loss and confidence: float32, exponential running means over some
    MEMORY visits. predicted: int32, the class of the last visit. given: int32, the label. streak:
    uint8, at how many visits in a row up to the last one the network has predicted this same class
    and not the label. Over the visits at which the label was hardly learned by heart (`record`),
    visits: int32, their number; likely: float32, the sum of the label's probabilities; rival:
    int32, the class most often predicted in its place, -1 for none; rival_likely: float32, the sum
    of its probabilities where it was predicted; votes: float32, of these what no other class's
    predictions outweigh.

    Of several processes each keeps a range of the indices, a share of those bytes. What a process
    records is sent to the rank that keeps it when the store is read or saved.
    """

    def __init__(
        self, samples: int, device: torch.device, dist: Dist | None = None, labels: bool = False
    ):
        self.dist = dist or Dist()
        self.edges = self.dist.shard_edges(samples)
        self.local = slice(self.edges[self.dist.rank], self.edges[self.dist.rank + 1])
        self.significance = torch.full(
            (self.local.stop - self.local.start,), math.inf, device=device
        )
        self.columns = {"significance": self.significance}
        self.columns["last_epoch"] = self.last_epoch = torch.full_like(
            self.significance, -1, dtype=torch.int16
        )
        self.labels = labels
        if labels:
            self.columns |= {
                name: torch.zeros_like(self.significance) for name in ("loss", "confidence")
            }
            self.columns |= {
                name: torch.full_like(self.last_epoch, -1, dtype=torch.int32)
                for name in ("predicted", "given", "rival")
            }
            self.columns["visits"] = torch.zeros_like(self.last_epoch, dtype=torch.int32)
            self.columns |= {
                name: torch.zeros_like(self.significance)
                for name in ("likely", "rival_likely", "votes")
            }
            self.columns["streak"] = torch.zeros_like(self.last_epoch, dtype=torch.uint8)
        self.unsent: list[
            tuple[Tensor, Tensor]
        ] = []  # (indices, rows) recorded by one of several processes
        self.unsent_epoch = -1

    def record(self, indices: Tensor, visit: Visit, epoch: int, fair: bool = False) -> None:
        """Keep what a visit says of the samples int64 [batch].

        fair: whether what the network says of their labels counts as judgement: it has hardly
        learned them by heart.
        """
        given = visit if self.labels else visit[:1]
        columns = [column.float() for column in given]  # which holds every class's number
        if self.labels:
            columns.append(torch.full_like(columns[0], float(fair)))
        rows = torch.stack(columns)
        rows = torch.nan_to_num(rows, nan=math.inf, posinf=math.inf)
        if self.dist.world > 1:
            self.unsent.append((indices, rows))
            self.unsent_epoch = epoch
        else:
            self._keep(indices, rows, epoch)

    def record_scores(self, indices: Tensor, scores: Tensor, epoch: int) -> None:
        """Keep fresh scores float32 [batch] of samples that may not be trained on. For a store
        without labels.
        """
        nothing = torch.zeros(0, device=scores.device)
        self.record(indices, Visit(scores, nothing, nothing, nothing, nothing), epoch)

    def _keep(self, indices: Tensor, rows: Tensor, epoch: int) -> None:
        """rows: float32 [1 or 6, batch], the fields of a Visit and 1 for a fair one."""
        if self.labels:
            self._keep_labels(indices, *rows[1:5])
            self._judge(indices, *rows[1:])
        self.significance.index_copy_(0, indices, rows[0])
        self.last_epoch.index_fill_(
            0, indices, epoch
        )  # `last_epoch[indices] = epoch` would wait for the device

    def _keep_labels(
        self, indices: Tensor, loss: Tensor, confidence: Tensor, predicted: Tensor, given: Tensor
    ) -> None:
        before = {name: column[indices] for name, column in self.columns.items()}
        sound = loss.isfinite()
        first = before["given"] < 0
        for name, new in (("loss", loss), ("confidence", confidence)):
            mean = torch.where(first, new, before[name] + (new - before[name]) / MEMORY)
            self.columns[name].index_copy_(0, indices, torch.where(sound, mean, before[name]))
        again = (predicted == before["predicted"]).to(torch.uint8) * before["streak"].clamp(
            max=254
        ) + 1
        streak = torch.where(sound & (predicted != given), again, 0)
        given = torch.where(sound, given, before["given"])
        for name, new in (("streak", streak), ("predicted", predicted), ("given", given)):
            self.columns[name].index_copy_(0, indices, new.to(self.columns[name].dtype))

    def _judge(
        self,
        indices: Tensor,
        loss: Tensor,
        confidence: Tensor,
        predicted: Tensor,
        given: Tensor,
        fair: Tensor,
    ) -> None:
        """Count what fair visits say of labels. The rival is found by a weighted majority vote
        (Boyer & Moore 1991, "MJRTY: a fast majority vote algorithm"), for which one class a sample
        is enough to remember.
        """
        before = {name: self.columns[name][indices] for name in JUDGED}
        counts = loss.isfinite() * fair
        against = counts * confidence * (predicted != given)
        same = predicted == before["rival"]
        votes = before["votes"] + torch.where(same, against, -against)
        falls = votes < 0
        sums = before["rival_likely"] + torch.where(same, against, 0.0)
        new = {
            "visits": before["visits"] + counts,
            "likely": before["likely"] + torch.where(counts > 0, torch.exp(-loss), 0.0),
            "rival": torch.where(falls, predicted, before["rival"]),
            "rival_likely": torch.where(falls, against, sums),
            "votes": votes.abs(),
        }
        for name, values in new.items():
            self.columns[name].index_copy_(0, indices, values.to(self.columns[name].dtype))

    def merge(self) -> None:
        """Send what was recorded since the last merge, 16 bytes a sample and 20 more with labels,
        to the ranks that keep it. Collective; at least once an epoch. A sample that was visited
        twice since, on two ranks perhaps, is kept in the order of its visits.
        """
        if self.dist.world == 1:
            return
        nothing = (
            self.significance[:0].long(),
            self.significance.new_empty(7 if self.labels else 2, 0),
        )
        told = [
            (indices, torch.cat([rows, torch.full_like(rows[:1], turn)]))
            for turn, (indices, rows) in enumerate(self.unsent)
        ]
        indices, rows = (torch.cat(each, -1) for each in zip(nothing, *told, strict=True))
        self.unsent = []
        owners = torch.searchsorted(
            torch.tensor(self.edges[1:], device=indices.device), indices, right=True
        )
        moves = self.dist.all_gather(owners.bincount(minlength=self.dist.world).tolist()).astype(
            int
        )
        epoch = int(
            self.dist.all_gather([self.unsent_epoch]).max()
        )  # a rank may have recorded nothing
        order = owners.argsort(stable=True)
        indices, rows = (self.dist.all_to_all(each[order], moves) for each in (indices, rows.T))
        indices = indices - self.local.start
        for visits in in_turns(indices, rows[:, -1]):
            self._keep(indices[visits], rows[visits, :-1].T, epoch)

    def scores(self, order: np.ndarray, epoch: int | None = None) -> np.ndarray:
        """The significance of all samples in this `order` of their indices, float32 on the host.
        Collective.

        epoch: the current one; each score is then doubled for every epoch since its own but the
        last, so that a sample that is left out comes back.
        """
        self.merge()
        local = self.significance.cpu().numpy()
        if epoch is not None:
            left_out = np.maximum(epoch - 1 - self.last_epoch.cpu().numpy(), 0)
            local = np.maximum(local, LEAST) * np.exp2(left_out.astype(np.float32))
        if self.dist.world == 1:
            return local[order]
        scores = np.full(len(order), -math.inf, dtype=np.float32)
        at = np.flatnonzero((order >= self.local.start) & (order < self.local.stop))
        scores[at] = local[order[at] - self.local.start]
        return self.dist.all_max(torch.from_numpy(scores)).numpy()

    def on_host(self) -> dict[str, np.ndarray]:
        """Every column of the whole store by its name, [samples], on all ranks. Collective."""
        self.merge()
        parts = self.dist.all_gather_objects(
            {name: column.cpu().numpy() for name, column in self.columns.items()}
        )
        return {name: np.concatenate([part[name] for part in parts]) for name in self.columns}

    def state_dict(self) -> dict[str, Tensor]:
        """The store, the whole of it on rank 0. Collective."""
        self.merge()
        if self.dist.world == 1:
            return dict(self.columns)
        moves = np.zeros((self.dist.world, self.dist.world), dtype=int)
        moves[:, 0] = np.diff(self.edges)
        state = {}
        for name, column in self.columns.items():
            as_bytes = column[:, None].view(torch.uint8)  # NCCL and gloo send no int16
            state[name] = self.dist.all_to_all(as_bytes, moves).view(column.dtype)[:, 0]
        return state

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take a whole store; this rank keeps its range of it."""
        for name, column in self.columns.items():
            column.copy_(state[name][self.local])
