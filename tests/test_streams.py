"""Standard streams that are closed, full or cut off change neither the exit code nor the files of a
command.
"""

import json
import subprocess
import sys

import pytest

from conftest import REPO
from helpers import write_run

QUICK = (
    "model.name=test_resnet dataset.image_size=8 dataset.max_train_samples=32 "
    "dataset.max_val_samples=16 "
)
QUICK += (
    "training.device=cpu training.num_workers=2 training.epochs=1 ast.mode=dense "
    "training.batch_size=16"
)


def shell(command, redirection, folder):
    """The exit code of a command of scripts/ with its streams redirected, and what is left of
    stderr.
    """
    line = f"{sys.executable} scripts/{command} --output-dir {folder} {redirection}"
    if command.startswith("analyze"):
        line = line.replace(f" --output-dir {folder}", "")
    return subprocess.run(
        ["bash", "-o", "pipefail", "-c", line],
        cwd=REPO,
        capture_output=True,
        text=True,
        timeout=200,
    )


BOTH_CLOSED = ">&- 2>&-"
BOTH_FULL = ">/dev/full 2>/dev/full"
LONG = pytest.mark.long  # one more process a case
BAD = [BOTH_CLOSED, BOTH_FULL, "| true"]
BAD += [pytest.param(each, marks=LONG) for each in (">&-", "2>&-", ">/dev/full", "2>/dev/full")]


@pytest.mark.parametrize(
    "redirection",
    [
        pytest.param("2>&-", marks=LONG),
        BOTH_CLOSED,
        pytest.param(BOTH_FULL, marks=LONG),
        pytest.param("| true", marks=LONG),
    ],
)
def test_a_run_ends_as_it_would_have(redirection, tmp_path):
    done = shell(
        f"run_experiment.py --config configs/digits_smoke.yaml {QUICK}", redirection, tmp_path
    )
    assert (done.returncode, done.stderr) == (0, "")
    (path,) = tmp_path.glob("final_results_*.json")
    assert json.loads(path.read_text())["status"] == "completed"


@pytest.mark.parametrize(
    ("redirection", "flag"),
    [
        pytest.param(BOTH_CLOSED, "", marks=LONG),
        (BOTH_FULL, "--one-process"),
        pytest.param("| true", "--one-process", marks=LONG),
    ],
)
@pytest.mark.long
def test_a_sweep_ends_as_it_would_have(redirection, flag, tmp_path):
    """One of its two runs is refused: the exit code says so."""
    seeds = "--seeds 0 99999999999999999999"
    done = shell(
        f"run_sweep.py --configs configs/digits_smoke.yaml {QUICK} {seeds} {flag}",
        redirection,
        tmp_path,
    )
    assert (done.returncode, done.stderr) == (1, "")
    (summary,) = tmp_path.glob("sweep_summary_*.jsonl")
    rows = [json.loads(line) for line in summary.read_text().splitlines()]
    assert sorted(row["status"] for row in rows) == ["completed", "failed"]


@pytest.mark.parametrize("redirection", BAD)
def test_an_analysis_writes_its_files_all_the_same(redirection, tmp_path):
    write_run(tmp_path, "1")
    pages = f"--report {tmp_path}/a.html" if redirection in (BOTH_CLOSED, BOTH_FULL) else ""
    command = f"analyze_results.py --results-dir {tmp_path} --csv {tmp_path}/a.csv {pages}"
    done = shell(command, redirection, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert (tmp_path / "a.csv").read_text().count("\n") == 2
    assert (tmp_path / "a.html").exists() == bool(pages)


def test_a_table_that_cannot_be_printed_is_a_failure(tmp_path):
    write_run(tmp_path, "1")
    done = shell(f"analyze_results.py --results-dir {tmp_path}", ">/dev/full", tmp_path)
    assert (done.returncode, done.stderr) == (
        1,
        "error: standard output: No space left on device\n",
    )


@pytest.mark.parametrize(
    ("redirection", "arguments"),
    [
        pytest.param("2>&-", "--results-dir /nowhere", marks=LONG),
        ("2>/dev/full", "--no-such-option"),
        (BOTH_CLOSED, "--results-dir /nowhere"),
        pytest.param(BOTH_CLOSED, "--no-such-option", marks=LONG),
    ],
)
def test_a_wrong_request_keeps_its_exit_code(redirection, arguments, tmp_path):
    assert shell(f"analyze_results.py {arguments}", redirection, tmp_path).returncode == 2


def test_help_into_a_closed_pipe_is_no_error(tmp_path):
    done = shell("analyze_results.py --help", "| true", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.long
def test_streams_without_unicode_get_question_marks(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    write_run(tmp_path, "1", ast__threshold_unit="表±")
    write_run(tmp_path, "2", ast__threshold_unit="表±", training__seed=1)
    done = shell(f"analyze_results.py --results-dir {tmp_path}", "", tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "? 95 %" in done.stdout
    folder = tmp_path / "表"
    assert (
        shell(f"run_sweep.py --configs configs/digits_smoke.yaml {QUICK}", "", folder).returncode
        == 0
    )
    (summary,) = folder.glob("sweep_summary_*.jsonl")
    assert json.loads(summary.read_text())["results_file"].startswith(str(folder))
