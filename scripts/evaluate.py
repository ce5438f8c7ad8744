"""Evaluate the weights of a run on a validation set, or ask them about pictures.

    python scripts/evaluate.py --weights results/latest
    python scripts/evaluate.py --weights RUN --predictions wrong.csv \\
        dataset.val_dir=other
    python scripts/evaluate.py --weights RUN --images photo.jpg pictures/

RUN is a weights folder (also of timm's save_for_hf), the folder of a run, a
results file, or `latest` in a results folder. The validation set is that of the
run, or of --config. Printed are accuracy, loss and calibration error (15 bins,
Guo et al. 2017), the figures of each class, and the confusion matrix. Shares
have 95 % intervals (Wilson). With --images the likeliest classes of each
picture are printed, which is prepared as the weights folder says, or as
--config or overrides do. --predictions writes a row a picture: path, label
where it is known, the likeliest classes, why it could not be read. --suspects
lists the run's training pictures whose labels may be wrong. Exit codes: 0 done;
1 pictures could not be read, with --predictions; 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lab.base.errors import RequestError, one_line
from lab.base.files import require_folder, user_path, user_text, write_outputs
from lab.base.launch import forget_launch
from lab.base.streams import print_progress
from lab.config.loading import Config, load_config
from lab.study.cli import (
    OVERRIDES_HELP,
    WEIGHTS_HELP,
    add_import,
    command_parser,
    run_cli,
    take_pictures,
)
from lab.study.finding import Found, config_of, find_run
from run_experiment import check_config

if TYPE_CHECKING:
    from pathlib import Path

    from lab.data.cache.loaders import Split
    from lab.outputs.evaluation import Predictions
    from lab.outputs.predictions import Guess, Row
    from lab.outputs.trained import Trained

TOP = 3  # classes of a picture that are printed
FORMS = (".csv", ".jsonl", ".parquet")  # of --predictions, see `lab.outputs.predictions.encoded`


def evaluate(trained: Trained, config: Config) -> tuple[dict[str, Any], list[Row]]:
    """(every figure of the weights on the validation set of `config`, see
    `lab.outputs.evaluation.measure`, and the pictures that could not be read; a row of
    --predictions a picture).
    """
    from lab.data.datasets import ReadErrors
    from lab.data.loading import device_batches
    from lab.machine.distributed import Dist
    from lab.machine.workers import ending_workers
    from lab.outputs.evaluation import measure, predict
    from lab.outputs.trained import class_numbers
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
    found = found._replace(labels=numbers[found.labels])
    figures = measure(found, trained.classes)
    rows = rows_of(found, val, errors.found, trained.classes)
    facts = {"bad_images": errors.found, "val_split": val.dataset.split}
    return {**figures, **facts}, rows


def judge(trained: Trained, config: Config, path: Path) -> None:
    """Write --suspects: the training pictures, one row for all copies of one, that the network
    takes for another class. Raises RequestError where the disk does not take it.
    """
    import numpy as np

    from lab.data.datasets import ReadErrors
    from lab.data.images import Augmentation
    from lab.data.loading import device_batches
    from lab.machine.distributed import Dist
    from lab.machine.workers import ending_workers
    from lab.outputs.evaluation import predict
    from lab.outputs.suspects import Judged, Suspects
    from lab.outputs.trained import class_numbers
    from train_ast import build_splits, build_val_loader

    config = config.model_copy(deep=True)
    config.dataset.cache = "none"  # its files are for another order
    device = trained.network.device
    train = build_splits(config.dataset)["train"]
    dataset = train.dataset
    dataset.mislabel(config.dataset.label_noise, config.training.seed)
    dataset.augmentation = Augmentation(config.dataset, train=False)
    dataset.max_bad_images = 0  # no stand-ins, which are other pictures
    pictures = train._replace(indices=np.unique(train.indices % len(dataset)))
    numbers = class_numbers(trained, dataset.classes)
    errors = ReadErrors(config.dataset.max_bad_images)
    loader = build_val_loader(pictures, config, device, Dist())
    with ending_workers():
        found = predict(trained.network, device_batches(loader, device, errors))
    judged = Judged.of_logits(found.logits[:, numbers], found.labels, found.indices)
    suspects = Suspects(dataset, judged)
    try:
        suspects.save(path, path.with_suffix(".png"))
    except OSError as error:
        raise RequestError(f"--suspects: {error.filename}: {error.strerror}") from None
    print(f"suspected labels: {path} ({suspects.summary()})")


def rows_of(
    found: Predictions, val: Split, unreadable: Sequence[str], classes: Sequence[str]
) -> list[Row]:
    """A row of --predictions for each sample, in order. unreadable: "<name>: <reason>" each."""
    from lab.outputs.predictions import Row

    places = {index: place for place, index in enumerate(found.indices.tolist())}
    rows = []
    for index in val.indices.tolist():
        name = val.dataset.name_of(index)
        place = places.get(index)
        if place is None:
            begins = f"{name if name.isprintable() else one_line(name)}: "
            reasons = [text.removeprefix(begins) for text in unreadable if text.startswith(begins)]
            rows.append(Row(name, None, None, (reasons or ["cannot be read"])[0]))
        else:
            rows.append(Row(name, classes[found.labels[place]], found.logits[place], None))
    return rows


def ask(trained: Trained, args: argparse.Namespace, allowed: int) -> int:
    """Print what the network says of pictures, and write it where that is asked for.

    allowed: how many may be unreadable. Raises RequestError naming the first one beyond, unless
    they are in a file of --predictions.
    """
    from lab.outputs.predictions import Row, find_pictures, guesses

    paths, remarks = find_pictures(args.images)
    say(remarks)
    found = guesses(trained, paths, args.top or TOP)
    show = print
    if args.output_dir is not None or args.predictions is not None:
        show = print_progress
        found = list(found)
        rows = [Row(str(guess.path), None, guess.logits, guess.problem) for guess in found]
        write(args, {"predictions.json": as_json(found, args)}, rows, trained.classes)
    bad = []
    for guess in found:
        if guess.problem is None:
            show(str(guess))
        else:
            bad.append(guess)
    say(map(str, bad[:allowed]))
    if len(bad) <= allowed:
        return 0
    if args.predictions is not None:
        return report_unread(len(bad), len(paths), args)
    more = f" (and {len(bad) - allowed - 1} more)" if len(bad) > allowed + 1 else ""
    raise RequestError(f"--images: {bad[allowed]}{more}")


def as_json(found: Sequence[Guess], args: argparse.Namespace) -> dict[str, Any]:
    rows = [
        {"path": str(guess.path), "classes": guess.classes, "problem": guess.problem}
        for guess in found
    ]
    return {"weights": args.weights, "pictures": rows}


def report_unread(bad: int, pictures: int, args: argparse.Namespace) -> int:
    """The exit code of a command that has written down what it could not read."""
    print(
        f"error: {bad:,} of {pictures:,} pictures could not be read; the reasons are in "
        f"{one_line(args.predictions)}",
        file=sys.stderr,
    )
    return 1


def load(args: argparse.Namespace, found: Found) -> tuple[Config, bool]:
    """(the config, whether pictures are prepared as the weights folder says). Without --config it
    is that of the run; for --images the overrides are laid over what the folder says.

    Says so where an override is of the network: that is the folder's.
    """
    keys = {override.partition("=")[0] for override in args.overrides}
    own = [key for key in sorted(keys) if key.startswith("model.")]
    say(f"{key} is not used: the network is the one of --weights" for key in own)
    if args.config is not None:
        check = check_evaluation
        return load_config(args.config, args.overrides, None, check, args.imports, False), False
    from lab.outputs.trained import folder_settings

    if args.images is None:
        text = config_of(found, args.imports)
        say([f"the config is that of the run: {one_line(found.path)}"])
        check = check_evaluation
        return load_config(found.path, args.overrides, text, check, args.imports, False), False
    text = json.dumps(folder_settings(args.weights))
    config = load_config(None, args.overrides, text, check_evaluation, args.imports, False)
    return config, not keys & {"dataset.image_size", "dataset.augment", "dataset.type"}


def other_split(split: dict[str, Any] | None, found: Found) -> bool:
    """Whether `dataset.val_fraction` has now chosen other pictures than in the run."""
    own = found.result.get("val_split")
    return isinstance(own, dict) and split is not None and split["digest"] != own.get("digest")


def check_evaluation(config: Config, given: Sequence[str] = ()) -> None:
    """`check_config`, but for the training set, which need not be there."""
    dataset = config.dataset
    data = dataset.model_copy(update={"train_dir": dataset.train_dir or dataset.val_dir})
    check_config(config.model_copy(update={"dataset": data}), given)


def say(lines: Iterable[str]) -> None:
    """Print what is not the command's output."""
    for line in lines:
        print(f"note: {line}", file=sys.stderr)


def write(
    args: argparse.Namespace, contents: Mapping[str, Any], rows: Sequence[Row], classes: list[str]
) -> None:
    """Write the files of --output-dir and --predictions, all or none: bytes as they are, and the
    rest as JSON. rows: of --predictions.
    """
    files = {}
    for name, content in contents.items() if args.output_dir is not None else ():
        if not isinstance(content, bytes):
            content = (json.dumps(content, allow_nan=False) + "\n").encode()
        files[args.output_dir / name] = ("--output-dir", content)
    if args.predictions is not None:
        from lab.outputs.predictions import as_table, encoded

        found = as_table(rows, classes, args.top or TOP, args.logits)
        content = encoded(found, args.predictions.suffix.lower())
        files[args.predictions] = ("--predictions", content)
    write_outputs(files)


def parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__, config_help=True)
    parser.add_argument(
        "--weights",
        required=True,
        type=user_text,
        metavar="RUN",
        help=WEIGHTS_HELP,
    )
    parser.add_argument(
        "--config",
        type=user_text,
        metavar="FILE",
        help="YAML or JSON, default: the run's own; with --images: the folder's",
    )
    add_import(parser)
    parser.add_argument(
        "--images", nargs="+", metavar="PATH", help="pictures, and folders of pictures"
    )
    parser.add_argument("--top", type=int, metavar="N", help=f"classes a picture, default: {TOP}")
    parser.add_argument(
        "--predictions",
        type=user_path,
        metavar="FILE",
        help=f"write a row a picture: {', '.join(FORMS)}",
    )
    parser.add_argument("--logits", action="store_true", help="all logits in --predictions too")
    parser.add_argument(
        "--suspects",
        type=user_path,
        metavar="FILE",
        help="write the training pictures whose labels may be wrong: .csv",
    )
    parser.add_argument(
        "--output-dir",
        type=user_path,
        metavar="DIR",
        help="write evaluation.json and evaluation.png there, of --images predictions.json",
    )
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=OVERRIDES_HELP)
    args = parser.parse_intermixed_args(argv)
    if args.images is not None:  # which takes the overrides after it too
        take_pictures(args)
    elif args.top is not None and args.predictions is None:
        raise RequestError("--top: only with --images or --predictions")
    if args.top is not None and args.top < 1:
        raise RequestError("--top: at least 1")
    if args.suspects is not None:
        check_suspects(args)
    if args.predictions is None and args.logits:
        raise RequestError("--logits: only with --predictions")
    if args.predictions is not None and args.predictions.suffix.lower() not in FORMS:
        path = one_line(args.predictions)
        raise RequestError(f"--predictions: {path}: its name ends in none of {', '.join(FORMS)}")
    return args


def check_suspects(args: argparse.Namespace) -> None:
    """Raises RequestError where --suspects cannot be had, or with what it does not go."""
    others = {"images": args.images, "predictions": args.predictions, "output-dir": args.output_dir}
    other = next((f"--{name}" for name, value in others.items() if value is not None), None)
    if other is not None:
        raise RequestError(f"--suspects: not with {other}")
    if args.suspects.suffix.lower() != ".csv":
        raise RequestError(f"--suspects: {one_line(args.suspects)}: its name does not end in .csv")
    require_folder(args.suspects.parent, "--suspects", args.suspects)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse(argv)
    forget_launch()
    found = find_run(args.weights)
    args.weights = found.weights
    config, by_folder = load(args, found)
    from lab.machine.devices import configure_backends, resolve_device
    from lab.outputs.evaluation import draw, table
    from lab.outputs.trained import load_trained

    device = resolve_device(config.training)
    configure_backends(True, device)
    trained = load_trained(args.weights, config, device, by_folder)
    say(trained.remarks)
    allowed = config.dataset.max_bad_images
    if args.images is not None:
        return ask(trained, args, allowed)
    if args.suspects is not None:
        say(
            [
                "the network has trained on these pictures, and may know wrong labels by heart; a "
                "run with training.list_suspects=true judges them before that"
            ]
        )
        judge(trained, config, args.suspects)
        return 0
    whole = config.model_copy(deep=True)
    if args.predictions is not None:  # which holds what cannot be read
        whole.dataset.max_bad_images = sys.maxsize
    figures, rows = evaluate(trained, whole)
    if args.config is None and other_split(figures["val_split"], found):
        say(
            ["dataset.val_fraction: pictures have changed since the run, and it may have seen some"]
        )
    show = print
    if args.output_dir is not None or args.predictions is not None:
        show = print_progress
        text = {"weights": args.weights, **figures, "config": config.model_dump()}
        picture = b"" if args.output_dir is None else draw(figures)
        contents = {"evaluation.json": text, "evaluation.png": picture}
        write(args, contents, rows, trained.classes)
    show(table(figures))
    if args.output_dir is not None:
        show(f"evaluation: {args.output_dir / 'evaluation.json'} and evaluation.png")
    if args.predictions is not None:
        show(f"predictions: {args.predictions}")
    bad = len(figures["bad_images"])
    return 0 if bad <= allowed else report_unread(bad, len(rows), args)


if __name__ == "__main__":
    sys.exit(run_cli(main))
