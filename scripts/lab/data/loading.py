"""Which samples an epoch loads, and batches on their way to the device."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from lab.data.datasets import BadImages, Batch
from lab.data.randomness import DRAWS, uniform
from lab.runtime.distributed import Dist


class Loaded(NamedTuple):
    """A batch on the device."""

    images: Tensor  # uint8 [batch, 3, H, W]
    labels: Tensor  # int64 [batch]
    indices: Tensor  # int64 [batch], which samples of the data set


Loader = Iterable[Batch]


def as_is(batch: Any) -> Any:
    return batch


class EpochPlan(Sampler):
    """Which samples an epoch loads, and in which order: chunks of (index, draws) keys, batch_size each.

    The order is a function of (seed, epoch), the draws that augment a sample one of (seed, epoch, index): neither
    workers nor restarts nor a cache change what it looks like. `share(epoch)` below 1 is the part of the samples to be
    loaded: a random one, unless `chosen` says which. The last, smaller chunk is left out where a full one exists: every
    step has one shape. A resumed epoch begins at chunk `start`. Of several processes each goes through its part of
    every chunk: their number does not change what a step is made of.
    """

    def __init__(
        self, indices: np.ndarray, batch_size: int, seed: int, share: Callable[[int], float], dist: Dist | None = None
    ):
        self.indices, self.batch_size, self.seed, self.share = indices, batch_size, seed, share
        self.dist = dist or Dist()
        self._shuffled: tuple[int, np.ndarray] = (-1, indices)  # epoch, its order
        self.begin(0)

    def begin(self, epoch: int, start: int = 0, chosen: np.ndarray | None = None) -> None:
        """Go to chunk `start` of `epoch`. chosen: uint8 by index, not 0 for the samples to load."""
        self.epoch, self.start, self.chosen = epoch, start, chosen

    def whole(self, samples: int) -> int:
        """So many samples without the last, smaller chunk."""
        return samples - samples % self.batch_size or samples

    def planned(self, epoch: int) -> int:
        """How many samples `epoch` is planned to load; what a choice takes may differ a little."""
        return self.whole(max(1, round(self.share(epoch) * len(self.indices))))

    def steps(self, epoch: int) -> int:
        """How many chunks those are."""
        return math.ceil(self.planned(epoch) / self.batch_size)

    @property
    def considered(self) -> int:
        """How many samples a dense epoch loads."""
        return self.whole(len(self.indices))

    def __len__(self) -> int:
        if self.chosen is None:
            return self.steps(self.epoch)
        return math.ceil(self.whole(np.count_nonzero(self.chosen[self.indices])) / self.batch_size)

    def shuffled(self) -> np.ndarray:
        """All indices in the order of this epoch."""
        if self._shuffled[0] != self.epoch:
            self._shuffled = self.epoch, np.random.default_rng((self.seed, self.epoch)).permutation(self.indices)
        return self._shuffled[1]

    def order(self) -> np.ndarray:
        """The indices this epoch loads, in order."""
        order = self.shuffled()
        if self.chosen is None:
            return order[: self.planned(self.epoch)]
        order = order[self.chosen[order] > 0]
        return order[: self.whole(len(order))]

    def __iter__(self) -> Iterator[list[tuple[int, np.ndarray]]]:
        order = self.order()
        for start in range(self.start * self.batch_size, len(order), self.batch_size):
            chunk = self.dist.part(order[start : start + self.batch_size])
            draws = uniform(self.seed, self.epoch, torch.from_numpy(chunk), DRAWS)
            yield list(zip(chunk.tolist(), draws.numpy(), strict=True))


def device_batches(loader: Loader, device: torch.device, bad_images: BadImages | None = None) -> Iterator[Loaded]:
    """The loader's batches on `device`, each copied there while the one before it is worked on.

    Raises RequestError naming the first unreadable image that `bad_images` does not allow; None allows none.
    """
    bad_images = bad_images or BadImages(0)
    copier = torch.cuda.Stream(device) if device.type == "cuda" else None
    ahead: tuple[Loaded, torch.cuda.Event] | None = None
    for batch in loader:
        bad_images.add(batch.unreadable)
        loaded = Loaded(batch.images, batch.labels, batch.indices)
        if copier is None or batch.images.is_cuda:
            yield loaded
            continue
        with torch.cuda.stream(copier):
            loaded = Loaded(*(tensor.to(device, non_blocking=True) for tensor in loaded))
            copied = copier.record_event()
        if ahead is not None:
            yield _arrived(*ahead)
        ahead = loaded, copied
    if ahead is not None:
        yield _arrived(*ahead)


def _arrived(batch: Loaded, copied: torch.cuda.Event) -> Loaded:
    """Order the current stream after a copy made on another, and tell the allocator who uses it."""
    stream = torch.cuda.current_stream(batch.images.device)
    stream.wait_event(copied)
    for tensor in batch:
        tensor.record_stream(stream)
    return batch
