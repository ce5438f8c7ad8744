"""What is refused or said before the first step."""

import pytest

from helpers import run_digits
from runs import ranks

SHRINKS = [
    "model.name=resnet18",
    "dataset.image_size=32",
]  # to one pixel, where BatchNorm needs two samples


@pytest.mark.parametrize(
    ("request_", "complaint"),
    [
        (
            ["training.batch_size=1", "ast.min_active=1"],
            "training.batch_size: 1 is a step of one sample",
        ),
        (
            ["dataset.max_train_samples=1"],
            "training.batch_size: epoch 1 is a single step of 1 of 1 samples",
        ),
        (
            ["dataset.max_train_samples=4", "ast.mode=random"],
            "ast.target_activation: epoch 2 is a single step of 1 of 4 samples",
        ),
        (
            ["ast.min_active=1", "ast.pack=false"],
            "ast.min_active: 1 lets a step train on one sample, 2 does not",
        ),
        (
            ["ast.min_active=0", "ast.pack=false"],
            "ast.min_active: 0 lets a step train on one sample, 2 does not",
        ),
        (
            ["ast.min_active=1", "ast.scoring=history"],
            "ast.min_active: 1 lets a step train on one sample, 2 does not",
        ),
    ],
)
def test_a_step_of_one_sample_is_refused_where_batchnorm_cannot_take_it(
    request_, complaint, tmp_path, capsys
):
    assert run_digits(tmp_path, *SHRINKS, *request_) == 2
    error = capsys.readouterr().err
    assert error == f"error: {complaint}, and BatchNorm in resnet18 cannot normalise a single one\n"
    assert not list(tmp_path.glob("final_results_*"))


def test_one_sample_on_each_process_is_refused(tmp_path):
    ended = ranks(
        2,
        lambda _: run_digits(tmp_path / "out", *SHRINKS, "training.batch_size=2"),
        tmp_path / "ranks",
    )
    assert ended.results() == [2, 2]
    assert [error.split(", ")[0] for error in ended.errors()] == [
        "error: training.batch_size: 2 is a step of one sample on each of the processes"
    ]


@pytest.mark.parametrize(
    "request_",
    [
        ["ast.rule=topk", "training.batch_size=4", "ast.target_activation=0.25", "ast.pack=false"],
        [
            "ast.scoring=history",
            "ast.explore=0",
            "ast.initial_threshold=100",
            "training.batch_size=4",
        ],
    ],
)
def test_the_floor_of_two_holds_under_every_rule(request_, tmp_path):
    assert run_digits(tmp_path, *SHRINKS, "dataset.max_train_samples=16", *request_) == 0


@pytest.mark.parametrize(
    "request_", [["training.batch_size=1", "ast.min_active=1"], ["dataset.max_train_samples=1"]]
)
def test_networks_that_take_a_single_sample_may_have_it(request_, tmp_path):
    few = ["model.name=test_vit", "dataset.image_size=32", "dataset.max_train_samples=4"]
    assert run_digits(tmp_path, *few, *request_) == 0


def test_what_fills_no_batch_is_said_once(tmp_path, capsys):
    assert run_digits(tmp_path, "dataset.max_train_samples=154") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "leaves out" in line]
    assert lines == [
        "note: 154 training samples are 4 batches of 32: each epoch leaves out another 26 of them"
    ]
    assert run_digits(tmp_path) == 0
    assert "leaves out" not in capsys.readouterr().out


def test_gains_too_low_for_short_epochs_are_said_with_those_that_hold(tmp_path, capsys):
    small = ["dataset.max_train_samples=154", "ast.target_activation=0.3"]
    assert run_digits(tmp_path, *small, "ast.kp=0.1", "ast.ki=0.01") == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "control steps" in line]
    assert line == (
        "note: an epoch has 4 control steps, few for ast.kp=0.1: the first sparse epochs may miss "
        "ast.target_activation=0.3; ast.kp=1 ast.ki=0.2 would hold it, after some 5 sparse epochs"
    )
    assert run_digits(tmp_path, *small, "ast.kp=1", "ast.ki=0.2") == 0
    assert "control steps" not in capsys.readouterr().out
