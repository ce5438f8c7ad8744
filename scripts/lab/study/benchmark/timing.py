"""Time training loops, and show what was found.

A loop is timed over one resident batch of random images, so that nothing but its steps is measured.
Every figure is per considered batch: a loop that trains on a quarter of the samples makes a quarter
as many steps for it.

With several processes, one a GPU, each has its part of the batch. The time is the slowest one's,
joules are summed, memory is the largest. A loop that goes through `TimedDist` makes one more pass,
in which every collective is timed by itself. `collectives` is their share of a step: an upper
bound, because nothing overlaps while they are timed, and because waiting for a slower process
counts too.
"""

from __future__ import annotations

import json
import math
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from lab.base.console import Columns, progress_bar, table_line
from lab.base.files import replace_text
from lab.base.launch import launched
from lab.base.plotting import import_matplotlib, plain_style
from lab.config.loading import Config
from lab.machine.devices import synchronize
from lab.machine.distributed import Dist
from lab.machine.meters import EnergyMeter


class TimedDist(Dist):
    """A Dist that times each of its collectives while it is watched.

    The device is synchronised before and after each call, so that nothing overlaps. A process that
    waits for a slower one counts the waiting. Calls are grouped by what a step needs them for.
    """

    device: torch.device | None = None  # None: not watched

    def watch(self, device: torch.device) -> None:
        self.device = device
        self.calls = {}

    def watched(self) -> dict[str, list[tuple[float, int]]]:
        """(milliseconds, bytes of this process's tensor) of every call since `watch`, by kind. Ends
        the watching.
        """
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

    def all_gather_columns(self, facts: Tensor, size: int) -> Tensor:
        filled = len(facts) * size * facts.element_size()
        return self._timed("scores", filled, partial(super().all_gather_columns, facts, size))

    def all_gather_async(self, values: Sequence[float]) -> Callable[[], np.ndarray]:
        later = super().all_gather_async
        if self.device is None:
            return later(values)
        rows = self._timed("agreement", 8 * len(values), lambda: later(values)())  # float64
        return lambda: rows

    def all_to_all(self, tensor: Tensor, moves: np.ndarray) -> Tensor:
        return self._timed("evening out", tensor.nbytes, partial(super().all_to_all, tensor, moves))


Step = Callable[[int], None]  # trains on so many considered batches


class Loop(NamedTuple):
    """A training loop, ready to be timed."""

    steps: Step
    # mean share of active samples so far; None: not measured
    activation: Callable[[], float | None] = lambda: None
    # what its FLOPs are at that share, of a dense step's; None: not known
    limit: Callable[[], float | None] = lambda: None


class Workload(NamedTuple):
    """What every loop is built for, and from: one batch on the device, the config, and functions of
    the lab.
    """

    config: Config
    images: Tensor  # uint8 [this process's part of the batch, 3, H, W]
    labels: Tensor  # int64, as many
    dist: Dist
    score_resolution: int | None  # pixels
    get_model: Callable[..., nn.Module]
    significance: Callable[[Tensor, Tensor, float], Tensor]


class StepRow(NamedTuple):
    """A row of the table of `steps`: how to build its loop, and when it applies."""

    name: str  # as printed; {activation} and {score_resolution} are filled in
    build: Callable[[Workload, str], Loop]  # str: the mode of torch.compile, or "off"
    compiles: bool = True  # timed compiled too
    one_process: bool = False  # left out with several processes
    needs_score_resolution: bool = False  # left out without --score-resolution


def random_workload(config: Config, device: torch.device, dist: Dist, **rest: Any) -> Workload:
    """A Workload of random pixels and labels. `rest`: its other fields."""
    torch.manual_seed(0)
    side = config.dataset.image_size
    batch_size = config.training.batch_size
    images = torch.randint(0, 256, (batch_size, 3, side, side), dtype=torch.uint8)
    labels = torch.randint(0, config.dataset.num_classes, (batch_size,))
    return Workload(
        config, dist.shard(images).to(device), dist.shard(labels).to(device), dist, **rest
    )


def choose_loops(
    table: Sequence[StepRow],
    workload: Workload,
    modes: Sequence[str],
    patterns: Sequence[str] | None,
) -> dict[str, Callable[[], Loop]]:
    """The rows that apply in each mode of torch.compile and whose name has a match of a pattern
    (None: all of them): by printed name, as functions that build the loop.
    """
    found = {}
    fields = {
        "activation": workload.config.ast.target_activation,
        "score_resolution": workload.score_resolution,
    }
    for mode in modes:
        tail = {"off": "", "default": ", compiled"}.get(mode, f", {mode}")
        for row in table:
            applies = row.compiles or mode == "off"
            applies &= workload.dist.world == 1 or not row.one_process
            applies &= bool(workload.score_resolution) or not row.needs_score_resolution
            name = row.name.format(**fields) + tail
            if applies and (not patterns or any(re.search(pattern, name) for pattern in patterns)):
                found[name] = partial(row.build, workload, mode)
    return found


def time_loops(
    loops: Mapping[str, Callable[[], Loop]], workload: Workload, steps: int, repeats: int
) -> Iterator[tuple[str, dict[str, Any]]]:
    """(name, figures) of each loop. One is built after the other, and its memory is freed before
    the next one.
    """
    for name, build in progress_bar(loops.items(), unit="row"):
        yield name, time_loop(build(), workload, steps, repeats)
        # dynamo would compile no more after eight functions of the same code
        torch.compiler.reset()
        if workload.images.device.type == "cuda":
            torch.cuda.empty_cache()


def time_loop(loop: Loop, workload: Workload, count: int, repeats: int) -> dict[str, Any]:
    """The figures of one loop, over `repeats` times `count` batches."""
    device = workload.images.device
    dist = workload.dist
    batch_size = workload.config.training.batch_size
    row = measure(loop.steps, device, count, repeats, dist)
    row["images_per_second"] = 1000 * batch_size / row["ms"]
    row["joules_per_sample"] = None if row["joules"] is None else row["joules"] / batch_size
    if (activation := loop.activation()) is not None:
        row["activation"] = activation
    row["limit"] = loop.limit()
    if dist.world > 1 and (collectives := time_collectives(loop.steps, device, count, dist)):
        row["collectives"] = collectives
        row["collective_share"] = (
            sum(each["calls"] * each["ms"] for each in collectives.values()) / row["ms"]
        )
    return row


def measure(
    steps: Step, device: torch.device, count: int, repeats: int, dist: Dist
) -> dict[str, float | None]:
    """Milliseconds a batch (median, smallest, largest of `repeats` times `count`), peak GiB and
    joules a batch.

    Several processes start each repeat together, and the slowest one's time counts.
    """
    steps(max(4, count // 2))  # warm-up: autotuning, allocation, the controller's first moves
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    meter = EnergyMeter(device)
    times = []
    drawn = meter.read_kj()
    for _ in range(repeats):
        synchronize(device)
        dist.all_gather([0])  # wait for all processes
        started = time.perf_counter()
        steps(count)
        synchronize(device)
        times.append(1000 * dist.all_gather([time.perf_counter() - started]).max() / count)
    joules = None if drawn is None else 1000 * (meter.read_kj() - drawn) / (count * repeats)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    row = {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times)}
    return {
        **row,
        "peak_gib": over_processes(dist, peak, np.max),
        "joules": over_processes(dist, joules, np.sum),
    }


def over_processes(
    dist: Dist, value: float | None, merge: Callable[[np.ndarray], float]
) -> float | None:
    """One number out of every process's; None where one has none."""
    found = float(merge(dist.all_gather([math.nan if value is None else value])))
    return None if math.isnan(found) else found


def time_collectives(
    steps: Step, device: torch.device, count: int, dist: TimedDist
) -> dict[str, dict[str, float]]:
    """The collectives of one pass over `count` considered batches, by kind.

    `calls`: a considered batch; an epoch begins with one agreement more. `bytes`: of a process's
    own tensor. `ms`: of a call, the mean over calls and processes, their waiting for each other
    included. `transfer_ms`: of a call, without waiting; the median over calls of the time of the
    process that arrived last.
    """
    dist.watch(device)
    steps(count)
    found = {}
    for kind, calls in dist.watched().items():
        times, sizes = (dist.all_gather(each) for each in zip(*calls, strict=True))
        found[kind] = {
            "calls": len(calls) / count,
            "bytes": float(sizes.mean()),
            "ms": float(times.mean()),
        }
        found[kind]["transfer_ms"] = float(np.median(times.min(0)))
    return found


def write_json(path: Path | None, result: Mapping[str, Any]) -> None:
    """The figures as JSON, with the command they came from. Of several processes the first one
    writes.
    """
    if path is not None and launched()[0] == 0:
        result = {"command": shlex.join(["scripts/benchmark.py", *sys.argv[1:]]), **result}
        replace_text(path, json.dumps(result, indent=2) + "\n")


STEP_COLUMNS: Columns = {
    "ms": ("ms", "9.2f"),
    "min": ("ms_min", "9.2f"),
    "max": ("ms_max", "9.2f"),
    "ratio": ("ratio", "7.3f"),  # over the fastest dense loop
    "limit": ("limit", "7.3f"),  # of that ratio, by the FLOPs
    "images/s": ("images_per_second", "9,.0f"),
    "active": ("activation", "7.3f"),
    "GiB": ("peak_gib", "7.2f"),
    "J/image": ("joules_per_sample", "9.4f"),
}


def show_steps(result: Mapping[str, Any]) -> str:
    """The table of the steps: with several processes the share of collectives too, and with a file
    of one process to compare with the speed-up over it. Below it a line for each break-even
    activation.
    """
    columns = dict(STEP_COLUMNS)
    if result["processes"] > 1:
        columns["collectives"] = ("collective_share", "11.3f")
    if any("speed_up" in row for row in result["rows"].values()):
        columns["speed-up"] = ("speed_up", "8.2f")
    lines = [f"{'per considered batch':<44} {table_line(columns)}"]
    lines += [f"{name:<44} {table_line(columns, row)}" for name, row in result["rows"].items()]
    for name, share in result["break_even"].items():
        lines.append(f"{name}: faster than dense below an activation of {share:.2f}")
    return "\n".join(lines)


def plot(what: str, result: Mapping[str, Any], path: Path) -> None:
    """Bars of milliseconds a batch (`what` is steps), or of images a second (input), with their
    spread.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    value, low, high = (
        ("ms", "ms_min", "ms_max")
        if what == "steps"
        else ("images_per_second", "lowest", "highest")
    )
    names = list(result["rows"])
    rows = list(result["rows"].values())
    values = np.array([row[value] for row in rows])
    spread = np.abs(
        np.array([[row.get(each, row[value]) for row in rows] for each in (low, high)]) - values
    )
    with plain_style({}):
        figure = Figure(figsize=(9, 0.6 + 0.32 * len(rows)), layout="constrained")
        axes = figure.subplots()
        ours = [
            name.startswith((" ", "dense", "batch", "random", "stream"))
            and "our settings" not in name
            for name in names
        ]
        axes.barh(
            names,
            values,
            xerr=spread,
            color=["#0072b2" if mine else "#999999" for mine in ours],
            ecolor="#333333",
        )
        for name, number in zip(names, values, strict=True):
            axes.annotate(f" {number:,.1f}", (number, name), va="center", fontsize=8)
        axes.invert_yaxis()
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_xlabel("milliseconds a considered batch" if what == "steps" else "images a second")
        figure.savefig(path)
