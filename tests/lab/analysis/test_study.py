"""The comparison: grouping, labels, intervals, the dense frontier and warnings."""

import json
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from conftest import MINIMAL
from helpers import study_of, write_run
from lab.analysis.study import dense_frontier, difference_half_width, half_width, label_settings, time_to_match
from lab.analysis.tables import frontier_lines

# ------------------------------------------------------------------------------------------- Grouping


def test_real_runs_are_grouped_by_config_with_seeds_as_replicates(results):
    study = study_of(results)
    assert sorted(study.table.index) == ["20200101_000000", "ast", "dense"]
    files = [json.loads(path.read_text()) for path in results.glob("*.json") if "config" in path.read_text()]
    sparse = [file for file in files if file["config"]["ast"]["mode"] == "ast"]
    row = study.table.loc["ast"]
    assert row["n"] == len(sparse) == 2
    finals = [file["final_accuracy"] for file in sparse]
    assert row["final_mean"] == pytest.approx(np.mean(finals))
    assert row["final_sd"] == pytest.approx(np.std(finals, ddof=1))
    assert row["best_mean"] == pytest.approx(np.mean([file["best_accuracy"] for file in sparse]))
    assert row["train_seconds_mean"] == pytest.approx(np.mean([file["train_seconds"] for file in sparse]))
    rates = [file["training_history"]["activation_rate"] for file in sparse]
    assert row["activation"] == pytest.approx(np.mean([rate[1:] for rate in rates]))
    assert row["activation_error"] == pytest.approx(max(abs(rate[2] - 0.25) for rate in rates))
    assert study.table.loc["dense", "n"] == 1
    minimal = study.table.loc["20200101_000000"]
    assert (minimal["final_mean"], minimal["best_mean"], minimal["epochs"]) == (71.5, 71.5, 2)
    assert minimal["activation"] == pytest.approx(0.33)
    assert minimal["tflop"] == pytest.approx(0.17)
    assert minimal["est_energy_kj_mean"] == 6.5
    assert np.isnan(minimal["train_seconds_mean"])


def test_seed_and_logging_make_no_other_setting_and_numbers_are_compared_by_value(tmp_path):
    write_run(tmp_path, "1", ast__kp=1)
    write_run(tmp_path, "2", ast__kp=1.0, training__seed=1, logging__output_dir="elsewhere", logging__jsonl_path="log")
    write_run(tmp_path / "more", "3", ast__kp=1.5, training__seed=2)
    (tmp_path / "final_results_minimal.json").write_text(json.dumps(MINIMAL))  # it knows no seed
    table = study_of(tmp_path, tmp_path / "more").table
    assert list(table["n"]) == [1, 2, 1]
    assert list(table["seeds"]) == ["-", "0 1", "2"]


def test_labels_are_the_shortest_telling_differences():
    base = {"ast.mode": "ast", "ast.target": "0.1", "ast.kp": "1", "training.lr": "1", "model.name": "a"}
    both = [base | {"ast.target": t, "ast.mode": m, "training.lr": t + "0"} for m in ("ast", "random") for t in "12"]

    def label(settings):
        return label_settings(settings, ["file"] * len(settings))

    assert label(both) == ["ast target=1", "ast target=2", "random target=1", "random target=2"]
    assert label([*both, base | {"ast.mode": "dense"}])[-1] == "dense"
    assert label([base]) == ["ast"]
    assert label_settings([{}, {}], ["20200101", "20200102"]) == ["20200101", "20200102"]
    assert label([base, base | {"new.key": "3"}]) == ["ast key=unset", "ast key=3"]
    two = [base | {"dataset.name": "d"}, base | {"dataset.name": "d", "model.name": "b"}]
    assert label(two) == ["ast model.name=a", "ast model.name=b"]  # `name` alone would be two keys


@given(st.lists(st.tuples(*[st.sampled_from("01")] * 4), unique=True, min_size=1))
def test_labels_are_distinct(rows):
    settings = [dict(zip(("ast.mode", "a.x", "a.y", "a.z"), row, strict=True)) for row in rows]
    labels = label_settings(settings, ["file"] * len(rows))
    assert len(set(labels)) == len(rows)
    assert not any("file" in label for label in labels)


def test_dense_twins_of_one_sparse_setting_are_one_setting_for_all_their_budgets(tmp_path):
    for seed in range(2):
        write_run(tmp_path, f"s{seed}", training__seed=seed, extra={"twin": f"final_results_t{seed}.json"})
        twin = {"twin": f"final_results_s{seed}.json"}
        write_run(
            tmp_path, f"t{seed}", training__seed=seed, ast__mode="dense", training__max_minutes=1.1 + seed, extra=twin
        )
    assert dict(study_of(tmp_path).table["n"]) == {"ast": 2, "dense twin": 2}


# ---------------------------------------------------------------------------------------- Statistics


@given(st.lists(st.floats(0, 100), min_size=2, max_size=9))
def test_interval_is_students(values):
    low, high = stats.t.interval(0.95, len(values) - 1, np.mean(values), max(stats.sem(values), 1e-300))
    assert half_width(np.std(values, ddof=1), len(values)) == pytest.approx((high - low) / 2, abs=1e-9)


def test_interval_covers_as_often_as_it_says():
    draws = np.random.default_rng(0).normal(3, 2, (20000, 3))
    half = half_width(draws.std(axis=1, ddof=1), 3)
    assert np.mean(np.abs(draws.mean(axis=1) - 3) < half) == pytest.approx(0.95, abs=0.005)
    assert NormalDist().inv_cdf(0.975) < half_width(1.0, 10**6) * 1000 + 1e-3  # and ends at the normal's
    assert np.isnan(half_width(0.0, 1))


@pytest.mark.filterwarnings("ignore:Precision loss")  # scipy's, for equal values
@given(st.lists(st.integers(0, 100), min_size=2, max_size=6), st.lists(st.integers(0, 100), min_size=2, max_size=6))
def test_interval_of_a_difference_is_welchs(left, right):
    half = difference_half_width(np.std(left, ddof=1), len(left), np.std(right, ddof=1), len(right))
    if np.ptp(left) + np.ptp(right) == 0:
        assert half == 0
    else:
        interval = stats.ttest_ind(left, right, equal_var=False).confidence_interval(0.95)
        assert half == pytest.approx((interval.high - interval.low) / 2)


# ------------------------------------------------------------------------------------------ Frontier


def test_frontier_keeps_what_no_other_reaches_in_less_time():
    seconds = np.array([30.0, 10.0, 20.0, 20.0, 40.0])
    percent = np.array([88.0, 80.0, 90.0, 85.0, 91.0])
    assert dense_frontier(seconds, percent).tolist() == [[10, 80], [20, 90], [40, 91]]
    assert dense_frontier(np.array([]), np.array([])).shape == (0, 2)


def test_time_to_match_interpolates_and_never_extrapolates():
    frontier = np.array([[10.0, 80.0], [20.0, 90.0], [40.0, 91.0]])
    assert time_to_match(85, 15, frontier) == (1.0, "")
    assert time_to_match(90.5, 15, frontier) == (0.5, "")
    assert time_to_match(80, 5, frontier) == (0.5, "")
    assert time_to_match(91, 80, frontier) == (2.0, "")
    assert time_to_match(92, 20, frontier) == (0.5, "<")  # dense needs more than 40 s for that, nobody knows how much
    assert time_to_match(70, 20, frontier) == (2.0, ">")  # dense needs less than 10 s
    assert np.isnan(time_to_match(85, float("nan"), frontier)[0])
    assert np.isnan(time_to_match(85, 15, frontier[:0])[0])


@given(st.lists(st.tuples(st.integers(1, 1000), st.integers(1, 99)), min_size=1), st.integers(1, 99))
def test_on_the_frontier_time_to_match_is_one(points, percent):
    frontier = dense_frontier(*np.array(points, dtype=float).T)
    assert (np.diff(frontier, axis=0) > 0).all()
    for seconds, accuracy in frontier:
        assert time_to_match(accuracy, seconds, frontier) == (pytest.approx(1), "")
    ratio, bound = time_to_match(percent, 10.0, frontier)
    assert ratio > 0
    assert (bound == "") == (frontier[0, 1] <= percent <= frontier[-1, 1])


def test_frontier_is_of_finished_dense_runs_on_the_same_data_model_and_machine(tmp_path):
    for number, (epochs, seconds, accuracy) in enumerate([(3, 10.0, 80.0), (6, 20.0, 90.0)]):
        for seed in range(2):
            values = (1.0, 2.0, accuracy + seed - 0.5)
            write_run(tmp_path, f"d{number}{seed}", values, seconds, ast__mode="dense", training__epochs=epochs,
                      training__seed=seed)  # fmt: skip
    write_run(
        tmp_path, "capped", (1.0, 95.0), 12.0, ast__mode="dense", training__epochs=9, extra={"status": "time_capped"}
    )
    write_run(tmp_path, "other", (1.0, 99.0), 1.0, ast__mode="dense", model__name="resnet50")
    gpu = {"environment": {"gpu": "H200", "platform": "Linux"}}
    write_run(tmp_path, "gpu", (1.0, 98.0), 1.0, ast__mode="dense", training__epochs=8, extra=gpu)
    write_run(tmp_path, "sparse", (1.0, 85.0), 12.0)
    study = study_of(tmp_path)
    row = study.table.loc[next(name for name in study.table.index if name.startswith("ast"))]
    assert (row["time_to_match"], row["time_to_match_bound"]) == (pytest.approx(12 / 15), "")
    assert sorted(len(frontier) for frontier in study.frontiers.values()) == [1, 1, 2]
    assert "dense frontier (model.name=resnet18 gpu=null): 80.00 % in 10.0 s, 90.00 % in 20.0 s" in str(
        frontier_lines(study)
    )
    assert any("the runs come from 2 machines" in text for text in study.warnings)
    assert any("time_capped in 1 of 1 runs" in text for text in study.warnings)


# ------------------------------------------------------------------------------------------ Warnings


def test_warnings(tmp_path):
    history = {"epoch": [1, 2, 3], "val_acc": [90.0, 80.0, float("nan")], "activation_rate": [1.0, 0.5, 0.4]}
    write_run(tmp_path, "1", extra={"training_history": history, "best_accuracy": 90.0})
    write_run(
        tmp_path, "2", training__seed=1, extra={"status": "failed", "error": "non-finite loss in epoch 3, step 2"}
    )
    found = "\n".join(study_of(tmp_path).warnings)
    assert "ast: activation up to 0.150 off its target" in found  # the first sparse epoch does not count
    assert "ast: best epoch inside a dense phase in 1 of 1 runs" in found
    assert "ast: 1 NaN or infinite values in its files" in found
    assert "final_results_2.json: failed: non-finite loss in epoch 3, step 2" in found
