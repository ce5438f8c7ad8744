"""What trained weights are worth on a validation set, and what they say of single pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS, has_file_allowed_extension

from lab.base.errors import RequestError, one_line
from lab.base.plotting import import_matplotlib, plain_style
from lab.config.loading import Config
from lab.config.sections import DatasetConfig, ModelConfig
from lab.data.folders import read_picture
from lab.data.images import Augmentation, decode_image
from lab.data.loading import DeviceBatch
from lab.data.randomness import UNIFORMS_PER_SAMPLE
from lab.machine.distributed import Dist
from lab.models.building import get_model
from lab.models.network import Network
from lab.models.weights import find_weights, load_weights

BINS = 15  # of the calibration error
FEW = 20  # classes of which a matrix or a whole table is printed


class Trained(NamedTuple):
    """A weights folder, ready to predict."""

    network: Network
    classes: list[str]


def load_trained(path: str, config: Config | None, device: torch.device) -> Trained:
    """The network of a weights folder, whatever model `config` names.

    config: of the pictures; None takes their size and crop from the folder. Raises RequestError
    naming --weights where it is no such folder.
    """
    facts = find_weights(path, "--weights").facts
    if not facts:
        raise RequestError(
            f"--weights: {path}: no config.json in it; expected the weights folder of a run"
        )
    try:
        classes = facts.get("label_names") or [
            str(number) for number in range(facts["num_classes"])
        ]
        model = ModelConfig(
            name=facts["architecture"], small_stem=facts.get("small_stem", False), weights=path
        )
        if config is None:
            how = facts["pretrained_cfg"]
            augment = "random_resized_crop" if how.get("crop_mode") == "center" else "none"
            config = Config(
                dataset=DatasetConfig(image_size=how["input_size"][-1], augment=augment)
            )
    except (KeyError, TypeError, ValueError, IndexError) as error:  # ValueError: pydantic's
        raise RequestError(
            f"--weights: {path}: its config.json does not say all ({one_line(error, 150)})"
        ) from None
    training = config.training.model_copy(update={"compile": "off", "compile_scoring": None})
    metrics = config.metrics.model_copy(
        update={"base_flop_per_sample": 1.0}
    )  # or it would be counted
    config = config.model_copy(update={"model": model, "training": training, "metrics": metrics})
    built = get_model(
        model.model_copy(update={"weights": None}), len(classes), config.dataset.image_size
    )
    load_weights(built, model, "--weights")
    return Trained(Network(built, config, lambda *_: None, device, Dist()), classes)


def class_numbers(trained: Trained, names: Sequence[str]) -> np.ndarray:
    """The network's own number of each class of the data, int64.

    Raises RequestError naming a class that it does not know.
    """
    own = {name: number for number, name in enumerate(trained.classes)}
    if unknown := [name for name in names if name not in own]:
        raise RequestError(
            f"--weights: class {one_line(repr(unknown[0]), 80)} of the data is not among "
            f"its classes"
        )
    return np.array([own[name] for name in names], dtype=np.int64)


class Predictions(NamedTuple):
    """What a network says of n pictures."""

    probabilities: np.ndarray  # float32 [n, classes]
    predicted: np.ndarray  # int64 [n]: the class of the largest logit, as validation takes it
    labels: np.ndarray  # int64 [n]


@torch.no_grad()
def predict(network: Network, batches: Iterable[DeviceBatch]) -> Predictions:
    """Predict every sample; a last, smaller batch is padded to the shape of the others, as in
    validation.
    """
    forward = network.predictor()
    found = []
    for images, labels, _ in batches:
        padding = images.new_zeros(network.local_batch - len(images), *images.shape[1:])
        logits = forward(torch.cat([images, padding]))[: len(images)]
        found.append([logits.float().softmax(-1).cpu(), logits.argmax(-1).cpu(), labels.cpu()])
    return Predictions(*(torch.cat(each).numpy() for each in zip(*found, strict=True)))


def calibration(
    confidence: np.ndarray, correct: np.ndarray
) -> tuple[float, list[dict[str, float]]]:
    """(expected calibration error, 0 to 1; by bin of the confidence, its samples, mean confidence
    and accuracy).

    Guo et al. 2017, "On calibration of modern neural networks", equation 3: over BINS bins of equal
    width, the mean of
    |accuracy - confidence| weighted by their samples.

    confidence: float [n], the largest probability. correct: bool [n].
    """
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    rows = []
    for number in np.unique(bins):
        inside = bins == number
        mean = float(confidence[inside].mean(dtype=np.float64))
        share = float(correct[inside].mean())
        rows.append({"samples": int(inside.sum()), "confidence": mean, "accuracy": share})
    return sum(row["samples"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(
        correct
    ), rows


def measure(found: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Every figure of an evaluation; accuracies in percent, the calibration error from 0 to 1.

    confusion: int [classes, classes], how many samples of each class (row) were taken for each
    (column).
    """
    correct = found.predicted == found.labels
    count = len(classes)
    own = found.probabilities[np.arange(len(correct)), found.labels]
    rank = (found.probabilities > own[:, None]).sum(1)  # how many classes are likelier
    confusion = np.zeros((count, count), dtype=int)
    np.add.at(confusion, (found.labels, found.predicted), 1)
    error, bins = calibration(found.probabilities.max(1), correct)
    samples = confusion.sum(1)
    shares = [
        100 * int(confusion[i, i]) / int(samples[i]) if samples[i] else None for i in range(count)
    ]
    return {
        "samples": len(correct),
        "accuracy": 100 * int(correct.sum()) / len(correct),
        "top5_accuracy": 100 * int((rank < 5).sum()) / len(correct),
        "calibration_error": error,
        "classes": {"name": list(classes), "accuracy": shares, "samples": samples.tolist()},
        "confusion": confusion.tolist(),
        "calibration_bins": bins,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as text. Of many classes it has those with the lowest accuracy, and no confusion
    matrix.
    """
    names, shares, samples = figures["classes"].values()
    confusion = np.array(figures["confusion"])
    lines = [
        f"accuracy           {figures['accuracy']:6.2f} %  of {figures['samples']:,} pictures",
        f"top-5 accuracy     {figures['top5_accuracy']:6.2f} %",
        f"calibration error  {figures['calibration_error']:6.4f}    ({BINS} bins)",
        "",
        f"{'class':<24} {'pictures':>8} {'accuracy':>9}  most often taken for",
    ]
    shown = sorted((i for i in range(len(names)) if samples[i]), key=lambda i: shares[i])
    shown = sorted(shown) if len(shown) <= FEW else shown[:FEW]
    for i in shown:
        wrong = confusion[i].copy()
        wrong[i] = 0
        taken = f"{one_line(names[wrong.argmax()], 24)} ({wrong.max()})" if wrong.any() else "-"
        lines.append(f"{one_line(names[i], 24):<24} {samples[i]:>8,} {shares[i]:>7.2f} %  {taken}")
    if len(shown) < sum(count > 0 for count in samples):
        lines.append(f"(the {FEW} classes with the lowest accuracy; --output-dir writes all)")
    elif len(names) <= FEW:
        lines += ["", "confusion matrix: a row a class, a column what it was taken for"]
        width = max(2, len(str(confusion.max())), max(min(10, len(name)) for name in names)) + 1
        lines.append(" " * 10 + "".join(one_line(name, 10).rjust(width) for name in names))
        lines += [
            one_line(n, 10).rjust(10) + "".join(f"{c:>{width}}" for c in row)
            for n, row in zip(names, confusion, strict=True)
        ]
    return "\n".join(lines)


def draw(figures: dict[str, Any]) -> bytes:
    """The confusion matrix, as shares of each class, and the calibration, as one PNG."""
    import_matplotlib()
    from matplotlib.figure import Figure

    names = figures["classes"]["name"]
    confusion = np.array(figures["confusion"], dtype=float)
    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    bins = figures["calibration_bins"]
    with plain_style({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(11, 5), layout="constrained")
        left, right = figure.subplots(1, 2)
        picture = left.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        figure.colorbar(picture, ax=left, label="share of the class")
        left.set(
            title=f"Confusion: accuracy {figures['accuracy']:.2f} %",
            xlabel="predicted",
            ylabel="class",
        )
        if len(names) <= 2 * FEW:
            labels = [one_line(name, 16) for name in names]
            left.set_xticks(range(len(names)), labels, rotation=90)
            left.set_yticks(range(len(names)), labels)
        right.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
        right.plot(
            [row["confidence"] for row in bins], [row["accuracy"] for row in bins], marker="o"
        )
        error = figures["calibration_error"]
        right.set(
            title=f"Calibration: error {error:.4f}",
            xlabel="confidence",
            ylabel="accuracy",
            ylim=(0, 1.02),
        )
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def find_pictures(paths: Sequence[Path]) -> list[Path]:
    """The files, and of each folder those below it whose names end as a picture's, sorted. Raises
    RequestError naming what is missing, and a folder without any.
    """
    found = []
    for path in paths:
        if not path.exists():
            raise RequestError(f"--images: {path}: no such file or folder")
        below = (
            sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        )
        named = [
            file
            for file in below
            if file == path or has_file_allowed_extension(str(file), IMG_EXTENSIONS)
        ]
        if not named:
            raise RequestError(
                f"--images: {path}: no pictures in it; their names end in "
                f"{', '.join(IMG_EXTENSIONS)}"
            )
        found += named
    return found


Guess = tuple[str, float]  # a class name and its probability


def top_predictions(
    trained: Trained, paths: Sequence[Path], top: int
) -> Iterator[tuple[Path, list[Guess]]]:
    """Of each picture its likeliest classes, prepared as for validation.

    Raises RequestError naming a picture that cannot be read.
    """
    network = trained.network
    augmentation = Augmentation(trained.network.config.dataset, train=False)
    batch = min(64, network.local_batch)
    forward = network.predictor()
    for start in range(0, len(paths), batch):
        part = paths[start : start + batch]
        images = augmentation(
            [_decoded(path) for path in part], torch.zeros(len(part), UNIFORMS_PER_SAMPLE).double()
        )
        probabilities = _probabilities(forward, torch.stack(images).to(network.device))
        for path, row in zip(part, probabilities, strict=True):
            best = row.topk(min(top, len(row)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            yield path, [(trained.classes[number], share) for number, share in pairs]


@torch.no_grad()
def _probabilities(forward: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return forward(images).float().softmax(-1).cpu()


def _decoded(path: Path) -> Tensor:
    try:
        return decode_image(read_picture(path))
    except (OSError, ValueError) as error:
        raise RequestError(
            f"--images: {path}: {one_line(getattr(error, 'strerror', None) or error)}"
        ) from None
