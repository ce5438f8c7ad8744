"""Labels that are not believed: who is left out, how it comes back, what a run leaves of it."""

import csv
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import lab.method.doubt
import train_ast
from conftest import LayerNormNet, make_batch, make_config
from helpers import analyze
from lab.base.errors import RequestError
from lab.config.loading import checkpoint_folder
from lab.data.datasets import DigitsDataset
from lab.data.loading import DeviceBatch
from lab.data.randomness import label_shifts, random_subset
from lab.method.doubt import LEFT_OUT
from lab.method.sample_store import Visit
from runs import StopAfter, final_state, ranks, same
from train_ast import Run, look_again, train

CPU = torch.device("cpu")
AUTO = ["ast.scoring=history", "ast.target_activation=1", "ast.explore=0", "ast.forget_rate=auto"]
DIGITS = [
    "model.name=small_conv",
    "dataset.image_size=8",
    "training.batch_size=32",
    "training.optimizer=adamw",
]
DIGITS += ["training.lr=0.003", "dataset.max_val_samples=64"]
CONFUSED = {
    1: 7,
    3: 8,
    4: 9,
    5: 6,
    7: 1,
    8: 3,
    9: 4,
    6: 5,
}  # digits that people mistake for each other


class MistakenDigits(DigitsDataset):
    """Digits, of which a quarter of those in CONFUSED have the label of the other one."""

    @classmethod
    def splits(cls, config):
        train_set, val_set = super().splits(config)
        chance = np.random.default_rng(1).random(len(train_set))
        train_set.samples = [
            (image, CONFUSED.get(label, label) if chance[i] < 0.25 else label)
            for i, (image, label) in enumerate(train_set.samples)
        ]
        return train_set, val_set


def wrong_labels() -> np.ndarray:
    sound = DigitsDataset.splits(None)[0]
    mistaken = MistakenDigits.splits(None)[0]
    return np.array(
        [a != b for (_, a), (_, b) in zip(sound.samples, mistaken.samples, strict=True)]
    )


def listed(folder):
    (path,) = folder.glob("suspected_labels_*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_wrong_labels_are_found_left_out_and_listed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(train_ast.DATASETS, "digits", MistakenDigits)
    settings = [
        *AUTO,
        *DIGITS,
        "training.epochs=10",
        "training.loss=early_learning",
    ]
    result, path = train(make_config(*settings, f"logging.output_dir={tmp_path}"))
    history = result["training_history"]
    wrong = wrong_labels()
    assert history["forgotten"][:5] == [0.0] * 5
    assert 0.5 * wrong.mean() < history["forgotten"][-1] < 1.2 * wrong.mean()
    assert history["activation_rate"][-1] == 1.0  # of those that are left
    assert history["samples_loaded"][-1] < history["samples_loaded"][0]
    rows = listed(tmp_path)
    shares = ["given_probability", "suggested_probability"]
    assert list(rows[0]) == ["index", "sample", "given", "suggested", *shares, "left_out"]
    margins = [float(row[shares[1]]) - float(row[shares[0]]) for row in rows]
    assert np.diff(margins).max() <= 2e-4  # they are rounded
    assert margins[-1] >= 0
    found = np.array([int(row["index"]) for row in rows])
    assert wrong[found].mean() >= 0.85
    assert wrong[found].sum() >= 0.8 * wrong.sum()
    out = [int(row["index"]) for row in rows if row["left_out"] == "1"]
    assert wrong[out].mean() > 0.9
    assert len(out) / len(wrong) == pytest.approx(history["forgotten"][-1], abs=0.02)
    said = f"({len(rows)} of 1,437 samples, {len(out)} of them left out; estimated wrong: "
    assert said in capsys.readouterr().out
    assert path.with_suffix(".suspected.png").read_bytes().startswith(b"\x89PNG")
    page = tmp_path / "page.html"
    assert analyze(["--results-dir", str(tmp_path), "--report", str(page)]) == 0
    assert "Suspected labels" in page.read_text()
    assert result["suspected_labels"].startswith(said[1:])
    assert f": {result['suspected_labels']}</figcaption>" in page.read_text()
    assert "data:image/png;base64,iVBOR" in page.read_text()


@pytest.mark.long
def test_sound_labels_are_left_in(tmp_path):
    few = ["training.epochs=8", "dataset.max_train_samples=1000"]
    result, _ = train(make_config(*AUTO, *DIGITS, *few, f"logging.output_dir={tmp_path}"))
    assert max(result["training_history"]["forgotten"]) < 0.02


def test_a_run_that_forgets_nothing_says_so_and_lists_nothing(tmp_path):
    few = [
        "dataset.max_train_samples=64",
        "training.epochs=2",
        "ast.mode=dense",
        "ast.forget_rate=auto",
    ]
    result, path = train(make_config(*DIGITS, *few, f"logging.output_dir={tmp_path}"))
    assert result["training_history"]["forgotten"] == [None, None]
    assert not list(tmp_path.glob("suspected*"))
    assert json.loads(path.read_text())["training_history"]["forgotten"] == [None, None]


# ---------------------------------------------------------------------------------------- One epoch


def doubting_run(monkeypatch, out: list[int], *overrides: str, samples: int = 40) -> Run:
    """A run past half of its schedule that doubts the labels of the samples `out`."""
    monkeypatch.setattr(
        lab.method.doubt,
        "doubted",
        lambda columns, before, progress: np.isin(np.arange(samples), out),
    )
    config = make_config(
        "ast.warmup_epochs=0", "training.epochs=3", "ast.anneal_epochs=1", *overrides
    )
    run = Run.build(config, LayerNormNet(), CPU, planned_steps=100, samples=samples)
    run.schedule.applied = 60
    return run


@pytest.mark.parametrize(
    "way", [AUTO, ["ast.forget_rate=auto"], [*AUTO, "ast.target_activation=0.5"]]
)
@pytest.mark.parametrize("epoch", [0, 2])  # a sparse and a dense one
def test_who_is_doubted_is_not_loaded_but_for_a_few(way, epoch, monkeypatch):
    out = list(range(0, 40, 2))
    run = doubting_run(monkeypatch, out, *way)
    scores = torch.arange(40.0)
    run.selection.store.record(
        torch.arange(40), Visit(scores, scores, *3 * [torch.zeros(40)]), epoch
    )
    run.start_epoch(epoch, np.random.default_rng(0).permutation(40))
    weights = run.selection.weights.numpy()
    assert run.selection.doubt.forgotten() == 0.5
    assert set(weights[out]) == {LEFT_OUT, 0.0}
    assert 1 <= np.count_nonzero(weights[out] == 0) <= 10
    if epoch == 2 or "ast.target_activation=0.5" not in way:
        assert (weights[1::2] == 1).all()
    else:  # the target is a share of those that are believed: the upper half of their scores
        assert (weights[1:20:2] == LEFT_OUT).all()
        assert (weights[21::2] == 1).all()
    assert (run.selection.mask() == (weights == 1)).all()
    again = run.selection.doubt.looks(np.arange(39, -1, -1))
    assert again.tolist() == np.flatnonzero(weights == 0)[::-1].tolist()


def test_before_half_of_the_schedule_all_are_believed(monkeypatch):
    run = doubting_run(monkeypatch, [0, 1, 2], *AUTO)
    run.schedule.applied = 49
    run.start_epoch(0, np.arange(40))
    assert run.selection.doubt.forgotten() == 0.0
    assert run.selection.mask().all()


def test_who_is_looked_at_again_is_recorded_and_in_no_step(monkeypatch):
    run = doubting_run(monkeypatch, [], *AUTO, samples=16)
    model = run.network.model
    before = [p.clone() for p in model.parameters()]
    images, labels = make_batch()
    run.start_epoch(0, np.arange(16))
    with torch.no_grad():
        logits = model(run.network.normalise(images))
    parts = [DeviceBatch(images[p], labels[p], torch.arange(16)[p]) for p in ([8, 9], [], [11])]
    batches = iter([*parts, DeviceBatch(images, labels, torch.arange(16))])
    look_again(run, batches, 3)
    assert len(next(batches).labels) == 16  # the first batch of a step is left
    columns = run.selection.store.columns
    seen = [8, 9, 11]
    assert np.flatnonzero(columns["visits"].numpy()).tolist() == seen
    assert np.flatnonzero(run.selection.store.last_epoch.numpy() == 0).tolist() == seen
    losses = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(columns["loss"][seen], losses[seen])
    assert all(map(torch.equal, before, model.parameters()))
    assert all(p.grad is None for p in model.parameters())
    ledger = run.metrics.ledger
    assert (ledger.loaded, ledger.looked, ledger.trained, ledger.scored) == (3, 3, 0, 0)
    assert run.metrics.meter.trained == 0
    assert not run.metrics.times_trained.times.any()
    assert ledger.dense_equivalents() == pytest.approx(1)


def test_who_waited_for_a_full_batch_has_its_weight_in_the_next_epoch(monkeypatch):
    """It was chosen while its label was believed. With weight 0 it would be dead in a step."""
    run = doubting_run(monkeypatch, [0, 1, 2, 3], "ast.forget_rate=auto", "ast.pack=true")
    run.start_epoch(0, np.arange(40))
    images, labels = make_batch(8)
    weights = run.selection.loss_weights(DeviceBatch(images, labels, torch.arange(8)))
    assert weights.tolist() == [1.0] * 8


# ------------------------------------------------------------------------------ Resumed, and shared

SMALL = [*DIGITS, "dataset.max_train_samples=128", "dataset.label_noise=0.3", "training.epochs=4"]
WITH_ROWS = [*AUTO, "training.loss=early_learning"]
BATCHES = ["ast.target_activation=0.6", "ast.forget_rate=auto", "ast.pack=true"]


LISTED = ["ast.mode=dense", "training.list_suspects=true"]


@pytest.mark.parametrize("way", [WITH_ROWS, BATCHES, LISTED])
def test_a_resumed_run_forgets_the_same(way, tmp_path, monkeypatch):
    monkeypatch.setattr(lab.method.doubt, "STREAK", 1)
    whole, parts = (
        make_config(*SMALL, *way, f"logging.output_dir={tmp_path / name}")
        for name in ("whole", "parts")
    )
    result, _ = train(whole)
    assert way == LISTED or result["training_history"]["forgotten"][-1] > 0
    assert train(parts, StopAfter(9))[0]["status"] == "interrupted"
    resumed, _ = train(parts, resume="auto")
    assert same(final_state(whole), final_state(parts))
    assert listed(tmp_path / "whole") == listed(tmp_path / "parts")
    assert resumed["ledger"] == result["ledger"]
    assert (result["ledger"]["looked"] > 0) == (way != LISTED)


def test_two_processes_forget_alike_and_one_of_them_lists(tmp_path, monkeypatch):
    monkeypatch.setattr(lab.method.doubt, "STREAK", 1)
    config = make_config(*SMALL, *WITH_ROWS, f"logging.output_dir={tmp_path / 'out'}")
    one, two = ranks(2, lambda rank: train(config)[0], tmp_path / "ranks").results()
    assert one["training_history"] == two["training_history"]
    assert one["training_history"]["forgotten"][-1] > 0
    assert (checkpoint_folder(config) / "last.pt").exists()
    assert one["ledger"]["looked"] > 0
    assert sum(row["left_out"] == "1" for row in listed(tmp_path / "out")) > 0


def test_a_dense_run_lists_copies_of_a_picture_once(tmp_path):
    twice = ["dataset.max_train_samples=300", "training.epochs=5", "dataset.repeat=2"]
    train(make_config(*SMALL, *LISTED, *twice, f"logging.output_dir={tmp_path}"))
    rows = listed(tmp_path)
    indices = [int(row["index"]) for row in rows]
    assert len(set(indices)) == len(indices)
    assert [row["sample"] for row in rows] == [f"sample {index}" for index in indices]
    shifts = label_shifts(1437, 10, 0.3, 0)
    used = random_subset(1437, 300)
    assert set(indices) <= set(used.tolist())
    assert (shifts[indices] > 0).mean() > 0.8
    assert (shifts[indices] > 0).sum() > 0.7 * (shifts[used] > 0).sum()
    assert {row["left_out"] for row in rows} == {"0"}


def test_what_a_list_cannot_be_made_of_is_refused():
    with pytest.raises(RequestError, match="ast.candidates: 1 for training.list_suspects"):
        make_config("training.list_suspects=true", "ast.candidates=0.8")


def test_a_fixed_rate_says_what_it_leaves_out(tmp_path):
    way = [
        "ast.scoring=history",
        "ast.target_activation=0.7",
        "ast.forget_rate=0.25",
        "ast.explore=0",
    ]
    result, _ = train(make_config(*SMALL, *way, f"logging.output_dir={tmp_path}"))
    assert result["training_history"]["forgotten"] == [0.0, *3 * [pytest.approx(0.25, abs=0.01)]]
    left_out = sum(row["left_out"] == "1" for row in listed(tmp_path))
    assert 0 < left_out <= 32


def test_the_list_holds_no_formula(tmp_path, image_folder):
    (image_folder / "train" / "blue").rename(image_folder / "train" / "=cmd()")
    (image_folder / "val" / "blue").rename(image_folder / "val" / "=cmd()")
    paths = [f"dataset.train_dir={image_folder}/train", f"dataset.val_dir={image_folder}/val"]
    way = [
        "dataset.type=folder",
        "dataset.image_size=16",
        "model.name=test_resnet",
        "training.num_workers=0",
    ]
    sizes = [
        "training.batch_size=8",
        "training.epochs=2",
        "ast.scoring=history",
        "ast.forget_rate=0.2",
    ]
    train(
        make_config(
            *paths,
            *way,
            *sizes,
            "ast.target_activation=0.8",
            f"logging.output_dir={tmp_path / 'out'}",
        )
    )
    rows = listed(tmp_path / "out")
    names = {row[name] for row in rows for name in ("given", "suggested")}
    assert names <= {"'=cmd()", "green", "red"}
    assert "'=cmd()" in names
    assert all(row["sample"].startswith(str(image_folder)) for row in rows)
