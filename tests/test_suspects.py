"""The list of wrong labels against what is known of them, and against cleanlab's."""

from __future__ import annotations

import csv
import re
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from sklearn.model_selection import StratifiedKFold

from conftest import make_config
from lab.data.datasets import DigitsDataset
from lab.data.randomness import label_shifts
from lab.models.building import get_model
from train_ast import train

SIDE = 8
EPOCHS = 10
DIGITS = ("model.name=small_conv", f"dataset.image_size={SIDE}", "training.batch_size=32")
DIGITS += ("training.optimizer=adamw", "training.lr=0.003", f"training.epochs={EPOCHS}")
WAYS = {  # what a run does with labels
    "dense": ("ast.mode=dense", "training.list_suspects=true"),
    "auto": (
        *("ast.forget_rate=auto", "ast.scoring=history", "ast.target_activation=1"),
        *("ast.explore=0", "ast.warmup_epochs=1"),
    ),
}


class Labels(NamedTuple):
    images: torch.Tensor  # uint8 [n, 3, 8, 8]
    right: np.ndarray  # int64 [n]
    given: np.ndarray


def noisy_digits(noise: float, seed: int) -> Labels:
    """The training set of a run with `dataset.label_noise`."""
    train_set, _ = DigitsDataset.splits(None)
    right = train_set.labels()
    given = (right + label_shifts(len(right), 10, noise, seed)) % 10 if noise else right
    return Labels(torch.stack([image for image, _ in train_set.samples]), right, given)


class Found(NamedTuple):
    """A list beside the truth."""

    rows: int
    precision: float
    recall: float
    average_precision: float  # of the ranking by a score; nan without one

    @classmethod
    def of(cls, listed: np.ndarray, wrong: np.ndarray, scores: np.ndarray | None = None) -> Found:
        right = wrong[listed].sum()
        average = np.nan
        if scores is not None and wrong.any():
            average = average_precision_score(wrong, scores)
        return cls(len(listed), right / max(1, len(listed)), right / max(1, wrong.sum()), average)

    def __str__(self) -> str:
        return (
            f"{self.rows:4d} rows, precision {self.precision:.3f}, recall {self.recall:.3f}, "
            f"average precision {self.average_precision:.3f}"
        )


def own_list(way: str, noise: float, seed: int, folder: Path) -> np.ndarray:
    """The indices that a run lists, most suspicious first."""
    noisy = (f"dataset.label_noise={noise}", f"training.seed={seed}")
    train(make_config(*DIGITS, *WAYS[way], *noisy, f"logging.output_dir={folder}"))
    (path,) = folder.glob("suspected_labels_*.csv")
    with path.open(newline="") as file:
        return np.array([int(row["index"]) for row in csv.DictReader(file)], dtype=int)


def probabilities(labels: Labels, seed: int, folds: int = 5) -> np.ndarray:
    """Out of sample, float [n, classes]: the network of the runs, by their recipe, trained on the
    other folds, as cleanlab's users do it.
    """
    images = labels.images.float() / 255
    given = torch.from_numpy(labels.given)
    found = np.zeros((len(given), 10))
    split = StratifiedKFold(folds, shuffle=True, random_state=seed)
    for others, fold in split.split(images, labels.given):
        torch.manual_seed(seed)
        model = get_model(make_config(*DIGITS).model, 10, SIDE)
        optimizer = torch.optim.AdamW(model.parameters(), 0.003, weight_decay=5e-4)
        steps = 20 * (len(others) // 32)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        for _ in range(EPOCHS):
            for batch in np.array_split(np.random.default_rng(seed).permutation(others), 36):
                F.cross_entropy(model(images[batch]), given[batch]).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedule.step()
        with torch.no_grad():
            found[fold] = model.eval()(images[fold]).softmax(-1).numpy()
    return found


def cleanlabs_list(labels: Labels, seed: int) -> Found:
    filters = pytest.importorskip("cleanlab.filter")
    rank = pytest.importorskip("cleanlab.rank")
    likely = probabilities(labels, seed)
    issues = filters.find_label_issues(
        labels.given, likely, return_indices_ranked_by="normalized_margin", n_jobs=1
    )
    scores = -rank.get_label_quality_scores(labels.given, likely, method="normalized_margin")
    return Found.of(issues, labels.given != labels.right, scores)


@pytest.mark.long
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("noise", [0, 0.05, 0.2, 0.4])
def test_the_list_finds_wrong_labels_and_how_many_there_are(noise, seed, way, tmp_path, capsys):
    labels = noisy_digits(noise, seed)
    wrong = labels.given != labels.right
    listed = own_list(way, noise, seed, tmp_path)
    found = Found.of(listed, wrong)
    pattern = r"estimated wrong: ([\d.]+) % \(95 %: ([\d.]+) to ([\d.]+)\)"
    said = re.search(pattern, capsys.readouterr().out)
    estimate, low, high = map(float, said.groups())
    truth = 100 * wrong.mean()
    with capsys.disabled():
        print(f"\n{way}, noise {noise}, seed {seed}: {found}; {truth:.1f} %, said {said[0]}")
    if noise == 0:
        assert found.rows <= 5
        assert low == 0
        return
    assert found.precision >= 0.85
    assert found.recall >= (0.8 if noise == 0.2 else 0.7)
    assert estimate == pytest.approx(truth, rel=0.25)
    assert low <= truth <= high


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("noise", [0, 0.05, 0.2, 0.4])
def test_cleanlab_on_the_same_labels(noise, seed, capsys):
    """Its figures, to be read beside those of the test above."""
    found = cleanlabs_list(noisy_digits(noise, seed), seed)
    with capsys.disabled():
        print(f"\ncleanlab, noise {noise}, seed {seed}: {found}")
    assert noise == 0 or found.precision > 0.5
