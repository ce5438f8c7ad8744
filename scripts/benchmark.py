"""Measure what a training step costs, every variant in one run on one machine.

    python scripts/benchmark.py steps --model resnet50 --image-size 224 --batch-size 256
    python scripts/benchmark.py steps --model test_resnet --image-size 32 --batch-size 32 --steps 4   # on a CPU

Images are random and resident, so that nothing but the step is timed. Every figure is per loaded batch: the median
over the repeats, with the smallest and largest. Our variants run the lab's own `train_one_epoch`; the others are:
  published pattern     the masked loss of the published Adaptive Sparse Training code: the whole batch forward and
                        backward, a second forward for the training accuracy, float16, contiguous memory, host reads
  ... in our settings   the same with bfloat16, channels_last, a fused optimizer and no host reads
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice, repeat
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from train_ast import (
    Config,
    RequestError,
    Run,
    Stop,
    configure_backends,
    environment,
    get_model,
    resolve_device,
    run_cli,
    significance,
    synchronize,
    train_one_epoch,
)

Step = Callable[[int], None]  # runs so many steps


def lab_steps(
    config: Config, images: Tensor, labels: Tensor, mode: str, pack: bool = True, compiled: bool = False
) -> tuple[Step, Run]:
    """The lab's own epoch loop over the same resident batch, in `mode`."""
    config = config.model_copy(deep=True)
    config.ast.mode, config.ast.pack, config.training.compile = mode, pack, "default" if compiled else "off"
    configure_backends(config.ast, images.device)
    model = get_model(config.model, config.dataset.num_classes, config.dataset.image_size)
    run = Run(config, model, images.device, planned_steps=10**6)
    run.start_epoch(config.ast.warmup_epochs)

    def steps(n: int) -> None:
        run.step = 0
        train_one_epoch(run, islice(repeat((images, labels)), n), n, Stop())

    return steps, run


def published_steps(config: Config, images: Tensor, labels: Tensor, ours: bool) -> Step:
    """Masked loss, full backward, extra forward for the accuracy: the pattern of the published implementation."""
    device = images.device
    model = get_model(config.model, config.dataset.num_classes, config.dataset.image_size).to(device).train()
    configure_backends(config.ast.model_copy(update={"mode": "dense"}), device)  # every batch of one shape
    layout = torch.channels_last if ours else torch.contiguous_format
    model = model.to(memory_format=layout)
    dtype = torch.bfloat16 if ours or device.type == "cpu" else torch.float16
    fused = True if ours and device.type == "cuda" else None
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    pixels = (images.float() / 255).to(memory_format=layout)
    keep = round(config.ast.target_activation * len(labels))

    def steps(n: int) -> None:
        for _ in range(n):
            with torch.autocast(device.type, dtype):
                logits = model(pixels)
                losses = F.cross_entropy(logits, labels, reduction="none")
            scores = significance(logits.detach(), labels, 1.0)
            mask = (scores >= scores.topk(keep).values[-1]).float()
            scaler.scale((losses * mask).sum() / mask.sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad(), torch.autocast(device.type, dtype):
                hits = (model(pixels).argmax(-1) == labels).sum()
            if not ours:
                hits.item(), mask.mean().item(), losses.mean().item()

    return steps


def measure(steps: Step, device: torch.device, count: int, repeats: int) -> dict[str, float | None]:
    """Milliseconds a step (median, smallest, largest over `repeats` times `count` steps) and peak memory in GiB."""
    steps(max(3, count // 2))  # warm-up: autotuning, allocation, the controller's first moves
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        steps(count)
        synchronize(device)
        times.append(1000 * (time.perf_counter() - started) / count)
    peak = torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None
    return {"ms": statistics.median(times), "ms_min": min(times), "ms_max": max(times), "peak_gib": peak}


def benchmark_steps(args: argparse.Namespace) -> dict[str, Any]:
    """All step variants for one model, resolution, batch size and activation."""
    config = Config()
    config.model.name, config.model.small_stem = args.model, args.small_stem
    config.dataset.num_classes, config.dataset.image_size = args.classes, args.image_size
    config.ast.target_activation, config.ast.kp, config.ast.ki = args.activation, 1.0, 0.05
    config.training.batch_size, config.training.lr = args.batch_size, 0.01
    config.metrics.base_flop_per_sample = 1.0  # not reported here
    device = resolve_device(config.training)
    torch.manual_seed(0)
    images = torch.randint(0, 256, (args.batch_size, 3, args.image_size, args.image_size), dtype=torch.uint8).to(device)
    labels = torch.randint(0, args.classes, (args.batch_size,)).to(device)
    lab = partial(lab_steps, config, images, labels)
    sparse = f"batch-scored loop, a={args.activation:g}"
    variants: dict[str, Callable[[], Any]] = {
        "dense loop": lambda: lab("dense"),
        sparse: lambda: lab("ast"),
        "  the same, not packed": lambda: lab("ast", pack=False),
        "dense loop, compiled": lambda: lab("dense", compiled=True),
        f"{sparse}, compiled": lambda: lab("ast", compiled=True),
        "published pattern": lambda: published_steps(config, images, labels, ours=False),
        "  in our settings": lambda: published_steps(config, images, labels, ours=True),
    }
    if args.no_compile:
        variants = {name: build for name, build in variants.items() if "compiled" not in name}
    rows = {}
    for name, build in tqdm(variants.items(), unit="variant", disable=None):
        built = build()
        steps, run = built if isinstance(built, tuple) else (built, None)
        rows[name] = measure(steps, device, args.steps, args.repeats)
        if run is not None and run.activations:
            rows[name]["activation"] = statistics.mean(run.activations[-args.steps * args.repeats :])
        del steps, run, built
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return {"command": " ".join(["scripts/benchmark.py", *sys.argv[1:]]), "rows": rows, **environment(device)}


def show(result: dict[str, Any]) -> str:
    """The table, every time also as a multiple of the first row's."""
    first = next(iter(result["rows"].values()))["ms"]
    lines = [f"{'per loaded batch':<36} {'ms':>9} {'min':>9} {'max':>9} {'ratio':>7} {'active':>7} {'GiB':>7}"]
    for name, row in result["rows"].items():
        active = "-" if row.get("activation") is None else f"{row['activation']:.3f}"
        peak = "-" if row["peak_gib"] is None else f"{row['peak_gib']:.2f}"
        times = f"{row['ms']:9.2f} {row['ms_min']:9.2f} {row['ms_max']:9.2f}"
        lines.append(f"{name:<36} {times} {row['ms'] / first:7.3f} {active:>7} {peak:>7}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="what", required=True).add_parser("steps", help="training steps")
    steps.add_argument("--model", default="resnet50", help="as model.name (default: resnet50)")
    steps.add_argument("--small-stem", action="store_true", help="as model.small_stem")
    steps.add_argument("--classes", type=int, default=1000, help="default: 1000")
    steps.add_argument("--image-size", type=int, default=224, help="pixels (default: 224)")
    steps.add_argument("--batch-size", type=int, default=256, help="samples (default: 256)")
    steps.add_argument("--activation", type=float, default=0.25, help="share of active samples (default: 0.25)")
    steps.add_argument("--steps", type=int, default=40, help="timed steps a repeat (default: 40)")
    steps.add_argument("--repeats", type=int, default=5, help="default: 5")
    steps.add_argument("--no-compile", action="store_true", help="leave the compiled variants out")
    steps.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args(argv)
    if min(args.steps, args.repeats, args.batch_size, args.image_size) < 1 or not 0 < args.activation <= 1:
        raise RequestError("steps, repeats, batch size and image size must be positive, the activation in (0, 1]")
    result = benchmark_steps(args)
    print(show(result))
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
