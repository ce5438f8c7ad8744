"""`dataset.cache`: loaders of pictures that were decoded once, kept on the training device or on a
disk.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.base.console import print_rank0, progress_bar
from lab.base.errors import RequestError
from lab.config.loading import Config
from lab.data.cache import MOST_READERS
from lab.data.cache.device import CachedLoader
from lab.data.cache.disk import (
    CacheFile,
    Index,
    Recipe,
    chunks,
    find_cache,
    find_or_build_cache,
    mean_bytes,
)
from lab.data.cache.disk_loader import DiskLoader
from lab.data.datasets import ImageDataset, LoaderBatch
from lab.data.loading import EpochPlan
from lab.data.views import FIRST, WIDTH, cut
from lab.machine.devices import to_device
from lab.machine.distributed import Dist
from lab.machine.workers import ending_workers


class Pictures(NamedTuple):
    """Decoded pictures of a process, on its device, one after the other as in a cache file."""

    flat: Tensor  # uint8 [bytes]
    index: Index
    unreadable: list[str]


# What runs made one after the other in one process have decoded, so that runs on the same data
# decode once; see `shared_pictures`. Keys tell data sets apart (`ResidentLoader`). None, the
# default: nothing is shared, and pictures live as long as their run.
SHARED_PICTURES: dict[tuple, Pictures] | None = None
MOST_SHARED = 4  # entries of SHARED_PICTURES: training and validation pictures of two data sets


@contextlib.contextmanager
def shared_pictures() -> Iterator[None]:
    """Let the runs of one process share what they decode. Afterwards nothing stays on the
    device.
    """
    global SHARED_PICTURES
    SHARED_PICTURES = {}
    try:
        yield
    finally:
        SHARED_PICTURES = None


class ResidentLoader(CachedLoader):
    """A CachedLoader whose pictures stay on the training device (`dataset.cache: device`).

    With several processes each keeps the pictures of its range. Views that another process trains
    on move to it.
    """

    def __init__(
        self,
        dataset: ImageDataset,
        indices: np.ndarray,
        plan: EpochPlan | None,
        config: Config,
        device: torch.device,
        loader_options: dict[str, Any],
        batch_size: int | None = None,
        file: CacheFile | None = None,
        kept: np.ndarray | None = None,
    ):
        """Decode the pictures, with a progress bar, or read them from a `file` that keeps the
        samples `kept`.

        loader_options: of the DataLoader that decodes. Raises RequestError naming the first
        unreadable picture beyond `dataset.max_bad_images`.
        """
        super().__init__(dataset, indices, plan, config, device, batch_size)
        own, positions = np.unique(self.dist.shard(indices) % len(dataset), return_inverse=True)
        key = (
            plan is None,
            str(device),
            config.dataset.model_dump_json(exclude={"label_noise", "random_erasing"}),
        )
        pictures = (SHARED_PICTURES or {}).get(key)
        if pictures is None:
            threads = max(1, loader_options["num_workers"])
            pictures = (
                self._decode(dataset, own, loader_options)
                if file is None
                else read_pictures(file, np.searchsorted(kept, own), device, threads)
            )
        if SHARED_PICTURES is not None:
            SHARED_PICTURES[key] = pictures
            if len(SHARED_PICTURES) > MOST_SHARED:
                del SHARED_PICTURES[next(iter(SHARED_PICTURES))]
        self.flat = pictures.flat
        self.offsets = np.concatenate([[0], np.cumsum(pictures.index.lengths)])
        known = (pictures.index.labels, pictures.index.shown)
        labels, shown = (
            np.concatenate(self.dist.all_gather_objects(column[positions])) for column in known
        )
        # rows of other processes, never looked up
        before = np.zeros(self.edges[self.dist.rank], dtype=np.int64)
        positions = np.concatenate([before, positions])
        self.attach(pictures.index, pictures.unreadable, positions, labels, shown)

    @property
    def images(self) -> Tensor:
        """Pictures that are kept as squares: uint8 [n, 3, side, side]."""
        return self.flat.view(-1, 3, self.recipe.side, self.recipe.side)

    def _decode(self, dataset: ImageDataset, own: np.ndarray, options: dict[str, Any]) -> Pictures:
        """The pictures of the samples `own`, int64, ascending."""
        mean = mean_bytes(dataset, own, self.recipe)
        done = 0  # bytes
        parts = []
        margin = 1 if self.recipe.square else 1.05  # the mean is estimated by a few pictures
        flat = torch.empty(int(mean * len(own) * margin), dtype=torch.uint8).to(self.device)
        with (
            ending_workers(),
            progress_bar(desc="decoding", unit=" pictures", total=len(own)) as bar,
        ):
            for data, index, unreadable in chunks(dataset, own, self.recipe, mean, options):
                self.read_errors.add(unreadable)
                if done + len(data) > len(flat):  # larger pictures than the first ones
                    more = max(done + len(data), int(1.25 * len(flat)))
                    flat = torch.cat([flat[:done], flat.new_empty(more - done)])
                flat[done : done + len(data)] = data.to(self.device)
                done += len(data)
                parts.append(index)
                bar.update(len(index.labels))
        return Pictures(flat[:done], Index.join(parts), self.read_errors.found)

    def __iter__(self) -> Iterator[LoaderBatch]:
        parts = self.parts()
        batches = 64 if self.recipe.square else 16  # whose boxes are computed at once
        while block := [*islice(parts, batches)]:
            rows = np.concatenate([part.cached for part in block])
            cuts = [len(part.cached) for part in block]
            pixels = self._squares(rows, cuts) if self.recipe.square else self._cut(rows, cuts)
            for part, images in zip(block, pixels, strict=True):
                if part.moves is not None:
                    images = self.dist.all_to_all(images, part.moves)
                yield self.labelled(images, part.rows)

    def _squares(self, rows: np.ndarray, cuts: Sequence[int]) -> Iterator[Tensor]:
        positions = to_device(torch.from_numpy(self.positions[rows]), self.device)
        boxes = (tensor.split(cuts) for tensor in self.square_boxes(rows))
        for own, *where in zip(positions.split(cuts), *boxes, strict=True):
            images = self.images[own]
            yield self.crop(images, *where) if where and len(own) else images

    def _cut(self, rows: np.ndarray, cuts: Sequence[int]) -> Iterator[Tensor]:
        table, first = self.views(rows)
        table[:, FIRST] = self.offsets[self.positions[rows]] + first * 3 * table[:, WIDTH]
        for part in to_device(torch.from_numpy(table), self.device).split(cuts):
            yield cut(self.flat, part, self.augmentation.size)


def read_pictures(
    file: CacheFile, pictures: np.ndarray, device: torch.device, threads: int
) -> Pictures:
    """Pictures of a cache file of raw pixels, int64 [n], ascending, on `device`."""
    index = Index(*(column[pictures] for column in file.index))
    ends = np.cumsum(index.lengths)
    flat = torch.empty(int(ends[-1]) if len(ends) else 0, dtype=torch.uint8, device=device)
    with (
        ThreadPoolExecutor(threads) as pool,
        progress_bar(desc="reading", unit=" pictures", total=len(ends)) as bar,
    ):
        for start in range(0, len(ends), 256):
            part = slice(start, start + 256)
            begin = int(ends[start - 1]) if start else 0
            held = torch.empty(int(ends[part][-1]) - begin, dtype=torch.uint8)
            spans = np.stack([ends[part] - index.lengths[part], ends[part]], 1) - begin
            columns = (pictures[part], np.zeros(len(spans), dtype=np.int64), spans)
            parts = zip(*(np.array_split(column, threads) for column in columns), strict=True)
            for read in [pool.submit(file.read, *each, held.numpy()) for each in parts]:
                read.result()
            flat[begin : begin + len(held)] = held.to(device)
            bar.update(len(spans))
    return Pictures(flat, index, file.unreadable)


class Split(NamedTuple):
    """A part of the data: the data set, and which samples of it are used."""

    dataset: ImageDataset
    indices: np.ndarray  # int64, ascending, of all processes

    @property
    def kept(self) -> np.ndarray:
        """The samples that a cache keeps, int64, ascending: each once, however often it comes."""
        return np.unique(self.indices % len(self.dataset))


def find_or_build_caches(
    splits: Mapping[str, Split], config: Config, options: dict[str, Any]
) -> list[CacheFile]:
    """The cache file of each split, by name. options: of the DataLoader that decodes."""
    options = options | {"worker_timeout": config.dataset.worker_timeout}
    return [
        find_or_build_cache(split.dataset, split.kept, config.dataset, name, options)
        for name, split in splits.items()
    ]


def prepare_caches(splits: Mapping[str, Split], config: Config, workers: int) -> None:
    """Build the cache files, and check every picture in them. workers: processes, and threads."""
    for file in find_or_build_caches(splits, config, {"num_workers": workers}):
        file.verify(
            np.arange(len(file)), max(1, workers), desc="checking", unit=" pictures", disable=None
        )


def cached_loaders(
    splits: Mapping[str, Split],
    plan: EpochPlan | None,
    config: Config,
    device: torch.device,
    dist: Dist,
    options: dict[str, Any],
) -> list[CachedLoader]:
    """The loaders of `dataset.cache`, one a split: `train` in the order of `plan`, `val` in its
    own.

    options: of the DataLoader that decodes.
    """
    dataset = config.dataset
    batch = config.training.batch_size // dist.world
    if dataset.cache == "disk":
        files = find_or_build_caches(splits, config, options)
        threads = max(1, options["num_workers"])
        make = partial(
            DiskLoader,
            threads=threads if dataset.cache_format == "jpeg" else min(MOST_READERS, threads),
        )
    else:
        files = [
            find_cache(split.dataset, split.kept, dataset, name) for name, split in splits.items()
        ]
        used = [
            np.unique(dist.shard(split.indices) % len(split.dataset)) for split in splits.values()
        ]
        _require_memory(zip(splits.values(), used, files, strict=True), Recipe.of(dataset), device)
        make = partial(ResidentLoader, loader_options=options)
    make = partial(make, config=config, device=device)
    loaders = []
    for (name, split), file in zip(splits.items(), files, strict=True):
        if name == "train":
            loaders.append(make(split.dataset, split.indices, plan, file=file, kept=split.kept))
        else:
            own = dist.shard(split.indices)
            loaders.append(
                make(split.dataset, own, None, file=file, kept=split.kept, batch_size=batch)
            )
    return loaders


def _require_memory(
    parts: Iterable[tuple[Split, np.ndarray, CacheFile | None]],
    recipe: Recipe,
    device: torch.device,
) -> None:
    """Print how much memory the caches of a process take: of each split the samples that it keeps,
    and their file.

    Raises RequestError where that is more than nine tenths of what is free. With SHARED_PICTURES
    that hold some already, nothing is checked: the pictures may be among them.
    """
    if SHARED_PICTURES:
        return
    pictures = 0
    needed = 0.0
    read = []
    for split, used, file in parts:
        mean = (
            mean_bytes(split.dataset, used, recipe)
            if file is None
            else float(file.offsets[-1]) / len(file)
        )
        pictures = pictures + len(used)
        needed = needed + len(used) * (mean + 24)
        read += [] if file is None else [f"read from {file.folder}"]
    about = "about " if len(read) < 2 and not recipe.square else ""
    free = free_memory(device)
    size = f"{pictures:,} {recipe} need {about}{needed / 2**30:,.2f} GiB"
    if needed > 0.9 * free:
        hint = (
            "set dataset.cache=disk, or a smaller dataset.cache_resolution or "
            "dataset.max_train_samples"
        )
        raise RequestError(
            f"dataset.cache: {size}, and {device} has {free / 2**30:,.2f} GiB free; {hint}"
        )
    print_rank0(f"dataset.cache: {', '.join([f'{size} on {device}', *read])}")


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`; on the CPU those that the kernel calls available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError):
        facts = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(facts["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
