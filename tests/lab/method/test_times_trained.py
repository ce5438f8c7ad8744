"""How often each sample was trained on: exact, whatever interrupts or spreads a run, and told in
its results.
"""

import numpy as np
import pytest
import timm
from PIL import Image

from conftest import make_config
from lab.config.loading import checkpoint_folder
from lab.data.datasets import digits_dataset
from lab.outputs.diet import Diet
from lab.outputs.sheets import SIDE
from runs import StopAfter, ranks
from train_ast import train

SMALL = [
    "model.name=test_resnet",
    "dataset.image_size=8",
    "training.batch_size=32",
    "training.epochs=3",
]
SMALL += ["dataset.max_train_samples=200", "dataset.max_val_samples=64", "ast.warmup_epochs=1"]
HISTORY = ["ast.scoring=history", "ast.target_activation=0.5"]


def arrays(path):
    """(times, labels) of the pictures that the run's training set had, and which these are."""
    with np.load(path.with_suffix(".samples.npz")) as file:
        times = file["times"]
        labels = file["labels"]
    members = np.flatnonzero(times >= 0)
    return times[members], labels[members], members


@pytest.mark.parametrize(
    "way",
    [
        ["ast.pack=true", "dataset.cache=device"],
        [*HISTORY, "dataset.repeat=2", "dataset.label_noise=0.3"],
    ],
)
def test_the_counts_are_what_was_trained(way, tmp_path):
    """Over samples and over classes they sum to the ledger, in a run that is left alone and in one
    cut in an epoch.
    """
    config = make_config(*SMALL, *way, f"logging.output_dir={tmp_path}/whole")
    result, path = train(config)
    times, labels, members = arrays(path)
    queued = (
        31 if "ast.pack=true" in way else 0
    )  # chosen, and waiting for a full batch when the run ended
    assert 0 <= times.sum() - result["ledger"]["trained"] <= queued
    assert len(times) == 200
    told = result["times_trained"]
    assert told["histogram"] == np.bincount(times).tolist()
    assert result["classes"]["times_trained"] == np.bincount(labels, times, 10).astype(int).tolist()
    digits = digits_dataset("train").labels()[members]
    noisy = "dataset.label_noise=0.3" in way
    assert (0.2 < (labels != digits).mean() < 0.4) if noisy else (labels == digits).all()
    most, least = (
        [row["times"] for row in told[name]] for name in ("most_trained", "least_trained")
    )
    assert most == sorted(times, reverse=True)[:24]
    assert least == sorted(times)[:24]
    assert len(list((tmp_path / "whole").glob("*_trained.png"))) == 2
    cut = make_config(*SMALL, *way, f"logging.output_dir={tmp_path}/cut")
    assert train(cut, StopAfter(9))[0]["status"] == "interrupted"
    assert not list((tmp_path / "cut").glob("*.npz"))
    resumed, other = train(cut, resume="auto")
    assert (arrays(other)[0] == times).all()
    assert resumed["times_trained"] == told
    assert resumed["classes"] == result["classes"]


def test_two_processes_count_together_and_write_one_folder(tmp_path):
    config = make_config(*SMALL, *HISTORY, f"logging.output_dir={tmp_path}/out")

    def work(rank):
        train(config, StopAfter(9))
        result, path = train(config, resume="auto")
        return result["ledger"]["trained"], result["classes"], str(path)

    (trained, classes, _), second = ranks(2, work, tmp_path / "ranks").results()
    (path,) = (tmp_path / "out").glob("*.samples.npz")
    times, labels, _ = arrays(path.with_name(path.name.removesuffix(".samples.npz") + ".json"))
    assert times.sum() == trained
    assert classes["times_trained"] == np.bincount(labels, times, 10).astype(int).tolist()
    assert sum(classes["val_samples"]) == 64
    assert second[1] == classes
    assert (
        timm.create_model(
            f"local-dir:{checkpoint_folder(config)}/weights", pretrained=True
        ).num_classes
        == 10
    )


def test_dense_training_counts_every_epoch(tmp_path):
    result, path = train(make_config(*SMALL, "ast.mode=dense", f"logging.output_dir={tmp_path}"))
    assert result["ledger"]["trained"] == 3 * 192 == arrays(path)[0].sum()
    assert not list(tmp_path.glob("*_trained.png"))  # all were trained on alike
    accuracies = result["classes"]["val_acc"]
    samples = result["classes"]["val_samples"]
    hits = sum(share * n / 100 for share, n in zip(accuracies, samples, strict=True) if n)
    assert 100 * hits / sum(samples) == pytest.approx(result["final_accuracy"])


def test_the_sheets_show_the_pictures_and_what_is_gone(image_folder, tmp_path):
    from helpers import folder_config
    from train_ast import build_datasets

    data, _ = build_datasets(folder_config(image_folder).dataset)
    counts = np.arange(24)
    diet = Diet.of(data, np.arange(24), counts)
    told = diet.extremes()
    assert [row["index"] for row in told["most_trained"]] == list(range(23, -1, -1))
    assert told["least_trained"][0] == {"index": 0, "class": "blue", "times": 0}
    (image_folder / "train" / "blue" / "0.jpg").unlink()
    diet.write(tmp_path / "final_results_x.json", told)
    with Image.open(tmp_path / "final_results_x.least_trained.png") as image:
        sheet = np.asarray(image.convert("RGB"))
    gone = sheet[2 : 2 + SIDE, 2 : 2 + SIDE]
    there = sheet[10 : SIDE - 10, SIDE + 10 : 2 * SIDE - 4]
    assert (gone == 211).all()  # light grey
    assert there.reshape(-1, 3).mean(0).argmax() == 2  # blue
