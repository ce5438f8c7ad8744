"""What torchrun or a scheduler has left in the environment: refused where malformed, ignored where
nothing trains.
"""

import json
import socket

import pytest

from helpers import ALONE, write_run
from lab.base import launch
from lab.base.errors import RequestError
from lab.machine import distributed
from runs import command, exit_code, forked, program

QUICK = (
    "model.name=test_resnet dataset.image_size=8 dataset.max_train_samples=32 "
    "dataset.max_val_samples=16 "
)
QUICK += "training.device=cpu training.num_workers=0 training.epochs=1 ast.mode=dense"
RUN = ["scripts/run_experiment.py", "--config", "configs/digits_smoke.yaml", *QUICK.split()]


@pytest.mark.parametrize(
    ("variables", "named"),
    [
        ({"WORLD_SIZE": ""}, "WORLD_SIZE"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE"),
        pytest.param({"WORLD_SIZE": "0"}, "WORLD_SIZE", marks=pytest.mark.long),
        pytest.param(ALONE | {"RANK": "x"}, "RANK", marks=pytest.mark.long),
        (ALONE | {"RANK": "2"}, "RANK"),
        pytest.param(ALONE | {"LOCAL_RANK": "-1"}, "LOCAL_RANK", marks=pytest.mark.long),
        pytest.param(ALONE | {"MASTER_PORT": "99999"}, "MASTER_PORT", marks=pytest.mark.long),
    ],
)
def test_a_malformed_variable_is_named(variables, named, tmp_path):
    done = command([*RUN, "--output-dir", tmp_path], variables=variables, timeout=60)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith(f"error: {named}: expected a whole number ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    "variables", [pytest.param(ALONE, marks=pytest.mark.long), {"WORLD_SIZE": "", "RANK": "x"}]
)
def test_what_does_not_train_ignores_them(variables, tmp_path):
    write_run(tmp_path, "1")
    sweep = ["scripts/run_sweep.py", "--configs", "configs/digits_smoke.yaml"]
    for arguments in (
        [*RUN, "--dry-run"],
        [*sweep, "--dry-run"],
        ["scripts/analyze_results.py", "--results-dir", tmp_path],
    ):
        done = command(arguments, variables=variables, timeout=30)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout
    done = command([*RUN, "--dry-run", "training.lr=x"], variables=variables, timeout=30)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)


@pytest.mark.parametrize("rank", ["0", pytest.param("1", marks=pytest.mark.long)])
def test_a_run_that_waits_for_others_says_so_and_ends_in_a_line(rank, tmp_path, monkeypatch):
    monkeypatch.setattr(distributed, "CONTACT_SECONDS", 4)
    monkeypatch.setattr(distributed, "WORTH_A_LINE", 1)
    done = command([*RUN, "--output-dir", tmp_path], variables=ALONE | {"RANK": rank}, timeout=60)
    assert done.returncode == 1
    said, *_, error = done.stderr.splitlines()
    assert said.startswith(
        f"rank {rank} waits for the other 1 of WORLD_SIZE=2 processes at 127.0.0.1:29517: "
    )
    assert "unset RANK and WORLD_SIZE" in said
    assert error.startswith("error: ")
    assert "Traceback" not in done.stderr
    assert len(done.stderr.splitlines()) == 2


SRUN = {"SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
SRUN |= {"SLURM_STEP_TASKS_PER_NODE": "2", "SLURM_NODEID": "0", "SLURM_JOB_ID": "7"}


def test_tasks_of_srun_that_do_not_know_where_to_meet_are_refused_once(tmp_path):
    """The first task says so, with the command for torchrun; the other ends with the same code."""
    train = ["scripts/train_ast.py", *RUN[1:], f"logging.output_dir={tmp_path}"]
    first, second = (
        command(train, variables=SRUN | {"SLURM_PROCID": rank}, timeout=60) for rank in "01"
    )
    assert (first.returncode, second.returncode, second.stderr) == (2, 2, "")
    assert first.stderr.startswith("error: MASTER_ADDR, MASTER_PORT: srun started 2 tasks that ")
    assert "srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_JOB_NUM_NODES" in first.stderr
    assert first.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_tasks_of_srun_take_rank_and_world_from_its_variables(monkeypatch):
    for name in (*launch.VARIABLES, *launch.SRUN_VARIABLES):
        monkeypatch.delenv(name, raising=False)
    assert launch.launched() == (0, 1, 0)
    asked = {"SLURM_STEP_NUM_TASKS": "7", "SLURM_PROCID": "5", "SLURM_LOCALID": "1"}
    asked |= {"SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_NODEID": "2"}
    for name, value in (asked | {"MASTER_ADDR": "host", "MASTER_PORT": "29500"}).items():
        monkeypatch.setenv(name, value)
    assert launch.launched() == (5, 7, 1)
    assert launch.launched_here() == 2
    monkeypatch.setenv("SLURM_NODEID", "3")
    assert launch.launched_here() == 1
    monkeypatch.setenv("SLURM_PROCID", "7")
    with pytest.raises(RequestError, match="SLURM_PROCID: expected a whole number from 0 to 6"):
        launch.launched()
    monkeypatch.setenv("RANK", "1")  # torchrun, a task of srun itself, has the say
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert launch.launched()[:2] == (1, 2)
    launch.forget_launch()
    assert launch.launched() == (0, 1, 0)


def test_two_tasks_of_srun_train_together(tmp_path):
    """Started as srun starts them, each with its variables; the meeting place is a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    meeting = SRUN | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"}
    train = ["scripts/train_ast.py", *RUN[1:], f"logging.output_dir={tmp_path}"]

    def task(rank: str) -> int:
        facts = {"SLURM_PROCID": rank, "SLURM_LOCALID": rank}
        return forked(program(train, variables=meeting | facts), tmp_path / f"{rank}.out")

    codes = [exit_code(child) for child in [task("0"), task("1")]]
    assert codes == [0, 0], (tmp_path / "0.out").read_text() + (tmp_path / "1.out").read_text()
    (path,) = tmp_path.glob("final_results_*.json")
    assert json.loads(path.read_text())["environment"]["processes"] == 2
