"""`dataset.cache: device`: a data set decoded once, its pictures kept on the training device."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lab.config import Config
from lab.console import print_rank0, progress_bar
from lab.data.datasets import ImageDataset, LoaderBatch, ReadErrors, collate
from lab.data.images import cached_side, crop_resize, resize
from lab.data.loading import EpochPlan
from lab.data.randomness import UNIFORMS_PER_SAMPLE, uniform
from lab.errors import RequestError
from lab.runtime.devices import compiled, to_device
from lab.runtime.distributed import Dist
from lab.runtime.workers import WorkerLoader, ending_workers


class DecodedDataset(Dataset):
    """The pictures of an ImageDataset decoded and resized to squares, as batches; for a DataLoader to fill a cache by.

    The items of several indices are one pair: (LoaderBatch with images uint8 [n, 3, side, side]; float64 [n], height /
    width of the pictures before they were resized).
    """

    def __init__(self, dataset: ImageDataset, side: int):
        self.dataset, self.side = dataset, side

    def __getitems__(self, indices: Sequence[int]) -> tuple[LoaderBatch, Tensor]:
        samples, aspects = [self.dataset.load(index) for index in indices], []
        for i, sample in enumerate(samples):
            if (image := sample.image) is None:
                continue
            square = image if image.shape[1:] == (self.side, self.side) else resize(image, self.side)
            samples[i] = sample._replace(image=square)
            aspects.append(image.shape[1] / image.shape[2])
        return collate(samples), torch.tensor(aspects, dtype=torch.float64)


# What runs made one after the other in one process have decoded, so that runs on the same data decode once; see
# `shared_pictures`. Keys tell data sets apart (`ResidentLoader`), values are what its `_decode` returns. None, the
# default: nothing is shared, and pictures live as long as their run.
SHARED_PICTURES: dict[tuple, tuple[Tensor, np.ndarray, Tensor, list[str]]] | None = None
MOST_SHARED = 4  # entries of SHARED_PICTURES: training and validation pictures of two data sets


@contextlib.contextmanager
def shared_pictures() -> Iterator[None]:
    """Let the runs of one process share what they decode. Afterwards nothing stays on the device."""
    global SHARED_PICTURES
    SHARED_PICTURES = {}
    try:
        yield
    finally:
        SHARED_PICTURES = None


class BatchPart(NamedTuple):
    """One process's part of a batch. A row is the position of a sample in `ResidentLoader.indices`."""

    rows: np.ndarray  # int64: the samples that it yields
    cached: np.ndarray  # int64: the samples of the batch whose pictures it has, as positions in `ResidentLoader.images`
    moves: np.ndarray | None  # int [world, world], see `Dist.all_to_all`: pictures that go from one process to another


class ResidentLoader:
    """A loader whose pictures are decoded once and stay on the training device (`dataset.cache: device`).

    It yields LoaderBatches in the order of `plan`, augmented on the device. Without a plan it yields the samples of
    `indices` in their order, augmented as for validation.

    Pictures are cached as squares, uint8 [n, 3, side, side], beside the ratio of their sides. A random crop is drawn
    for the shape of the original. Its box in the square follows axis by axis. The uniform numbers are those of
    streaming: a function of (seed, epoch, index).

    With several processes each caches a range of the pictures, about as many as the others. A batch consists of random
    samples, so that a process may have the pictures of more samples than its part of the batch, or of fewer. Pictures
    then move between the processes before they are cropped.
    """

    def __init__(self, dataset: ImageDataset, indices: np.ndarray, plan: EpochPlan | None, config: Config,
                 device: torch.device, loader_options: dict[str, Any], batch_size: int | None = None):  # fmt: skip
        """Decode the pictures, with a progress bar.

        indices: int64 [n], ascending, the samples to cache; without a plan, those of this process alone.
        loader_options: of the DataLoader that decodes. batch_size: samples in a batch, with a plan those of all
        processes together; None stands for training.batch_size. Raises RequestError naming the first unreadable
        picture beyond `dataset.max_bad_images`.
        """
        batch_size = batch_size or config.training.batch_size
        self.dataset, self.plan, self.indices, self.batch_size = dataset, plan, indices, batch_size
        self.dist = plan.dist if plan else Dist()
        self.edges = self.dist.shard_edges(len(indices))
        self.augmentation, self.side = dataset.augmentation, cached_side(config.dataset)
        self.sample_indices = torch.from_numpy(indices).to(device)
        self.read_errors = ReadErrors(config.dataset.max_bad_images)
        key = (plan is None, str(device), config.dataset.model_dump_json(exclude={"label_noise"}))
        decoded = (SHARED_PICTURES or {}).get(key) or self._decode(dataset, device, loader_options)
        if SHARED_PICTURES is not None:
            SHARED_PICTURES[key] = decoded
            if len(SHARED_PICTURES) > MOST_SHARED:
                del SHARED_PICTURES[next(iter(SHARED_PICTURES))]
        self.images, labels, self.aspects, self.read_errors.found = decoded
        self.labels = torch.from_numpy(dataset.noisy_labels(labels, indices)).to(device)
        mode = "off" if plan is None or config.training.compile == "off" else "default"
        crop = partial(crop_resize, size=self.augmentation.size, reflected=self.augmentation.reflected)
        self.crop = compiled(crop, mode)
        if mode != "off":  # compile now, before training time is counted
            next(iter(self))

    def _decode(
        self, dataset: ImageDataset, device: torch.device, loader_options: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray, Tensor, list[str]]:
        """(pictures of this process's range, uint8 [own, 3, side, side], on the device; labels of all samples, int64
        [n], on the host; height / width of all samples, float64 [n], on the device; what could not be read)."""
        own = self.dist.shard(self.indices)
        images = torch.empty(len(own), 3, self.side, self.side, dtype=torch.uint8, device=device)
        labels, aspects, done = np.empty(len(own), dtype=np.int64), np.empty(len(own)), 0
        decoder = WorkerLoader(DecodedDataset(dataset, self.side), 256, sampler=own.tolist(), **loader_options)
        with ending_workers():
            for batch, ratios in progress_bar(decoder, desc="decoding", unit="batch"):
                self.read_errors.add(batch.unreadable)
                part, pictures = slice(done, done + len(ratios)), batch.images.to(device)
                images[part], labels[part], aspects[part] = pictures, batch.labels.numpy(), ratios.numpy()
                done = part.stop
        everyone = zip(*self.dist.all_gather_objects((labels, aspects)), strict=True)
        labels, aspects = (np.concatenate(each) for each in everyone)
        return images, labels, torch.from_numpy(aspects).to(device), self.read_errors.found

    def __len__(self) -> int:
        return len(self.plan) if self.plan else math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[LoaderBatch]:
        order = self.indices if self.plan is None else self.plan.indices_to_load()
        order = np.searchsorted(self.indices, order)
        starts = range(self.batch_size * (self.plan.first_batch if self.plan else 0), len(order), self.batch_size)
        parts = (self._part(order[start : start + self.batch_size]) for start in starts)
        while block := [*islice(parts, 64)]:  # boxes of 64 batches at once: few, large launches
            sizes, cached_sizes = [len(part.rows) for part in block], [len(part.cached) for part in block]
            rows, cached = (torch.from_numpy(np.concatenate([part[i] for part in block])) for i in (0, 1))
            rows = to_device(rows, self.images.device)
            cached = to_device(cached, self.images.device).split(cached_sizes)
            by_batch = (tensor.split(sizes) for tensor in (rows, *self.boxes(rows)))
            for part, own, batch_rows, *boxes in zip(block, cached, *by_batch, strict=True):
                images = self.images[own]
                if part.moves is not None:
                    images = self.dist.all_to_all(images, part.moves)
                images = self.crop(images, *boxes) if boxes and len(batch_rows) else images
                indices = self.sample_indices[batch_rows]
                yield LoaderBatch(images, self.labels[batch_rows], indices, self.read_errors.found)

    def _part(self, batch: np.ndarray) -> BatchPart:
        """This process's part of a batch, whose samples are given as rows, int64 [batch]."""
        rank = self.dist.rank
        if self.dist.world == 1:
            return BatchPart(batch, batch, None)
        owner = np.searchsorted(self.edges[1:], batch, side="right")
        by_owner = [batch[owner == each] for each in range(self.dist.world)]
        own, moves = by_owner[rank], self.dist.balancing_moves([len(rows) for rows in by_owner])
        if moves is None:
            return BatchPart(own, own - self.edges[rank], None)
        ends = moves.cumsum(1)[:, rank]
        received = [rows[end - n : end] for rows, end, n in zip(by_owner, ends, moves[:, rank], strict=True)]
        return BatchPart(np.concatenate(received), own - self.edges[rank], moves)

    def boxes(self, rows: Tensor) -> tuple[Tensor, Tensor] | tuple[()]:
        """Boxes, float64 [n, 4], in the cached squares and who is mirrored, bool [n], in the current epoch.

        Empty where pictures are used as they are cached.
        """
        if not self.augmentation.crops and not self.augmentation.random:
            return ()
        seed, epoch = (self.plan.seed, self.plan.epoch) if self.plan else (0, 0)
        sides = torch.full((1, 2), self.side, dtype=torch.float64, device=rows.device)
        uniforms = uniform(seed, epoch, self.sample_indices[rows], UNIFORMS_PER_SAMPLE)
        return self.augmentation.boxes(uniforms, self.aspects[rows], sides)


def require_memory(samples: int, side: int, device: torch.device) -> None:
    """Print how much memory the cache takes: `samples` pictures of `side` pixels on `device`.

    Raises RequestError where it takes more than nine tenths of what is free. With SHARED_PICTURES that hold some
    already, nothing is checked: the pictures may be among them.
    """
    if SHARED_PICTURES:
        return
    needed, free = samples * (3 * side**2 + 24), free_memory(device)
    size = f"{samples:,} pictures of {side} px need {needed / 2**30:,.2f} GiB"
    if needed > 0.9 * free:
        hint = "set dataset.cache=none, or a smaller dataset.cache_resolution or dataset.max_train_samples"
        raise RequestError(f"dataset.cache: {size}, and {device} has {free / 2**30:,.2f} GiB free; {hint}")
    print_rank0(f"dataset.cache: {size} on {device}")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`; on the CPU those that the kernel calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(facts["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
