"""Evaluate the weights of a run on a validation set, or ask them about single pictures.

    python scripts/evaluate.py --weights FOLDER --config configs/digits_smoke.yaml
    python scripts/evaluate.py --weights FOLDER --config CONFIG dataset.val_dir=other
    python scripts/evaluate.py --weights FOLDER --images photo.jpg pictures/

The first two print accuracy, top-5 accuracy, the accuracy of each class, the confusion matrix and
the calibration error (expected calibration error, 15 bins, Guo et al. 2017). With --output-dir they
also write evaluation.json and evaluation.png. The validation set is that of the config, prepared as
while training; the network and its normalisation are those of the folder. --images prints the
likeliest classes of every picture, prepared as the folder says, or as --config or overrides do;
with --output-dir it also writes predictions.json. What one would not expect is said on stderr.

FOLDER may also be of timm's save_for_hf. A weights folder is timm's local-dir form. For every model
of timm, and for a resnet18 or resnet50 without small stem:
    model = timm.create_model("local-dir:FOLDER", pretrained=True)
For torchvision's resnet18, resnet50 and vit_b_16, and (timm has none) model.small_stem:
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

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lab.base.errors import RequestError
from lab.base.files import user_path, user_text, write_outputs
from lab.base.launch import forget_launch
from lab.base.streams import print_progress
from lab.config.grid import is_override
from lab.config.loading import Config, load_config
from lab.study.cli import OVERRIDES_HELP, command_parser, run_cli
from run_experiment import check_config

if TYPE_CHECKING:
    from lab.outputs.evaluation import Trained

TOP = 3  # classes of a picture that are printed


def evaluate(trained: Trained, config: Config) -> dict[str, Any]:
    """Every figure of the weights on the validation set of `config`: see
    `lab.outputs.evaluation.measure`; and the pictures that could not be read.
    """
    from lab.data.datasets import ReadErrors
    from lab.data.loading import device_batches
    from lab.machine.distributed import Dist
    from lab.machine.workers import ending_workers
    from lab.outputs.evaluation import class_numbers, measure, predict
    from train_ast import build_val_loader, build_validation

    device = trained.network.device
    val = build_validation(config.dataset)
    numbers = class_numbers(trained, val.dataset.classes)
    errors = ReadErrors(config.dataset.max_bad_images)
    with ending_workers():
        found = predict(
            trained.network,
            device_batches(build_val_loader(val, config, device, Dist()), device, errors),
        )
    figures = measure(found._replace(labels=numbers[found.labels]), trained.classes)
    return {**figures, "bad_images": errors.found}


def ask(trained: Trained, args: argparse.Namespace, allowed: int) -> int:
    """Print what the network says of pictures, and write it where that is asked for.

    allowed: how many may be unreadable. Raises RequestError naming the first one beyond.
    """
    from lab.outputs.evaluation import find_pictures, guesses

    paths, remarks = find_pictures(args.images)
    say(remarks)
    found = guesses(trained, paths, args.top or TOP)
    show = print
    if args.output_dir is not None:
        show = print_progress
        found = list(found)
        rows = [guess._asdict() | {"path": str(guess.path)} for guess in found]
        write(args, {"predictions.json": {"weights": args.weights, "pictures": rows}})
    bad = []
    for guess in found:
        if guess.problem is None:
            show(str(guess))
        else:
            bad.append(guess)
    say(map(str, bad[:allowed]))
    if len(bad) > allowed:
        more = f" (and {len(bad) - allowed - 1} more)" if len(bad) > allowed + 1 else ""
        raise RequestError(f"--images: {bad[allowed]}{more}")
    return 0


def load(args: argparse.Namespace) -> tuple[Config, bool]:
    """(the config, whether pictures are prepared as the weights folder says). Without --config the
    overrides are laid over what the folder says.

    Says so where an override is of the network: that is the folder's.
    """
    keys = {override.partition("=")[0] for override in args.overrides}
    own = [key for key in sorted(keys) if key.startswith("model.")]
    say(f"{key} is not used: the network is the one of --weights" for key in own)
    if args.config is not None:
        return load_config(args.config, args.overrides, check=check_evaluation), False
    from lab.outputs.evaluation import folder_settings

    text = json.dumps(folder_settings(args.weights))
    config = load_config(None, args.overrides, text, check_evaluation)
    return config, not keys & {"dataset.image_size", "dataset.augment", "dataset.type"}


def check_evaluation(config: Config, given: Sequence[str] = ()) -> None:
    """`check_config`, but for the training set, which need not be there."""
    dataset = config.dataset
    data = dataset.model_copy(update={"train_dir": dataset.train_dir or dataset.val_dir})
    check_config(config.model_copy(update={"dataset": data}), given)


def say(lines: Iterable[str]) -> None:
    """Print what is not the command's output."""
    for line in lines:
        print(f"note: {line}", file=sys.stderr)


def write(args: argparse.Namespace, contents: Mapping[str, Any]) -> None:
    """Write files into --output-dir, all or none: bytes as they are, and the rest as JSON."""
    files = {
        args.output_dir / name: (
            "--output-dir",
            content
            if isinstance(content, bytes)
            else (json.dumps(content, allow_nan=False) + "\n").encode(),
        )
        for name, content in contents.items()
    }
    write_outputs(files)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, config_help=True)
    parser.add_argument(
        "--weights",
        required=True,
        type=user_text,
        metavar="FOLDER",
        help="the weights folder of a run",
    )
    parser.add_argument(
        "--config",
        type=user_text,
        metavar="FILE",
        help="YAML or JSON; with --images it may be left out",
    )
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="pictures, and folders of pictures"
    )
    parser.add_argument(
        "--top", type=int, metavar="N", help=f"with --images: classes a picture, default: {TOP}"
    )
    parser.add_argument(
        "--output-dir",
        type=user_path,
        metavar="DIR",
        help="write what was found there as files",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    args = parser.parse_intermixed_args(argv)
    if args.config is None and args.images is None:
        raise RequestError(
            "--config: needed for the validation set; or --images for single pictures"
        )
    if args.images is not None:  # which takes the overrides after it too
        args.overrides += [text for text in args.images if is_override(text)]
        args.images = [user_path(text) for text in args.images if not is_override(text)]
    elif args.top is not None:
        raise RequestError("--top: only with --images")
    if args.top is not None and args.top < 1:
        raise RequestError("--top: at least 1")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    forget_launch()
    config, by_folder = load(args)
    from lab.machine.devices import configure_backends, resolve_device
    from lab.outputs.evaluation import draw, load_trained, table

    device = resolve_device(config.training)
    configure_backends(True, device)
    trained = load_trained(args.weights, config, device, by_folder)
    say(trained.remarks)
    if args.images is not None:
        return ask(trained, args, config.dataset.max_bad_images)
    figures = evaluate(trained, config)
    if args.output_dir is None:
        print(table(figures))
        return 0
    text = {"weights": args.weights, **figures, "config": config.model_dump()}
    write(args, {"evaluation.json": text, "evaluation.png": draw(figures)})
    print_progress(table(figures))
    print_progress(f"evaluation: {args.output_dir / 'evaluation.json'} and evaluation.png")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
