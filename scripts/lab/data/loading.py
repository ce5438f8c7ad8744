"""Which samples an epoch loads, and batches on their way to the device."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from lab.config import TrainingConfig
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


def ignore_signals(_: int) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):  # the main process ends the run, and its workers with it
        signal.signal(number, signal.SIG_IGN)


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
            chunk = self.dist.shard(order[start : start + self.batch_size])
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


class Scores(NamedTuple):
    """The scores of a batch on their way to the host; of several processes, of the batches of all ranks in order."""

    rows: Tensor  # float32 [2, batch] on the host: significance, nats; 1 for a correct prediction
    arrived: torch.cuda.Event | None  # when they are there; None: now
    is_model: bool = True  # whether the predictions are those of the network that is trained

    def wait(self) -> Tensor:
        """The rows, once the scoring forward has finished."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.rows

    def read(self) -> tuple[Tensor, int]:
        """(significance float32 [batch] on the host, number of correct predictions)."""
        significance, correct = self.wait()
        if len(significance) and significance.min() == -math.inf:  # padding of a rank with a smaller part
            significance, correct = self.rows[:, significance != -math.inf]
        return significance, int(correct.sum())


class ScoreAhead:
    """Gives each batch with its scores while the scoring of the next one has already started (`ast.score_ahead`).

    So the device has work while the host reads scores and chooses. The price: scores come from the weights before the
    previous batch was trained on. The threshold is not delayed, because the host chooses.
    """

    def __init__(self, score: Callable[[Loaded], Scores] | None, ahead: bool):
        """score: starts scoring a batch; None: nothing is scored. ahead: if false, each is scored at its turn."""
        self.score, self.depth = score, int(ahead and score is not None)
        self.pending: Scores | None = None  # of a batch that is scored and not yet trained on

    def pairs(self, batches: Iterable[Loaded], scoring: bool) -> Iterator[tuple[Loaded, Scores | None]]:
        """The batches with their scores; with None where `scoring` is false."""
        waiting: list[tuple[Loaded, Scores | None]] = []
        depth = self.depth if scoring else 0
        restored, self.pending = self.pending, None  # of a checkpoint: the weights that gave these scores are gone
        for batch in batches:
            scores = restored or (self.score(batch) if scoring else None)
            restored = None
            waiting.append((batch, scores))
            if len(waiting) > depth:
                ready = waiting.pop(0)
                self.pending = scores if waiting else None
                yield ready
        self.pending = None
        yield from waiting


def loader_processes(training: TrainingConfig, in_memory: bool) -> int:
    """training.num_workers, or by default one a core of this process, at most 16; none for data in memory."""
    if training.num_workers is not None:
        return training.num_workers
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return 0 if in_memory else min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))
