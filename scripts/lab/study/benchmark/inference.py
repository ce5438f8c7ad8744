"""How fast a network predicts: the latency of a picture, and pictures a second in batches."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lab.base.console import Columns, table_line
from lab.base.errors import one_line
from lab.config.loading import Config
from lab.machine.devices import (
    compiled,
    configure_backends,
    environment,
    resolve_device,
    synchronize,
)
from lab.machine.distributed import Dist
from lab.models.building import get_model
from lab.models.network import Network
from lab.study.benchmark.timing import measure, write_json

LARGEST = {"cuda": 2**14, "cpu": 2**6}  # batches that are tried, by device
COLUMNS: Columns = {
    "ms": ("ms", "9.2f"),
    "min": ("ms_min", "9.2f"),
    "max": ("ms_max", "9.2f"),
    "images/s": ("images_per_second", "9,.0f"),
    "GiB": ("peak_gib", "7.2f"),
}


def benchmark_inference(args: argparse.Namespace) -> dict[str, Any]:
    """A row for each batch of 1, 2, 4 and so on pictures, to the largest that fits into the memory
    or that is tried. The pictures are on the device already, as uint8; every forward is waited for.
    """
    config = Config()
    config.model.name = args.model
    config.model.small_stem = args.small_stem
    config.dataset.image_size = args.image_size
    config.training.device = args.device
    config.metrics.base_flop_per_sample = 1.0  # not reported here
    device = resolve_device(config.training)
    configure_backends(True, device)
    model = get_model(config.model, args.classes, args.image_size)
    network = Network(model, config, lambda *_: None, device, Dist())
    forward = compiled(torch.no_grad()(network.predictor()), args.compile)
    rows: dict[str, dict[str, Any]] = {}
    result = {"model": args.model, "image_size": args.image_size, "compile": args.compile}
    result |= {"dtype": str(network.amp_dtype or torch.float32), **environment(device)}
    result |= {"rows": rows, "ended": None}
    batch = 1
    while batch <= (args.largest or LARGEST[device.type]):
        try:
            rows[str(batch)] = time_batch(forward, batch, args, device)
        except RuntimeError as error:  # out of memory, or of what a kernel can count
            if batch == 1:
                raise
            result["ended"] = f"a batch of {batch:,}: {one_line(error, 100)}"
            break
        write_json(args.json, result)
        batch *= 2
    return result


def time_batch(
    forward: Callable[[Tensor], Tensor],
    batch: int,
    args: argparse.Namespace,
    device: torch.device,
) -> dict[str, Any]:
    side = args.image_size
    images = torch.randint(0, 256, (batch, 3, side, side), dtype=torch.uint8).to(device)

    def steps(n: int) -> None:
        for _ in range(n):
            forward(images)
            synchronize(device)

    count = max(1, args.steps // batch)
    row = measure(steps, device, count, args.repeats, Dist())
    return {**row, "images_per_second": 1000 * batch / row["ms"]}


def show_inference(result: Mapping[str, Any]) -> str:
    """The table, and below it the latency of one picture and the fastest batch."""
    rows = result["rows"]
    lines = [f"{'pictures a batch':<18} {table_line(COLUMNS)}"]
    lines += [f"{int(name):<18,} {table_line(COLUMNS, row)}" for name, row in rows.items()]
    if result["ended"] is not None:
        lines.append(f"does not fit: {result['ended']}")
    name, row = max(rows.items(), key=lambda each: each[1]["images_per_second"])
    lines.append(
        f"one picture takes {rows['1']['ms']:.2f} ms; at most {row['images_per_second']:,.0f} "
        f"pictures a second, {int(name):,} at once, in {result['dtype'].removeprefix('torch.')}"
    )
    return "\n".join(lines)
