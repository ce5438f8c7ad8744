"""Measure what a training step and the input cost, every variant in one run on one machine.

    python scripts/benchmark.py steps --model resnet50 --image-size 224 --batch-size 256
    python scripts/benchmark.py steps --model resnet18 --small-stem --image-size 32 --compile reduce-overhead
    python scripts/benchmark.py steps --model test_resnet --image-size 32 --batch-size 32 --steps 4   # on a CPU
    python scripts/benchmark.py steps --model resnet50 --nproc 2 --batch-size 512 --json steps.json   # two GPUs
    python scripts/benchmark.py scaling --steps steps.json --gpus 8 64 512
    python scripts/benchmark.py input --folder data/imagenette2-160/train --image-size 128

steps: images are random and resident, so that nothing but the step is timed. Every figure is per considered batch, the
median over the repeats with the smallest and largest; `considered` means that a loop which trains on a quarter of the
samples makes a quarter as many steps. Our loops run the lab's own `train_one_epoch`. Beside them:
  hand-written loop     forward, backward and step with nothing else, channels_last, bfloat16, fused: what a good
                        dense training script does
  stored scores         the hand-written loop on the chosen share alone, recording their significance for later epochs
  published pattern     the masked loss of the published Adaptive Sparse Training code: the whole batch forward and
                        backward, a second forward for the training accuracy, float16, contiguous memory, host reads
  ... in our settings   the same with bfloat16, channels_last, a fused optimizer and no host reads
  two full forwards     one to score, one to train, the loss masked, the whole batch backward
  two-pass top-k        selective backprop: a forward to score, forward and backward of the top share
The last three run in our settings too, uncompiled as published.

steps --nproc N: N processes, one a GPU, by torchrun. The batch is that of all together; each has its part of it. The
slowest one's time counts; joules are summed, memory is the largest. The hand-written dense loop is wrapped in torch's
DistributedDataParallel, which sends gradients while the backward goes on; the other peers are left out. Each of our
loops makes one more pass in which every collective is timed by itself: `collectives` is their share of a step. It is an
upper bound, for nothing overlaps while they are timed, and waiting for a slower process counts too.

scaling: on paper, what a step would take on more GPUs with as many samples each, from the JSON of `steps --nproc`. From
there come a GPU's own work and the price of each collective; the host's choosing is measured while the table is made.
The rest is assumed and stands above the table; the formulas are with `parts_at` and `step_ms`.

input: images per second of each pipeline over a folder of classes, read again and again.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import cache, partial
from itertools import islice, repeat
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets.folder import default_loader
from torchvision.transforms import v2

from lab.cli import command_parser, run_cli
from lab.config import Config
from lab.console import progress_bar
from lab.data.cache import ResidentLoader
from lab.data.datasets import ImageDataset, collate, folder_dataset
from lab.data.images import Augmentation
from lab.data.loading import DeviceBatch, EpochPlan, as_is, device_batches
from lab.errors import RequestError
from lab.runtime.clock import Stop
from lab.runtime.devices import (
    IMAGENET_MOMENTS,
    Normalise,
    configure_backends,
    environment,
    resolve_device,
    synchronize,
)
from lab.runtime.distributed import Dist, asking_interval
from lab.runtime.launch import launch, launched
from lab.runtime.meters import EnergyMeter
from train_ast import Run, get_model, select_active, significance, train_one_epoch

Step = Callable[[int], None]  # considers so many batches


class TimedDist(Dist):
    """Dist that, while watched, times each of its collectives: the device is synchronised before and after, so that
    nothing overlaps. They go by what a step has them for; a process that waits for a slower one counts the waiting."""

    device: torch.device | None = None  # while it is watched

    def watch(self, device: torch.device) -> None:
        self.device, self.calls = device, {}

    def watched(self) -> dict[str, list[tuple[float, int]]]:
        """(milliseconds, bytes of this process's tensor) of every call since `watch`, by kind. Ends the watching."""
        self.device = None
        return self.calls

    def _timed(self, kind: str, size: int, call: Callable[[], Any]) -> Any:
        if self.device is None:
            return call()
        synchronize(self.device)
        started = time.perf_counter()
        result = call()
        synchronize(self.device)
        self.calls.setdefault(kind, []).append((1000 * (time.perf_counter() - started), size))
        return result

    def all_sum(self, tensor: Tensor) -> Tensor:
        return self._timed("gradients", tensor.nbytes, partial(super().all_sum, tensor))

    def join_columns(self, facts: Tensor, size: int) -> Tensor:
        filled = len(facts) * size * facts.element_size()
        return self._timed("scores", filled, partial(super().join_columns, facts, size))

    def gather_later(self, values: Sequence[float]) -> Callable[[], np.ndarray]:
        later = super().gather_later
        if self.device is None:
            return later(values)
        rows = self._timed("agreement", 8 * len(values), lambda: later(values)())  # float64
        return lambda: rows

    def exchange(self, tensor: Tensor, moves: np.ndarray) -> Tensor:
        return self._timed("evening out", tensor.nbytes, partial(super().exchange, tensor, moves))


def lab_steps(
    config: Config, images: Tensor, labels: Tensor, dist: Dist, compiled: str = "off", **ast: Any
) -> tuple[Step, Run]:
    """The lab's own epoch loop over the same resident batch, with the settings `ast`."""
    config = config.model_copy(deep=True)
    config.ast, config.training.compile = config.ast.model_copy(update={"pack": True, **ast}), compiled
    configure_backends(config.ast, images.device)
    model = get_model(config.model, config.dataset.num_classes, config.dataset.image_size)
    run = Run(config, model, images.device, planned_steps=10**6, dist=dist)
    run.start_epoch(config.ast.warmup_epochs)
    share = config.ast.target_activation if config.ast.mode == "random" else 1.0
    rows = torch.arange(len(labels), device=images.device)

    def steps(n: int) -> None:
        run.step, n = 0, max(1, round(share * n))
        train_one_epoch(run, islice(repeat(DeviceBatch(images, labels, rows)), n), n, Stop())

    return steps, run


class Bench:
    """What a hand-written script sets up: model, optimizer and scaler; `ours` in the lab's settings.

    Of several processes the model is in DistributedDataParallel: gradients are views of its buckets, and each process
    keeps its own running statistics, as ours do."""

    def __init__(self, config: Config, device: torch.device, ours: bool = True, world: int = 1):
        self.kind = device.type
        self.keep = round(config.ast.target_activation * config.training.batch_size)
        configure_backends(config.ast.model_copy(update={"mode": "dense"}), device)  # every batch of one shape
        layout = torch.channels_last if ours and self.kind == "cuda" else torch.contiguous_format
        model = get_model(config.model, config.dataset.num_classes, config.dataset.image_size)
        self.model = model.to(device, memory_format=layout).train()
        if world > 1:
            known = inspect.signature(DistributedDataParallel).parameters
            buffers = "forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers"  # its old name
            options = {"device_ids": [device] if self.kind == "cuda" else None, buffers: False}
            self.model = DistributedDataParallel(self.model, gradient_as_bucket_view=True, **options)
        self.dtype = torch.bfloat16 if ours or self.kind == "cpu" else torch.float16
        fused = True if ours and self.kind == "cuda" else None
        self.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=fused)
        self.scaler = torch.amp.GradScaler(self.kind, enabled=self.dtype == torch.float16)
        self.normalise = Normalise(**IMAGENET_MOMENTS, device=device, layout=layout, dtype=None)

    def forward(self, images: Tensor) -> Tensor:
        with torch.autocast(self.kind, self.dtype):
            return self.model(self.normalise(images))

    def step(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)


def hand_written_steps(
    config: Config, images: Tensor, labels: Tensor, world: int, compiled: str, stored: bool = False
) -> Step:
    """Dense training by hand; `stored`: on the chosen share alone, each sample's significance recorded."""
    bench = Bench(config, images.device, world=world)
    store, rows = torch.zeros(1_281_167, device=images.device), torch.arange(len(labels), device=images.device)

    def loss_of(images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        logits = bench.forward(images)
        return F.cross_entropy(logits.float(), labels), significance(logits.detach(), labels, 1.0)

    fast = loss_of if compiled == "off" else torch.compile(loss_of, dynamic=False, mode=compiled)
    share = config.ast.target_activation if stored else 1.0

    def steps(n: int) -> None:
        for _ in range(max(1, round(share * n))):
            torch.compiler.cudagraph_mark_step_begin()
            loss, scores = fast(images, labels)
            if stored:
                store[rows] = scores
            bench.step(loss)

    return steps


def masked(losses: Tensor, scores: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The mean loss over the `keep` samples of the highest score, by a mask, and the mask."""
    mask = (scores >= scores.topk(keep).values[-1]).float()
    return (losses * mask).sum() / mask.sum(), mask


def published_steps(config: Config, images: Tensor, labels: Tensor, ours: bool) -> Step:
    """Masked loss, full backward, extra forward for the accuracy: the pattern of the published implementation."""
    bench = Bench(config, images.device, ours)

    def steps(n: int) -> None:
        for _ in range(n):
            logits = bench.forward(images)
            losses = F.cross_entropy(logits.float(), labels, reduction="none")
            loss, mask = masked(losses, significance(logits.detach(), labels, 1.0), bench.keep)
            bench.step(loss)
            with torch.no_grad():
                hits = (bench.forward(images).argmax(-1) == labels).sum()
            if not ours:
                hits.item(), mask.mean().item(), losses.mean().item()

    return steps


def two_forward_steps(config: Config, images: Tensor, labels: Tensor, top_k: bool) -> Step:
    """A forward to score, then forward and backward of the whole batch under a mask, or of the top share alone."""
    bench = Bench(config, images.device)

    def steps(n: int) -> None:
        for _ in range(n):
            with torch.no_grad():
                scores = significance(bench.forward(images), labels, 1.0)
            if top_k:
                chosen = scores.topk(bench.keep).indices
                loss = F.cross_entropy(bench.forward(images[chosen]).float(), labels[chosen])
            else:
                losses = F.cross_entropy(bench.forward(images).float(), labels, reduction="none")
                loss, _ = masked(losses, scores, bench.keep)
            bench.step(loss)

    return steps


def over_processes(dist: Dist, value: float | None, merged: Callable[[np.ndarray], float]) -> float | None:
    """One number of every process's; None where one has none."""
    found = float(merged(dist.gather([math.nan if value is None else value])))
    return None if math.isnan(found) else found


def measure(steps: Step, device: torch.device, count: int, repeats: int, dist: Dist) -> dict[str, float | None]:
    """Milliseconds a batch (median, smallest, largest of `repeats` times `count`), peak GiB and joules a batch.

    Several processes start each repeat together, and the slowest one's time counts.
    """
    steps(max(4, count // 2))  # warm-up: autotuning, allocation, the controller's first moves
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    meter, times = EnergyMeter(device), []
    drawn = meter.read_kj()
    for _ in range(repeats):
        synchronize(device)
        dist.gather([0])  # all are here
        started = time.perf_counter()
        steps(count)
        synchronize(device)
        times.append(1000 * dist.gather([time.perf_counter() - started]).max() / count)
    joules = None if drawn is None else 1000 * (meter.read_kj() - drawn) / (count * repeats)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    row = {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
    return {**row, "peak_gib": over_processes(dist, peak, np.max), "joules": over_processes(dist, joules, np.sum)}


def time_collectives(steps: Step, device: torch.device, count: int, dist: TimedDist) -> dict[str, dict[str, float]]:
    """By kind of collective, over one pass of `count` considered batches: calls a considered batch (an epoch begins
    with one agreement more), bytes of a process's own tensor, and milliseconds a call: `ms` is the mean over calls and
    processes, their waiting for each other included; `transfer_ms` the median over the calls of the process that came
    last and waited for nobody.
    """
    dist.watch(device)
    steps(count)
    found = {}
    for kind, calls in dist.watched().items():
        times, sizes = (dist.gather(each) for each in zip(*calls, strict=True))
        found[kind] = {"calls": len(calls) / count, "bytes": float(sizes.mean()), "ms": float(times.mean())}
        found[kind]["transfer_ms"] = float(np.median(times.min(0)))
    return found


def step_variants(
    args: argparse.Namespace, config: Config, images: Tensor, labels: Tensor, dist: Dist
) -> dict[str, Callable]:
    """Every variant by name, to be built one after the other; the best dense loop of a script comes first. Of several
    processes it is the one peer."""
    lab = partial(lab_steps, config, images, labels, dist)
    by_hand = partial(hand_written_steps, config, images, labels, dist.world)

    def wanted(name: str) -> bool:
        return not args.only or any(re.search(pattern, name) for pattern in args.only)

    low, a = args.score_resolution, f"a={args.activation:g}"
    variants: dict[str, Callable[[], Any]] = {}
    for mode in ["off"] if args.no_compile else [args.compile, "off"]:
        tail = "" if mode == "off" else f", {mode if mode == 'reduce-overhead' else 'compiled'}"
        variants |= {
            f"hand-written dense loop{tail}": partial(by_hand, mode),
            f"dense loop{tail}": partial(lab, mode, mode="dense"),
            f"batch-scored loop, {a}{tail}": partial(lab, mode, mode="ast"),
        }
        if low:
            variants[f"  scored at {low} px{tail}"] = partial(lab, mode, mode="ast", score_resolution=low)
        variants |= {
            f"  not scored ahead{tail}": partial(lab, mode, mode="ast", score_ahead=False),
            f"random loop, {a}{tail}": partial(lab, mode, mode="random"),
        }
        if dist.world == 1:
            variants[f"stored scores, {a}{tail}"] = partial(by_hand, mode, stored=True)
    if dist.world == 1:
        variants |= {
            "batch-scored loop, not packed": partial(lab, mode="ast", pack=False),
            "published pattern": partial(published_steps, config, images, labels, ours=False),
            "  in our settings": partial(published_steps, config, images, labels, ours=True),
            "two full forwards, masked": partial(two_forward_steps, config, images, labels, top_k=False),
            f"two-pass top-k, {a}": partial(two_forward_steps, config, images, labels, top_k=True),
        }
    return {name: build for name, build in variants.items() if wanted(name)}


def benchmark_steps(args: argparse.Namespace) -> dict[str, Any]:
    """All step variants for one model, resolution, batch size and activation; all processes return the same."""
    config = Config()
    config.model.name, config.model.small_stem = args.model, args.small_stem
    config.dataset.num_classes, config.dataset.image_size = args.classes, args.image_size
    config.ast.target_activation, config.ast.kp, config.ast.ki = args.activation, 1.0, 0.05
    config.training.batch_size, config.training.lr, config.training.device = args.batch_size, 0.01, args.device
    config.metrics.base_flop_per_sample = 1.0  # not reported here
    device = resolve_device(config.training)
    dist = TimedDist.join(device)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8)
    labels = torch.randint(0, args.classes, (args.batch_size,))
    images, labels = (dist.part(each).to(device) for each in (images, labels))
    rows = {}
    result = {"processes": dist.world, "batch_size": args.batch_size, "model": args.model}
    result |= {"image_size": args.image_size, **environment(device), "rows": rows}
    single = {} if args.single is None else read_steps("--single", args.single).rows
    for name, build in progress_bar(step_variants(args, config, images, labels, dist).items(), unit="variant"):
        built = build()
        steps, run = built if isinstance(built, tuple) else (built, None)
        row = rows[name] = measure(steps, device, args.steps, args.repeats, dist)
        row["images_per_second"] = 1000 * args.batch_size / row["ms"]
        row["joules_per_sample"] = None if row["joules"] is None else row["joules"] / args.batch_size
        if run is not None and run.activations:
            row["activation"] = statistics.mean(run.activations)
        if run is not None and dist.world > 1:
            row["collectives"] = time_collectives(steps, device, args.steps, dist)
            row["collective_share"] = (
                sum(each["calls"] * each["ms"] for each in row["collectives"].values()) / row["ms"]
            )
        if name in single:
            row["speed_up"] = row["images_per_second"] / single[name].images_per_second
        del steps, run, built
        write(args.json, result)  # a benchmark that is cut short keeps what it measured
        torch.compiler.reset()  # or dynamo, after eight functions of the same code, would compile no more
        if device.type == "cuda":
            torch.cuda.empty_cache()
    dist.leave()
    dense = min((row["ms"] for name, row in rows.items() if "dense loop" in name), default=None)
    for row in rows.values():
        row["ratio"] = None if dense is None else row["ms"] / dense
    return {**result, "break_even": break_even(rows, args.activation)}


def break_even(rows: dict[str, dict], activation: float) -> dict[str, float]:
    """The activation below which each scored loop is faster than dense, from the cost model: a scored loop takes the
    scoring's time plus activation times the dense step's; both are in `rows`, with the same tail to their names."""
    found = {}
    for name, row in rows.items():
        kind, _, tail = name.strip().rpartition(",") if "compiled" in name or "reduce" in name else (name, "", "")
        dense = rows.get(f"dense loop,{tail}" if tail else "dense loop")
        if dense and kind.strip().startswith(("batch-scored", "scored at")) and "not packed" not in name:
            scoring = row["ms"] - row.get("activation", activation) * dense["ms"]
            found[name.strip()] = min(1.0, max(0.0, 1 - scoring / dense["ms"]))
    return found


class PillowDataset(Dataset):
    """The pictures of a folder data set as torchvision's ImageFolder reads them: by Pillow, one by one."""

    def __init__(self, dataset: ImageDataset, transform: Callable):
        self.samples, self.transform = dataset.samples, transform

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path, label = self.samples[index]
        return self.transform(default_loader(path)), label


def pil_float_loader(dataset: ImageDataset, size: int, plan: EpochPlan, shared: dict[str, Any]) -> DataLoader:
    """The pipeline of most training scripts: Pillow, float32 and normalised in the workers."""
    floats = [v2.PILToTensor(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(**IMAGENET_MOMENTS)]
    transform = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), *floats])
    order = plan.indices_to_load().reshape(-1, plan.batch_size).tolist()
    return DataLoader(PillowDataset(dataset, transform), batch_sampler=order, **shared)


def benchmark_input(args: argparse.Namespace) -> dict[str, Any]:
    """Images per second of each pipeline, up to the batch on the training device."""
    config = Config()
    config.dataset.image_size, config.dataset.augment = args.image_size, "random_resized_crop"
    config.training.batch_size = args.batch_size
    device = resolve_device(config.training)
    dataset = folder_dataset("--folder", args.folder)
    dataset.augmentation = Augmentation(config.dataset, train=True)
    lead, whole = 2 * args.workers + 2, np.arange(len(dataset))  # batches in flight before the clock starts
    count = 2 * lead + args.steps * args.repeats
    plan = EpochPlan(np.arange(count * args.batch_size) % len(dataset), args.batch_size, 0, lambda epoch: 1.0)
    shared = {"num_workers": args.workers, "pin_memory": device.type == "cuda"}
    pillow = pil_float_loader(dataset, args.image_size, plan, shared)
    streaming = DataLoader(dataset, batch_sampler=plan, collate_fn=collate, **shared)
    decoder = {"num_workers": args.workers, "collate_fn": as_is}
    resident = ResidentLoader(dataset, whole, EpochPlan(whole, args.batch_size, 0, plan.share), config, device, decoder)

    def by_pillow() -> Iterator[tuple[Tensor, Tensor]]:
        for images, labels in pillow:
            yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    def by_residence() -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            yield from device_batches(resident, device)

    sources: dict[str, Iterator] = {
        "Pillow, float32": by_pillow(),
        "streaming: torchvision.io, uint8": device_batches(streaming, device),
        "dataset.cache=device": by_residence(),
    }
    rows = {}
    for name, source in progress_bar(sources.items(), unit="pipeline"):
        speeds = []
        for _ in islice(source, lead):
            pass
        for _ in range(args.repeats):
            synchronize(device)
            started = time.perf_counter()
            images = sum(len(batch[0]) for batch in islice(source, args.steps))
            synchronize(device)
            speeds.append(images / (time.perf_counter() - started))
        source.close()
        median = statistics.median(speeds)
        rows[name] = {"images_per_second": median, "lowest": min(speeds), "highest": max(speeds)}
        rows[name]["ratio"] = median / rows["Pillow, float32"]["images_per_second"]
    return {"rows": rows, "pictures": len(dataset), "workers": args.workers, **environment(device)}


Measured = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Printable = Annotated[str, Field(pattern=r"^[ -~]{1,80}$")]  # what is shown of a file that anybody may have written


class Collective(BaseModel):
    """A kind of collective, as `time_collectives` has it."""

    calls: Measured
    bytes: Measured
    transfer_ms: Measured

    def per_batch(self) -> float:
        """Milliseconds a considered batch, without waiting for others."""
        return self.calls * self.transfer_ms


class StepsRow(BaseModel):
    ms: Measured
    images_per_second: Measured
    activation: float | None = Field(None, ge=0, le=1)
    collectives: dict[str, Collective] | None = None

    def computing_ms(self) -> float:
        """Of a considered batch, without the collectives that the step waits for."""
        waits = [each.per_batch() for kind, each in (self.collectives or {}).items() if kind != "agreement"]
        return self.ms - sum(waits)


class StepsFile(BaseModel):
    """What `steps` has written, as far as it is read again."""

    processes: int = Field(1, ge=1)
    batch_size: int | None = Field(None, ge=1)
    model: Printable | None = None
    image_size: int | None = None
    gpu: Printable | None = None
    rows: dict[Printable, StepsRow]


def read_steps(option: str, path: Path) -> StepsFile:
    """The JSON of a `steps` run. Raises RequestError, naming the file, for anything else."""
    try:
        return StepsFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{option}: cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ascii(".".join(map(str, first["loc"])) or "file")[:120]
        raise RequestError(f"{option}: {path} is no JSON of benchmark.py steps: {where}: {first['msg']}") from None


@cache
def choosing_ms(samples: int, activation: float) -> float:
    """Milliseconds the host takes to choose among so many scores, float32: the median of three, measured here."""
    scores, times = torch.randn(samples, generator=torch.Generator().manual_seed(0)), []
    threshold = scores.sort().values[min(samples - 1, round((1 - activation) * samples))].item()
    for _ in range(4):
        started = time.perf_counter()
        select_active(scores, threshold)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])  # the first one warms up


def parts_at(gpus: int, row: StepsRow, found: StepsFile, args: argparse.Namespace) -> dict[str, float]:
    """What a considered batch costs on so many GPUs, each with as many samples as measured: milliseconds by part.

    With N GPUs on M machines, n processes measured, and of each collective its bytes B and its transfer's time t:
      device        the measured step less the collectives it waits for (calls x t): what a GPU computes, whatever N is
      gradients     ring all-reduce, 2 (N - 1) / N x B / pace, and 2 ceil(log2 M) hops between machines. The pace is the
                    measured one, 2 (n - 1) / n x B / t, and with M > 1 at most --network-gb
      scores        t as a fixed price, (N - 1) x B / pace, and ceil(log2 M) hops
      evening out   t, with M > 1 at least B / --network-gb and a hop: what a GPU has too many does not grow with N
      agreement     gloo's all_gather is a ring of N - 1 hops: t / (n - 1) each, with M > 1 at least --latency-us; once
                    in `asking_interval` batches, while all else goes on
      choosing      `select_active` over the scores of all GPUs, measured here (`choosing_ms`)
    All but the device's are of one call, and are multiplied by the calls a considered batch. Assumed: no GPU is slower
    than those measured, the network is nobody else's, and what every process allocates for N others costs nothing.
    """
    nodes, n = math.ceil(gpus / args.gpus_per_node), found.processes
    hops, hop = math.ceil(math.log2(nodes)), args.latency_us / 1000 if nodes > 1 else 0.0
    network = args.network_gb * 1e6 if nodes > 1 else math.inf  # bytes a millisecond
    gradients = row.collectives["gradients"]
    pace = min(network, 2 * (n - 1) / n * gradients.bytes / gradients.transfer_ms)
    a_call = {
        "gradients": lambda c: 2 * (gpus - 1) / gpus * c.bytes / pace + 2 * hops * hop,
        "scores": lambda c: c.transfer_ms + (gpus - 1) * c.bytes / pace + hops * hop,
        "evening out": lambda c: max(c.transfer_ms, c.bytes / network + hop),
        "agreement": lambda c: (gpus - 1) * max(c.transfer_ms / (n - 1), hop) / asking_interval(gpus),
    }
    parts = {"device": row.computing_ms(), "choosing": 0.0}
    for kind, price in a_call.items():
        collective = row.collectives.get(kind)
        parts[kind] = 0.0 if collective is None else collective.calls * price(collective)
    if scores := row.collectives.get("scores"):
        samples = gpus * found.batch_size // n
        parts["choosing"] = scores.calls * choosing_ms(samples, row.activation or 0.0)
    return parts


def step_ms(parts: dict[str, float], ahead: bool) -> float:
    """Milliseconds a considered batch. The host chooses while the GPU works, so that the longer of the two counts; not
    scored ahead, the GPU waits for the host's choice, and they add up. Gradients overlap with neither, and agreement
    with all: it counts where it takes longer than the rest."""
    device, host = parts["device"] + parts["scores"] + parts["evening out"], parts["choosing"]
    return max((max(device, host) if ahead else device + host) + parts["gradients"], parts["agreement"])


LEAST_EFFICIENCY, MOST_GPUS = 0.9, 4096


def breaks_first(at: Callable[[int], dict[str, float]], ahead: bool) -> tuple[str, int] | None:
    """The part that takes the efficiency below LEAST_EFFICIENCY, and the first power of two of GPUs at which it does:
    the one without which that step would be the shortest. None where nothing does up to MOST_GPUS."""
    for gpus in (2**power for power in range(1, MOST_GPUS.bit_length())):
        parts = at(gpus)
        if parts["device"] < LEAST_EFFICIENCY * step_ms(parts, ahead):
            others = [part for part in parts if part != "device"]
            return min(others, key=lambda part: step_ms(parts | {part: 0.0}, ahead)), gpus
    return None


def scaling(args: argparse.Namespace) -> dict[str, Any]:
    """The table on paper, from a `steps --nproc` run: for each loop of ours, compiled ones if there are any, what a
    considered batch takes on each number of GPUs, its bytes, and what breaks first. Raises RequestError where the file
    does not hold what it takes."""
    found = read_steps("--steps", args.steps)
    loops = {name: row for name, row in found.rows.items() if row.collectives}
    if found.processes < 2 or found.batch_size is None or not loops:
        raise RequestError(f"--steps: {args.steps} has no rows with collectives; make it by `steps --nproc N --json`")
    fast = {name: row for name, row in loops.items() if "compiled" in name or "reduce" in name}
    rows, verdicts = {}, {}
    for name, row in (fast or loops).items():
        if "gradients" not in row.collectives:
            raise RequestError(f"--steps: {args.steps}: {name.strip()}: no optimizer step was timed, take more --steps")
        if row.computing_ms() <= 0:
            raise RequestError(f"--steps: {args.steps}: {name.strip()}: its collectives take longer than its step")
        at, ahead = partial(parts_at, row=row, found=found, args=args), "not scored ahead" not in name
        gradients, scores = (row.collectives.get(kind) for kind in ("gradients", "scores"))
        rows[name] = []
        for gpus in args.gpus:
            parts = at(gpus)
            step = step_ms(parts, ahead)
            sizes = {"gpus": gpus, "batch_size": gpus * found.batch_size // found.processes}
            sizes["gradient_bytes"] = gradients.calls * 2 * (gpus - 1) / gpus * gradients.bytes  # sent by a GPU
            sizes["score_bytes"] = scores.calls * gpus * scores.bytes if scores else 0.0  # gathered on a GPU
            rows[name].append({**sizes, "ms": parts, "step_ms": step, "efficiency": parts["device"] / step})
        first = breaks_first(at, ahead)
        verdicts[name] = None if first is None else {"part": first[0], "gpus": first[1]}
    measured = {"file": str(args.steps), "processes": found.processes, "batch_size": found.batch_size, "gpu": found.gpu}
    measured["threads_choosing"] = torch.get_num_threads()
    assumed = {key: getattr(args, key) for key in ("gpus_per_node", "network_gb", "latency_us")}
    result = {"measured": measured, "assumed": assumed, "rows": rows, "breaks_first": verdicts}
    return {**result, **environment(torch.device("cpu"))}


def write(path: Path | None, result: dict[str, Any]) -> None:
    """The figures as JSON, with the command they came from; of several processes the first one writes."""
    if path is not None and launched()[0] == 0:
        result = {"command": shlex.join(["scripts/benchmark.py", *sys.argv[1:]]), **result}
        path.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def cell(value: float | None, spec: str) -> str:
    """A figure, or a dash where there is none, as wide as its format."""
    return "-".rjust(len(format(0, spec))) if value is None else format(value, spec)


def show_input(result: dict[str, Any]) -> str:
    """The table of the pipelines, every line also as a multiple of the usual one."""
    lines = [f"{'pipeline':<34} {'images/s':>10} {'lowest':>10} {'highest':>10} {'ratio':>7}"]
    for name, row in result["rows"].items():
        speeds = f"{row['images_per_second']:10,.0f} {row['lowest']:10,.0f} {row['highest']:10,.0f}"
        lines.append(f"{name:<34} {speeds} {row['ratio']:7.2f}")
    return "\n".join(lines)


STEP_COLUMNS = {  # title: (key of the row, format); the width is the format's
    "ms": ("ms", "9.2f"),
    "min": ("ms_min", "9.2f"),
    "max": ("ms_max", "9.2f"),
    "ratio": ("ratio", "7.3f"),
    "images/s": ("images_per_second", "9,.0f"),
    "active": ("activation", "7.3f"),
    "GiB": ("peak_gib", "7.2f"),
    "J/image": ("joules_per_sample", "9.4f"),
}


def show_steps(result: dict[str, Any]) -> str:
    """The table of the steps, every line also as a multiple of the best dense loop; of several processes with the share
    of their collectives, and the speed-up over a file of one process where there is one."""
    columns = dict(STEP_COLUMNS)
    if result["processes"] > 1:
        columns["collectives"] = ("collective_share", "11.3f")
    if any("speed_up" in row for row in result["rows"].values()):
        columns["speed-up"] = ("speed_up", "8.2f")
    titles = " ".join(title.rjust(len(format(0, spec))) for title, (_, spec) in columns.items())
    lines = [f"{'per considered batch':<44} {titles}"]
    for name, row in result["rows"].items():
        lines.append(f"{name:<44} {' '.join(cell(row.get(key), spec) for key, spec in columns.values())}")
    for name, share in result["break_even"].items():
        lines.append(f"{name}: faster than dense below an activation of {share:.2f}")
    return "\n".join(lines)


SCALING_PARTS = ("device", "gradients", "scores", "evening out", "agreement", "choosing")


def show_scaling(result: dict[str, Any]) -> str:
    """What is measured and what assumed, the table on paper, and a line a loop on what breaks first."""
    measured, assumed = result["measured"], result["assumed"]
    each = f"{measured['batch_size'] // measured['processes']} samples"
    network = f"{assumed['network_gb']:g} GB/s a GPU and {assumed['latency_us']:g} us a hop"
    columns = [part.rjust(11) for part in (*SCALING_PARTS, "step", "efficiency")]
    lines = [
        f"on paper, from {measured['file']}: {measured['processes']} x {measured['gpu'] or 'CPU'}, {each} each",
        "measured there: the step and its collectives, and so the pace of gradients inside a machine",
        f"measured here: choosing, on {measured['threads_choosing']} threads",
        f"assumed: {assumed['gpus_per_node']} GPUs a machine, {network} between machines, {each} a GPU,",
        "  gradients by a ring, overlapping with nothing; the host at work while the GPU is; efficiency: device / step",
        "",
        f"{'ms per considered batch':<44} {'GPUs':>5} {'batch':>9} {'grad. MB':>9} {'score KB':>9} {' '.join(columns)}",
    ]
    for name, row in result["rows"].items():
        for at in row:
            sizes = f"{at['gpus']:5} {at['batch_size']:9,}"
            sizes += f" {at['gradient_bytes'] / 1e6:9.2f} {at['score_bytes'] / 1e3:9.1f}"
            times = " ".join(f"{ms:11.3f}" for ms in (*(at["ms"][part] for part in SCALING_PARTS), at["step_ms"]))
            lines.append(f"{name:<44} {sizes} {times} {at['efficiency']:11.3f}")
    for name, first in result["breaks_first"].items():
        verdict = f"nothing brings the efficiency below {LEAST_EFFICIENCY} up to {MOST_GPUS} GPUs"
        if first is not None:
            verdict = f"first to break: {first['part']}, efficiency below {LEAST_EFFICIENCY} at {first['gpus']} GPUs"
        lines.append(f"{name.strip()}: {verdict}")
    return "\n".join(lines)


def plot(what: str, result: dict[str, Any], path: Path) -> None:
    """Bars of milliseconds a batch, or of images a second, with their spread."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    value, low, high = ("ms", "ms_min", "ms_max") if what == "steps" else ("images_per_second", "lowest", "highest")
    names, rows = list(result["rows"]), list(result["rows"].values())
    values = np.array([row[value] for row in rows])
    spread = np.abs(np.array([[row[low] for row in rows], [row[high] for row in rows]]) - values)
    figure, axes = plt.subplots(figsize=(9, 0.6 + 0.32 * len(rows)), layout="constrained")
    ours = [
        name.startswith((" ", "dense", "batch", "random", "stream")) and "our settings" not in name for name in names
    ]
    axes.barh(names, values, xerr=spread, color=["#0072b2" if mine else "#999999" for mine in ours], ecolor="#333333")
    for name, number in zip(names, values, strict=True):
        axes.annotate(f" {number:,.1f}", (number, name), va="center", fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("milliseconds a considered batch" if what == "steps" else "images a second")
    figure.savefig(path)
    plt.close(figure)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    kinds = parser.add_subparsers(dest="what", required=True)
    steps, inputs = kinds.add_parser("steps", help="training steps"), kinds.add_parser("input", help="input pipelines")
    paper = kinds.add_parser("scaling", help="steps on more GPUs, on paper")
    steps.add_argument("--model", default="resnet50", help="as model.name (default: resnet50)")
    steps.add_argument("--small-stem", action="store_true", help="as model.small_stem")
    steps.add_argument("--classes", type=int, default=1000, help="default: 1000")
    steps.add_argument("--activation", type=float, default=0.25, help="share of active samples (default: 0.25)")
    steps.add_argument("--score-resolution", type=int, metavar="PX", help="also score at PX pixels")
    steps.add_argument(
        "--compile", choices=["default", "reduce-overhead"], default="default", help="torch.compile mode"
    )
    steps.add_argument("--no-compile", action="store_true", help="leave the compiled variants out")
    steps.add_argument(
        "--only", nargs="+", metavar="PATTERN", help="only variants whose name has a match (Python's re)"
    )
    steps.add_argument("--device", choices=["auto", "cuda", "cpu"], default="auto", help="as training.device")
    steps.add_argument("--nproc", type=int, default=1, metavar="N", help="processes, one a GPU, by torchrun; 1: none")
    steps.add_argument(
        "--single", type=Path, metavar="FILE", help="the JSON of one process: also show the speed-up over its rows"
    )
    inputs.add_argument("--folder", required=True, help="of classes, each a folder of images")
    inputs.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    for kind, count in ((steps, 40), (inputs, 20)):
        kind.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
        kind.add_argument("--batch-size", type=int, default=256, help="samples, of all processes (default: 256)")
        kind.add_argument("--steps", type=int, default=count, help=f"timed batches a repeat (default: {count})")
        kind.add_argument("--repeats", type=int, default=5, help="default: 5")
        kind.add_argument("--plot", type=Path, metavar="FILE", help="draw a bar chart (png, svg, pdf)")
    paper.add_argument("--steps", type=Path, required=True, metavar="FILE", help="the JSON of a run of steps --nproc")
    paper.add_argument("--gpus", type=int, nargs="+", default=[8, 64, 512], metavar="N", help="default: 8 64 512")
    paper.add_argument("--gpus-per-node", type=int, default=8, metavar="N", help="of one machine (default: 8)")
    paper.add_argument("--network-gb", type=float, default=50, help="GB/s a GPU between machines (default: 50)")
    paper.add_argument("--latency-us", type=float, default=30, help="microseconds a hop between them (default: 30)")
    paper.set_defaults(plot=None)
    for kind in (steps, inputs, paper):
        kind.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args(argv)
    if args.what == "scaling":
        sizes = (*args.gpus, args.gpus_per_node, args.network_gb)
        if not (all(0 < size < math.inf for size in sizes) and 0 <= args.latency_us < math.inf):
            raise RequestError("--gpus, --gpus-per-node and --network-gb must be positive, --latency-us at least 0")
        return args
    if min(args.steps, args.repeats, args.batch_size, args.image_size) < 1:
        raise RequestError("--steps, --repeats, --batch-size and --image-size must be positive")
    if args.what == "steps":
        require_steps(args)
    return args


def require_steps(args: argparse.Namespace) -> None:
    """Raises RequestError where the options of `steps` do not fit together."""
    if not 0 < args.activation <= 1:
        raise RequestError("--activation must lie in (0, 1]")
    if args.score_resolution and not 0 < args.score_resolution <= args.image_size:
        raise RequestError("--score-resolution must be positive and at most --image-size")
    for pattern in args.only or []:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RequestError(f"--only: {pattern!r} is no regular expression: {error}") from None
    processes = max(args.nproc, launched()[1])
    if args.nproc < 1:
        raise RequestError("--nproc: at least 1")
    if args.batch_size % processes:
        raise RequestError(f"--batch-size: {args.batch_size} is no multiple of {processes} processes")
    if args.single is not None:
        single = read_steps("--single", args.single)
        if single.processes > 1:
            raise RequestError(f"--single: {args.single} is of {single.processes} processes")
        for key in ("model", "image_size"):
            theirs, asked = getattr(single, key), getattr(args, key)
            if theirs not in (None, asked):
                raise RequestError(f"--single: {args.single} is of {key} {theirs}, not {asked}")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    for option, path in (("--json", args.json), ("--plot", args.plot)):
        try:
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise RequestError(f"{option}: cannot write to {path}: {error.strerror}") from None
    if args.what == "steps" and args.nproc > 1 and launched()[1] == 1:
        return launch(Path(__file__), args.nproc, 0, sys.argv[1:] if argv is None else argv)
    work, show = {
        "steps": (benchmark_steps, show_steps),
        "input": (benchmark_input, show_input),
        "scaling": (scaling, show_scaling),
    }[args.what]
    result = work(args)
    if launched()[0] == 0:
        print(show(result))
        write(args.json, result)
        if args.plot:
            plot(args.what, result, args.plot)
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
