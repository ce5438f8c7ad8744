"""Evaluate the weights of a run on a validation set, or ask them about single pictures.

    python scripts/evaluate.py --weights FOLDER --config configs/digits_smoke.yaml
    python scripts/evaluate.py --weights FOLDER --config CONFIG dataset.val_dir=other
    python scripts/evaluate.py --weights FOLDER --images photo.jpg pictures/

The first two print accuracy, top-5 accuracy, the accuracy of each class, the confusion matrix and
the calibration error (expected calibration error, 15 bins, Guo et al. 2017). With --output-dir they
also write evaluation.json and evaluation.png. The validation set is that of the config, prepared as
while training; the network and its normalisation are those of the folder. --images prints the
likeliest classes of every picture.

A weights folder is timm's local-dir form. For every model of timm, and for resnet18 and resnet50:
    model = timm.create_model("local-dir:FOLDER", pretrained=True)
torchvision's resnet18, resnet50 and vit_b_16, and model.small_stem:
    facts = json.load(open("FOLDER/config.json"))
    weights = safetensors.torch.load_file("FOLDER/model.safetensors")
    model = torchvision.models.get_model(
        facts["architecture"], num_classes=facts["num_classes"], **facts["model_args"]
    )
    if facts["small_stem"]:
        model.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)
        model.maxpool = torch.nn.Identity()
    model.load_state_dict(weights)

Exit codes: 0 done; 2 the request was wrong.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lab.base.errors import RequestError, one_line
from lab.base.files import write_outputs
from lab.base.launch import forget_launch
from lab.base.streams import print_progress
from lab.config.loading import Config
from lab.config.sections import TrainingConfig
from lab.data.datasets import ReadErrors
from lab.data.loading import device_batches
from lab.machine.devices import configure_backends, resolve_device
from lab.machine.distributed import Dist
from lab.machine.workers import ending_workers
from lab.outputs.evaluation import (
    Trained,
    class_numbers,
    draw,
    find_pictures,
    load_trained,
    measure,
    predict,
    table,
    top_predictions,
)
from lab.study.cli import OVERRIDES_HELP, command_parser, run_cli
from train_ast import build_splits, build_val_loader, load_config


def evaluate(trained: Trained, config: Config) -> dict[str, Any]:
    """Every figure of the weights on the validation set of `config`: see
    `lab.outputs.evaluation.measure`.
    """
    device = trained.network.device
    val = build_splits(config.dataset)["val"]
    numbers = class_numbers(trained, val.dataset.classes)
    errors = ReadErrors(config.dataset.max_bad_images)
    with ending_workers():
        found = predict(
            trained.network,
            device_batches(build_val_loader(val, config, device, Dist()), device, errors),
        )
    return measure(found._replace(labels=numbers[found.labels]), trained.classes)


def main(argv: Sequence[str] | None = None) -> int:
    parser = command_parser(__doc__, config_help=True)
    parser.add_argument(
        "--weights", required=True, metavar="FOLDER", help="the weights folder of a run"
    )
    parser.add_argument(
        "--config", metavar="FILE", help="YAML or JSON config; with --images it may be left out"
    )
    parser.add_argument(
        "--images", nargs="+", type=Path, metavar="PATH", help="pictures, and folders of pictures"
    )
    parser.add_argument(
        "--top",
        type=int,
        default=3,
        metavar="N",
        help="with --images: classes a picture, default: 3",
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="write evaluation.json and evaluation.png there",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    args = parser.parse_intermixed_args(argv)
    forget_launch()
    if args.config is None and args.images is None:
        raise RequestError(
            "--config: needed for the validation set; or --images for single pictures"
        )
    if args.top < 1:
        raise RequestError("--top: at least 1")
    config = load_config(args.config, args.overrides) if args.config or args.overrides else None
    device = resolve_device(TrainingConfig() if config is None else config.training)
    configure_backends(True, device)
    trained = load_trained(args.weights, config, device)
    if args.images is not None:
        for path, classes in top_predictions(trained, find_pictures(args.images), args.top):
            print(
                f"{path}: "
                + ", ".join(f"{one_line(name, 60)} {100 * share:.1f} %" for name, share in classes)
            )
        return 0
    figures = evaluate(trained, config)
    text = {"weights": args.weights, **figures, "config": config.model_dump()}
    print(table(figures))
    if args.output_dir is not None:
        files = {
            "evaluation.json": (json.dumps(text) + "\n").encode(),
            "evaluation.png": draw(figures),
        }
        write_outputs(
            {args.output_dir / name: ("--output-dir", content) for name, content in files.items()}
        )
        print_progress(f"evaluation: {args.output_dir / 'evaluation.json'} and evaluation.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
