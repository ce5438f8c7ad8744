"""What trained weights are worth on a validation set, and what they say of single pictures."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import softmax
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms.v2.functional import to_pil_image

from lab.base.errors import RequestError, one_line
from lab.base.plotting import import_matplotlib, plain_style
from lab.config.loading import Config
from lab.config.sections import DatasetConfig, ModelConfig
from lab.data.folders import composed, pictures_below, read_picture
from lab.data.images import Augmentation, decode_image
from lab.data.loading import DeviceBatch
from lab.data.randomness import UNIFORMS_PER_SAMPLE
from lab.machine.distributed import Dist
from lab.models.building import build_model
from lab.models.description import Description, View
from lab.models.network import Network
from lab.models.weights import find_weights, load_weights

BINS = 15  # of the calibration error
FEW = 20  # classes of which a matrix or a whole table is printed


class Trained(NamedTuple):
    """A weights folder, ready to predict."""

    network: Network
    classes: list[str]
    view: View  # how the folder says that pictures are prepared
    prepare: Callable[[Sequence[Tensor]], list[Tensor]]  # uint8 [3, H, W] -> [3, size, size]
    remarks: list[str]  # what the weights are, where that is not as one would expect


def folder_settings(path: str) -> dict[str, Any]:
    """The sections of a config that prepares pictures as the weights folder says. Raises
    RequestError naming --weights where it is no such folder.
    """
    view = described(path).view
    augment = "random_resized_crop" if view.crop_mode == "center" else "none"
    return {"dataset": {"image_size": view.size, "augment": augment}}


def described(path: str) -> Description:
    """Raises RequestError naming --weights where no description lies beside the weights."""
    description = find_weights(path, "--weights").description
    if description is None:
        raise RequestError(
            f"--weights: {path}: no config.json in it; expected the weights folder of a run"
        )
    return description


def load_trained(path: str, config: Config, device: torch.device, by_folder: bool) -> Trained:
    """The network of a weights folder, whatever model `config` names.

    by_folder: whether pictures are prepared as the folder says, and not as `config` does. Raises
    RequestError naming --weights where the folder does not hold a whole network.
    """
    description = described(path)
    try:
        classes = description.classes()
        model = ModelConfig(
            name=description.architecture, small_stem=bool(description.small_stem), weights=path
        )
    except ValueError as error:  # pydantic's too
        raise RequestError(f"--weights: {path}: config.json: {one_line(error, 150)}") from None
    training = config.training.model_copy(update={"compile": "off", "compile_scoring": None})
    metrics = config.metrics.model_copy(
        update={"base_flop_per_sample": 1.0}
    )  # or it would be counted
    config = config.model_copy(update={"model": model, "training": training, "metrics": metrics})
    size = config.dataset.image_size
    try:
        built = build_model(model, len(classes), size)
    except RequestError as error:
        raise RequestError(f"--weights: {path}: config.json: {error}") from None
    loaded = load_weights(built, model, size, "--weights", new_head=False)
    network = Network(built, config, lambda *_: None, device, Dist())
    as_lab = description.by_lab and View.of(config.dataset) == description.view
    by_timm = by_folder and not as_lab
    prepare = timm_preparation(description.view) if by_timm else lab_preparation(config.dataset)
    shown = description.view if by_folder else View.of(config.dataset)
    remarks = loaded.remarks
    if shown != description.view:
        remarks = [
            *remarks,
            f"pictures are shown as {shown}, and the weights are for {description.view}",
        ]
    return Trained(network, classes, shown, prepare, remarks)


def lab_preparation(config: DatasetConfig) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """As the lab validates."""
    augmentation = Augmentation(config, train=False)

    def prepare(images: Sequence[Tensor]) -> list[Tensor]:
        return augmentation(images, torch.zeros(len(images), UNIFORMS_PER_SAMPLE).double())

    return prepare


def timm_preparation(view: View) -> Callable[[Sequence[Tensor]], list[Tensor]]:
    """As timm evaluates, whose order and rounding are not the lab's."""
    from timm.data import create_transform

    size = (3, view.size, view.size)
    ways = view._asdict()
    del ways["size"]
    transform = create_transform(size, use_prefetcher=True, **ways)  # uint8, not normalised

    def prepare(images: Sequence[Tensor]) -> list[Tensor]:
        return [torch.as_tensor(transform(to_pil_image(image))) for image in images]

    return prepare


def class_numbers(trained: Trained, names: Sequence[str]) -> np.ndarray:
    """The network's own number of each class of the data, int64.

    Raises RequestError naming a class that it does not know.
    """
    own = {composed(name): number for number, name in enumerate(trained.classes)}
    if unknown := [name for name in names if composed(name) not in own]:
        raise RequestError(
            f"--weights: class {one_line(repr(unknown[0]), 80)} of the data is not among "
            f"its classes"
        )
    return np.array([own[composed(name)] for name in names], dtype=np.int64)


class Predictions(NamedTuple):
    """What a network says of n pictures."""

    logits: np.ndarray  # float32 [n, classes]
    labels: np.ndarray  # int64 [n]

    @property
    def predicted(self) -> np.ndarray:
        """The class of the largest logit, as validation takes it: int64 [n]."""
        return self.logits.argmax(1)


@torch.no_grad()
def predict(network: Network, batches: Iterable[DeviceBatch]) -> Predictions:
    """Predict every sample; a last, smaller batch is padded to the shape of the others, as in
    validation.

    Raises RequestError where no sample could be read, or where a logit is not finite.
    """
    forward = network.predictor()
    found = []
    for images, labels, *_ in batches:
        if len(labels):
            padding = images.new_zeros(network.local_batch - len(images), *images.shape[1:])
            logits = forward(torch.cat([images, padding]))[: len(images)]
            found.append([logits.float().cpu(), labels.cpu()])
    if not found:
        raise RequestError("dataset: no picture of the validation set can be read")
    whole = Predictions(*(torch.cat(each).numpy() for each in zip(*found, strict=True)))
    require_finite(whole.logits)
    return whole


def require_finite(logits: np.ndarray) -> None:
    """Raises RequestError where any of float32 [n, classes] is not finite: then no class is the
    likeliest.
    """
    bad = int((~np.isfinite(logits).all(1)).sum())
    if bad:
        raise RequestError(
            f"--weights: of {bad:,} of {len(logits):,} pictures the logits are not finite"
        )


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
    (column). Of equal logits the first class ranks first, as the prediction does.
    """
    from sklearn.metrics import confusion_matrix  # a second to import

    numbers = range(len(classes))
    correct = found.predicted == found.labels
    ranked = (-found.logits).argsort(1, kind="stable")[:, :5]
    in_five = (ranked == found.labels[:, None]).any(1)
    confusion = confusion_matrix(found.labels, found.predicted, labels=numbers)
    confidence = softmax(found.logits, axis=1).max(1)
    error, bins = calibration(confidence, correct)
    samples = confusion.sum(1).tolist()
    shares = [
        100 * right / count if count else None
        for right, count in zip(confusion.diagonal().tolist(), samples, strict=True)
    ]
    return {
        "samples": len(correct),
        "accuracy": 100 * int(correct.sum()) / len(correct),
        "top5_accuracy": 100 * int(in_five.sum()) / len(correct),
        "calibration_error": error,
        "classes": {"name": list(classes), "accuracy": shares, "samples": samples},
        "confusion": confusion.tolist(),
        "calibration_bins": bins,
    }


def table(figures: dict[str, Any]) -> str:
    """The figures as text. Of many classes it has those with the lowest accuracy, and no confusion
    matrix.
    """
    names, shares, samples = figures["classes"].values()
    confusion = np.array(figures["confusion"])
    bad = figures.get("bad_images", [])
    lines = [
        *(f"left out           {one_line(each)}" for each in bad[:FEW]),
        *([f"left out           {len(bad) - FEW:,} more"] if len(bad) > FEW else []),
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


def find_pictures(paths: Sequence[Path]) -> tuple[list[Path], list[str]]:
    """(the files, and of each folder the pictures below it, sorted; what was skipped in each
    folder).

    Raises RequestError naming what is missing, and a folder without any.
    """
    found: list[Path] = []
    remarks = []
    for path in paths:
        if not path.exists():
            raise RequestError(f"--images: {path}: no such file or folder")
        if not path.is_dir():
            found.append(path)
            continue
        try:
            pictures, skipped = pictures_below(path)
        except OSError as error:
            raise RequestError(f"--images: {error.filename or path}: {error.strerror}") from None
        said = f"skipped: {skipped}" if skipped else ""
        if not pictures:
            endings = f"their names end in {', '.join(IMG_EXTENSIONS)}"
            raise RequestError(f"--images: {path}: no pictures in it; {endings}; {said}")
        remarks += [f"--images: {path}: {said}"] if said else []
        found += pictures
    return found, remarks


class Guess(NamedTuple):
    """What a network says of a picture, or why it could not be asked."""

    path: Path
    classes: list[tuple[str, float]]  # names and probabilities, the likeliest first
    problem: str | None = None

    def __str__(self) -> str:
        name = str(self.path) if str(self.path).isprintable() else one_line(self.path)
        if self.problem is not None:
            return f"{name}: {self.problem}"
        shares = (f"{one_line(each, 60)} {100 * share:.1f} %" for each, share in self.classes)
        return f"{name}: {', '.join(shares)}"


def guesses(trained: Trained, paths: Sequence[Path], top: int) -> Iterator[Guess]:
    """Of each picture its likeliest classes; of one that cannot be read, why. Raises RequestError
    where a logit is not finite.
    """
    network = trained.network
    batch = min(64, network.local_batch)
    forward = network.predictor()
    for start in range(0, len(paths), batch):
        part = [(path, *_decoded(path)) for path in paths[start : start + batch]]
        images = trained.prepare([image for _, image, _ in part if image is not None])
        rows = iter(
            _likeliest(forward, torch.stack(images).to(network.device), top) if images else ()
        )
        for path, image, problem in part:
            pairs = next(rows) if image is not None else []
            yield Guess(
                path, [(trained.classes[number], share) for number, share in pairs], problem
            )


@torch.no_grad()
def _likeliest(
    forward: Callable[[Tensor], Tensor], images: Tensor, top: int
) -> list[list[tuple[int, float]]]:
    """Of each picture, (class, probability) of the `top` likeliest classes."""
    logits = forward(images).float().cpu()
    require_finite(logits.numpy())
    order = logits.sort(descending=True, stable=True).indices[:, :top]
    shares = logits.softmax(-1).gather(1, order)
    return [
        list(zip(*each, strict=True)) for each in zip(order.tolist(), shares.tolist(), strict=True)
    ]


def _decoded(path: Path) -> tuple[Tensor | None, str | None]:
    """(a picture, None), or (None, why it cannot be read)."""
    try:
        return decode_image(read_picture(path)), None
    except (OSError, ValueError) as error:
        return None, one_line(getattr(error, "strerror", None) or error)
