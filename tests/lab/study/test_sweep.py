"""The parts of a sweep: plans, identities, slots, processes, and which results count as
finished.
"""

import json
import signal
import time
from datetime import timedelta

import pytest

from conftest import REPO
from helpers import write_run
from lab.base.errors import RequestError
from lab.base.reading import read_config
from lab.config.loading import Config, load_config, run_id
from lab.study.sweep import (
    Halt,
    Planned,
    Running,
    arguments_for,
    finished_runs,
    is_done,
    plan_run,
    slots_of,
    time_left,
    work_off,
)
from runs import wait_until

DIGITS = str(REPO / "configs/digits_smoke.yaml")


def test_identity_is_the_config_with_its_seed_without_its_logging():
    base = load_config(DIGITS)
    assert run_id(base) == run_id(
        load_config(DIGITS, ["logging.output_dir=elsewhere", "logging.jsonl_path=log"])
    )
    assert run_id(base) == run_id(load_config(DIGITS, ["training.seed=0", "ast.kp=1"]))
    assert run_id(base) == run_id(Config.model_validate(json.loads(json.dumps(base.model_dump()))))
    others = [
        ["training.seed=1"],
        ["ast.kp=1.5"],
        ["ast.mode=dense"],
        ["dataset.max_val_samples=9"],
    ]
    assert len({run_id(base), *(run_id(load_config(DIGITS, other)) for other in others)}) == 5


def stand_in(folder, program):
    """A script to run in place of run_experiment.py, and plans for it: for tests of processes, not
    of training.
    """
    script = folder / "stand_in.py"
    script.write_text(program)
    return script, [Planned(name, "config", (), name, load_config(DIGITS)) for name in "abcd"]


def test_a_second_signal_kills(tmp_path):
    deaf = (
        "import signal, time; signal.signal(2, signal.SIG_IGN); print('up', flush=True); "
        "time.sleep(60)"
    )
    (script, (plan, *_)) = stand_in(tmp_path, deaf)
    halt = Halt()
    run = Running(plan, script, None, tmp_path / "log")
    wait_until(lambda: "up" in (tmp_path / "log").read_text())
    halt.signals.append(signal.SIGINT)
    halt.pass_on([run])
    time.sleep(0.2)
    assert run.process.poll() is None
    halt.signals.append(signal.SIGINT)
    halt.pass_on([run])
    assert run.process.wait(10) == -signal.SIGKILL
    assert run.row()["status"] == "failed"


def test_each_gpu_works_off_the_queue(tmp_path):
    """Two devices, one run at a time on each: never two on one, and the quick device takes what is
    left.
    """
    program = (
        "import os, time; time.sleep(1.5 if os.environ['CUDA_VISIBLE_DEVICES'] == 'slow' else 0.05)"
    )
    (script, plans) = stand_in(tmp_path, program)
    rows = []
    work_off(
        plans,
        script,
        ["slow", "quick"],
        tmp_path,
        Halt(),
        lambda row, still: rows.append((row, len(still))),
    )
    assert [row["device"] for row, _ in rows] == ["quick", "quick", "quick", "slow"]
    assert [still for _, still in rows] == [3, 2, 1, 0]


def test_slots(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots_of([], 2) == [None, None]
    assert slots_of(["0", "1"], 2) == ["0", "0", "1", "1"]
    with pytest.raises(RequestError, match="--gpus 2: torch sees 2 GPUs"):
        slots_of(["2"], 1)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,6")  # numbers count what this process may see
    assert slots_of(["1", "0"], 1) == ["6", "4"]


def test_time_left_goes_by_epochs():
    plans = [Planned("a", "", (), "", load_config(DIGITS, ["training.epochs=30"]))]
    rows = [{"status": "completed", "epochs": 10, "duration_seconds": 20.0}, {"status": "failed"}]
    assert time_left(rows, plans, 2) == timedelta(seconds=30)
    assert time_left(rows[1:], plans, 2) is None


def test_results_of_others_are_not_taken_for_finished_runs(tmp_path):
    config = load_config(DIGITS, [f"logging.output_dir={tmp_path}"])
    plan = Planned(run_id(config), "", (), "", config)
    write_run(tmp_path, "0", extra={"config": config.model_dump(), "status": "interrupted"})
    write_run(
        tmp_path, "1", extra={"config": load_config(DIGITS, ["training.seed=3"]).model_dump()}
    )
    write_run(tmp_path, "2", extra={"config": config.model_dump(), "training_history": None})
    assert plan.id not in finished_runs([plan])
    path = write_run(tmp_path, "3", extra={"config": config.model_dump()})
    assert finished_runs([plan])[plan.id]["results_file"] == str(path)


def test_with_dense_twins_a_run_is_done_when_its_twin_is_there(tmp_path):
    text = read_config(DIGITS)
    modes = ("random", "dense")
    plan, dense = (
        plan_run(DIGITS, text, (f"ast.mode={mode}",), mode, dense_twin=True) for mode in modes
    )
    assert ["--dense-twin" in arguments_for(each) for each in (plan, dense)] == [True, False]
    assert not is_done(plan, None)
    row = {"results_file": str(write_run(tmp_path, "1"))}
    assert [is_done(plan, row), is_done(dense, row)] == [False, True]
    row["twin"] = "final_results_2.json"
    assert not is_done(plan, row)
    write_run(tmp_path, "2", ast__mode="dense")
    assert is_done(plan, row)


def test_a_run_that_outlives_a_killed_sweep_keeps_the_log_it_writes_to(tmp_path):
    script, plans = stand_in(tmp_path, "import sys; sys.exit('error: refused')")
    log = tmp_path / "a.log"
    rows = []
    with log.open("w") as old:
        old.write("epoch 1\n")
        old.flush()
        work_off(plans[:1], script, [None], tmp_path, Halt(), lambda row, still: rows.append(row))
        old.write("epoch 2\n")
    assert [(row["exit_code"], row["error"]) for row in rows] == [(1, "error: refused")]
    assert log.read_text() == "error: refused\n"
