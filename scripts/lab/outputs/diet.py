"""What a run was trained on: how often each class and each picture, for its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lab.base.files import beside_results, replace_file
from lab.data.datasets import ImageDataset
from lab.outputs.sheets import SHOWN, contact_sheet, own_picture

SHEETS = {"most_trained": -1, "least_trained": 1}  # by name, the sign of the times that come first


@dataclass
class Diet:
    """How often each picture of a data set was trained on. Its copies (`dataset.repeat`) count
    together.
    """

    dataset: ImageDataset
    times: np.ndarray  # int32 [pictures]; -1 for one that was no part of the run's training set
    labels: np.ndarray  # int32 [pictures], with the label noise that the run was trained with

    @classmethod
    def of(cls, dataset: ImageDataset, indices: np.ndarray, counts: np.ndarray) -> Diet:
        """indices: int64 [n], those of the run's training set. counts: by index, how often it was
        trained on.
        """
        pictures = np.arange(len(dataset))
        times = np.full(len(dataset), -1, dtype=np.int32)
        times[indices % len(dataset)] = 0
        np.add.at(times, indices % len(dataset), counts[indices])
        labels = dataset.noisy_labels(dataset.labels(), pictures).astype(np.int32)
        return cls(dataset, times, labels)

    def by_class(self) -> list[int]:
        """How often the pictures of each class were trained on, together."""
        eaten = (self.times > 0) & (self.labels >= 0)
        counts = np.bincount(self.labels[eaten], self.times[eaten], len(self.dataset.classes))
        return counts.astype(int).tolist()

    def histogram(self) -> list[int]:
        """How many pictures were trained on 0 times, once, twice and so on."""
        return np.bincount(self.times[self.times >= 0]).tolist()

    def extremes(self) -> dict[str, list[dict[str, Any]]]:
        """By the name of a sheet, its pictures in order. Of those trained on equally often, some at
        random.
        """
        members = np.random.default_rng(0).permutation(np.flatnonzero(self.times >= 0))
        found = {}
        for name, sign in SHEETS.items():
            first = members[np.argsort(sign * self.times[members], kind="stable")][:SHOWN]
            found[name] = [self.describe(int(index)) for index in first]
        return found

    def describe(self, index: int) -> dict[str, Any]:
        """A picture: its index in the data set, its class as it was trained on, and how often."""
        label = int(self.labels[index])
        name = self.dataset.classes[label] if 0 <= label < len(self.dataset.classes) else None
        return {"index": index, "class": name, "times": int(self.times[index])}

    def write(self, results: Path, extremes: dict[str, list[dict[str, Any]]]) -> None:
        """Write beside the results file <name>.samples.npz with both arrays, and the sheets
        <name>.<sheet>.png.

        Raises TrainingFailed where the disk does not take them.
        """
        with beside_results():
            replace_file(results.with_suffix(".samples.npz"), self._save)
            for name, rows in extremes.items():
                contact_sheet(
                    results.with_suffix(f".{name}.png"), [self._tile(row) for row in rows]
                )

    def _save(self, part: Path) -> None:
        with part.open("wb") as file:
            np.savez_compressed(file, times=self.times, labels=self.labels)

    def _tile(self, row: dict[str, Any]) -> tuple[Any, str]:
        picture = own_picture(self.dataset, row["index"])
        return picture, f"{row['class']}\n{row['times']} x" + (" (gone)" if picture is None else "")


def figures(diet: Diet | None, by_class: Sequence[Sequence[int]]) -> dict[str, Any]:
    """What a results file says of classes and samples; None where that is not known.

    by_class: of the last validation, `meters.ClassCounts`.
    """
    if diet is None:
        return {"classes": None, "times_trained": None}
    names = diet.dataset.classes
    correct, counts = (
        [*each, *[0] * (len(names) - len(each))] for each in by_class
    )  # the last classes may lack any
    accuracies = [
        100 * right / count if count else None for right, count in zip(correct, counts, strict=True)
    ]
    classes = {
        "name": names,
        "val_acc": accuracies,
        "val_samples": counts,
        "times_trained": diet.by_class(),
    }
    return {"classes": classes, "times_trained": {"histogram": diet.histogram(), **diet.extremes()}}
