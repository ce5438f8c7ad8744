"""The samples whose labels may be wrong, as a run leaves them: a list, and a sheet of the first
pictures.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from lab.base.console import print_rank0
from lab.base.files import beside_results, no_formula, replace_file
from lab.data.datasets import ImageDataset
from lab.outputs.sheets import SHOWN, contact_sheet, own_picture

CERTAIN = (
    0.9  # probability of a label, over the last visits, from which on the sample is not listed
)
HEADER = ("index", "sample", "given", "predicted", "score", "left_out")


class Suspects:
    """The samples of a training set by how unlikely the network finds their labels, the least
    likely first.

    Listed are those that are left out, those whose label was not predicted at the last visit, and
    those whose label has on average a probability below CERTAIN. The score is the mean loss over
    some four visits, nats.
    """

    def __init__(self, dataset: ImageDataset, columns: Mapping[str, np.ndarray], out: np.ndarray):
        """columns: of `SampleStore.on_host`, with labels. out: bool [samples], which are left
        out.
        """
        self.dataset = dataset
        self.columns = columns
        self.out = out
        listed = out | (columns["streak"] > 0) | (columns["loss"] > -math.log(CERTAIN))
        listed = np.flatnonzero(listed & (columns["given"] >= 0))
        self.order = listed[np.argsort(-columns["loss"][listed], kind="stable")]

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The values of HEADER, a tuple a sample."""
        names = self.dataset.classes
        columns = self.columns
        for index in self.order.tolist():
            given, predicted = (names[columns[name][index]] for name in ("given", "predicted"))
            score = f"{columns['loss'][index]:.4f}"
            yield index, self.dataset.name_of(index), given, predicted, score, int(self.out[index])

    def write(self, results: Path) -> Path:
        """Write suspected_labels_<timestamp>.csv beside the results file, and the sheet <results
        file>.suspected.png.

        Returns the list's path. Raises TrainingFailed where the disk does not take them.
        """
        path = results.with_name(
            results.name.replace("final_results", "suspected_labels", 1)
        ).with_suffix(".csv")
        with beside_results():
            replace_file(path, self._save)
            first = [
                (row[0], f"given {row[2]}\nseen {row[3]}") for row in islice(self.rows(), SHOWN)
            ]
            contact_sheet(
                results.with_suffix(".suspected.png"),
                [(own_picture(self.dataset, i), text) for i, text in first],
            )
        left_out = f", {int(self.out.sum()):,} of them left out" if self.out.any() else ""
        print_rank0(f"suspected labels: {path} ({len(self.order):,} samples{left_out})")
        return path

    def _save(self, part: Path) -> None:
        with part.open("w", encoding="utf-8", errors="replace", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADER)
            writer.writerows(map(no_formula, row) for row in self.rows())
