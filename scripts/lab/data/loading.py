"""Which samples an epoch loads, in which batches, and how these reach the device."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from lab.base.launch import cores_here
from lab.config.loading import Config
from lab.config.sections import TrainingConfig
from lab.data.datasets import ImageDataset, LoaderBatch, ReadErrors, collate
from lab.data.randomness import UNIFORMS_PER_SAMPLE, uniform
from lab.machine.distributed import Dist
from lab.machine.stateful import Stateful

Loader = Iterable[LoaderBatch]


class DeviceBatch(NamedTuple):
    """A LoaderBatch on the training device; what could not be read has been reported by then."""

    images: Tensor  # uint8 [batch, 3, H, W]
    labels: Tensor  # int64 [batch]
    indices: Tensor  # int64 [batch], of the samples in the data set
    weights: Tensor | None = None  # float32 [batch], of the losses; None: all 1

    def tensors(self) -> list[Tensor]:
        """The fields that are there, in their order."""
        return [each for each in self if each is not None]


def as_is(batch: Any) -> Any:
    """The `collate_fn` for a data set that makes whole batches itself."""
    return batch


class EpochPlan(Sampler):
    """Which samples an epoch loads, in which order and in which batches.

    Iterating over it gives the batches of the current epoch, as lists of (index, uniforms) keys for
    an ImageDataset. The order is a function of (seed, epoch). The uniforms of a sample are a
    function of (seed, epoch, index). Neither workers nor resumption nor a cache change how a sample
    looks.

    All batches of an epoch hold `batch_size` samples, so that every step has one shape: a smaller
    one at the end is left out, unless it is the only one. A wide epoch has larger batches, of which
    a training step takes a part; what is planned is planned in those of a step. With several
    processes, each gets its part of every batch. What a batch holds does not depend on their
    number.

    Before its first training batch an epoch may have batches to look at, without training on them.
    They are no steps: a number of batches never counts them.
    """

    def __init__(
        self,
        indices: np.ndarray,
        batch_size: int,
        seed: int,
        share: Callable[[int], float],
        dist: Dist | None = None,
        wide_size: int | None = None,
        kept_out: np.ndarray | None = None,
    ):
        """indices: int64 [n], the samples that a dense epoch goes through. share: the part of them,
        0 to 1, that the epoch of this number loads. wide_size: of the batches of a wide epoch, by
        default `batch_size`. kept_out: those of the indices that no epoch loads before `keeps_out`
        is set to false.
        """
        self.all_indices = indices
        self.kept_out = indices[:0] if kept_out is None else kept_out
        self.others = indices[~np.isin(indices, self.kept_out)]
        self.keeps_out = True
        self.epoch = 0
        self.step_size = batch_size
        self.wide_size = wide_size or batch_size
        self.seed = seed
        self.share = share
        self.dist = dist or Dist()
        self._permuted = (-1, 0)  # the epoch that `_permutation` is of, and its size; -1: of none
        self._permutation = indices
        self.start_epoch(0)

    def start_epoch(
        self,
        epoch: int,
        first_batch: int = 0,
        mask: np.ndarray | None = None,
        wide: bool = False,
        looks: np.ndarray | None = None,
    ) -> None:
        """Make `epoch` the current one. A resumed epoch starts at batch number `first_batch`.

        mask: uint8, by index, not 0 for the samples to load; None loads a random `share(epoch)` of
        them. wide: whether batches hold `wide_size` samples. looks: int64, the samples to look at
        before batch number 0.
        """
        self.epoch = epoch
        self.batch_size = self.wide_size if wide else self.step_size
        self.first_batch = first_batch
        self.mask = mask
        self.looks = self.all_indices[:0] if looks is None else looks

    @property
    def look_batches(self) -> int:
        """How many batches come before the training's."""
        return 0 if self.first_batch else math.ceil(len(self.looks) / self.step_size)

    @property
    def indices(self) -> np.ndarray:
        """The samples that the current epoch would go through densely."""
        return self.others if self.keeps_out else self.all_indices

    def _in_full_batches(self, samples: int, size: int) -> int:
        """How many of so many samples fill whole batches of a size; all, where they do not fill a
        single one.
        """
        return samples - samples % size or samples

    def samples_of(self, share: float) -> int:
        """How many samples an epoch loads that loads this share of them."""
        return self._in_full_batches(max(1, round(share * len(self.indices))), self.step_size)

    def steps_of(self, share: float) -> int:
        """How many batches these make."""
        return math.ceil(self.samples_of(share) / self.step_size)

    def planned_samples(self, epoch: int) -> int:
        """How many samples `epoch` loads, as far as `share` tells. With a mask the number may
        differ a little.
        """
        return self.samples_of(self.share(epoch))

    def planned_steps(self, epoch: int) -> int:
        """How many batches `planned_samples(epoch)` makes."""
        return math.ceil(self.planned_samples(epoch) / self.step_size)

    @property
    def dense_samples(self) -> int:
        """How many samples an epoch loads that loads all."""
        return self._in_full_batches(len(self.indices), self.step_size)

    def considered_samples(self, epoch: int) -> int:
        """Out of how many samples those that `epoch` loads are drawn: all, but for what fills no
        batch where it loads all.
        """
        return self.dense_samples if self.share(epoch) == 1 else len(self.indices)

    def __len__(self) -> int:
        """How many batches the current epoch has, those before `first_batch` included."""
        if self.mask is None:
            samples = max(1, round(self.share(self.epoch) * len(self.indices)))
        else:
            samples = np.count_nonzero(self.mask[self.indices])
        return math.ceil(self._in_full_batches(samples, self.batch_size) / self.batch_size)

    def permutation(self) -> np.ndarray:
        """All indices in the order of the current epoch, int64 [n], whether it loads them or
        not.
        """
        if self._permuted != (self.epoch, len(self.indices)):
            generator = np.random.default_rng((self.seed, self.epoch))
            self._permutation = generator.permutation(self.indices)
            self._permuted = (self.epoch, len(self.indices))
        return self._permutation

    def indices_to_load(self) -> np.ndarray:
        """The indices that the current epoch loads, in its order; of all processes, and from batch
        0 on.
        """
        order = self.permutation()
        if self.mask is None:
            order = order[: max(1, round(self.share(self.epoch) * len(order)))]
        else:
            order = order[self.mask[order] > 0]
        return order[: self._in_full_batches(len(order), self.batch_size)]

    def batches(self) -> Iterator[np.ndarray]:
        """The indices of each batch, of all processes, int64 [batch]: those to look at, and from
        batch number `first_batch` on those to train on.
        """
        size = self.step_size
        for number in range(self.look_batches):
            yield self.looks[number * size : (number + 1) * size]
        order = self.indices_to_load()
        for start in range(self.first_batch * self.batch_size, len(order), self.batch_size):
            yield order[start : start + self.batch_size]

    def __iter__(self) -> Iterator[list[tuple[int, np.ndarray]]]:
        for batch in self.batches():
            indices = self.dist.shard(batch)
            uniforms = uniform(
                self.seed, self.epoch, torch.from_numpy(indices), UNIFORMS_PER_SAMPLE
            )
            yield list(zip(indices.tolist(), uniforms.numpy(), strict=True))


Item = TypeVar("Item")


def ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, each once `count` further ones have been begun."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


def device_batches(
    loader: Loader, device: torch.device, read_errors: ReadErrors | None = None
) -> Iterator[DeviceBatch]:
    """The loader's batches on `device`. On a GPU each is copied while the one before it is worked
    on.

    read_errors: takes in what could not be read; None allows nothing. Raises RequestError naming
    the first picture that it does not allow.
    """
    read_errors = read_errors or ReadErrors(0)
    copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def begin_copy(loaded: LoaderBatch) -> tuple[DeviceBatch, torch.cuda.Event | None]:
        images, labels, indices, unreadable = loaded
        read_errors.add(unreadable)
        batch = DeviceBatch(images, labels, indices)
        if images.device.type == device.type:
            return batch, None
        with torch.cuda.stream(copy_stream):
            copies = [tensor.to(device, non_blocking=True) for tensor in batch.tensors()]
            return DeviceBatch(*copies), copy_stream.record_event()

    for batch, copied in ahead(map(begin_copy, loader), 0 if copy_stream is None else 1):
        if copied is not None:
            await_copy(batch.tensors(), copied)
        yield batch


def await_copy(tensors: Sequence[Tensor], copied: torch.cuda.Event) -> None:
    """Let the current stream wait until tensors are copied, and keep their memory until that stream
    has used them.
    """
    stream = torch.cuda.current_stream(tensors[0].device)
    stream.wait_event(copied)
    for tensor in tensors:
        tensor.record_stream(stream)


class BatchScores(NamedTuple):
    """The scores of a batch on their way to the host; of several processes, of the batches of all
    ranks in order.
    """

    # float32 [2, batch], on the host unless the rule chooses on the device: significance, nats; 1
    # if predicted right
    rows: Tensor
    arrived: torch.cuda.Event | None = None  # when they are there; None: now

    def wait(self) -> Tensor:
        """The rows, once the scoring forward has finished."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.rows

    def read(self) -> tuple[Tensor, int | Tensor]:
        """(significance float32 [batch], number of correct predictions); both on the device where
        they stayed there.
        """
        significance, correct = self.wait()
        if significance.is_cuda:
            return significance, correct.sum()
        # padding of a rank with a smaller part
        if len(significance) and significance.min() == -math.inf:
            significance, correct = self.rows[:, significance != -math.inf]
        return significance, int(correct.sum())


class ScoreAhead(Stateful):
    """Gives each batch with its scores while the scoring of the next one has already started.

    So the device has work while the host reads scores and chooses. The price: scores come from the
    weights before the previous batch was trained on. The threshold is not delayed, because the host
    chooses.
    """

    def __init__(self, ahead: bool):
        """ahead: if false, each is scored at its turn."""
        self.depth = int(ahead)
        self.pending: BatchScores | None = None  # of a batch that is scored and not yet trained on

    def state_dict(self) -> dict[str, Tensor | None]:
        return {"pending": None if self.pending is None else self.pending.wait()}

    def load_state_dict(self, state: dict[str, Tensor | None]) -> None:
        self.pending = None if state["pending"] is None else BatchScores(state["pending"])

    def pairs(
        self, batches: Iterable[DeviceBatch], score: Callable[[DeviceBatch], BatchScores] | None
    ) -> Iterator[tuple[DeviceBatch, BatchScores | None]]:
        """The batches with their scores. score: starts scoring a batch; None: nothing is scored."""
        waiting: list[tuple[DeviceBatch, BatchScores | None]] = []
        depth = 0 if score is None else self.depth
        # of a checkpoint: the weights that gave these scores are gone
        restored = self.pending
        self.pending = None
        for batch in batches:
            scores = restored or (score and score(batch))
            restored = None
            waiting.append((batch, scores))
            if len(waiting) > depth:
                ready = waiting.pop(0)
                self.pending = scores if waiting else None
                yield ready
        self.pending = None
        yield from waiting


def loader_processes(training: TrainingConfig, in_memory: bool) -> int:
    """training.num_workers, or by default one a core of this process, at most 16; none for data in
    memory.
    """
    if training.num_workers is not None:
        return training.num_workers
    if in_memory:
        return 0
    return min(16, cores_here())


def loader_options(config: Config, device: torch.device, dataset: ImageDataset) -> dict[str, Any]:
    """Of the DataLoader. It draws from a generator of its own, and leaves the model's random
    numbers alone.
    """
    workers = loader_processes(config.training, in_memory=dataset.IN_MEMORY)
    shared = {
        "num_workers": workers,
        "worker_timeout": config.dataset.worker_timeout,
        "generator": torch.Generator(),
    }
    if config.dataset.cache != "none":
        return shared
    return shared | {
        "collate_fn": collate,
        "pin_memory": device.type == "cuda",
        "persistent_workers": workers > 0,
    }
