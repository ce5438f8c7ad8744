"""What the loaders of pictures that were decoded once have in common: order, parts of processes,
boxes, labels.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.config.loading import Config
from lab.data.cache.disk import Index, Recipe
from lab.data.datasets import ImageDataset, LoaderBatch, ReadErrors
from lab.data.images import erase, pad_crop
from lab.data.loading import EpochPlan
from lab.data.randomness import UNIFORMS_PER_SAMPLE, uniform
from lab.data.views import table_of_views
from lab.machine.devices import compiled, to_device
from lab.machine.distributed import Dist


class BatchPart(NamedTuple):
    """One process's part of a batch. A row is the position of a sample in
    `CachedLoader.indices`.
    """

    rows: np.ndarray  # int64: the samples that it yields
    cached: np.ndarray  # int64: the samples of the batch that are in its own range, as rows
    # int [world, world], see `Dist.all_to_all`: views that go from one process to another
    moves: np.ndarray | None


class CachedLoader:
    """A loader of pictures that were decoded once.

    It yields LoaderBatches in the order of `plan`, augmented on the device. Without a plan it
    yields the samples of `indices` in their order, augmented as for validation.

    Where crops are cut, pictures keep their shape. A random crop is drawn for the original, and cut
    out of the smaller picture without rounding. Else pictures are kept as squares. The uniform
    numbers are those of streaming: a function of (seed, epoch, index).

    Of several processes each has a range of the samples. A batch consists of random samples, so
    that a process may have more samples of it in its range than its part of the batch, or fewer:
    only the surplus goes to another process. Subclasses say where pixels come from. Which process
    trains on which sample is the same in all of them.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        indices: np.ndarray,
        plan: EpochPlan | None,
        config: Config,
        device: torch.device,
        batch_size: int | None = None,
    ):
        """indices: int64 [n], ascending; without a plan, those of this process alone. batch_size:
        samples in a batch, with a plan those of all processes together; None stands for
        training.batch_size.
        """
        self.dataset = dataset
        self.plan = plan
        self.indices = indices
        self.device = device
        self.batch_size = batch_size or config.training.batch_size
        self.dist = plan.dist if plan else Dist()
        self.edges = self.dist.shard_edges(len(indices))
        self.augmentation = dataset.augmentation
        self.recipe = Recipe.of(config.dataset)
        self.read_errors = ReadErrors(config.dataset.max_bad_images)
        # CUDA graphs would give each batch the memory of the one before, so never reduce-overhead
        mode = "off" if plan is None or config.training.compile == "off" else "default"
        crop = partial(pad_crop, reflects=self.augmentation.reflects)
        self.crop = compiled(crop, mode)
        self.erase = compiled(partial(erase, colour=self.augmentation.grey.to(device)), mode)
        self.compiles = (
            mode != "off" if self.recipe.square else plan is not None and device.type == "cuda"
        )

    def attach(
        self,
        index: Index,
        unreadable: list[str],
        positions: np.ndarray,
        labels: np.ndarray,
        shown: np.ndarray,
    ) -> None:
        """Take in what is known of the pictures. Compiles now, before training time is counted.

        positions: int64 [n], of each row, its picture's place in `index`. labels: int64 [n], of
        each row, without noise; -1 for one without a picture, which validation leaves out. shown:
        int64 [n], of each row, the sample whose picture it has. unreadable: what could not be read.
        """
        self.sizes = index.sizes
        self.originals = index.originals
        self.positions = positions
        self.readable = labels >= 0
        shown = self.indices - self.indices % len(self.dataset) + shown
        self.sample_indices = torch.from_numpy(shown).to(self.device)
        self.labels = torch.from_numpy(self.dataset.noisy_labels(labels, shown)).to(self.device)
        self.read_errors.found = list(unreadable)
        if self.compiles:
            next(iter(self))
            if self.plan.wide_size != self.plan.step_size:
                self.plan.start_epoch(0, wide=True)
                next(iter(self))
                self.plan.start_epoch(0)

    def __len__(self) -> int:
        samples = int(self.readable.sum())
        return len(self.plan) if self.plan else math.ceil(samples / self.batch_size)

    def parts(self) -> Iterator[BatchPart]:
        """This process's part of each batch."""
        if self.plan is None:
            order = np.flatnonzero(self.readable)
            starts = range(self.batch_size, len(order), self.batch_size)
            batches = np.split(order, starts) if len(order) else []
        else:
            batches = [np.searchsorted(self.indices, batch) for batch in self.plan.batches()]
        self._draw_erasures(np.concatenate([np.empty(0, dtype=np.int64), *batches]))
        for batch in batches:
            yield self._part(batch)

    def _draw_erasures(self, rows: np.ndarray) -> None:
        """The boxes that are erased in the current epoch, float64 [n, 4] by row: one batch after
        the other would launch these many small kernels again and again. rows: int64, all that the
        epoch yields.
        """
        if not self.augmentation.erasing:
            return
        self.erased = torch.zeros(len(self.indices), 4, dtype=torch.float64, device=self.device)
        parts = max(1, math.ceil(len(rows) / 2**16))  # of 25 MB of uniform numbers each
        for part in np.array_split(rows, parts):
            boxes = self.augmentation.erasures(self.uniforms(part, self.device))
            self.erased[to_device(torch.from_numpy(part), self.device)] = boxes

    def _part(self, batch: np.ndarray) -> BatchPart:
        """This process's part of a batch, whose samples are given as rows, int64 [batch]."""
        rank = self.dist.rank
        if self.dist.world == 1:
            return BatchPart(batch, batch, None)
        owner = np.searchsorted(self.edges[1:], batch, side="right")
        by_owner = [batch[owner == each] for each in range(self.dist.world)]
        own = by_owner[rank]
        moves = self.dist.balancing_moves([len(rows) for rows in by_owner])
        if moves is None:
            return BatchPart(own, own, None)
        ends = moves.cumsum(1)[:, rank]
        received = [
            rows[end - n : end] for rows, end, n in zip(by_owner, ends, moves[:, rank], strict=True)
        ]
        return BatchPart(np.concatenate(received), own, moves)

    def boxes(
        self, rows: np.ndarray, originals: np.ndarray, device: torch.device
    ) -> tuple[Tensor, Tensor]:
        """Boxes, float64 [n, 4], in pictures of the sizes `originals`, int [n, 2] or [1, 2], and
        who is mirrored, bool [n], in the current epoch. rows: int64 [n].
        """
        uniforms = self.uniforms(rows, device)
        sides = torch.from_numpy(originals.astype(np.float64)).to(device)
        return self.augmentation.boxes(uniforms, sides[:, 0] / sides[:, 1], sides)

    def square_boxes(self, rows: np.ndarray) -> tuple[Tensor, Tensor] | tuple[()]:
        """`boxes` in squares, on the device. Empty where pictures are used as they are kept."""
        if not self.augmentation.random:
            return ()
        return self.boxes(rows, np.full((1, 2), self.recipe.side), self.device)

    def views(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What `table_of_views` gives for the samples of some rows, int64 [n], in the current
        epoch.

        Boxes are computed on the host, where the last bit does not depend on the kind of GPU, or on
        where pixels are.
        """
        pictures = self.positions[rows]
        boxes, mirror = self.boxes(rows, self.originals[pictures], torch.device("cpu"))
        return table_of_views(
            boxes.numpy(), mirror.numpy(), self.originals[pictures], self.sizes[pictures]
        )

    def uniforms(self, rows: np.ndarray, device: torch.device) -> Tensor:
        """The uniform numbers of samples in the current epoch, float64 [n, UNIFORMS_PER_SAMPLE]."""
        seed, epoch = (self.plan.seed, self.plan.epoch) if self.plan else (0, 0)
        return uniform(
            seed,
            epoch,
            to_device(torch.from_numpy(self.indices[rows]), device),
            UNIFORMS_PER_SAMPLE,
        )

    def labelled(self, images: Tensor, rows: np.ndarray) -> LoaderBatch:
        """The batch of the samples of some rows, int64 [n]; what is to be erased of its images is
        erased.
        """
        rows = to_device(torch.from_numpy(rows), self.device)
        if self.augmentation.erasing and len(images):
            images = self.erase(images, self.erased[rows])
        return LoaderBatch(
            images, self.labels[rows], self.sample_indices[rows], self.read_errors.found
        )
