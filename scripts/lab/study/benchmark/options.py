"""The options of `benchmark.py`, by sub-command."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Sequence
from typing import Any

from lab.base.errors import RequestError, one_line
from lab.base.files import user_path, user_text
from lab.base.launch import launched
from lab.config.imports import resolved
from lab.config.names import unknown_network
from lab.data.cache import MOST_READERS
from lab.study.cli import add_import, command_parser


def parse(description: str, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """The options. Raises RequestError where they do not fit together."""
    parser = command_parser(description)
    kinds = parser.add_subparsers(dest="what", required=True)
    kinds_of_work = (
        (add_steps, check_steps),
        (add_input, check_input),
        (add_epoch, check_epoch),
        (add_scaling, check_scaling),
        (add_inference, check_inference),
    )
    for add, check in kinds_of_work:
        kind = add(kinds)
        kind.add_argument(
            "--json", type=user_path, metavar="FILE", help="write all figures to FILE"
        )
        add_import(kind)
        kind.set_defaults(check=check)
    args = parser.parse_args(argv)
    try:
        args.imports = resolved(args.imports)
    except ValueError as error:
        raise RequestError(f"--import: {one_line(error)}") from None
    args.check(args)
    wrong = () if args.imports or "model" not in args else unknown_network("--model", args.model)
    for complaint in wrong:
        raise RequestError(complaint)
    return args


def add_steps(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser("steps", help="training steps")
    add = parser.add_argument
    add("--model", default="resnet50", help="as model.name (default: resnet50)")
    add("--small-stem", action="store_true", help="as model.small_stem")
    add("--classes", type=int, default=1000, help="default: 1000")
    add("--activation", type=float, default=0.25, help="share of active samples (default: 0.25)")
    add("--score-resolution", type=int, metavar="PX", help="also score at PX pixels")
    add(
        "--compile",
        choices=["default", "reduce-overhead"],
        default="default",
        help="torch.compile mode",
    )
    add("--no-compile", action="store_true", help="leave the compiled rows out")
    add(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="only rows whose name has a match (Python's re)",
    )
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="as training.device")
    add(
        "--nproc",
        type=int,
        default=1,
        metavar="N",
        help="processes, one a GPU, by torchrun (default: 1)",
    )
    add(
        "--single",
        type=user_path,
        metavar="FILE",
        help="JSON of a run in one process: show the speed-up over its rows",
    )
    return add_timed(parser, steps=40)


def add_input(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser("input", help="input pipelines")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    threads = "that read the file of dataset.cache=disk (default: 2 4 8 16)"
    parser.add_argument(
        "--threads", type=int, nargs="+", default=[2, 4, 8, 16], metavar="N", help=threads
    )
    return add_timed(add_folder(parser), steps=20)


def add_epoch(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser("epoch", help="whole epochs of a folder, by kind of cache")
    add = parser.add_argument
    add("--model", default="resnet50", help="as model.name (default: resnet50)")
    add(
        "--activations",
        type=float,
        nargs="+",
        default=[0.5, 0.25],
        metavar="SHARE",
        help="default: 0.5 0.25",
    )
    add(
        "--kinds",
        nargs="+",
        choices=["none", "disk", "device"],
        default=["disk", "none"],
        help="as dataset.cache",
    )
    add(
        "--only",
        nargs="+",
        metavar="PATTERN",
        help="only ways to train whose name has a match (Python's re)",
    )
    add(
        "--workers",
        type=int,
        help=f"as training.num_workers; of disk: the threads, at most {MOST_READERS}",
    )
    add(
        "--compile",
        choices=["off", "default", "reduce-overhead"],
        default="default",
        help="torch.compile mode",
    )
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="as training.device")
    add("--epoch-steps", type=int, metavar="N", help="end epochs from a cache after N steps")
    add(
        "--stream-steps",
        type=int,
        metavar="N",
        help="end streamed epochs after N steps; seconds are of the whole",
    )
    parser.set_defaults(threads=[1])
    repeats = "epochs, after one (streamed: two steps) that is not timed (default: 2, streamed 1)"
    return add_timed(add_folder(parser), steps=40, repeats=None, repeated=repeats)


def add_folder(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The options of where pictures are."""
    parser.add_argument(
        "--folder", required=True, type=user_text, help="of classes, each a folder of images"
    )
    parser.add_argument(
        "--cache-folder",
        default="data/cache",
        type=user_text,
        help="as dataset.cache_folder (default: data/cache)",
    )
    parser.add_argument(
        "--cache-resolution", type=int, metavar="PX", help="as dataset.cache_resolution"
    )
    return parser


def add_timed(
    parser: argparse.ArgumentParser,
    steps: int,
    repeats: int | None = 5,
    repeated: str = "default: 5",
) -> argparse.ArgumentParser:
    """The options of what is timed."""
    add = parser.add_argument
    add("--image-size", type=int, default=224, help="pixels (default: 224)")
    add(
        "--batch-size",
        type=int,
        default=256,
        help="samples, of all processes together (default: 256)",
    )
    add("--steps", type=int, default=steps, help=f"timed batches a repeat (default: {steps})")
    add("--repeats", type=int, default=repeats, help=repeated)
    add("--plot", type=user_path, metavar="FILE", help="draw a bar chart (png, svg, pdf)")
    return parser


def add_scaling(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser("scaling", help="steps on more GPUs, on paper")
    parser.set_defaults(plot=None)
    add = parser.add_argument
    add(
        "--steps",
        type=user_path,
        required=True,
        metavar="FILE",
        help="JSON of a run of steps --nproc",
    )
    add("--gpus", type=int, nargs="+", default=[8, 64, 512], metavar="N", help="default: 8 64 512")
    add(
        "--gpus-per-node", type=int, default=8, metavar="N", help="GPUs of one machine (default: 8)"
    )
    add("--network-gb", type=float, default=50, help="GB/s a GPU between machines (default: 50)")
    add(
        "--latency-us",
        type=float,
        default=30,
        help="microseconds a hop between machines (default: 30)",
    )
    return parser


def add_inference(kinds: Any) -> argparse.ArgumentParser:
    parser = kinds.add_parser("inference", help="predictions, one by one and in batches")
    parser.set_defaults(plot=None)
    add = parser.add_argument
    add("--model", default="resnet50", help="as model.name (default: resnet50)")
    add("--small-stem", action="store_true", help="as model.small_stem")
    add("--classes", type=int, default=1000, help="default: 1000")
    add("--image-size", type=int, default=224, help="pixels (default: 224)")
    add("--compile", choices=["off", "default", "reduce-overhead"], default="off", help="of torch")
    add("--device", choices=["auto", "cuda", "cpu"], default="auto", help="as training.device")
    add("--largest", type=int, metavar="N", help="batch to try (default: 16384, on a CPU 64)")
    add("--steps", type=int, default=100, help="timed pictures a repeat, or a batch (default: 100)")
    add("--repeats", type=int, default=5, help="default: 5")
    return parser


def check_inference(args: argparse.Namespace) -> None:
    sizes = (args.largest or 1, args.steps, args.repeats, args.image_size, args.classes - 1)
    if args.largest == 0 or min(sizes) < 1:
        raise RequestError(
            "--largest, --steps, --repeats and --image-size must be positive, --classes at least 2"
        )


def check_timed(args: argparse.Namespace) -> None:
    repeats = 1 if args.repeats is None else args.repeats
    if min(args.steps, repeats, args.batch_size, args.image_size) < 1:
        raise RequestError("--steps, --repeats, --batch-size and --image-size must be positive")


def check_patterns(args: argparse.Namespace) -> None:
    for pattern in args.only or []:
        try:
            re.compile(pattern)
        except re.error as error:
            raise RequestError(f"--only: {pattern!r} is no regular expression: {error}") from None


def check_input(args: argparse.Namespace) -> None:
    check_timed(args)
    limits = (getattr(args, name, None) for name in ("epoch_steps", "stream_steps"))
    if min(*args.threads, args.cache_resolution or 1, *(limit or 1 for limit in limits)) < 1:
        raise RequestError(
            "--threads, --cache-resolution, --epoch-steps and --stream-steps must be positive"
        )
    if (args.workers or 0) < 0:
        raise RequestError("--workers: at least 0")
    if not all(0 < share <= 1 for share in getattr(args, "activations", ())):
        raise RequestError("--activations must lie in (0, 1]")


def check_epoch(args: argparse.Namespace) -> None:
    check_input(args)
    check_patterns(args)


def check_steps(args: argparse.Namespace) -> None:
    """Raises RequestError where the options do not fit together. Reads the file to compare with, if
    there is one.
    """
    check_timed(args)
    if not 0 < args.activation <= 1:
        raise RequestError("--activation must lie in (0, 1]")
    if args.score_resolution and not 0 < args.score_resolution <= args.image_size:
        raise RequestError("--score-resolution must be positive and at most --image-size")
    check_patterns(args)
    processes = max(args.nproc, launched()[1])
    if args.nproc < 1:
        raise RequestError("--nproc: at least 1")
    if args.batch_size % processes:
        raise RequestError(
            f"--batch-size: {args.batch_size} is no multiple of {processes} processes"
        )
    args.speeds = {}
    if args.single is not None:
        from lab.study.benchmark.scaling import read_single  # imports torch

        args.speeds = read_single(args.single, args.model, args.image_size)


def check_scaling(args: argparse.Namespace) -> None:
    sizes = (*args.gpus, args.gpus_per_node, args.network_gb)
    if not (all(0 < size < math.inf for size in sizes) and 0 <= args.latency_us < math.inf):
        raise RequestError(
            "--gpus, --gpus-per-node and --network-gb must be positive, --latency-us at least 0"
        )
