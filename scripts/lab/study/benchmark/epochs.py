"""Time whole epochs over a folder of pictures, by kind of cache, against the steps in them
alone.
"""

from __future__ import annotations

import argparse
import gc
import re
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice, repeat
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch

from lab.base.console import Columns, progress_bar, table_line
from lab.config.loading import Config
from lab.data.loading import DeviceBatch, EpochPlan, device_batches
from lab.machine.devices import environment, resolve_device, synchronize
from lab.machine.workers import end_workers
from lab.study.benchmark.inputs import read_in_order
from lab.study.benchmark.timing import write_json


class Steps(Protocol):
    """A run of the lab whose epochs can be timed: what `benchmark.py` makes of `train_ast`."""

    device: torch.device

    def begin_epoch(self, plan: EpochPlan) -> None:
        """Begin the next epoch, and choose what it loads."""

    def train(self, batches: Iterator[DeviceBatch], steps: int) -> None:
        """Train on batches as the first `steps` of an epoch."""


class Lab(NamedTuple):
    """What is above this module: functions of `train_ast`, and how `benchmark.py` calls them."""

    build_dataloaders: Callable[..., Any]
    build_steps: Callable[[Config, torch.device, Any], Steps]


def ways(activations: Sequence[float], patterns: Sequence[str] | None) -> dict[str, dict[str, Any]]:
    """By name, the settings of `ast` of each way to train whose name has a match of a pattern
    (None: of all).
    """
    found: dict[str, dict[str, Any]] = {"dense": {"mode": "dense"}}
    for share in activations:
        common = {"target_activation": share, "pack": True}
        found[f"batch-scored, a={share:g}"] = {**common, "kp": 1.0, "ki": 0.05}
        found[f"history, a={share:g}"] = {**common, "scoring": "history", "pack": False}
    return {
        name: ast
        for name, ast in found.items()
        if not patterns or any(re.search(pattern, name) for pattern in patterns)
    }


def epoch_config(args: argparse.Namespace, ast: Mapping[str, Any]) -> Config:
    config = Config()
    config.model.name = args.model
    config.training.compile = args.compile
    config.training.device = args.device
    config.dataset.type = "folder"
    config.dataset.train_dir = args.folder
    config.dataset.val_dir = args.folder
    config.dataset.image_size = args.image_size
    config.dataset.augment = "random_resized_crop"
    config.dataset.cache_folder = args.cache_folder
    config.dataset.cache_resolution = args.cache_resolution
    config.dataset.max_val_samples = args.batch_size
    config.training.batch_size = args.batch_size
    config.training.lr = 0.01
    config.training.num_workers = args.workers
    config.training.epochs = 10**6
    config.metrics.base_flop_per_sample = 1.0
    config.ast = config.ast.model_copy(update=dict(ast))
    return config


class HostMemory:
    """The largest growth of this process's memory while it is watched, page cache left out, GiB.

    Pinned memory is counted by torch, for the kernel does not count it as the process's own.
    """

    def __init__(self) -> None:
        self.before = self._now()
        self.largest = 0.0
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def _now(self) -> float:
        facts = dict(
            line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines()
        )
        own = sum(1024 * int(facts[key].split()[0]) for key in ("RssAnon", "RssShmem"))
        pinned = 0
        if torch.cuda.is_initialized() and hasattr(torch.cuda, "host_memory_stats"):
            pinned = torch.cuda.host_memory_stats().get("allocated_bytes.current", 0)
        return (own + pinned) / 2**30

    def _watch(self) -> None:
        while not self.done.wait(0.05):
            self.largest = max(self.largest, self._now() - self.before)

    def end(self) -> float:
        self.done.set()
        self.thread.join()
        return self.largest


def time_steps(run: Steps, batch: DeviceBatch, count: int) -> float:
    """Seconds of a step over one resident batch: what an epoch costs at least."""
    for timed in (max(4, count // 4), count):
        synchronize(run.device)
        started = time.perf_counter()
        run.train(islice(repeat(batch), timed), timed)
        synchronize(run.device)
    return (time.perf_counter() - started) / count


class Waits:
    """How long the device waits for each batch: from the end of the work it has until the batch is
    there, cutting it included. On a CPU, how long the program does.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.moments = []

    def _note(self) -> None:
        if self.device.type == "cuda":
            self.moments.append(torch.cuda.Event(enable_timing=True))
            self.moments[-1].record()
        else:
            self.moments.append(time.perf_counter())

    def watch(self, batches: Iterator[DeviceBatch]) -> Iterator[DeviceBatch]:
        while True:
            self._note()
            batch = next(batches, None)
            self._note()
            if batch is None:
                return
            yield batch

    def seconds(self) -> float:
        pairs = zip(self.moments[::2], self.moments[1::2], strict=True)
        if self.device.type == "cuda":
            return sum(before.elapsed_time(after) for before, after in pairs) / 1000
        return sum(after - before for before, after in pairs)


class Epoch(NamedTuple):
    seconds: float
    waited: float  # share of the seconds
    steps: int  # that were taken
    whole: int  # that a whole epoch has


def time_epoch(
    run: Steps, loaders: tuple, limit: int | None, lead: int | None, repeats: int
) -> Epoch:
    """The median of the repeats, of an even number the faster of the two in the middle.

    limit, lead: steps of each, and of one before them that starts workers and threads and reserves
    memory; None: all.
    """
    train, _, plan, _ = loaders
    found = []
    for most in (lead, *[limit] * repeats):
        waits = Waits(run.device)
        synchronize(run.device)
        started = time.perf_counter()
        run.begin_epoch(plan)
        count = len(plan) if most is None else min(most, len(plan))
        batches = device_batches(train, run.device)
        run.train(waits.watch(islice(batches, count)), count)
        synchronize(run.device)
        seconds = time.perf_counter() - started
        found.append(Epoch(seconds, waits.seconds() / seconds, count, len(plan)))
        batches.close()
    return statistics.median_low(found[1:])


def time_way(
    args: argparse.Namespace, lab: Lab, ast: Mapping[str, Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(kind of cache, figures) for one way to train. One network, compiled once, for all of
    them.
    """
    config = epoch_config(args, ast)
    device = resolve_device(config.training)
    run = None
    for kind in args.kinds:
        config.dataset.cache = kind
        gc.collect()
        memory = HostMemory()
        loaders = lab.build_dataloaders(config, device)
        if run is None:
            run = lab.build_steps(config, device, loaders)
            size = (args.batch_size, 3, args.image_size, args.image_size)
            images = torch.randint(0, 256, size, dtype=torch.uint8).to(device)
            labels = torch.randint(0, loaders[-1], (args.batch_size,)).to(device)
            step = time_steps(run, DeviceBatch(images, labels, labels), args.steps)
        if kind == "disk":
            read_in_order(
                loaders[0].file, max(1, args.workers)
            )  # what is timed is a file that the kernel keeps
        limit, lead, repeats = (
            (args.stream_steps, 2, 1) if kind == "none" else (args.epoch_steps, args.epoch_steps, 2)
        )
        seconds, waited, count, whole = time_epoch(
            run, loaders, limit, lead, args.repeats or repeats
        )
        end_workers()
        row = {
            "seconds": seconds * whole / count,
            "steps": count,
            "epoch_steps": whole,
            "step_ms": 1000 * step,
        }
        row |= {"over_steps": seconds / (count * step), "waited": waited}
        row |= {"images_per_second": count * args.batch_size / seconds, "host_gib": memory.end()}
        del loaders
        yield kind, row


def benchmark_epoch(args: argparse.Namespace, lab: Lab) -> dict[str, Any]:
    """The rows of `epoch`: each way to train with each kind of cache."""
    rows: dict[str, Any] = {}
    device = resolve_device(epoch_config(args, {}).training)
    result = {
        "rows": rows,
        "model": args.model,
        "batch_size": args.batch_size,
        **environment(device),
    }
    for name, ast in progress_bar(ways(args.activations, args.only).items(), unit="way"):
        for kind, row in time_way(args, lab, ast):
            rows[f"{name}, {kind}"] = row
            dense = rows.get(f"dense, {kind}")
            row["over_dense"] = dense and row["seconds"] / dense["seconds"]
            write_json(args.json, result)  # a benchmark that is cut short keeps what it measured
        torch.compiler.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return result


EPOCH_COLUMNS: Columns = {
    "seconds": ("seconds", "9.2f"),  # of a whole epoch
    "/steps": ("over_steps", "7.3f"),  # over the time of its steps alone
    "waited": ("waited", "7.1%"),  # share of the time that the device waited for pictures
    "/dense": ("over_dense", "7.3f"),  # over the dense epoch with the same kind of cache
    "images/s": ("images_per_second", "9,.0f"),
    "steps": ("steps", "6,.0f"),
    "ms/step": ("step_ms", "8.2f"),
    "host GiB": ("host_gib", "9.2f"),
}


def show_epoch(result: Mapping[str, Any]) -> str:
    """The table of the epochs."""
    lines = [f"{'epoch':<34} {table_line(EPOCH_COLUMNS)}"]
    return "\n".join(
        lines
        + [f"{name:<34} {table_line(EPOCH_COLUMNS, row)}" for name, row in result["rows"].items()]
    )
