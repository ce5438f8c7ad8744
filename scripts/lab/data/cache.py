"""A data set decoded once and cached on the training device."""

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
from lab.data.datasets import BadImages, Batch, ImageDataset, collate
from lab.data.images import crop_resize, kept_side, resize
from lab.data.loading import EpochPlan
from lab.data.randomness import DRAWS, uniform
from lab.errors import RequestError
from lab.runtime.devices import compiled, to_device
from lab.runtime.distributed import Dist
from lab.runtime.workers import WorkerLoader, ending_workers


class _Kept(Dataset):
    """The items of `indices` are (a Batch of side `side`, their heights over widths), to be sent as one; see
    ImageDataset."""

    def __init__(self, dataset: ImageDataset, side: int):
        self.dataset, self.side = dataset, side

    def __getitems__(self, indices: Sequence[int]) -> tuple[Batch, Tensor]:
        samples, aspects = [self.dataset.load(index) for index in indices], []
        for i, sample in enumerate(samples):
            if (image := sample.image) is None:
                continue
            kept = image if image.shape[1:] == (self.side, self.side) else resize(image, self.side)
            samples[i] = sample._replace(image=kept)
            aspects.append(image.shape[1] / image.shape[2])
        return collate(samples), torch.tensor(aspects, dtype=torch.float64)


# What runs in one process have decoded, by data set; None where a process has one run (see run_sweep.py --one-process)
SHARED_PICTURES: dict[tuple, tuple[Tensor, np.ndarray, Tensor]] | None = None


class Share(NamedTuple):
    """A process's part in a batch of resident pictures."""

    rows: np.ndarray  # int64: those it yields
    kept: np.ndarray  # int64: those it has the pictures of, counted from its first one
    moves: np.ndarray | None  # int [world, world]: how many pictures go from whom to whom


class ResidentLoader:
    """A data set decoded once and kept on the device: uint8 [n, 3, side, side]. Yields batches in the order of
    `plan`, or, without one, in the order of `indices` and not augmented.

    Pictures to be cropped at random are kept as squares, both axes resized, with the ratio of their sides: a crop is
    drawn in the shape of the original and maps to the square axis by axis. Augmentation happens on the device and is
    a function of (seed, epoch, index). `shared`: options of the DataLoader that decodes. Raises RequestError naming
    the first unreadable image beyond `dataset.max_bad_images`.

    Of several processes each keeps a range of the pictures. A batch takes from each what it has of it, more from one
    and fewer from another; those that one has too many go to who has too few before they are cropped.
    """

    def __init__(self, dataset: ImageDataset, indices: np.ndarray, plan: EpochPlan | None, config: Config,
                 device: torch.device, shared: dict[str, Any], batch_size: int | None = None):  # fmt: skip
        batch_size = batch_size or config.training.batch_size
        self.plan, self.indices, self.batch_size = plan, indices, batch_size
        self.dist = plan.dist if plan else Dist()  # without a plan `indices` are this process's alone
        self.edges = self.dist.edges(len(indices))
        self.view, self.side = dataset.view, kept_side(config.dataset)
        self.keys = torch.from_numpy(indices).to(device)
        self.bad = BadImages(config.dataset.max_bad_images)
        which = (plan is None, str(device), config.dataset.model_dump_json(exclude={"label_noise"}))
        kept = (SHARED_PICTURES or {}).get(which) or self._decode(dataset, device, shared)
        if SHARED_PICTURES is not None:
            SHARED_PICTURES[which] = kept
            if len(SHARED_PICTURES) > 4:  # two data sets
                del SHARED_PICTURES[next(iter(SHARED_PICTURES))]
        self.images, labels, self.aspects = kept
        self.labels = torch.from_numpy(dataset.noisy(labels, indices)).to(device)
        mode = "off" if plan is None or config.training.compile == "off" else "default"
        self.crop = compiled(partial(crop_resize, size=self.view.size), mode)
        if mode != "off":  # compile before the clock of the training starts
            next(iter(self))

    def _decode(
        self, dataset: ImageDataset, device: torch.device, shared: dict[str, Any]
    ) -> tuple[Tensor, np.ndarray, Tensor]:
        """This process's pictures [own, 3, side, side] on the device, and of all samples the labels [n] on the host
        and the heights over widths [n] on the device."""
        own = self.dist.part(self.indices)
        images = torch.empty(len(own), 3, self.side, self.side, dtype=torch.uint8, device=device)
        labels, aspects, done = np.empty(len(own), dtype=np.int64), np.empty(len(own)), 0
        decoder = WorkerLoader(_Kept(dataset, self.side), 256, sampler=own.tolist(), **shared)
        with ending_workers():
            for batch, shapes in progress_bar(decoder, desc="decoding", unit="batch"):
                self.bad.add(batch.unreadable)
                part, pictures = slice(done, done + len(shapes)), batch.images.to(device)
                images[part], labels[part], aspects[part] = pictures, batch.labels.numpy(), shapes.numpy()
                done = part.stop
        everyone = zip(*self.dist.gather_objects((labels, aspects)), strict=True)
        labels, aspects = (np.concatenate(each) for each in everyone)
        return images, labels, torch.from_numpy(aspects).to(device)

    def __len__(self) -> int:
        return len(self.plan) if self.plan else math.ceil(len(self.indices) / self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        order = self.indices if self.plan is None else self.plan.order()
        order = np.searchsorted(self.indices, order)
        starts = range(self.batch_size * (self.plan.start if self.plan else 0), len(order), self.batch_size)
        shares = (self._share(order[start : start + self.batch_size]) for start in starts)
        while block := [*islice(shares, 64)]:  # few, large launches for the crops' numbers
            sizes = [[len(share[i]) for share in block] for i in (0, 1)]
            rows, own = (torch.from_numpy(np.concatenate([share[i] for share in block])) for i in (0, 1))
            rows, own = to_device(rows, self.images.device), to_device(own, self.images.device).split(sizes[1])
            views = (view.split(sizes[0]) for view in (rows, *self.views(rows)))
            for share, kept, part, *view in zip(block, own, *views, strict=True):
                images = self.images[kept]
                if share.moves is not None:
                    images = self.dist.exchange(images, share.moves)
                images = self.crop(images, *view) if view and len(part) else images
                yield Batch(images, self.labels[part], self.bad.found, self.keys[part])

    def _share(self, batch: np.ndarray) -> Share:
        """What this process has to do with the `batch`, rows of `indices`."""
        if self.dist.world == 1:
            return Share(batch, batch, None)
        keeper = np.searchsorted(self.edges[1:], batch, side="right")
        parts = [batch[keeper == rank] for rank in range(self.dist.world)]
        kept, moves = parts[self.dist.rank], self.dist.evening([len(part) for part in parts])
        if moves is None:
            return Share(kept, kept - self.edges[self.dist.rank], None)
        ends = moves.cumsum(1)[:, self.dist.rank]
        got = [part[end - n : end] for part, end, n in zip(parts, ends, moves[:, self.dist.rank], strict=True)]
        return Share(np.concatenate(got), kept - self.edges[self.dist.rank], moves)

    def views(self, rows: Tensor) -> tuple[Tensor, Tensor] | tuple[()]:
        """Boxes [n, 4] and mirrors [n] of `rows` this epoch; nothing where pictures are used as they are kept."""
        if not self.view.crops and not self.view.random:
            return ()
        seed, epoch = (self.plan.seed, self.plan.epoch) if self.plan else (0, 0)
        sides = torch.full((1, 2), self.side, dtype=torch.float64, device=rows.device)
        return self.view.boxes(uniform(seed, epoch, self.keys[rows], DRAWS), self.aspects[rows], sides)


def require_memory(samples: int, side: int, device: torch.device) -> None:
    """Say how much `dataset.cache: device` takes. Raises RequestError where nine tenths of what is free are less."""
    needed, free = samples * (3 * side**2 + 24), free_memory(device)
    size = f"{samples:,} pictures of {side} px need {needed / 2**30:,.2f} GiB"
    if needed > 0.9 * free:
        hint = "set dataset.cache=none, or a smaller dataset.cache_resolution or dataset.max_train_samples"
        raise RequestError(f"dataset.cache: {size}, and {device} has {free / 2**30:,.2f} GiB free; {hint}")
    print_rank0(f"dataset.cache: {size} on {device}")


def free_memory(device: torch.device) -> int:
    """Bytes a program can still have on `device`."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(facts["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
