"""The comparison: settings, groups, the dense frontier and warnings."""

import json

import numpy as np
import pytest

from conftest import MINIMAL
from helpers import studies_of, study_of, write_run
from lab.study.analysis.figures import notes_on_bars
from lab.study.analysis.report import render
from lab.study.analysis.settings import UNKNOWN
from lab.study.analysis.tables import (
    frontier_lines,
    text_table,
    to_latex,
    to_markdown,
    verdict,
)

# ----------------------------------------------------------------------------------------- Grouping


def test_real_runs_are_grouped_by_config_with_seeds_as_replicates(results):
    study, unknown = studies_of(results).values()
    assert sorted(study.table.index) == ["ast", "dense"]
    files = [
        json.loads(path.read_text())
        for path in results.glob("*.json")
        if "config" in path.read_text()
    ]
    sparse = [file for file in files if file["config"]["ast"]["mode"] == "ast"]
    row = study.table.loc["ast"]
    assert row["n"] == len(sparse) == 2
    finals = [file["final_accuracy"] for file in sparse]
    assert row["final_mean"] == pytest.approx(np.mean(finals))
    assert row["final_sd"] == pytest.approx(np.std(finals, ddof=1))
    assert row["best_mean"] == pytest.approx(np.mean([file["best_accuracy"] for file in sparse]))
    assert row["train_seconds_mean"] == pytest.approx(
        np.mean([file["train_seconds"] for file in sparse])
    )
    rates = [file["training_history"]["activation_rate"] for file in sparse]
    assert row["activation"] == pytest.approx(np.mean([rate[1:] for rate in rates]))
    assert row["activation_error"] == pytest.approx(max(abs(rate[2] - 0.25) for rate in rates))
    assert study.table.loc["dense", "n"] == 1
    assert unknown.title == UNKNOWN
    minimal = unknown.table.loc["20200101_000000"]
    assert (minimal["final_mean"], minimal["best_mean"], minimal["epochs"]) == (71.5, 71.5, 2)
    assert minimal["activation"] == pytest.approx(0.33)
    assert minimal["tflop"] == pytest.approx(0.17)
    assert minimal["est_energy_kj_mean"] == 6.5
    assert np.isnan(minimal["train_seconds_mean"])


def test_seed_and_logging_make_no_other_setting_and_numbers_are_compared_by_value(tmp_path):
    write_run(tmp_path, "1", ast__kp=1)
    write_run(
        tmp_path,
        "2",
        ast__kp=1.0,
        training__seed=1,
        logging__output_dir="elsewhere",
        logging__jsonl_path="log",
    )
    write_run(tmp_path / "more", "3", ast__kp=1.5, training__seed=2)
    (tmp_path / "final_results_minimal.json").write_text(json.dumps(MINIMAL))  # it knows no seed
    study, unknown = studies_of(tmp_path, tmp_path / "more").values()
    assert list(study.table["n"]) == [2, 1]
    assert list(study.table["seeds"]) == ["0 1", "2"]
    assert list(unknown.table["seeds"]) == ["-"]


def test_dense_twins_of_one_sparse_setting_are_one_setting_for_all_their_budgets(tmp_path):
    for seed in range(2):
        write_run(
            tmp_path, f"s{seed}", training__seed=seed, extra={"twin": f"final_results_t{seed}.json"}
        )
        twin = {"twin": f"final_results_s{seed}.json"}
        write_run(
            tmp_path,
            f"t{seed}",
            training__seed=seed,
            ast__mode="dense",
            training__max_minutes=1.1 + seed,
            extra=twin,
        )
    assert dict(study_of(tmp_path).table["n"]) == {"ast": 2, "dense twin": 2}


# ----------------------------------------------------------------------------------------- Frontier


def test_frontier_is_of_finished_dense_runs_on_the_same_data_model_and_machine(tmp_path):
    for number, (epochs, seconds, accuracy) in enumerate([(3, 10.0, 80.0), (6, 20.0, 90.0)]):
        for seed in range(2):
            values = (1.0, 2.0, accuracy + seed - 0.5)
            write_run(
                tmp_path,
                f"d{number}{seed}",
                values,
                seconds,
                ast__mode="dense",
                training__epochs=epochs,
                training__seed=seed,
            )
    write_run(
        tmp_path,
        "capped",
        (1.0, 95.0),
        12.0,
        ast__mode="dense",
        training__epochs=9,
        extra={"status": "time_capped"},
    )
    write_run(tmp_path, "other", (1.0, 99.0), 1.0, ast__mode="dense", model__name="resnet50")
    gpu = {"environment": {"gpu": "H200", "platform": "Linux"}}
    write_run(tmp_path, "gpu", (1.0, 98.0), 1.0, ast__mode="dense", training__epochs=8, extra=gpu)
    write_run(tmp_path, "sparse", (1.0, 85.0), 12.0)
    study, other = studies_of(tmp_path).values()
    assert list(other.table.index) == ["dense"]
    row = study.table.loc["ast epochs=3 gpu=null"]
    assert row["machine"] == "null"
    assert {machine: len(each.points) for machine, each in study.frontiers.items()} == {
        "null": 2,
        "H200": 1,
    }
    assert "dense frontier (null): 80.00 % in 10.0 s, 90.00 % in 20.0 s" in frontier_lines(study)
    # at 12 s, between 80 % at 10 s and 90 % at 20 s: half way from log time to 1 / time
    share = (np.log2(1.2) + (1 - 10 / 12) / (1 - 10 / 20)) / 2
    assert row["equal_time"] == pytest.approx(85 - 80 - 10 * share, abs=0.05)
    assert any("the runs come from 2 machines" in text for text in study.warnings)
    assert any("time_capped in 1 of 1 runs" in text for text in study.warnings)


def test_times_of_one_setting_that_scatter_are_said(tmp_path):
    for seed, seconds in enumerate((30.0, 32.0, 36.0)):
        write_run(tmp_path, f"a{seed}", seconds=seconds, training__seed=seed)
        write_run(tmp_path, f"d{seed}", seconds=30 + seed, training__seed=seed, ast__mode="dense")
    (study,) = studies_of(tmp_path).values()
    found = [text for text in study.warnings if "an epoch took" in text]
    assert found == [
        "ast: an epoch took 10 s in one run and 12 s in another: the machine did other work, so "
        "its times say little"
    ]


# ----------------------------------------------------------------------------------- Dense training

LENGTHS = ((10, 88.0), (20, 89.5), (40, 90.5))


def write_study(folder, dense_steps=10.0, own_steps=10.0, settings=1, **keys):
    """Three dense lengths of a second an epoch and sparse settings of 30 s, three seeds each."""

    def steps(dense):
        return {"step_time_ms": [3 * dense, dense, dense, 1.1 * dense]}

    for seed, noise in enumerate((-0.1, 0.0, 0.1)):
        for epochs, percent in LENGTHS:
            name = f"d{epochs}{seed}"
            config = {"ast__mode": "dense", "training__epochs": epochs, "training__seed": seed}
            write_run(
                folder,
                name,
                (1.0, 2.0, 3.0, percent + noise),
                float(epochs),
                history=steps(dense_steps),
                **config,
                **keys,
            )
        for number in range(settings):
            write_run(
                folder,
                f"s{number}{seed}",
                (1.0, 2.0, 3.0, 90.9 + noise - number),
                30.0,
                history=steps(own_steps),
                ast__warmup_epochs=2,
                ast__kp=1.0 + number,
                training__epochs=4,
                training__seed=seed,
                **keys,
            )
    return study_of(folder)


def test_runs_whose_dense_steps_differ_are_not_compared_by_time(tmp_path):
    """Identical steps of 10 and of 26 ms: the machine was busy. In the table, the verdict and the
    warnings.
    """
    alike = write_study(tmp_path / "alike", own_steps=10.9)
    own = next(name for name in alike.table.index if name.startswith("ast"))
    assert alike.table.loc[own, "equal_time"] > 0
    assert alike.table.loc[own, "void"] == ""
    apart = write_study(tmp_path / "apart", own_steps=26.0)
    row = apart.table.loc[own]
    assert row["void"] == "10 and 26 ms"
    assert np.isnan([row["equal_time"], row["time_to_match"], row["time_to_match_high"]]).all()
    cells = text_table(apart).set_index("setting").loc[own]
    assert (cells["at equal time"], cells["time to match"]) == ("void", "void: 10 and 26 ms")
    assert "not compared by time: dense steps of the compared runs took" in verdict(apart)
    assert "took 10 and 26 ms, so" in verdict(apart)
    assert "of the same time" not in verdict(apart)
    assert any("comparison by time is void" in text for text in apart.warnings)
    for text in (to_markdown([apart]), to_latex([apart]), render([apart])):
        assert "void: 10 and 26 ms" in text
    assert notes_on_bars(apart)[-1] == "times of 1 setting void: see the table"


def test_steps_that_cost_more_by_their_settings_are_not_held_against_a_run(tmp_path):
    """A dense run with twice the batch has slower steps on the same machine."""
    write_study(tmp_path)
    for seed in range(2):
        write_run(
            tmp_path,
            f"big{seed}",
            (1.0, 2.0, 3.0, 80.0 + seed),
            80.0,
            history={"step_time_ms": [20.0] * 4},
            ast__mode="dense",
            training__epochs=80,
            training__batch_size=64,
            training__seed=seed,
        )
    assert set(study_of(tmp_path).table["void"]) == {""}


def test_lengths_a_factor_two_apart_are_called_too_few(tmp_path):
    study = write_study(tmp_path)
    (text,) = (text for text in study.warnings if "apart" in text)
    assert "dense epochs=20 batch" not in text
    assert "a factor 2.0 apart: too few dense lengths" in text
    assert text.endswith("add dense runs of about 4 epochs (28.3 s)")  # their files hold 4 epochs
    between = {"ast__mode": "dense", "training__epochs": 28}
    for seed, noise in enumerate((-0.1, 0.0, 0.1)):
        write_run(tmp_path, f"m{seed}", (1.0, 90.1 + noise), 28.3, training__seed=seed, **between)
    assert not any("apart" in text for text in study_of(tmp_path).warnings)


def test_the_best_of_several_settings_is_judged_by_wider_intervals(tmp_path):
    one = write_study(tmp_path / "one")
    four = write_study(tmp_path / "four", settings=4)
    best = four.table.index[0]
    assert (one.rivals, four.rivals) == (1, 4)
    row = four.table.loc[best]
    assert row["equal_time_ci95"] == one.table["equal_time_ci95"].dropna().iloc[0]
    assert row["best_of_equal_time_ci95"] > 1.3 * row["equal_time_ci95"]
    assert row["best_of_difference_ci95"] > row["difference_ci95"]
    assert f"by 0.40 ± {row['best_of_difference_ci95']:.2f} points" in verdict(four)
    assert "the best of 4 settings (Bonferroni)" in verdict(four)
    assert "Bonferroni" not in verdict(one)


# ----------------------------------------------------------------------------------------- Warnings


def test_warnings(tmp_path):
    history = {
        "epoch": [1, 2, 3],
        "val_acc": [90.0, 80.0, float("nan")],
        "activation_rate": [1.0, 0.5, 0.4],
    }
    write_run(tmp_path, "1", extra={"training_history": history, "best_accuracy": 90.0})
    write_run(
        tmp_path,
        "2",
        training__seed=1,
        extra={"status": "failed", "error": "non-finite loss in epoch 3, step 2"},
    )
    found = "\n".join(study_of(tmp_path).warnings)
    assert (
        "ast: activation up to 0.150 off its target" in found
    )  # the first sparse epoch does not count
    assert "ast: the best epoch lies in a dense phase in 1 of 1 runs" in found
    assert "ast: 1 NaN or infinite values in its files" in found
    assert "final_results_2.json: failed: non-finite loss in epoch 3, step 2" in found
