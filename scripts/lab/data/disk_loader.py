"""`dataset.cache: disk`: a loader that reads the pixels of each batch from a cache file."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from lab.config import Config
from lab.data.cached import CachedLoader
from lab.data.datasets import ImageDataset, LoaderBatch
from lab.data.disk_cache import CacheFile
from lab.data.loading import EpochPlan, await_copy
from lab.data.views import FIRST, bytes_needed, cut


class HostBatch(NamedTuple):
    """A batch that is being read."""

    rows: np.ndarray  # int64 [n]
    flat: Tensor  # uint8 [bytes], pinned where the device is a GPU
    table: Tensor | None  # float64 [n, 8], see `table_of_views`; None for squares
    reads: list[Future]


Item = TypeVar("Item")


def ahead(items: Iterable[Item], count: int) -> Iterator[Item]:
    """The items, each once `count` further ones have been begun."""
    waiting: deque[Item] = deque()
    for item in items:
        waiting.append(item)
        if len(waiting) > count:
            yield waiting.popleft()
    yield from waiting


class DiskLoader(CachedLoader):
    """A CachedLoader whose pictures are read from a file for each batch (`dataset.cache: disk`).

    Threads read the rows that the views of a batch need, in the order of the file, into one piece of pinned memory. It
    is copied while the device works on the batch before. The device cuts, resizes and mirrors as for `ResidentLoader`,
    so that batches are the same bit for bit.
    """

    AHEAD = 3  # batches that are being read while one is waited for

    def __init__(self, dataset: ImageDataset, indices: np.ndarray, plan: EpochPlan | None, config: Config,
                 device: torch.device, file: CacheFile, kept: np.ndarray, threads: int,
                 batch_size: int | None = None):  # fmt: skip
        """file: keeps the samples `kept`, int64, ascending. threads: how many read."""
        super().__init__(dataset, indices, plan, config, device, batch_size)
        self.file, self.threads = file, threads
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        positions = np.searchsorted(kept, indices % len(dataset))
        self.attach(dataset, file.index, file.unreadable, positions, file.index.labels[positions])

    def __iter__(self) -> Iterator[LoaderBatch]:
        with ThreadPoolExecutor(1) as planner, ThreadPoolExecutor(self.threads) as readers:
            try:
                begun = ahead((planner.submit(self._begin, readers, part.rows) for part in self.parts()), self.AHEAD)
                for batch, flat, table, copied in ahead((self._copy(each.result()) for each in begun), 1):
                    yield self._finish(batch.rows, flat, table, copied)
            finally:
                planner.shutdown(cancel_futures=True)
                readers.shutdown(cancel_futures=True)

    def _begin(self, readers: ThreadPoolExecutor, rows: np.ndarray) -> HostBatch:
        """Begin to read what the samples of some rows, int64 [n], need."""
        pinned, pictures = self.copy_stream is not None, self.positions[rows]
        if self.recipe.square:
            table, first = None, np.zeros(len(rows), dtype=np.int64)
            ends = 3 * self.recipe.side**2 * np.arange(len(rows) + 1)
        else:
            table, first = self.views(rows)
            ends = np.concatenate([[0], np.cumsum(bytes_needed(table))])
            table[:, FIRST] = ends[:-1]
            table = torch.from_numpy(table)
            table = table.pin_memory() if pinned else table
        flat = torch.empty(int(ends[-1]), dtype=torch.uint8, pin_memory=pinned)
        order = np.argsort(pictures, kind="stable")
        parts = np.array_split(order, max(1, min(self.threads, len(order) // 8)))
        read = partial(self._read, pictures, first, ends, flat.numpy())
        return HostBatch(rows, flat, table, [readers.submit(read, part) for part in parts])

    def _read(
        self, pictures: np.ndarray, first: np.ndarray, ends: np.ndarray, out: np.ndarray, part: np.ndarray
    ) -> None:
        for i in part.tolist():
            self.file.read(int(pictures[i]), int(first[i]), out[ends[i] : ends[i + 1]])

    def _copy(self, batch: HostBatch) -> tuple[HostBatch, Tensor, Tensor | None, torch.cuda.Event | None]:
        """Wait until a batch is read, and begin to copy it: (batch, flat and table on the device, when they are)."""
        for read in batch.reads:
            read.result()
        if self.copy_stream is None:
            return batch, batch.flat, batch.table, None
        with torch.cuda.stream(self.copy_stream):
            flat, table = (
                None if each is None else each.to(self.device, non_blocking=True) for each in (batch.flat, batch.table)
            )
            return batch, flat, table, self.copy_stream.record_event()

    def _finish(
        self, rows: np.ndarray, flat: Tensor, table: Tensor | None, copied: torch.cuda.Event | None
    ) -> LoaderBatch:
        if copied is not None:
            await_copy((flat,) if table is None else (flat, table), copied)
        if table is not None:
            return self.labelled(cut(flat, table, self.augmentation.size), rows)
        images, boxes = flat.view(-1, 3, self.recipe.side, self.recipe.side), self.square_boxes(rows)
        return self.labelled(self.crop(images, *boxes) if boxes and len(rows) else images, rows)
