"""Write a trained network as a file for other programs, or upload it to the
Hugging Face hub.

    python scripts/export.py --weights results/latest --output model.onnx
    python scripts/export.py --weights RUN --output model.pt2 --images photos/
    python scripts/export.py --weights RUN --push NAME/REPOSITORY

RUN is a weights folder, the folder of a run, a results file, or `latest` in a
results folder. A .onnx file needs the packages onnx and onnxscript. A .pt2 file
is for torch.export.load. Both take any number of pictures, float32
[batch, 3, size, size], RGB from 0 to 1, and normalise them. Their metadata say
the class names and how pictures are prepared. Before the file is written, its
logits are compared with the network's on real pictures: those of --images, or
some of the run's validation set. A .onnx file is compared where onnxruntime is
installed.

--push uploads the weights, config.json and README.md, the model card. It takes
the token HF_TOKEN (.env). A new repository is private. The card leaves the
licence open.

Exit codes: 0 done; 1 the file does not compute what the network does; 2 the
request was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from evaluate import check_evaluation, say
from lab.base.errors import RequestError, one_line
from lab.base.files import user_path, user_text, write_outputs
from lab.base.launch import forget_launch
from lab.config.loading import load_config
from lab.study.cli import (
    OVERRIDES_HELP,
    WEIGHTS_HELP,
    add_import,
    command_parser,
    run_cli,
    take_pictures,
)
from lab.study.finding import Found, config_of, find_run

if TYPE_CHECKING:
    from torch import Tensor

    from lab.data.datasets import ImageDataset
    from lab.outputs.trained import Trained

SUFFIXES = (".onnx", ".pt2")  # see `lab.outputs.export.FORMS`
PICTURES = 8  # that an exported file is compared on


def load(found: Found, imports: Sequence[str] = ()) -> Trained:
    """The network on the CPU, in float32."""
    import torch

    from lab.outputs.trained import folder_settings, load_trained

    settings = {**folder_settings(found.weights), "training": {"device": "cpu"}}
    config = load_config(None, (), json.dumps(settings), check_evaluation, imports)
    return load_trained(found.weights, config, torch.device("cpu"), by_folder=True)


def real_pictures(args: argparse.Namespace, found: Found, trained: Trained) -> Tensor:
    """uint8 [n, 3, size, size], of --images or of the run's validation set."""
    import torch

    from lab.outputs.predictions import find_pictures, read_pictures
    from train_ast import build_validation

    if args.images is not None:
        paths, _ = find_pictures(args.images)
        images = read_pictures(paths[:PICTURES])
    else:
        text = config_of(found, args.imports)
        config = load_config(found.path, args.overrides, text, check_evaluation, args.imports)
        images = some_of(build_validation(config.dataset).dataset)
    return torch.stack([torch.as_tensor(image) for image in trained.prepare(images)])


def some_of(dataset: ImageDataset) -> list[Tensor]:
    """Pictures spread over a data set. Raises RequestError where none of them can be read."""
    import numpy as np

    chosen = np.unique(np.linspace(0, len(dataset) - 1, PICTURES).round().astype(int))
    samples = [dataset.load(index) for index in chosen.tolist()]
    images = [sample.image for sample in samples if sample.image is not None]
    if not images:
        raise RequestError(f"dataset: {samples[0].unreadable[0]}")
    return images


def export(args: argparse.Namespace, found: Found, trained: Trained) -> None:
    from lab.outputs.export import FORMS

    images = real_pictures(args, found, trained)
    checked = FORMS[args.output.suffix.lower()](trained, images)
    write_outputs({args.output: ("--output", checked.data)})
    view = trained.view
    print(
        f"{args.output}: {trained.network.model_config.name}, {len(trained.classes):,} classes, "
        f"{len(checked.data) / 1e6:,.1f} MB\n"
        f"input      images, float32 [batch, 3, {view.size}, {view.size}], RGB from 0 to 1; "
        f"pictures as {view}\n"
        f"output     logits, float32 [batch, {len(trained.classes)}]\n"
        f"checked    on {len(images)} pictures, one by one and together: logits of up to "
        f"{checked.difference.of:.3g} differ by {checked.difference.largest:.1e} at most "
        f"({checked.by})"
    )


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    add = parser.add_argument
    add("--weights", required=True, type=user_text, metavar="RUN", help=WEIGHTS_HELP)
    add(
        "--output",
        type=user_path,
        metavar="FILE",
        help=f"its name ends in {' or '.join(SUFFIXES)}",
    )
    add_import(parser)
    add("--images", nargs="+", metavar="PATH", help="pictures, and folders, to compare on")
    add("--push", type=user_text, metavar="REPO", help="name of a repository on the hub")
    add("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    args = parser.parse_intermixed_args(argv)
    if args.images is not None:  # which takes the overrides after it too
        take_pictures(args)
    if args.output is None and args.push is None:
        raise RequestError("--output: a file to write, or --push: a repository")
    if args.output is not None and args.output.suffix.lower() not in SUFFIXES:
        path = one_line(args.output)
        raise RequestError(f"--output: {path}: its name ends in none of {', '.join(SUFFIXES)}")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    forget_launch()
    found = find_run(args.weights)
    if args.output is not None:
        trained = load(found, args.imports)
        say(trained.remarks)
        export(args, found, trained)
    if args.push is not None:
        from lab.outputs.push import push

        print(f"pushed     {push(found.weights, args.push)}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
