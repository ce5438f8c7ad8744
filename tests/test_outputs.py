"""Where a command writes: device files, logs that cannot be written, and which of several results
is the newest.
"""

import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest

import run_experiment
import run_sweep
from conftest import REPO
from helpers import analyze, write_run
from lab.study.cli import run_cli
from lab.study.results import load_runs
from train_ast import load_config

DIGITS = str(REPO / "configs/digits_smoke.yaml")
QUICK = [
    "model.name=test_resnet",
    "dataset.image_size=8",
    "dataset.max_train_samples=32",
    "training.epochs=2",
]
QUICK += [
    "dataset.max_val_samples=16",
    "training.device=cpu",
    "training.num_workers=0",
    "ast.mode=dense",
]


def run(folder, *more):
    return run_cli(
        lambda: run_experiment.main(
            ["--config", DIGITS, "--output-dir", str(folder), *QUICK, *more]
        )
    )


def test_a_log_may_be_a_device(tmp_path):
    """A run, its resumption, its dense twin, a sweep; the device is still one, and nothing lies
    beside it.
    """
    before = sorted(os.listdir("/dev"))
    log = "logging.jsonl_path=/dev/null"
    assert run(tmp_path, log) == 0
    assert run(tmp_path, log, "--resume", "auto") == 0
    assert (
        run(tmp_path / "twin", log, "ast.mode=random", "ast.warmup_epochs=1", "--dense-twin") == 0
    )
    sweep = [
        "--configs",
        DIGITS,
        "--output-dir",
        str(tmp_path / "sweep"),
        *QUICK,
        log,
        "--one-process",
    ]
    assert run_cli(lambda: run_sweep.main(sweep)) == 0
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)
    assert sorted(os.listdir("/dev")) == before


@pytest.mark.long
def test_a_log_may_be_a_pipe_that_is_read(tmp_path):
    command = [
        sys.executable,
        "scripts/run_experiment.py",
        "--config",
        DIGITS,
        "--output-dir",
        str(tmp_path),
        *QUICK,
    ]
    line = f"{' '.join(command)} logging.jsonl_path=/dev/fd/3 3>&1 >/dev/null | cat"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", line], cwd=REPO, capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert [json.loads(row)["epoch"] for row in done.stdout.split("\n") if row] == [1, 2]


@pytest.mark.parametrize("kind", ["folder", "pipe", "full", "nothing", "dots"])
def test_a_log_that_cannot_be_written_is_refused_at_the_start(kind, tmp_path, capsys):
    path = {"full": "/dev/full", "nothing": ".", "dots": "a/.."}.get(kind, str(tmp_path / kind))
    if kind == "folder":
        os.mkdir(path)
    if kind == "pipe":
        os.mkfifo(path)  # without a reader
    assert run(tmp_path / "out", f"logging.jsonl_path={path}") == 2
    captured = capsys.readouterr()
    assert "logging.jsonl_path: " in captured.err
    assert captured.err.count("\n") == 1
    assert not list(tmp_path.glob("out/final_results*"))


def test_a_table_may_go_to_a_device(tmp_path):
    write_run(tmp_path, "1")
    link = os.readlink("/dev/stdout")
    command = (
        f"{sys.executable} scripts/analyze_results.py --results-dir {tmp_path} --csv "
        f"/dev/stdout --markdown /dev/null"
    )
    for redirection in ("| cat", f"> {tmp_path}/out; cat {tmp_path}/out"):
        done = subprocess.run(
            ["bash", "-c", f"{command} {redirection}"], cwd=REPO, capture_output=True, text=True
        )
        assert "setting,n," in done.stdout, done.stderr
        assert done.stderr == ""
    assert os.readlink("/dev/stdout") == link
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_a_dash_is_the_standard_output(tmp_path, capfd):
    write_run(tmp_path, "1")
    assert analyze(["--results-dir", str(tmp_path), "--markdown", "-"]) == 0
    assert capfd.readouterr().out.startswith("| setting |")


def finished(folder, name, utc, **more):
    config = load_config(DIGITS, [f"logging.output_dir={folder}"]).model_dump()
    environment = {"python": "3.12"} | ({} if utc is None else {"finished_utc": utc})
    return write_run(folder, name, extra={"config": config, "environment": environment, **more})


def test_the_newest_result_is_told_by_utc(tmp_path, capsys):
    """At the end of summer time: the run that ended later has the earlier local time in its
    name.
    """
    older = finished(tmp_path, "20261025_025500", "2026-10-25T00:55:00.000001+00:00")
    newer = finished(tmp_path, "20261025_020500", "2026-10-25T01:05:00.000001+00:00")
    runs, left_out = load_runs([tmp_path])
    assert [run.path for run in runs] == [newer]
    assert left_out == {str(older): f"config and seed of {newer}, which is newer"}
    assert analyze(["--results-dir", str(tmp_path)]) == 0
    assert f"left out: {older}: " in capsys.readouterr().out
    sweep = ["--configs", DIGITS, "--output-dir", str(tmp_path), "--resume"]
    assert run_cli(lambda: run_sweep.main(sweep)) == 0
    (summary,) = tmp_path.glob("sweep_summary_*.jsonl")
    assert json.loads(summary.read_text())["results_file"] == str(newer)


def test_within_a_second_the_microseconds_count(tmp_path):
    times = {
        "20261025_020500_2": "2026-10-25T01:05:00.000003+00:00",
        "20261025_020500_10": "2026-10-25T01:05:00.000009Z",
    }
    paths = [finished(tmp_path, name, utc) for name, utc in times.items()]
    assert [run.path for run in load_runs([tmp_path])[0]] == [paths[1]]


def test_older_files_go_by_their_names(tmp_path, monkeypatch):
    """Local time and a number; a name without a time is the oldest."""
    monkeypatch.setenv("TZ", "UTC")
    names = ["zzz", "20261025_020500", "20261025_020500_2", "20261025_020500_10"]
    for name in names:
        finished(tmp_path, name, None)
        assert [run.name for run in load_runs([tmp_path])[0]] == [name]
    finished(tmp_path, "20250101_000000", "2026-10-26T00:00:00+00:00")
    assert [run.name for run in load_runs([tmp_path])[0]] == ["20250101_000000"]


def test_a_run_stores_when_it_finished(tmp_path):
    """And the machine it ran on is the same machine for all runs."""
    for seed in "01":
        assert run(tmp_path, f"training.seed={seed}") == 0
    files = [json.loads(path.read_text()) for path in tmp_path.glob("final_results_*.json")]
    times = [each["environment"]["finished_utc"] for each in files]
    assert len(set(times)) == 2
    assert all(time.endswith("+00:00") and len(time) == 32 for time in times)
    runs, _ = load_runs([tmp_path])
    assert runs[0].environment == runs[1].environment


def test_the_newest_summary_is_told_by_utc(tmp_path):
    """A sweep with --resume goes on in it; a new sweep never takes the name of an old one."""
    row = {"id": "x", "exit_code": 0, "status": "completed", "duration_seconds": 1.0}
    for name, hour in (("20261025_025500", 0), ("20261025_020500", 1)):
        line = row | {"id": name, "finished_utc": f"2026-10-25T{hour:02}:30:00.000000+00:00"}
        (tmp_path / f"sweep_summary_{name}.jsonl").write_text(json.dumps(line) + "\n")
    finished(tmp_path, "20261025_025500", "2026-10-25T00:55:00.000001+00:00")
    sweep = ["--configs", DIGITS, "--output-dir", str(tmp_path), "--resume"]
    assert run_cli(lambda: run_sweep.main(sweep)) == 0
    lines = {
        path.stem[-6:]: path.read_text().count("\n")
        for path in tmp_path.glob("sweep_summary_*.jsonl")
    }
    assert lines == {"025500": 1, "020500": 2}


def test_two_sweeps_of_one_second_have_two_summaries(tmp_path, monkeypatch):
    from lab.study.sweep import summary

    class Clock(summary.datetime):
        @classmethod
        def now(cls, *zone):
            return cls(2026, 10, 25, 2, 5, tzinfo=zone[0] if zone else None)

    monkeypatch.setattr(summary, "datetime", Clock)
    paths = {summary.open_summary(tmp_path, False, [], set()) for _ in range(3)}
    assert {path.name for path in paths} == {
        f"sweep_summary_20261025_020500{tail}.jsonl" for tail in ("", "_1", "_2")
    }
    assert all(Path(path).exists() for path in paths)
