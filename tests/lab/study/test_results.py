"""Reading results files: what is left out, and why."""

import os

import numpy as np
import pytest

from conftest import REPO, make_config
from helpers import write_run
from lab.study.results import apart, dense_step_ms, load_runs, settings_of, sparse_epochs


@pytest.mark.parametrize(
    "overrides",
    [
        ["ast.warmup_epochs=2", "ast.anneal_epochs=3"],
        ["ast.mode=random", "ast.warmup_epochs=1"],
        ["ast.mode=dense"],
        ["ast.rule=infobatch", "ast.scoring=history", "ast.entropy_weight=0"],
    ],
)
def test_sparse_epochs_are_those_of_the_config(overrides):
    config = make_config("training.epochs=17", *overrides)
    settings = settings_of({"config": config.model_dump()})
    planned = [config.is_sparse(epoch) for epoch in range(17)]
    assert sparse_epochs({"activation_rate": np.ones(17)}, settings).tolist() == planned
    assert (
        sparse_epochs({"activation_rate": np.ones(5)}, settings).tolist() == planned[:5]
    )  # the run was cut short
    assert sparse_epochs({"activation_rate": np.where(planned, 0.5, 1.0)}, {}).tolist() == planned


def test_every_published_result_is_still_read():
    """Whatever the lab of its day wrote; with its own labels, see test_settings.py."""
    files = list((REPO / "results" / "published").rglob("final_results_*.json"))
    assert len(files) > 400
    for folder in {path.parent for path in files}:
        runs, left_out = load_runs([folder])
        assert runs
        for reason in left_out.values():
            assert reason == "interrupted" or reason.startswith("config and seed of ")


def test_a_run_knows_the_time_of_its_dense_steps():
    config = make_config("training.epochs=8", "ast.warmup_epochs=4", "ast.anneal_epochs=1")
    settings = settings_of({"config": config.model_dump()})
    history = {
        "activation_rate": np.array([1, 1, 1, 1, 0.5, 0.5, 1, 1.0]),
        "step_time_ms": np.array([40, 10, 10, 30, 5, 5, 5, 12.0]),
        "samples_scored": np.array([0, 0, 0, 0, 100, 100, 100, 0.0]),
        **{f"samples_{kind}": np.full(8, 100.0) for kind in ("loaded", "trained")},
    }
    # of 10, 10, 30 and 12 the middle half; the first epoch warms up, the scored ones cost more
    assert dense_step_ms(history, settings) == 11
    short = {key: values[:1] for key, values in history.items()}
    assert dense_step_ms(short, settings) == 40
    auto = history | {"samples_scored": np.array([0, 0, 0, 0, 100, 100, 0, 0.0])}
    assert dense_step_ms(auto, settings) == pytest.approx((10 + 10 + 12) / 3)  # 5 and 30 left out
    foreign = {key: history[key] for key in ("activation_rate", "step_time_ms")}
    assert dense_step_ms(foreign, {}) == pytest.approx((10 + 10 + 12) / 3)
    assert np.isnan(dense_step_ms({}, settings))
    sparse = settings | {"ast.warmup_epochs": "0", "ast.anneal_epochs": "0"}
    assert dense_step_ms(history, sparse) == 11  # nothing was scored in the first four
    scored = history | {"samples_scored": np.full(8, 100.0)}
    assert np.isnan(dense_step_ms(scored, sparse))


def test_steps_more_than_a_tenth_apart_are_apart():
    assert apart([10.0, 11.0, float("nan")]) is None
    assert apart([10.0, 11.2, 10.5]) == (10.0, 11.2)
    assert apart([float("nan")]) is apart([]) is None


def test_what_is_left_out_and_why(results, tmp_path):
    write_run(tmp_path, "1")
    write_run(tmp_path, "2")  # the same again
    write_run(tmp_path, "3", training__seed=1, extra={"status": "interrupted"})
    write_run(
        tmp_path,
        "4",
        training__seed=2,
        extra={"status": "failed", "error": "out\nof memory \ud800"},
    )
    write_run(tmp_path, "5", training__seed=3, dataset__type="hf", dataset__name="cifar10")
    write_run(tmp_path, "6", training__seed=4, extra={"training_history": {"val_acc": ["high"]}})
    write_run(tmp_path, "7", training__seed=5, extra={"config": [1]})
    (tmp_path / "final_results_8.json").write_text("[1, 2]")
    (tmp_path / "final_results_9.json").write_bytes(b"\xff\xfe{")
    runs, left_out = load_runs([tmp_path, results], "digits")
    reasons = {name.rpartition("final_results_")[2]: reason for name, reason in left_out.items()}
    assert reasons.pop("1.json").startswith("config and seed of ")
    assert reasons.pop("3.json") == "interrupted"
    assert reasons.pop("4.json") == "failed: out of memory ?"
    assert reasons.pop("5.json") == "other dataset: hf:cifar10"
    assert (
        reasons.pop("6.json")
        == "not a results file of the lab: val_acc: a list of numbers was expected, not 'high'"
    )
    assert reasons.pop("7.json").startswith("not a results file of the lab: ")
    assert reasons.pop("8.json") == "not a JSON object"
    assert reasons.pop("9.json").startswith("not valid JSON: ")
    assert reasons.pop("20200101_000000.json") == "other dataset: it does not say which"
    assert reasons.pop("20200101_000001.json").startswith("not valid JSON: ")
    assert (
        reasons.pop("20200101_000002.json")
        == "no total_time_hours, epochs_completed, training_history"
    )
    assert not reasons
    assert len(runs) == 4


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"best_accuracy": 1e300}, "1e+300 is out of range"),
        ({"best_accuracy": True}, "a number was expected, not True"),
        ({"best_accuracy": "90"}, "a number was expected, not '90'"),
        ({"final_accuracy": -1}, "-1 is out of range"),
        ({"train_seconds": 10**400}, "int too large to convert to float"),
        ({"epochs_completed": None}, "cannot convert float NaN to integer"),
        ({"status": "completee"}, "status: 'completee' is none of completed, early_stopped"),
        (
            {"training_history": {"val_acc": [101.0]}},
            "val_acc: a value is out of its range of 0 to 100",
        ),
        (
            {"training_history": {"val_acc": [True]}},
            "val_acc: a list of numbers was expected, not True",
        ),
        ({"training_history": {"threshold": [1e300]}}, "threshold: a value is out of its range"),
        ({"training_history": {"val_acc": 3}}, "val_acc: a list of numbers was expected, not 3"),
    ],
)
def test_what_cannot_be_a_figure_is_refused(changes, reason, tmp_path):
    write_run(tmp_path, "good", training__seed=1)
    write_run(tmp_path, "bad", extra=changes)
    runs, left_out = load_runs([tmp_path])
    assert [run.name for run in runs] == ["good"]
    (found,) = left_out.values()
    assert found.startswith("not a results file of the lab: ")
    assert reason in found


def test_what_is_no_file_is_left_out_and_not_waited_for(tmp_path):
    write_run(tmp_path, "good")
    os.mkfifo(tmp_path / "final_results_pipe.json")
    (tmp_path / "final_results_zero.json").symlink_to("/dev/zero")
    (tmp_path / "final_results_none.json").symlink_to("nowhere")
    (tmp_path / "final_results_folder.json").mkdir()
    runs, left_out = load_runs([tmp_path])
    assert len(runs) == 1
    assert (
        sorted(left_out.values())
        == [
            "[Errno 2] No such file or directory: "
            + repr(str(tmp_path / "final_results_none.json"))
        ]
        + ["not a regular file"] * 3
    )


def test_a_later_failure_does_not_hide_a_finished_run(tmp_path):
    finished = write_run(tmp_path, "1")
    write_run(tmp_path, "2", extra={"status": "interrupted"})
    runs, left_out = load_runs([tmp_path, tmp_path])
    assert [run.path for run in runs] == [finished]
    assert list(left_out.values()) == ["interrupted"]
