"""Time input pipelines over a folder of pictures, up to the training device."""

from __future__ import annotations

import argparse
import math
import os
import re
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from lab.base.console import Columns, progress_bar, table_line
from lab.base.errors import RequestError, one_line
from lab.config.loading import Config
from lab.data.cache.disk import CacheFile, find_or_build_cache
from lab.data.cache.disk_loader import DiskLoader
from lab.data.cache.loaders import ResidentLoader, Split
from lab.data.datasets import ImageDataset, collate, folder_dataset
from lab.data.images import Augmentation
from lab.data.loading import EpochPlan, device_batches
from lab.machine.devices import IMAGENET_MOMENTS, environment, resolve_device, synchronize
from lab.study.benchmark.timing import write_json

BLOCK = 2**23  # bytes of a sequential read
MOST_READ = 2**33  # bytes that the disk's own rate is measured over


def read_with_pillow(path: Path) -> Image.Image:
    """A picture in RGB. Raises OSError naming the file, which Pillow's own often does not."""
    try:
        return default_loader(path)
    except OSError as error:
        why = re.sub(r" <_io\..*?>", "", one_line(error))  # the file once more
        raise OSError(f"{path}: {why}") from None


class PillowDataset(Dataset):
    """The pictures of a folder data set as torchvision's ImageFolder reads them: by Pillow, one by
    one.
    """

    def __init__(self, dataset: ImageDataset, transform: Callable):
        self.samples = dataset.samples
        self.transform = transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(read_with_pillow(path)), label


def pil_float_loader(
    dataset: ImageDataset, size: int, plan: EpochPlan, shared: dict[str, Any]
) -> DataLoader:
    """The pipeline of most training scripts: Pillow, float32 and normalised in the workers."""
    floats = [
        v2.PILToTensor(),
        v2.ToDtype(torch.float32, scale=True),
        v2.Normalize(**IMAGENET_MOMENTS),
    ]
    transform = v2.Compose(
        [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *floats]
    )
    order = plan.indices_to_load().reshape(-1, plan.batch_size).tolist()
    return DataLoader(PillowDataset(dataset, transform), batch_sampler=order, **shared)


def device_pairs(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of `pil_float_loader` on the device. Raises RequestError for a picture that
    Pillow cannot read.
    """
    try:
        for images, labels in loader:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
    except (
        OSError
    ) as error:  # a worker's has its traceback for a message, and the reason in the last line
        why = str(error).splitlines()[-1].removeprefix("OSError: ")
        raise RequestError(f"--folder: Pillow cannot read {why}") from None


def endless(loader: ResidentLoader | DiskLoader, device: torch.device) -> Iterator[Any]:
    while True:
        yield from device_batches(loader, device)


def forget_pages(file: CacheFile) -> None:
    """Have the kernel drop what it keeps of a file in memory, so that the next reads come from the
    disk.
    """
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read_in_order(file: CacheFile, threads: int, most: float = math.inf) -> float:
    """Read a file from its start in large blocks, `most` bytes of it. Returns bytes a second.

    Afterwards the kernel keeps in memory what was read, as far as there is room.
    """
    starts = range(0, min(most, int(file.offsets[-1])), BLOCK)

    def read(start: int) -> int:
        return len(os.pread(file.file.fileno(), BLOCK, start))

    started = time.perf_counter()
    with ThreadPoolExecutor(threads) as pool:
        total = sum(pool.map(read, starts))
    return total / (time.perf_counter() - started)


def cached_pipelines(
    dataset: ImageDataset, config: Config, device: torch.device, args: argparse.Namespace
) -> tuple[dict[str, tuple[Iterator, Callable[[], Any]]], CacheFile]:
    """Of pictures that were decoded once: as in `input_pipelines`; and the file they are in."""
    whole = np.arange(len(dataset))
    plan = EpochPlan(whole, args.batch_size, 0, lambda epoch: 1.0)  # each picture once an epoch
    options = {"num_workers": args.workers}
    file = find_or_build_cache(dataset, whole, config.dataset, "train", options)
    read_in_order(file, max(args.threads))
    found = {}
    for title, before in (
        ("dataset.cache=disk", lambda: None),
        ("  cold", partial(forget_pages, file)),
    ):
        for threads in args.threads:
            loader = DiskLoader(dataset, whole, plan, config, device, file, whole, threads)
            found[f"{title}, {threads} threads"] = endless(loader, device), before
    resident = ResidentLoader(
        dataset, whole, plan, config, device, options, file=file, kept=Split(dataset, whole).kept
    )
    return {**found, "dataset.cache=device": (endless(resident, device), lambda: None)}, file


def input_pipelines(
    dataset: ImageDataset, plan: EpochPlan, config: Config, device: torch.device, workers: int
) -> dict[str, tuple[Iterator, Callable[[], Any]]]:
    """By name, the batches of each pipeline on the device, and what is to be called before they are
    timed.
    """
    shared = {"num_workers": workers, "pin_memory": device.type == "cuda"}
    streaming = DataLoader(dataset, batch_sampler=plan, collate_fn=collate, **shared)
    pillow = pil_float_loader(dataset, config.dataset.image_size, plan, shared)
    return {
        "Pillow, float32": (device_pairs(pillow, device), lambda: None),
        "streaming, uint8": (device_batches(streaming, device), lambda: None),
    }


def benchmark_input(args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of each pipeline over a folder of classes, read again and again, up to the
    training device.
    """
    config = Config()
    config.dataset.image_size = args.image_size
    config.dataset.augment = "random_resized_crop"
    config.dataset.cache = "disk"
    config.dataset.cache_folder = args.cache_folder
    config.dataset.cache_resolution = args.cache_resolution
    config.training.batch_size = args.batch_size
    device = resolve_device(config.training)
    dataset = folder_dataset("--folder", args.folder)
    dataset.augmentation = Augmentation(config.dataset, train=True)
    lead = 2 * args.workers + 2  # batches in flight before the clock starts
    count = 2 * lead + args.steps * args.repeats
    plan = EpochPlan(
        np.arange(count * args.batch_size) % len(dataset), args.batch_size, 0, lambda epoch: 1.0
    )
    cached, file = cached_pipelines(dataset, config, device, args)
    rows: dict[str, Any] = {}
    result = {
        "rows": rows,
        "pictures": len(dataset),
        "workers": args.workers,
        **environment(device),
    }
    sources = input_pipelines(dataset, plan, config, device, args.workers) | cached
    for name, (source, before) in progress_bar(sources.items(), unit="pipeline"):
        speeds = list(time_source(source, before, device, lead, args))
        median = statistics.median(speeds)
        rows[name] = {"images_per_second": median, "lowest": min(speeds), "highest": max(speeds)}
        rows[name]["ratio"] = median / rows["Pillow, float32"]["images_per_second"]
        write_json(args.json, result)  # a benchmark that is cut short keeps what it measured
    forget_pages(file)
    rate = read_in_order(file, max(args.threads), MOST_READ)
    mean = int(file.offsets[-1]) / len(file)
    return {**result, "bytes_per_picture": mean, "disk_bytes_per_second": rate}


def time_source(
    source: Iterator,
    before: Callable[[], Any],
    device: torch.device,
    lead: int,
    args: argparse.Namespace,
) -> Iterator[float]:
    """Images per second of each repeat."""
    for _ in islice(source, lead):
        pass
    for _ in range(args.repeats):
        before()
        synchronize(device)
        started = time.perf_counter()
        images = sum(len(batch[0]) for batch in islice(source, args.steps))
        synchronize(device)
        yield images / (time.perf_counter() - started)
    source.close()


INPUT_COLUMNS: Columns = {
    "images/s": ("images_per_second", "10,.0f"),
    "lowest": ("lowest", "10,.0f"),
    "highest": ("highest", "10,.0f"),
    "ratio": ("ratio", "7.2f"),  # over the first pipeline
}


def show_input(result: Mapping[str, Any]) -> str:
    """The table of the pipelines, and what the disk gives by itself."""
    lines = [f"{'pipeline':<34} {table_line(INPUT_COLUMNS)}"]
    lines += [
        f"{name:<34} {table_line(INPUT_COLUMNS, row)}" for name, row in result["rows"].items()
    ]
    size = result["bytes_per_picture"]
    rate = result["disk_bytes_per_second"]
    lines.append(
        f"a cached picture has {size:,.0f} bytes; the disk reads {rate / 1e9:,.2f} GB/s: "
        f"{rate / size:,.0f} a second"
    )
    return "\n".join(lines)
