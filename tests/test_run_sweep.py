"""The sweep: every config its own process, failures reported, the rest go on."""

import json
from pathlib import Path

QUICK = ["training.epochs=2", "ast.warmup_epochs=1", "dataset.max_train_samples=64", "training.batch_size=16"]


def test_a_failing_run_is_reported_and_the_rest_go_on(script, tmp_path):
    bad = tmp_path / "bad.yaml"
    bad.write_text("training:\n  epochz: 3\n")
    dies = tmp_path / "dies.yaml"
    dies.write_text("ast: {mode: dense}\ntraining: {lr: 1.0e+20}\nmodel: {name: test_resnet}\n")
    good = "configs/digits_smoke.yaml"
    done = script("run_sweep", "--configs", bad, dies, good, *QUICK, "--output-dir", tmp_path / "out")
    assert done.returncode == 1, done.stderr
    (summary,) = (tmp_path / "out").glob("sweep_summary_*.jsonl")
    rows = [json.loads(line) for line in summary.read_text().splitlines()]
    assert [row["exit_code"] for row in rows] == [2, 1, 0]
    assert [row["status"] for row in rows] == ["failed", "failed", "completed"]
    assert "training.epochz: unknown key; did you mean training.epochs?" in rows[0]["error"]
    assert "non-finite loss" in rows[1]["error"]
    assert rows[1]["results_file"] is not None  # what was finished, and why it ended
    assert rows[2]["best_accuracy"] == json.loads(Path(rows[2]["results_file"]).read_text())["best_accuracy"]
    assert all(row["duration_seconds"] > 0 for row in rows)
    assert all(name in done.stdout for name in (str(bad), str(dies), good, str(summary)))


def test_nothing_to_run_is_a_wrong_request(script):
    done = script("run_sweep", "--configs")
    assert done.returncode == 2
    assert "--configs" in done.stderr
