"""`dataset.cache: disk`: a loader that reads the pixels of each batch from a cache file."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import cycle
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lab.config.loading import Config
from lab.data.cache.device import CachedLoader
from lab.data.cache.disk import CacheFile
from lab.data.datasets import ImageDataset, LoaderBatch
from lab.data.loading import EpochPlan, ahead, await_copy
from lab.data.views import COLUMNS, FIRST, bytes_needed, cut


class Slot:
    """Memory that batches go through one after the other: a piece of the host's, and one of the
    GPU's where it is used.

    A piece is replaced by a larger one where a batch does not fit; else an epoch allocates nothing.
    """

    def __init__(self, copy_stream: torch.cuda.Stream | None):
        """copy_stream: on which batches are copied to the GPU; None: they stay on the host."""
        self.stream = copy_stream
        self.host = self.device = torch.empty(0, dtype=torch.uint8)
        if copy_stream is not None:
            self.copied = torch.cuda.Event(blocking=True)
            self.used = torch.cuda.Event()

    def take(self, size: int) -> Tensor:
        """The host's piece, uint8 [at least size], once the batch before is copied out of it."""
        if self.stream is not None:
            self.copied.synchronize()
        if len(self.host) < max(1, size):
            room = 2 ** math.ceil(math.log2(size + 1))  # pinned memory comes in powers of two
            self.host = torch.empty(room, dtype=torch.uint8, pin_memory=self.stream is not None)
        return self.host

    def copy(self, size: int) -> None:
        """Begin to copy the first bytes to the GPU, after the batch before has been used there."""
        if self.stream is None:
            self.device = self.host
            return
        with torch.cuda.stream(self.stream):
            self.stream.wait_event(self.used)
            if len(self.device) < len(self.host):
                self.device = torch.empty(
                    len(self.host), dtype=torch.uint8, device=self.stream.device
                )
            self.device[:size].copy_(self.host[:size], non_blocking=True)
            self.copied.record(self.stream)

    @contextlib.contextmanager
    def using(self) -> Iterator[Tensor]:
        """The batch's piece on the device, for what is launched in the block."""
        if self.stream is not None:
            await_copy((self.device,), self.copied)
        yield self.device
        if self.stream is not None:
            self.used.record(torch.cuda.current_stream(self.device.device))


class HostBatch(NamedTuple):
    """A batch that is being read."""

    rows: np.ndarray  # int64 [n]
    # its table, float64 [n, 8], see `table_of_views`, where there are views; then the pixels
    slot: Slot
    size: int  # bytes of both
    reads: list[Future]


class DiskLoader(CachedLoader):
    """A CachedLoader whose pictures are read from a file for each batch (`dataset.cache: disk`).

    Threads read the rows that the views of a batch need, in the order of the file, into pinned
    memory. That is copied while the device works on the batch before. The device cuts, resizes and
    mirrors as for `ResidentLoader`, so that batches are the same bit for bit.

    Batches go through a few slots in turn. So the host is never more than these ahead of the
    device.
    """

    AHEAD = 2  # batches that are being read while one is waited for
    # one more batch is being copied, and one cut: whoever waits for a slot has its end in sight
    SLOTS = AHEAD + 2

    def __init__(
        self,
        dataset: ImageDataset,
        indices: np.ndarray,
        plan: EpochPlan | None,
        config: Config,
        device: torch.device,
        file: CacheFile,
        kept: np.ndarray,
        threads: int,
        batch_size: int | None = None,
    ):
        """file: keeps the samples `kept`, int64, ascending. threads: how many read."""
        super().__init__(dataset, indices, plan, config, device, batch_size)
        self.file = file
        self.threads = threads
        self.copy_stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.idle: list[list[Slot]] = []  # the slots of iterators that have ended
        positions = np.searchsorted(kept, indices % len(dataset))
        index = file.index
        known = (index.labels[positions], index.shown[positions])
        self.attach(index, file.unreadable, positions, *known)

    def __iter__(self) -> Iterator[LoaderBatch]:
        slots = self.idle.pop() if self.idle else self._new_slots()
        use_device = None
        if self.copy_stream is not None:  # a new thread would allocate on GPU 0
            use_device = partial(torch.cuda.set_device, self.copy_stream.device)
        with (
            ThreadPoolExecutor(1, initializer=use_device) as planner,
            ThreadPoolExecutor(self.threads) as readers,
        ):
            try:
                work = zip(self.parts(), cycle(slots), strict=False)
                reads = (
                    planner.submit(self._begin, readers, part.rows, slot) for part, slot in work
                )
                copies = (self._copy(each.result()) for each in ahead(reads, self.AHEAD))
                for batch in ahead(copies, 1):
                    yield self._finish(batch)
            finally:
                planner.shutdown(cancel_futures=True)
                readers.shutdown(cancel_futures=True)
                self.idle.append(slots)  # nobody writes into them any more

    def _new_slots(self) -> list[Slot]:
        return [Slot(self.copy_stream) for _ in range(self.SLOTS)]

    def _begin(self, readers: ThreadPoolExecutor, rows: np.ndarray, slot: Slot) -> HostBatch:
        """Begin to read into a slot what the samples of some rows, int64 [n], need."""
        pictures = self.positions[rows]
        if self.recipe.square:
            table = np.zeros((0, COLUMNS))
            first = np.zeros(len(rows), dtype=np.int64)
            ends = 3 * self.recipe.side**2 * np.arange(len(rows) + 1)
        else:
            table, first = self.views(rows)
            ends = np.concatenate([[0], np.cumsum(bytes_needed(table))])
            table[:, FIRST] = ends[:-1]
        size = table.nbytes + int(ends[-1])
        host = slot.take(size).numpy()
        host[: table.nbytes] = table.reshape(-1).view(np.uint8)
        spans = np.stack([ends[:-1], ends[1:]], 1) + table.nbytes
        order = np.argsort(pictures, kind="stable")
        parts = np.array_split(order, max(1, min(self.threads, len(order) // 8)))
        reads = [
            readers.submit(self.file.read, pictures[part], first[part], spans[part], host)
            for part in parts
        ]
        return HostBatch(rows, slot, size, reads)

    def _copy(self, batch: HostBatch) -> HostBatch:
        """Wait until a batch is read, and begin to copy it."""
        for read in batch.reads:
            read.result()
        batch.slot.copy(batch.size)
        return batch

    def _finish(self, batch: HostBatch) -> LoaderBatch:
        """What a batch is on the device, in memory of its own."""
        with batch.slot.using() as memory:
            return self.labelled(self._images(memory[: batch.size], batch.rows), batch.rows)

    def _images(self, memory: Tensor, rows: np.ndarray) -> Tensor:
        if not self.recipe.square:
            pixels = len(rows) * COLUMNS * 8
            table = memory[:pixels].view(torch.float64).view(-1, COLUMNS)
            return cut(memory[pixels:], table, self.augmentation.size)
        images = memory.view(-1, 3, self.recipe.side, self.recipe.side)
        boxes = self.square_boxes(rows)
        return self.crop(images, *boxes) if boxes and len(rows) else images.clone()
