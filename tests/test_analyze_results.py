"""The analysis: grouping, intervals, the dense frontier, what is left out, figures, and following a run."""

import json
import os
import signal
import subprocess
import sys
import time
from statistics import NormalDist

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy import stats

import analyze_results
from analyze_results import (
    RequestError,
    cli,
    compare,
    dense_frontier,
    difference_half_width,
    half_width,
    label_settings,
    load_runs,
    shown,
    time_to_match,
    verdict,
)
from conftest import REPO, make_config
from train_ast import train

MINIMAL = {  # a file of the published lab: the documented keys alone
    "best_accuracy": 71.5,
    "total_time_hours": 0.5,
    "epochs_completed": 2,
    "training_history": {
        "epoch": [1, 2],
        "train_acc": [50.0, 60.0],
        "val_acc": [55.0, 71.5],
        "activation_rate": [0.4, 0.26],
        "threshold": [1.2, 0.9],
        "energy_savings": [60.0, 74.0],
        "step_time_ms": [10.0, 11.0],
        "est_energy_kj": [3.0, 6.5],
        "est_flops_g": [100.0, 170.0],
    },
}


def write_run(folder, name, accuracies=(50.0, 60.0, 70.0), seconds=30.0, extra=None, **settings):
    """A results file of the lab's form, `settings` as section__key."""
    config = make_config("ast.warmup_epochs=1", "training.epochs=3").model_dump()
    for key, value in settings.items():
        section, _, leaf = key.partition("__")
        config[section][leaf] = value
    epochs, target = len(accuracies), config["ast"]["target_activation"]
    sparse, threshold = (1.0, None) if config["ast"]["mode"] == "dense" else (target, 0.5)
    result = {
        "best_accuracy": max(accuracies),
        "total_time_hours": 0.01,
        "epochs_completed": epochs,
        "training_history": {
            "epoch": list(range(1, epochs + 1)),
            "val_acc": list(accuracies),
            "activation_rate": [1.0] + [sparse] * (epochs - 1),
            "threshold": [None] + [threshold] * (epochs - 1),
            "train_seconds": [seconds * (i + 1) / epochs for i in range(epochs)],
            "est_energy_kj": [seconds * (i + 1) / epochs for i in range(epochs)],
            "est_flops_g": [float(i) for i in range(epochs)],
            **{f"samples_{kind}": [100] * epochs for kind in ("loaded", "scored", "trained")},
        },
        "status": "completed",
        "seed": config["training"]["seed"],
        "final_accuracy": accuracies[-1],
        "train_seconds": seconds,
        "energy_kj": None,
        "config": config,
        "environment": {"python": "3.12", "gpu": None, "platform": "Linux"},
        **(extra or {}),
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"final_results_{name}.json"
    path.write_text(json.dumps(result))
    return path


def study_of(*folders, **options):
    return compare(*load_runs(folders), **options)


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Real runs, two of them one setting, a file with the documented keys, and two that cannot be used."""
    folder = tmp_path_factory.mktemp("results")
    small = ["model.name=test_resnet", "dataset.image_size=16", "dataset.max_train_samples=64", "ast.pack=true"]
    small += ["training.epochs=3", "ast.warmup_epochs=1", f"logging.output_dir={folder}"]
    for overrides in (["ast.mode=ast"], ["ast.mode=ast", "training.seed=1"], ["ast.mode=dense"]):
        train(make_config(*small, *overrides))
    (folder / "final_results_20200101_000000.json").write_text(json.dumps(MINIMAL))
    (folder / "final_results_20200101_000001.json").write_text(json.dumps(MINIMAL)[:100])
    (folder / "final_results_20200101_000002.json").write_text('{"best_accuracy": 3}')
    return folder


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
        analyze_results.frontier_lines(study)
    )
    assert any("the runs come from 2 machines" in text for text in study.warnings)
    assert any("time_capped in 1 of 1 runs" in text for text in study.warnings)


def test_verdict_names_the_winner_the_margin_and_the_controller(tmp_path):
    for seed, noise in enumerate((-0.1, 0.0, 0.1)):
        write_run(tmp_path, f"s{seed}", (1.0, 2.0, 90 + noise), 10.0, training__seed=seed)
        write_run(tmp_path, f"d{seed}", (1.0, 2.0, 89 + noise), 20.0, training__seed=seed, ast__mode="dense")
    text = verdict(study_of(tmp_path))
    assert text.startswith(
        "ast has the highest final accuracy: 90.00 % (n = 3, 95 % interval ± 0.25). ast is +1.00 points"
    )
    assert "from dense ± 0.23: beyond chance." in text
    assert "Least time to match the dense frontier: < 0.50 (ast)." in text
    assert "Activation was at most 0.000 off its target" in text
    assert "dense is -1.00 points from ast" in verdict(study_of(tmp_path, baseline="ast"))
    write_run(tmp_path, "best", (1.0, 2.0, 99.0), 60.0, ast__mode="dense", training__epochs=9)
    text = verdict(study_of(tmp_path))
    assert (
        "dense epochs=9 has the highest final accuracy: 99.00 % (n = 1). ast is -9.00 points from dense epochs=9"
        in text
    )


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


# ------------------------------------------------------------------------------------------ Left out


def test_what_is_left_out_and_why(results, tmp_path):
    write_run(tmp_path, "1")
    write_run(tmp_path, "2")  # the same again
    write_run(tmp_path, "3", training__seed=1, extra={"status": "interrupted"})
    write_run(tmp_path, "4", training__seed=2, extra={"status": "failed", "error": "out\nof memory \ud800"})
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
    assert reasons.pop("6.json").startswith("not a results file of the lab: could not convert string to float")
    assert reasons.pop("7.json").startswith("not a results file of the lab: ")
    assert reasons.pop("8.json") == "not a JSON object"
    assert reasons.pop("9.json").startswith("not valid JSON: ")
    assert reasons.pop("20200101_000000.json") == "other dataset: it does not say which"
    assert reasons.pop("20200101_000001.json").startswith("not valid JSON: ")
    assert reasons.pop("20200101_000002.json") == "no total_time_hours, epochs_completed, training_history"
    assert not reasons
    assert len(runs) == 4


def test_a_later_failure_does_not_hide_a_finished_run(tmp_path):
    finished = write_run(tmp_path, "1")
    write_run(tmp_path, "2", extra={"status": "interrupted"})
    runs, left_out = load_runs([tmp_path, tmp_path])
    assert [run.path for run in runs] == [finished]
    assert list(left_out.values()) == ["interrupted"]


@pytest.mark.parametrize(
    ("prepare", "args", "message"),
    [
        (lambda folder: None, [], "--results-dir: {folder}: no such folder"),
        (lambda folder: folder.mkdir(), [], "--results-dir: {folder}: no final_results_*.json in it"),
        (
            lambda folder: write_run(folder, "1").write_text('{"best_acc'),
            [],
            "nothing to compare: {folder}/final_results_1.json: not valid JSON: Unterminated string",
        ),
        (
            lambda folder: (
                write_run(folder, "1"),
                write_run(folder, "2", dataset__type="folder", dataset__val_dir="x"),
            ),
            [],
            "--results-dir: several datasets: digits (1 runs), folder:x (1 runs); choose one with --dataset",
        ),
        (
            lambda folder: write_run(folder, "1"),
            ["--baseline", "dense"],
            "--baseline: dense: none of the settings: ast",
        ),
        (lambda folder: write_run(folder, "1"), ["--dataset", "mnist"], "nothing to compare: "),
        (
            lambda folder: write_run(folder, "1"),
            ["--plot", "--save-dir", "/proc/plots"],
            "--save-dir: cannot write to /proc/plots",
        ),
        (
            lambda folder: write_run(folder, "1"),
            ["--csv", "/proc/x/table.csv"],
            "--csv: cannot write to /proc/x/table.csv",
        ),
    ],
)
def test_a_wrong_request_is_one_line_and_exit_code_2(prepare, args, message, tmp_path, capsys):
    folder = tmp_path / "results"
    prepare(folder)
    before = sorted(tmp_path.rglob("*"))
    assert cli(["--results-dir", str(folder), "--markdown", str(tmp_path / "table.md"), *args]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: " + message.format(folder=folder))
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before  # nothing half-written


# ------------------------------------------------------------------------------------------- Outputs


def test_command_prints_the_table_and_writes_tables_and_figures(results, tmp_path, capsys):
    paths = {kind: tmp_path / f"out/table.{kind}" for kind in ("csv", "markdown", "latex")}
    flags = [text for kind, path in paths.items() for text in (f"--{kind}", str(path))]
    plots = tmp_path / "plots"
    assert cli(["--results-dir", str(results), *flags, "--plot", "--save-dir", str(plots)]) == 0
    printed = capsys.readouterr().out
    study = study_of(results)
    table = shown(study)
    for cell in table.to_numpy().ravel():
        assert cell in printed
    assert f"left out: {results}/final_results_20200101_000001.json: not valid JSON" in printed
    assert verdict(study) in printed
    csv = pd.read_csv(paths["csv"]).set_index("setting")
    assert csv["final_mean"].to_dict() == pytest.approx(study.table["final_mean"].to_dict(), abs=1e-12)
    rows = [line.strip("|").split("|") for line in paths["markdown"].read_text().splitlines()]
    assert [[cell.strip() for cell in row] for row in rows[2:]] == table.to_numpy().tolist()
    latex = paths["latex"].read_text()
    assert latex.count("\\\\") == len(table) + 1
    assert "20200101\\_000000 & 1 & 71.50" in latex
    names = ["accuracy", "accuracy_by_time", "activation", "energy", "frontier_energy", "frontier_time", "samples"]
    names += ["threshold"]
    assert sorted(path.name for path in plots.iterdir()) == sorted(
        f"{name}.{kind}" for name in names for kind in ("png", "svg")
    )
    for path in plots.glob("*.png"):
        with Image.open(path) as image:
            assert image.size[0] >= 800
            assert len(image.convert("RGB").getcolors(10**6)) > 50  # lines, text and anti-aliasing: not blank
    assert all(path.read_text().rstrip().endswith("</svg>") for path in plots.glob("*.svg"))


def test_a_thousand_files_are_quick(tmp_path):
    """Time and memory of the command over 1,000 files of 100 epochs, in a process of its own."""
    text = write_run(tmp_path, "0000", [50 + i / 3 for i in range(100)], training__epochs=100).read_text()
    for number in range(1000):
        result = json.loads(text)
        result["seed"], result["config"]["ast"]["kp"] = number % 5, 1 + number // 5
        (tmp_path / f"final_results_{number:04}.json").write_text(json.dumps(result, indent=2))
    program = "import sys, analyze_results; code = analyze_results.cli(sys.argv[1:]);"
    program += "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0]);"  # maxrss would be the parent's
    program += "print('torch' in sys.modules); sys.exit(code)"
    command = [sys.executable, "-c", program, "--results-dir", str(tmp_path), "--csv", str(tmp_path / "table.csv")]
    started = time.monotonic()
    done = subprocess.run(command, cwd=REPO / "scripts", capture_output=True, text=True, check=True)
    assert time.monotonic() - started < 10
    *_, kilobytes, has_torch = done.stdout.split()
    assert int(kilobytes) < 2**20
    assert has_torch == "False"
    table = pd.read_csv(tmp_path / "table.csv")
    assert (len(table), table["n"].sum()) == (200, 1000)


def test_follow_shows_lines_as_they_are_finished(tmp_path):
    log = tmp_path / "run.jsonl"
    command = [sys.executable, "scripts/analyze_results.py", "--follow", str(log)]
    with subprocess.Popen(command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline().split()[:2] == ["epoch", "loss"]
        with log.open("a") as file:
            print(json.dumps({"epoch": 1, "val_acc": 55.5, "threshold": None}), file=file, flush=True)
            assert process.stdout.readline().split()[:6] == ["1", "-", "-", "55.50", "-", "-"]
            line = json.dumps({"epoch": 2, "val_acc": 71.25, "activation_rate": 0.251, "threshold": 0.5})
            file.write(line[:20])
            file.flush()
            time.sleep(0.7)
            print(line[20:], file=file, flush=True)
            assert process.stdout.readline().split()[:6] == ["2", "-", "-", "71.25", "0.251", "0.5000"]
            print(json.dumps({"epoch": 1}), file=file, flush=True)  # the next run, in the same file
            assert [process.stdout.readline().split()[:1] for _ in range(3)] == [[], ["epoch"], ["1"]]
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (130, "")


def test_follow_refuses_what_is_no_log(tmp_path, capsys):
    log = tmp_path / "run.jsonl"
    log.write_text('{"epoch": 1}\nhello\n')
    assert cli(["--follow", str(log)]) == 2
    assert capsys.readouterr().err == f"error: --follow: {log}: line 2: not an epoch: hello\n"
    assert cli(["--follow", str(tmp_path / "no" / "run.jsonl")]) == 2
    assert capsys.readouterr().err == f"error: --follow: {tmp_path / 'no'}: no such folder\n"
    with pytest.raises(RequestError, match="Is a directory"):
        analyze_results.follow(tmp_path)


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path):
    for number in range(400):
        write_run(tmp_path, f"final_results_{number}.json", training__lr=1.0 + number)
    command = f"{sys.executable} scripts/analyze_results.py --results-dir {tmp_path} | head -1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=REPO, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
