"""What trained weights are worth on a validation set."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.special import log_softmax

from lab.base.errors import RequestError, one_line
from lab.base.plotting import import_matplotlib, plain_style
from lab.data.loading import DeviceBatch
from lab.models.network import Network

BINS = 15  # of the calibration error
FEW = 20  # classes of which a matrix or a whole table is printed
Z = 1.959964  # of a 95 % interval


class Predictions(NamedTuple):
    """What a network says of n pictures."""

    logits: np.ndarray  # float32 [n, classes]
    labels: np.ndarray  # int64 [n]
    indices: np.ndarray | None = None  # int64 [n], of the samples in their data set

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
    for images, labels, indices, *_ in batches:
        if len(labels):
            padding = images.new_zeros(network.local_batch - len(images), *images.shape[1:])
            logits = forward(torch.cat([images, padding]))[: len(images)]
            found.append([logits.float().cpu(), labels.cpu(), indices.cpu()])
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
        right = float(correct[inside].mean())
        rows.append(
            {
                "low": int(number) / BINS,
                "samples": int(inside.sum()),
                "confidence": mean,
                "accuracy": right,
            }
        )
    return sum(row["samples"] * abs(row["accuracy"] - row["confidence"]) for row in rows) / len(
        correct
    ), rows


def wilson(right: int, samples: int) -> list[float]:
    """The 95 % interval of a share, [low, high] in percent (Wilson 1927, "Probable inference, the
    law of succession, and statistical inference").
    """
    centre = (right + Z**2 / 2) / (samples + Z**2)
    half = Z / (samples + Z**2) * math.sqrt(right * (samples - right) / samples + Z**2 / 4)
    return [max(0.0, 100 * (centre - half)), min(100.0, 100 * (centre + half))]


def measure(found: Predictions, classes: Sequence[str]) -> dict[str, Any]:
    """Every figure of an evaluation. Shares are in percent, each with its 95 % interval; the loss
    is the mean cross-entropy, nats; the calibration error is from 0 to 1.

    confusion: int [classes, classes], how many samples of each class (row) were taken for each
    (column). Of equal logits the first class ranks first, as the prediction does. Top-5 of five
    classes or fewer is None. The macro figures are means over the classes that have samples.
    """
    from sklearn.metrics import confusion_matrix  # a second to import

    rows = np.arange(len(found.labels))
    correct = found.predicted == found.labels
    logarithms = log_softmax(found.logits.astype(np.float64), axis=1)
    confusion = confusion_matrix(found.labels, found.predicted, labels=range(len(classes)))
    error, bins = calibration(np.exp(logarithms.max(1)), correct)
    by_class = class_figures(found, confusion)
    return {
        "samples": len(correct),
        **share("accuracy", correct),
        **top_five(found),
        **{f"macro_{name}": macro(by_class, name) for name in ("accuracy", "precision", "f1")},
        "loss": float(-logarithms[rows, found.labels].mean()),
        "calibration_error": error,
        "classes": {"name": list(classes), **by_class},
        "confusion": confusion.tolist(),
        "calibration_bins": bins,
    }


def share(name: str, hits: np.ndarray) -> dict[str, Any]:
    """A share, percent, and its interval. hits: bool [n]."""
    right = int(hits.sum())
    return {name: 100 * right / len(hits), f"{name}_interval": wilson(right, len(hits))}


def top_five(found: Predictions) -> dict[str, Any]:
    """How often the label is among the five largest logits; nothing of so few classes."""
    if found.logits.shape[1] <= 5:
        return {"top5_accuracy": None, "top5_accuracy_interval": None}
    ranked = (-found.logits).argsort(1, kind="stable")[:, :5]
    return share("top5_accuracy", (ranked == found.labels[:, None]).any(1))


def class_figures(found: Predictions, confusion: np.ndarray) -> dict[str, list[Any]]:
    """By name, a figure of each class; None where it has none. The accuracy of a class is its
    recall; the precision of a class that was never predicted is none.
    """
    from sklearn.metrics import precision_recall_fscore_support

    scores = precision_recall_fscore_support(
        found.labels, found.predicted, labels=range(len(confusion)), zero_division=np.nan
    )
    precision, _, f1 = (
        [100 * value if math.isfinite(value) else None for value in each.tolist()]
        for each in scores[:3]
    )
    right = confusion.diagonal().tolist()
    samples = confusion.sum(1).tolist()
    pairs = list(zip(right, samples, strict=True))
    return {
        "accuracy": [100 * hits / count if count else None for hits, count in pairs],
        "samples": samples,
        "interval": [wilson(hits, count) if count else None for hits, count in pairs],
        "precision": precision,
        "f1": f1,
    }


def macro(by_class: dict[str, list[Any]], name: str) -> float:
    """The mean of a figure over the classes that have samples; 0 for one that has none of it."""
    pairs = zip(by_class[name], by_class["samples"], strict=True)
    return float(np.mean([value or 0.0 for value, count in pairs if count]))


def table(figures: dict[str, Any]) -> str:
    """The figures as text. Of many classes it has those with the lowest accuracy, and no confusion
    matrix.
    """
    bad = figures.get("bad_images", [])
    lines = [
        *(f"left out           {one_line(each)}" for each in bad[:FEW]),
        *([f"left out           {len(bad) - FEW:,} more"] if len(bad) > FEW else []),
        f"accuracy           {figures['accuracy']:6.2f} %  of {figures['samples']:,} pictures "
        f"({interval(figures['accuracy_interval'])})",
        f"macro accuracy     {figures['macro_accuracy']:6.2f} %  precision "
        f"{figures['macro_precision']:.2f} %, F1 {figures['macro_f1']:.2f} %: means over classes",
    ]
    if figures["top5_accuracy"] is not None:
        lines.append(
            f"top-5 accuracy     {figures['top5_accuracy']:6.2f} %  "
            f"({interval(figures['top5_accuracy_interval'])})"
        )
    lines += [
        f"loss               {figures['loss']:6.4f}    (cross-entropy, nats)",
        f"calibration error  {figures['calibration_error']:6.4f}    ({BINS} bins)",
        "",
        *class_table(figures),
    ]
    return "\n".join(lines)


def interval(ends: Sequence[float]) -> str:
    return f"95 %: {ends[0]:.2f} to {ends[1]:.2f}"


def class_table(figures: dict[str, Any]) -> list[str]:
    """A line a class: all of few classes, and then the matrix; of many those with the lowest
    accuracy.
    """
    names = figures["classes"]["name"]
    shares = figures["classes"]["accuracy"]
    there = [i for i, count in enumerate(figures["classes"]["samples"]) if count]
    shown = sorted(there, key=lambda i: shares[i])
    shown = there if len(shown) <= FEW else shown[:FEW]
    lines = [
        f"{'class':<20} {'pictures':>8} {'accuracy':>9} {'95 %':>12} {'precision':>10} {'F1':>6}"
        f"  most often taken for",
        *(class_line(figures, i) for i in shown),
    ]
    if len(shown) < len(there):
        return [*lines, f"(the {FEW} classes with the lowest accuracy; --output-dir writes all)"]
    if len(names) > FEW:
        return lines
    confusion = np.array(figures["confusion"])
    width = max(2, len(str(confusion.max())), max(min(10, len(name)) for name in names)) + 1
    return [
        *lines,
        "",
        "confusion matrix: a row a class, a column what it was taken for",
        " " * 10 + "".join(one_line(name, 10).rjust(width) for name in names),
        *(
            one_line(name, 10).rjust(10) + "".join(f"{count:>{width}}" for count in row)
            for name, row in zip(names, confusion, strict=True)
        ),
    ]


def class_line(figures: dict[str, Any], i: int) -> str:
    of = {name: values[i] for name, values in figures["classes"].items()}
    wrong = np.array(figures["confusion"][i])
    wrong[i] = 0
    other = one_line(figures["classes"]["name"][wrong.argmax()], 24)
    taken = f"{other} ({wrong.max()})" if wrong.any() else "-"
    low, high = of["interval"]
    ends = f"{low:.1f}-{high:.1f}"
    precision, f1 = ("-" if of[name] is None else f"{of[name]:.2f}" for name in ("precision", "f1"))
    return (
        f"{one_line(of['name'], 20):<20} {of['samples']:>8,} {of['accuracy']:>7.2f} % {ends:>12} "
        f"{precision:>10} {f1:>6}  {taken}"
    )


def draw(figures: dict[str, Any]) -> bytes:
    """The confusion matrix, as shares of each class, and the calibration with the number of
    pictures in each bin, as one PNG.
    """
    import_matplotlib()
    from matplotlib.figure import Figure

    with plain_style({"font.size": 9, "text.parse_math": False}):
        figure = Figure(figsize=(11, 5), layout="constrained")
        parts = figure.subplot_mosaic(
            [["confusion", "calibration"], ["confusion", "pictures"]], height_ratios=[3, 1]
        )
        picture = draw_confusion(parts["confusion"], figures)
        figure.colorbar(picture, ax=parts["confusion"], label="share of the class")
        draw_calibration(parts["calibration"], parts["pictures"], figures)
        file = io.BytesIO()
        figure.savefig(file, format="png", dpi=120)
    return file.getvalue()


def draw_confusion(axes: Any, figures: dict[str, Any]) -> Any:
    """Returns the image, for its colour bar. Counts stand in the cells of up to FEW classes."""
    names = figures["classes"]["name"]
    confusion = np.array(figures["confusion"], dtype=float)
    shares = confusion / np.maximum(1, confusion.sum(1, keepdims=True))
    picture = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    title = f"Confusion: accuracy {figures['accuracy']:.2f} %"
    axes.set(title=title, xlabel="predicted", ylabel="class")
    if len(names) <= 2 * FEW:
        labels = [one_line(name, 16) for name in names]
        axes.set_xticks(range(len(names)), labels, rotation=90)
        axes.set_yticks(range(len(names)), labels)
    if len(names) <= FEW:
        for (row, column), part in np.ndenumerate(shares):
            colour = "white" if part > 0.5 else "black"
            count = f"{confusion[row, column]:.0f}"
            axes.text(column, row, count, ha="center", va="center", color=colour, fontsize=8)
    return picture


def draw_calibration(axes: Any, below: Any, figures: dict[str, Any]) -> None:
    bins = figures["calibration_bins"]
    confidences = [row["confidence"] for row in bins]
    axes.plot([0, 1], [0, 1], color="0.6", linewidth=0.8)
    axes.plot(confidences, [row["accuracy"] for row in bins], marker="o")
    title = f"Calibration: error {figures['calibration_error']:.4f}"
    axes.set(title=title, ylabel="accuracy", xlim=(0, 1), ylim=(0, 1.02))
    counts = [row["samples"] for row in bins]
    bars = below.bar([row["low"] for row in bins], counts, 1 / BINS, align="edge", color="0.7")
    below.bar_label(bars, [f"{count:,}" for count in counts], fontsize=7)
    below.margins(y=0.25)
    below.set(xlabel="confidence", ylabel="pictures", xlim=(0, 1))
