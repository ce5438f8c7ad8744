"""What gives the scores, and what a target of auto makes of the predictions."""

import copy
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from conftest import (
    BatchNormNet,
    LayerNormNet,
    make_batch,
    make_config,
    make_run,
    scores_of,
    sparse_step,
)
from helpers import run_digits
from lab.config.sections import ModelConfig
from lab.engine.checkpoint import load_checkpoint
from lab.models.building import count_flops, eval_view, get_model
from train_ast import (
    AutoTarget,
    Evidence,
    build_dataloaders,
    kept_out_of,
    load_kept_out,
    significance,
    train,
)

CIFAR = [
    "dataset.image_size=16",
    "training.batch_size=32",
    "dataset.max_train_samples=256",
    "training.lr=0.1",
]
CIFAR += [
    "dataset.max_val_samples=64",
    "model.name=small_conv",
    "training.num_workers=0",
    "ast.warmup_epochs=1",
]
QUICK = [*CIFAR, "dataset.repeat=2", "training.optimizer=adamw", "training.lr=0.01"]
QUICK += ["ast.rule=topk"]


@pytest.mark.parametrize(
    ("wrong", "cost", "target"),
    [
        (1.0, 1 / 3, 1.0),  # nothing is learned yet
        (0.23, 1 / 3, 1.0),  # 0.69 and the scoring cost more than a dense step
        (0.20, 1 / 3, 0.6),
        (0.10, 1 / 3, 0.5),  # never below a half
        (0.0, 1 / 3, 0.5),
        (0.30, 0.02, 0.9),  # cheap scores pay sooner
        (0.33, 0.02, 1.0),
    ],
)
def test_auto_follows_the_share_of_wrong_predictions(wrong, cost, target):
    assert auto_after(wrong, cost) == pytest.approx(target)


def auto_after(wrong: float, cost: float) -> float:
    """The target after an epoch with so many wrong predictions."""
    auto = AutoTarget(1.0)
    auto.end_epoch(Evidence(wrong, decides=True, left=1), lambda target: target + cost)
    return auto.value


def test_a_run_with_a_target_of_auto_is_dense_until_enough_is_learned(tmp_path, capsys):
    keys = ["ast.target_activation=auto", "training.epochs=8", "ast.pack=true", *QUICK]
    result, _ = train(make_config(*keys, f"logging.output_dir={tmp_path}"))
    history = result["training_history"]
    target = result["auto_target"]
    without = target["epochs_without"]
    assert (target["kept_out"], target["selects"]) == (6, True)
    assert 1 < without < 5
    for epoch in range(1, 8):
        share = auto_after(1 - history["train_acc"][epoch - 1] / 100, 1 / 3)
        assert (share < 1) is (epoch >= without)
        assert history["target"][epoch] == (None if share == 1 else pytest.approx(share))
        assert history["activation_rate"][epoch] == pytest.approx(share, abs=1 / 32)
    # dense epochs score the pictures kept out alone, two copies of which they do without
    assert history["samples_scored"] == [6] * without + [512] * (8 - without)
    assert history["samples_loaded"] == [480] * without + [512] * (8 - without)
    assert (
        history["lr"][-1] < 0.1 * 0.01
    )  # planned anew with each target, the schedule still ends at its end
    assert history["lr"] == sorted(history["lr"], reverse=True)
    said = f"note: ast.target_activation=auto kept 6 pictures out of {without} epochs"
    assert said in capsys.readouterr().out


def test_mixed_pictures_are_judged_before_they_are_mixed(tmp_path):
    """MixUp of equal parts: of a mixture about half of the answers are wrong whatever the network
    knows, so that by its answers a selection would never begin.
    """
    keys = ["ast.target_activation=auto", "training.epochs=7", "ast.pack=true", *QUICK]
    result, _ = train(make_config(*keys, "training.mixup=1000", f"logging.output_dir={tmp_path}"))
    history = result["training_history"]
    assert history["target"][0] is None
    # a batch, of the 15 of a dense epoch, and the pictures kept out
    assert history["samples_scored"][0] == 32 + 6
    assert history["target"][-1] == 0.5
    assert history["samples_scored"][-1] == 512
    assert history["train_acc"][-1] > 85


def note_of(output: str) -> str:
    (line,) = (line for line in output.splitlines() if "trained on all samples" in line)
    return line


def test_a_run_that_stayed_dense_says_by_which_figure_and_what_would_change_it(tmp_path, capsys):
    keys = ["ast.target_activation=auto", *CIFAR, f"logging.output_dir={tmp_path}"]
    result, _ = train(make_config(*keys, "training.epochs=3", "training.lr=1e-4"))
    wrong = 100 - max(result["training_history"]["train_acc"][:2])  # the last decides nothing
    assert note_of(capsys.readouterr().out) == (
        "note: ast.target_activation=auto trained on all samples in every epoch: "
        f"{wrong:.1f} % of the samples were predicted wrongly at best while half of the sparse "
        "epochs were left, and a selection begins below 22.2 %: train longer, score at less cost "
        "(ast.score_resolution), or give ast.target_activation a number; it kept 6 pictures out "
        "of 2 epochs"
    )
    train(make_config(*keys, "training.epochs=1", "ast.warmup_epochs=0"))
    assert "no sparse epoch came after its first" in note_of(capsys.readouterr().out)


# ------------------------------------------------------------------------------- Pictures kept out


def two_passes(target: float) -> float:
    return target + 1 / 3


@pytest.mark.parametrize(
    ("wrong", "unseen_wrong", "target"),
    [
        (0.06, 0.45, 1.0),  # learned by heart: of the active half 12 % are wrong
        (0.06, 0.18, 0.5),  # within two standard errors, 6.3 points
        (0.06, 0.19, 1.0),
        (0.20, 0.39, 0.6),  # of the active 33 % are wrong
        (0.20, 0.40, 1.0),
        (0.50, 0.10, 1.0),  # too far to go
    ],
)
def test_auto_selects_while_the_active_are_harder_than_pictures_kept_out(
    wrong, unseen_wrong, target
):
    auto = AutoTarget(1.0)
    auto.end_epoch(Evidence(wrong, True, 1, 250, unseen_wrong), two_passes)
    assert auto.value == pytest.approx(target)
    assert auto.keeps_out is (target == 1)


def test_auto_judges_by_the_share_that_would_be_trained_on():
    """With forward once by three quarters, of which fewer are wrong than of 0.6."""
    for in_quarters, target in ((False, 0.6), (True, 1.0)):
        auto = AutoTarget(1.0)
        auto.moves_in_quarters = in_quarters
        auto.end_epoch(Evidence(0.2, True, 1, 250, 0.37), lambda target: (1 + 2 * target) / 3)
        assert auto.value == pytest.approx(target)
    assert auto.facts()["active_wrong"] == pytest.approx(0.2 / 0.75)


def test_without_pictures_kept_out_nothing_is_said_of_them():
    auto = AutoTarget(1.0)
    auto.end_epoch(Evidence(0.1, True, 1), two_passes)
    assert auto.facts()["selects"]
    assert auto.facts()["unseen_wrong"] is None


def test_why_a_run_stayed_dense_is_not_said_of_predictions_that_did_not_decide():
    auto = AutoTarget(1.0)
    auto.end_epoch(Evidence(0.01, False, 1), lambda target: target + 0.6)
    assert not auto.keeps_out  # at once: it would never cost less
    assert auto.why_dense(lambda target: target + 0.6) == (
        "scoring all and training on half cost 1.10 of training on all: score at less cost "
        "(ast.score_resolution)"
    )
    auto = AutoTarget(1.0)
    auto.end_epoch(Evidence(0.01, True, 1, 250, 0.0), two_passes)
    assert auto.why_dense(two_passes) == "the run ended before the selection began"


@pytest.mark.parametrize(
    ("epochs", "selects", "without"),
    [
        # of each epoch: the share wrong, that of the kept out, the sparse epochs left
        ([(0.5, 0.6, 1.0), (0.2, 0.5, 0.9), (0.2, 0.5, 0.8), (0.1, 0.5, 0.7)], False, 4),
        ([(0.2, 0.5, 0.9), (0.2, 0.5, 0.8), (0.2, 0.3, 0.7), (0.2, 0.9, 0.6)], True, 3),
        ([(0.5, 0.6, 0.6), (0.4, 0.5, 0.5), (0.3, 0.4, 0.4), (0.2, 0.3, 0.3)], False, 3),
        ([(0.5, 0.6, 0.6), (0.2, 0.3, 0.4)], True, 2),
        ([(0.2, 0.5, 0.0)], False, 1),  # the only one that decides
        ([(0.5, 0.6, 1.0), (0.3, 0.6, 0.9)], None, 2),
    ],
)
def test_auto_decides_once(epochs, selects, without):
    """By three epochs, or in the first half of the sparse ones; whatever comes later."""
    auto = AutoTarget(1.0)
    for wrong, unseen_wrong, left in epochs:
        auto.end_epoch(Evidence(wrong, True, left, 250, unseen_wrong), two_passes)
    for wrong in (0.05, 0.3, 0.05) if selects is not None else ():
        auto.end_epoch(Evidence(wrong, True, 0.0), two_passes)
        assert auto.value == (0.5 if selects and wrong == 0.05 else 1.0)
    assert auto.facts()["selects"] is selects
    assert auto.facts()["epochs_without"] == without
    assert auto.keeps_out is (selects is None)


def test_dense_epochs_before_the_sparse_ones_decide_nothing():
    auto = AutoTarget(1.0)
    auto.end_epoch(Evidence(0.01, decides=False, left=1.0), two_passes)
    assert auto.keeps_out
    assert auto.value == 1
    auto.end_epoch(Evidence(0.01, decides=False, left=0.0), two_passes)  # nor is there one left
    assert not auto.keeps_out
    assert auto.value == 1


def test_where_time_ends_the_run_half_of_it_is_the_last_moment():
    run = make_run(LayerNormNet(), "training.lr_decay=time", "training.max_minutes=1")
    run.schedule.shares = dataclasses.replace(run.schedule.shares, span=range(2, 10))
    assert run.sparse_left == 1
    run.metrics.epoch = 4
    assert run.sparse_left == 4 / 8
    run.clock.train_seconds = 45
    assert run.sparse_left == 0.25


def test_a_picture_that_is_kept_out_is_in_no_copy_and_comes_once_it_is_decided():
    config = make_config(
        *CIFAR,
        "dataset.repeat=2",
        "ast.target_activation=auto",
        "training.epochs=4",
        "dataset.label_noise=0.5",
    )
    data = build_dataloaders(config, torch.device("cpu"))
    size = len(data.train.dataset)
    batches = load_kept_out(data, config)
    labels = torch.cat([batch.labels for batch in batches]).tolist()
    kept_out = torch.cat([batch.indices for batch in batches]).tolist()
    assert len(kept_out) == 6  # a fortieth of 256
    shifts = data.train.dataset.label_shifts[kept_out]
    clean = [data.train.dataset.load(index).label for index in kept_out]
    assert labels == [(a + b) % 10 for a, b in zip(clean, shifts.tolist(), strict=True)]
    for keeps_out in (True, False):
        data.plan.keeps_out = keeps_out
        data.plan.start_epoch(2)
        loaded = {index % size for batch in data.plan for index, _ in batch}
        assert loaded.isdisjoint(kept_out) is keeps_out
    for seed in (0, 1):
        fewer = kept_out_of(data.plan.all_indices, size, 5, seed)
        assert len(fewer) == 10  # each comes twice
        assert (set(fewer % size) < set(kept_out)) is (seed == 0)
    for pictures, count in ((39, 0), (40, 1), (1_437, 35), (50_000, 250)):
        assert len(kept_out_of(np.arange(pictures), pictures, AutoTarget.KEEPS_OUT, 0)) == count


def test_what_is_learned_by_heart_is_trained_on_whole(tmp_path, capsys):
    """Nine labels of ten are random: by what the network answers of these pictures half of them
    would do, by what it answers of others it knows nothing but them.
    """
    keys = [*QUICK, "dataset.label_noise=0.9", "dataset.repeat=7", "training.epochs=4"]
    keys += ["training.seed=1"]
    keys += ["training.lr=0.002", "training.lr_schedule=constant", "ast.warmup_epochs=2"]
    keys += ["ast.target_activation=auto", f"logging.output_dir={tmp_path}"]
    result, _ = train(make_config(*keys))
    history = result["training_history"]
    target = result["auto_target"]
    assert auto_after(1 - history["train_acc"][2] / 100, 1 / 3) < 1
    assert set(history["target"]) == {None}
    assert (target["kept_out"], target["selects"], target["epochs_without"]) == (6, False, 3)
    assert target["unseen_wrong"] - 6**-0.5 > target["active_wrong"]
    assert history["samples_scored"] == [0, 6, 6, 0]
    assert result["ledger"]["judged"] == 12
    assert history["samples_loaded"] == [1728, 1728, 1728, 1792]
    printed = capsys.readouterr().out
    assert "keeps 6 pictures out until it is decided by them whether" in printed
    assert "of 6 pictures kept out were predicted wrongly" in note_of(printed)
    assert note_of(printed).endswith("; it kept 6 pictures out of 3 epochs")


def test_kept_out_pictures_that_cannot_be_read_decide_nothing(tmp_path):
    """Nor do others stand in for them."""
    for index in range(48):
        folder = tmp_path / "train" / "ab"[index % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (200 * (index % 2), 0, index)).save(folder / f"{index}.png")
    keys = ["dataset.type=folder", f"dataset.train_dir={tmp_path / 'train'}"]
    keys += [f"dataset.val_dir={tmp_path / 'train'}", "dataset.max_bad_images=1"]
    keys += ["dataset.image_size=8", "ast.target_activation=auto"]
    config = make_config(*keys)
    data = build_dataloaders(config, torch.device("cpu"))
    (index,) = data.plan.kept_out
    assert len(load_kept_out(data, config)[0].labels) == 1
    Path(data.train.dataset.name_of(index)).write_bytes(b"no picture")
    assert load_kept_out(data, config) is None


@pytest.mark.parametrize(
    ("overrides", "line"),
    [
        (
            ["ast.target_activation=auto", "ast.mode=random"],
            "ast.target_activation: auto needs ast.mode=ast",
        ),
        (
            ["ast.target_activation=auto", "ast.scoring=history", "ast.explore=0.5"],
            "ast.explore: 0.5 or more of all samples, and ast.target_activation is no larger",
        ),
        (["ast.target_activation=often"], "ast.target_activation: expected"),
        (["ast.target_activation=1.5"], "ast.target_activation: expected"),
        (
            ["ast.scoring=proxy", "ast.proxy_model=reznet"],
            "ast.proxy_model: no model 'reznet'; did you mean",
        ),
        (
            ["ast.scoring=proxy", "ast.proxy_model=vit_b_16", "ast.score_resolution=12"],
            "ast.proxy_model: vit_b_16 does",
        ),
        (
            ["ast.scoring=proxy", "ast.score_resolution=64"],
            "ast.score_resolution: at most dataset.image_size=16",
        ),
        (
            ["ast.scoring=proxy", "ast.score_statistics=batch"],
            "ast.score_statistics: nothing reads it here; it needs ast.scoring=batch",
        ),
        (
            ["ast.rule=topk", "ast.kp=1"],
            "ast.kp: nothing reads it here; it needs ast.rule=pi",
        ),
    ],
)
def test_what_does_not_fit_is_one_line(overrides, line, tmp_path, capfd):
    assert run_digits(tmp_path, *overrides) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert line in error


def test_scores_by_batch_statistics_are_those_of_training_and_leave_the_averages_alone():
    torch.manual_seed(0)
    model = get_model(ModelConfig(name="small_conv"), 10, 16)
    model.train()(torch.randn(64, 3, 16, 16) * 3 + 1)
    before = copy.deepcopy(model.state_dict())
    images = torch.randn(32, 3, 16, 16)
    with torch.no_grad():
        got = eval_view(model, batch_statistics=True)(images)
        running = eval_view(model)(images)
        assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        assert not torch.allclose(got, running)
        assert torch.allclose(running, copy.deepcopy(model).eval()(images))
        assert torch.equal(got, model(images))  # in training mode


def test_dropout_is_off_where_scores_are_by_batch_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    view = eval_view(model, batch_statistics=True)
    images = torch.randn(8, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(view(images), view(images))


def test_a_run_scores_by_the_statistics_that_it_names():
    images, labels = make_batch()
    for statistics in ("running", "batch"):
        run = make_run(
            BatchNormNet(), f"ast.score_statistics={statistics}", "ast.entropy_weight=0.5"
        )
        with torch.no_grad():
            model = copy.deepcopy(run.network.model).train(statistics == "batch")
            expected = significance(model(run.network.normalise(images)), labels, 0.5)
        assert torch.allclose(scores_of(run, images, labels).rows[0], expected, atol=1e-5)


@pytest.mark.parametrize("rule", ["pi", pytest.param("topk", marks=pytest.mark.long)])
def test_a_proxy_scores_learns_and_is_counted(rule, tmp_path):
    keys = [
        "ast.scoring=proxy",
        f"ast.rule={rule}",
        "ast.pack=true",
        "ast.target_activation=0.5",
        "training.epochs=6",
    ]
    keys += [
        *CIFAR,
        "model.name=test_resnet",
        *(["ast.kp=1"] if rule == "pi" else []),
        f"logging.output_dir={tmp_path}",
    ]
    config = make_config(*keys)
    result, _ = train(config)
    history = result["training_history"]
    ledger = result["ledger"]
    # the first epoch is dense: of it, those are scored that the proxy learns from
    assert ledger["scored"] == 64 + 5 * 256
    assert history["activation_rate"][-1] == pytest.approx(0.5, abs=0.1)
    state = load_checkpoint(next(tmp_path.glob("checkpoints/*/last.pt")), config)["selection"]
    state = state["scores"]["proxy"]
    assert state["batches"] == 6 * 8  # it learns in the dense epoch too
    assert ledger["learned"] == 6 * 256 // 4
    # the total holds the proxy's forward of each scored sample, and a backward of every fourth
    # batch
    spent = 1e9 * (history["total_flops_g"][-1] - history["est_flops_g"][-1])
    proxy = get_model(ModelConfig(name="small_conv"), 10, 16)
    passes = (ledger["scored"] + 2 * ledger["learned"]) / 3
    assert spent == pytest.approx(count_flops(proxy, 16) * passes, rel=1e-6)


def test_a_proxy_leaves_the_network_its_random_numbers(tmp_path):
    """The dense epoch before the first score is the same with a proxy and without."""
    ways = {"proxy": ["ast.scoring=proxy"], "own": []}
    first = {}
    for name, way in ways.items():
        keys = [
            *CIFAR,
            "model.name=test_resnet",
            "training.epochs=2",
            *way,
            f"logging.output_dir={tmp_path / name}",
        ]
        first[name] = train(make_config(*keys))[0]["training_history"]["train_loss"][0]
    assert first["proxy"] == first["own"]


def test_a_proxys_predictions_do_not_count_as_the_networks():
    run = make_run(
        LayerNormNet(), "ast.scoring=proxy", "ast.initial_threshold=0", "ast.min_active=0"
    )
    assert sparse_step(run, *make_batch()) == 16
    assert (
        run.metrics.ledger.scored == run.metrics.meter.predicted == 16
    )  # the predictions of the training forward
    run.selection.rule.controller.threshold = 99.0
    assert sparse_step(run, *make_batch()) == 0
    assert (run.metrics.ledger.scored, run.metrics.meter.predicted) == (32, 16)
