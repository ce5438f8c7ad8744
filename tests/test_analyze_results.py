"""The analysis: files this lab wrote, files with the documented keys alone, and files nobody can read."""

import json

import analyze_results
import pytest
from conftest import make_config
from PIL import Image
from train_ast import run_cli, train

MINIMAL = {
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


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Two real runs, a minimal file, and two that cannot be used."""
    folder = tmp_path_factory.mktemp("results")
    small = ["model.name=test_resnet", "dataset.image_size=16", "dataset.max_train_samples=64", "ast.pack=true"]
    small += ["training.epochs=3", "ast.warmup_epochs=1", f"logging.output_dir={folder}"]
    for mode in ("ast", "dense"):
        train(make_config(*small, f"ast.mode={mode}"))
    (folder / "final_results_20200101_000000.json").write_text(json.dumps(MINIMAL))
    (folder / "final_results_20200101_000001.json").write_text(json.dumps(MINIMAL)[:100])
    (folder / "final_results_20200101_000002.json").write_text('{"best_accuracy": 3}')
    return folder


def test_table_has_a_row_a_run_and_its_figures(results):
    runs, left_out = analyze_results.load_results(results)
    table = analyze_results.table(runs)
    assert len(table) == 3
    row = table.loc["20200101_000000"]
    assert (row["best %"], row["final %"], row["epochs"]) == (71.5, 71.5, 2)
    assert row["activation"] == pytest.approx(0.33)
    assert row["TFLOP"] == pytest.approx(0.17)
    assert row["est kJ"] == 6.5
    assert sorted(row["run"] for _, row in table.iterrows())[1:] == [
        "test_resnet ast 0.25 seed 0",
        "test_resnet dense seed 0",
    ]
    by_run = table.set_index("run")
    history = runs[table.index[table["run"] == "test_resnet ast 0.25 seed 0"][0]]["training_history"]
    rates = history["activation_rate"][1:]
    assert by_run.loc["test_resnet ast 0.25 seed 0", "activation"] == pytest.approx(sum(rates) / 2)
    assert set(left_out) == {"final_results_20200101_000001.json", "final_results_20200101_000002.json"}
    assert "no total_time_hours" in left_out["final_results_20200101_000002.json"]


def test_runs_of_one_name_are_told_apart_by_their_time(results):
    runs, _ = analyze_results.load_results(results)
    assert len(set(analyze_results.labels(runs).values())) == 3
    twice = {"1": runs["20200101_000000"] | {"config": None}, "2": MINIMAL}
    assert analyze_results.labels(twice) == {"1": "1", "2": "2"}
    name = next(name for name, result in runs.items() if "config" in result)
    same = {"a": runs[name], "b": runs[name]}
    assert [text.rpartition(" ")[2] for text in analyze_results.labels(same).values()] == ["(a)", "(b)"]


def test_command_prints_the_table_and_writes_the_plots(results, tmp_path, capsys):
    code = analyze_results.main(["--results-dir", str(results), "--plot", "--save-dir", str(tmp_path / "plots")])
    shown = capsys.readouterr().out
    assert code == 0
    assert "test_resnet ast 0.25 seed 0" in shown
    assert "left out: final_results_20200101_000001.json" in shown
    assert sorted(path.name for path in (tmp_path / "plots").iterdir()) == [
        "accuracy.png", "activation.png", "energy.png", "threshold.png",
    ]  # fmt: skip
    for path in (tmp_path / "plots").iterdir():
        with Image.open(path) as image:
            assert image.size[0] >= 800
            assert len(image.convert("RGB").getcolors(10**6)) > 50  # lines, text and anti-aliasing: not blank


@pytest.mark.parametrize("make", [True, False])
def test_no_results_is_a_wrong_request(make, tmp_path, capsys):
    folder = tmp_path / "none"
    if make:
        folder.mkdir()
    assert run_cli(lambda: analyze_results.main(["--results-dir", str(folder)])) == 2
    assert capsys.readouterr().err.startswith(f"error: --results-dir: {folder}: no ")


def test_a_save_dir_that_cannot_be_written_is_named(results, capsys):
    args = ["--results-dir", str(results), "--plot", "--save-dir", "/proc/plots"]
    assert run_cli(lambda: analyze_results.main(args)) == 2
    assert "--save-dir: cannot write to /proc/plots" in capsys.readouterr().err
