"""Following a run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest

from conftest import REPO
from helpers import analyze
from lab.base.errors import RequestError
from lab.study.following import follow


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
