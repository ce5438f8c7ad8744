"""The parts of a sweep: plans, identities, slots, processes, and which results count as
finished.
"""

import json
import os
import signal
import threading
import time
from dataclasses import replace
from datetime import timedelta

import pytest

from conftest import REPO
from helpers import processes, write_run
from lab.base.errors import RequestError
from lab.base.files import utc_now
from lab.base.reading import read_config
from lab.config.loading import Config, checkpoint_folder, load_config, run_id
from lab.study.sweep.halving import Halving
from lab.study.sweep.jobs import JobOptions, launch_jobs
from lab.study.sweep.plans import Planned, arguments_for, plan_run
from lab.study.sweep.processes import Halt, Running, slots_of, work_off
from lab.study.sweep.sharing import Board, Round
from lab.study.sweep.standing import standing
from lab.study.sweep.summary import finished_runs, is_done, time_left
from runs import exit_code, forked, wait_until

DIGITS = str(REPO / "configs/digits_smoke.yaml")
# A minute of a stand-in that handles signals. One long sleep would not do: a signal that arrives
# just before it begins is handled only after it.
WAIT = "for _ in range(600):\n    time.sleep(0.1)\n"


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
    config = load_config(DIGITS, [f"logging.output_dir={folder}"])
    return script, [Planned(name, "config", (), name, config) for name in "abcd"]


def board_of(folder, plans):
    """The board of a command that is alone."""
    summary = folder / "summary.jsonl"
    summary.touch()
    return Board(folder, Round(str(summary), utc_now(), False), plans)


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
        "import os, time; time.sleep(2.5 if os.environ['CUDA_VISIBLE_DEVICES'] == 'slow' else 0.05)"
    )
    (script, plans) = stand_in(tmp_path, program)
    rows = []
    board = board_of(tmp_path, plans)
    work_off(
        board,
        script,
        ["slow", "quick"],
        Halt(),
        lambda row: rows.append((row, len(board.ahead()))),
    )
    assert [row["device"] for row, _ in rows] == ["quick", "quick", "quick", "slow"]
    assert [still for _, still in rows] == [3, 2, 1, 0]


def test_slots(monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert slots_of(1, None) == [None]
    assert slots_of(4, None) == ["0", "1", "0", "1"]
    assert slots_of(2, 2) == ["0,1", "0,1"]
    with pytest.raises(RequestError, match="--gpus 3: torch sees 2 GPUs"):
        slots_of(1, 3)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "6,4")  # those that this process may see
    assert slots_of(3, None) == ["6", "4", "6"]
    assert slots_of(1, 1) == ["6"]
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert slots_of(2, None) == [None, None]


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
        work_off(board_of(tmp_path, plans[:1]), script, [None], Halt(), rows.append)
        old.write("epoch 2\n")
    assert [(row["exit_code"], row["error"]) for row in rows] == [(1, "error: refused")]
    assert log.read_text() == "error: refused\n"


def test_runs_at_a_time_share_the_cores(tmp_path):
    """The threads of each, and its loader workers, by what the process itself finds."""
    script, plans = stand_in(
        tmp_path,
        "import os, sys\nsys.path.insert(0, sys.argv[-1])\n"
        "from lab.base.launch import cores_here\n"
        "print(cores_here(), os.environ['OMP_NUM_THREADS'])",
    )
    cores = len(os.sched_getaffinity(0))
    plans = [replace(plan, overrides=(str(REPO / "scripts"),)) for plan in plans[:2]]
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("OMP_NUM_THREADS", raising=False)
        work_off(board_of(tmp_path, plans), script, [None, None], Halt(), lambda row: None)
    share = max(1, cores // 2)
    assert {path.read_text() for path in tmp_path.glob("*.log")} == {f"{share} {share}\n"}


def test_a_scheduler_may_warn_again_and_ends_nothing(tmp_path):
    """SIGUSR1, SIGUSR2 and SIGTERM are passed on as often as they come; Ctrl-C then kills."""
    deaf = (
        "import signal, sys, time\n"
        "got = []\n"
        "for number in (10, 12, 15):\n"
        "    signal.signal(number, lambda number, _: print('got', number, flush=True))\n"
        "print('up', flush=True)\n" + WAIT
    )
    (script, (plan, *_)) = stand_in(tmp_path, deaf)
    halt = Halt()
    run = Running(plan, script, None, tmp_path / "log")
    log = tmp_path / "log"
    wait_until(lambda: "up" in log.read_text())
    numbers = [signal.SIGUSR1, signal.SIGUSR2, signal.SIGUSR1, signal.SIGTERM, signal.SIGTERM]
    for number in numbers:
        before = log.read_text().count(f"got {number:d}")
        halt.signals.append(number)
        halt.pass_on([run])
        wait_until(
            lambda number=number, before=before: log.read_text().count(f"got {number:d}") > before
        )
    assert run.process.poll() is None
    halt.signals.append(signal.SIGINT)
    halt.pass_on([run])
    assert run.process.wait(10) == -signal.SIGKILL


def test_two_boards_never_give_the_same_run_and_a_dead_holder_frees_its_own(tmp_path):
    """Another process takes half of the runs and is killed: they are free again, once each."""
    _, plans = stand_in(tmp_path, "")
    first = board_of(tmp_path, plans)
    child = forked(lambda: hold(Board(tmp_path, first.round, plans), tmp_path), tmp_path / "out")
    wait_until((tmp_path / "held").exists)
    assert [first.take().id for _ in range(2)] == ["c", "d"]
    assert first.take() is None
    os.kill(child, signal.SIGKILL)
    assert exit_code(child) == -signal.SIGKILL
    freed = [first.take() for _ in range(3)]
    assert [plan and plan.id for plan in freed] == ["a", "b", None]
    assert not any(plan.resume for plan in freed[:2])  # there is no checkpoint
    for key in "abcd":
        first.finish({"id": key, "status": "failed", "exit_code": 1, "finished_utc": utc_now()})
    late = Board(tmp_path, first.round, plans)
    assert late.take() is None
    assert [row["id"] for row in late.look()] == list("abcd")


def hold(board, folder):
    board.take()
    board.take()
    (folder / "held").touch()
    time.sleep(60)
    return 0


def test_what_is_interrupted_goes_on_with_another_command_from_its_checkpoint(tmp_path):
    _, (plan, *_) = stand_in(tmp_path, "")
    first = board_of(tmp_path, [plan])
    last = checkpoint_folder(plan.config) / "last.pt"
    last.parent.mkdir(parents=True)
    last.touch()
    os.utime(last, (1, 1))  # of another day: a run that was not asked to resume starts afresh
    assert not first.take().resume
    last.write_text("saved")
    row = {"id": "a", "status": "interrupted", "exit_code": 143, "finished_utc": utc_now()}
    first.finish(row)
    assert first.take() is None
    assert first.ahead() == []
    second = Board(tmp_path, first.round, [plan])
    assert second.take().resume


def test_a_run_whose_line_is_missing_is_not_done_again(tmp_path):
    """Its holder was killed between the results and the line."""
    _, (plan, *_) = stand_in(tmp_path, "")
    plan = replace(plan, id=run_id(plan.config))
    first = board_of(tmp_path, [plan])
    assert first.take() is not None
    with first.held.pop(plan.id):
        pass
    environment = {"finished_utc": utc_now()}
    extra = {"config": plan.config.model_dump(), "environment": environment}
    path = write_run(tmp_path, "1", extra=extra)
    second = Board(tmp_path, first.round, [plan])
    assert second.take() is None
    assert [row["results_file"] for row in second.look()] == [str(path)]


@pytest.mark.parametrize(
    ("printed", "says"),
    [
        ("", "starting"),
        ("    4/20     ast   0.254\n", "epoch 4 of 20 done, 0:02:00 left"),
        ("    4       dense   0.254\n", "epoch 4 done"),
        (
            "    4/20     ast   0.254\nepoch 5/20, step 3/9: loss 1.2, 0:01:10 left\n",
            "epoch 5/20, 0:01:10 left",
        ),
    ],
)
def test_what_a_run_is_at_is_read_from_what_it_prints(printed, says):
    assert standing(printed, 4, 30.0) == says


def test_halving_ends_the_runs_that_are_behind_and_no_others(tmp_path):
    """Six runs, one after the other, of which each prints one accuracy: from the rung at epoch 3
    the best of the first five goes on, and the best two of six.
    """
    pytest.importorskip("optuna")
    program = (
        "import signal, sys, time\n"
        "signal.signal(15, lambda *_: sys.exit(143))\n"
        "for epoch in range(1, 8):\n"
        "    print(f'{epoch:>5}/7    dense   0.5    50.0  {sys.argv[-1]}   1.0', flush=True)\n"
        "    time.sleep(0.25 if epoch == 3 else 0)\n"
    )
    script, (plan, *_) = stand_in(tmp_path, program)
    accuracies = ["30.0", "20.0", "40.0", "10.0", "60.0", "50.0"]
    plans = [replace(plan, id=each, overrides=(each,)) for each in accuracies]
    board = board_of(tmp_path, plans)
    rows = []
    work_off(board, script, [None], Halt(), rows.append, halving=Halving(board, 3))
    statuses = {row["id"]: (row["status"], row["exit_code"]) for row in rows}
    behind = {key for key, ended in statuses.items() if ended == ("pruned", 0)}
    assert behind == {"20.0", "10.0"}
    assert {key for key in statuses if statuses[key][1] == 0} == set(accuracies)


def test_a_job_that_is_warned_comes_back_by_submitit_and_one_that_is_told_to_end_does_not(tmp_path):
    """On this machine, by the path of SLURM: the first start of `a` is warned as before a time-out,
    `b` is told to end as by scancel.
    """
    pytest.importorskip("submitit")
    program = (
        "import pathlib, signal, sys, time\n"
        "for number in (12, 15):\n"
        "    signal.signal(number, lambda number, _: sys.exit(128 + number))\n"
        "place = pathlib.Path(sys.argv[-1])\n"
        "began = place.read_text() if place.exists() else ''\n"
        "place.write_text(began + 'began\\n')\n"
        "if began:\n    sys.exit()\n" + WAIT
    )
    script, plans = stand_in(tmp_path, program)
    plans = [replace(plan, overrides=(str(tmp_path / f"at_{plan.id}"),)) for plan in plans[:2]]
    wrong = Planned("w", "config", (), "w", None, "wrong: no such thing")
    board = board_of(tmp_path, [*plans, wrong])

    def tell() -> None:
        for name, number in (("a", signal.SIGUSR2), ("b", signal.SIGTERM)):
            wait_until((tmp_path / f"at_{name}").exists)
            job = str(tmp_path / "jobs")
            (task,) = {*processes("submitit.core._submit")} & {*processes(job)}
            os.kill(task, number)

    threading.Thread(target=tell).start()
    rows = []
    launch_jobs("local", board, script, [None], JobOptions(), Halt(), rows.append)
    assert {row["id"]: row["exit_code"] for row in rows} == {"a": 0, "b": 143, "w": 2}
    assert (tmp_path / "at_a").read_text() == "began\n" * 2
    assert (tmp_path / "at_b").read_text() == "began\n"
    logs = {path.read_text().count("Requeued job") for path in tmp_path.glob("jobs/*_log.out")}
    assert logs == {0, 1}
