"""The study as text: the verdict, and following a run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import REPO
from helpers import analyze, study_of, write_run
from lab.base.errors import RequestError
from lab.study.analysis.tables import follow, verdict


def test_verdict_names_the_winner_the_margin_and_the_controller(tmp_path):
    for seed, noise in enumerate((-0.1, 0.0, 0.1)):
        write_run(tmp_path, f"s{seed}", (1.0, 2.0, 90 + noise), 10.0, training__seed=seed)
        write_run(
            tmp_path,
            f"d{seed}",
            (1.0, 2.0, 89 + noise),
            20.0,
            training__seed=seed,
            ast__mode="dense",
        )
    text = verdict(study_of(tmp_path))
    assert text.startswith(
        "ast has the highest final accuracy: 90.00 ± 0.25 % (3 seeds). It beats dense by "
        "1.00 ± 0.23"
    )
    assert "It beats dense training of every length: its time to match is < 0.50." in text
    assert "Activation was at most 0.000 off its target" in text
    assert "dense loses to ast by 1.00 ± 0.23 points." in verdict(
        study_of(tmp_path, baseline="ast")
    )
    write_run(tmp_path, "best", (1.0, 2.0, 99.0), 60.0, ast__mode="dense", training__epochs=9)
    text = verdict(study_of(tmp_path))
    assert (
        "dense epochs=9 has the highest final accuracy: 99.00 % (1 seed). ast epochs=3 is "
        "9.00 points below dense"
    ) in text


def test_follow_shows_lines_as_they_are_finished(tmp_path):
    log = tmp_path / "run.jsonl"
    command = [sys.executable, "scripts/analyze_results.py", "--follow", str(log)]
    with subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline().split()[:2] == ["epoch", "loss"]
        with log.open("a") as file:
            print(
                json.dumps({"epoch": 1, "val_acc": 55.5, "threshold": None}), file=file, flush=True
            )
            assert process.stdout.readline().split()[:6] == ["1", "-", "-", "55.50", "-", "-"]
            line = json.dumps(
                {"epoch": 2, "val_acc": 71.25, "activation_rate": 0.251, "threshold": 0.5}
            )
            file.write(line[:20])
            file.flush()
            time.sleep(0.7)
            print(line[20:], file=file, flush=True)
            assert process.stdout.readline().split()[:6] == [
                "2",
                "-",
                "-",
                "71.25",
                "0.251",
                "0.5000",
            ]
            print(json.dumps({"epoch": 1}), file=file, flush=True)  # the next run, in the same file
            assert [process.stdout.readline().split()[:1] for _ in range(3)] == [
                [],
                ["epoch"],
                ["1"],
            ]
        os.kill(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=10)
    assert (process.returncode, errors) == (130, "")


def test_follow_refuses_what_is_no_log(tmp_path, capsys):
    log = tmp_path / "run.jsonl"
    log.write_text('{"epoch": 1}\nhello\n')
    assert analyze(["--follow", str(log)]) == 2
    assert capsys.readouterr().err == f"error: --follow: {log}: line 2: not an epoch: hello\n"
    assert analyze(["--follow", str(tmp_path / "no" / "run.jsonl")]) == 2
    assert capsys.readouterr().err == f"error: --follow: {tmp_path / 'no'}: no such folder\n"
    with pytest.raises(RequestError, match="Is a directory"):
        follow(tmp_path)
