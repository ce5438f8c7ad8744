"""The samples whose labels may be wrong: a list, its share of all, and a sheet of the first
pictures.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy.special import softmax

from lab.base.console import print_rank0
from lab.base.files import beside_results, no_formula, replace_file
from lab.data.datasets import ImageDataset
from lab.outputs.evaluation import wilson
from lab.outputs.sheets import SHOWN, contact_sheet, own_picture

HEADER = (
    *("index", "sample", "given", "suggested"),
    *("given_probability", "suggested_probability", "left_out"),
)
ODDS = 3  # of the suggested class against the given one: between ODDS and 1 / ODDS it is open


class Share(NamedTuple):
    """The estimated share of wrong labels and its 95 % interval, percent."""

    estimate: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.estimate:.1f} % (95 %: {self.low:.1f} to {self.high:.1f})"


class Judged(NamedTuple):
    """What a network makes of the labels of n pictures, each judged at least once.

    A label is suspected where another class is likelier. No bar has to be set for that, and none
    has to be estimated from labels that may be wrong.
    """

    indices: np.ndarray  # int64 [n], in their data set
    given: np.ndarray  # int64 [n]
    suggested: np.ndarray  # int64 [n], another class than the given one; -1: none was predicted
    given_likely: np.ndarray  # float64 [n], probability
    suggested_likely: np.ndarray  # float64 [n], likewise
    left_out: np.ndarray  # bool [n]

    @classmethod
    def of_visits(cls, columns: Mapping[str, np.ndarray], out: np.ndarray, size: int) -> Judged:
        """By the fair visits of training (`SampleStore`). Copies of a picture (`dataset.repeat`)
        are one, whose visits count together.

        columns: by index, of a store with labels. out: bool by index, who is left out: a picture
        with all of its copies that were trained on. size: pictures in the data set.
        """
        seen = np.flatnonzero(columns["visits"] > 0)
        pictures, place = np.unique(seen % size, return_inverse=True)
        n = len(pictures)
        # the rival of the copy that has seen most of it; the copies with another count for nothing
        order = np.argsort(columns["votes"][seen], kind="stable")
        rival = np.full(n, -1)
        rival[place[order]] = columns["rival"][seen[order]]
        agrees = columns["rival"][seen] == rival[place]
        visits = np.bincount(place, columns["visits"][seen], n)
        likely = np.bincount(place, columns["likely"][seen], n)
        rival_likely = np.bincount(place, columns["rival_likely"][seen] * agrees, n)
        given = np.full(n, -1)
        given[place] = columns["given"][seen]
        in_use = np.bincount(place, ~out[seen], n) > 0
        return cls(pictures, given, rival, likely / visits, rival_likely / visits, ~in_use)

    @classmethod
    def of_logits(cls, logits: np.ndarray, given: np.ndarray, indices: np.ndarray) -> Judged:
        """By one prediction. logits: float32 [n, classes]; given, indices: int64 [n]."""
        rows = np.arange(len(given))
        likely = softmax(logits.astype(np.float64), axis=1)
        own = likely[rows, given]
        likely[rows, given] = -1
        other = likely.argmax(1)
        nobody = np.zeros(len(given), dtype=bool)
        return cls(indices, given, other, own, likely[rows, other], nobody)

    def suspected(self) -> np.ndarray:
        """The rows of those suspected, int64, the most suspicious first: by how much likelier the
        other class is.
        """
        margin = self.suggested_likely - self.given_likely
        rows = np.flatnonzero(margin > 0)
        return rows[np.argsort(-margin[rows], kind="stable")]

    def share(self, error: float = 0.0) -> Share | None:
        """Estimated: those suspected. Its interval is that of a count (Wilson 1927), from those
        whose other class is ODDS times as likely as the given one to those for whom it is the other
        way round. None without a picture.

        error: of the network on pictures that it was not trained on, percent. As many of those at
        the lower end may be its own mistakes.
        """
        n = len(self.given)
        if not n:
            return None
        least, estimate, most = (
            int(np.count_nonzero(self.suggested_likely > odds * self.given_likely))
            for odds in (ODDS, 1, 1 / ODDS)
        )
        return Share(100 * estimate / n, max(0.0, wilson(least, n)[0] - error), wilson(most, n)[1])


class Suspects:
    """The suspected labels of a data set, as `Judged` says."""

    def __init__(self, dataset: ImageDataset, judged: Judged, error: float = 0.0):
        """error: see `Judged.share`."""
        self.error = error
        self.dataset = dataset
        self.judged = judged
        self.order = judged.suspected()

    def rows(self) -> Iterator[tuple[Any, ...]]:
        """The values of HEADER, a tuple a picture."""
        names = self.dataset.classes
        judged = self.judged
        for row in self.order.tolist():
            index = int(judged.indices[row])
            given, suggested = (names[each[row]] for each in (judged.given, judged.suggested))
            shares = (f"{each[row]:.4f}" for each in (judged.given_likely, judged.suggested_likely))
            left_out = int(judged.left_out[row])
            yield index, self.dataset.name_of(index), given, suggested, *shares, left_out

    def summary(self) -> str:
        """How many there are, and the estimated share."""
        out = int(self.judged.left_out[self.order].sum())
        left_out = f", {out:,} of them left out" if out else ""
        share = self.judged.share(self.error)
        estimate = "" if share is None else f"; estimated wrong: {share}"
        return f"{len(self.order):,} of {len(self.judged.given):,} samples{left_out}{estimate}"

    def write(self, results: Path) -> Path:
        """Write suspected_labels_<timestamp>.csv beside the results file, and the sheet <results
        file>.suspected.png.

        Returns the list's path. Raises TrainingFailed where the disk does not take them.
        """
        path = results.with_name(
            results.name.replace("final_results", "suspected_labels", 1)
        ).with_suffix(".csv")
        with beside_results():
            self.save(path, results.with_suffix(".suspected.png"))
        print_rank0(f"suspected labels: {path} ({self.summary()})")
        return path

    def save(self, path: Path, sheet: Path) -> None:
        """Write the list and the sheet. Raises OSError naming the file."""
        replace_file(path, self._save)
        first = [(row[0], f"given {row[2]}\nseen {row[3]}") for row in islice(self.rows(), SHOWN)]
        pictures = [(own_picture(self.dataset, i), text) for i, text in first]
        contact_sheet(sheet, pictures)

    def _save(self, part: Path) -> None:
        with part.open("w", encoding="utf-8", errors="replace", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(HEADER)
            writer.writerows(map(no_formula, row) for row in self.rows())
