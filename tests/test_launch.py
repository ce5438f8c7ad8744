"""What torchrun or a scheduler has left in the environment: refused where malformed, ignored where
nothing trains.
"""

import pytest

from helpers import write_run
from lab.machine import distributed
from runs import command

QUICK = (
    "model.name=test_resnet dataset.image_size=8 dataset.max_train_samples=32 "
    "dataset.max_val_samples=16 "
)
QUICK += "training.device=cpu training.num_workers=0 training.epochs=1 ast.mode=dense"
RUN = ["scripts/run_experiment.py", "--config", "configs/digits_smoke.yaml", *QUICK.split()]
ALONE = {
    "RANK": "1",
    "WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29517",
}  # nobody is there


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


def test_the_runs_of_a_sweep_are_alone(tmp_path):
    sweep = ["scripts/run_sweep.py", "--configs", "configs/digits_smoke.yaml", *QUICK.split()]
    done = command([*sweep, "--output-dir", tmp_path], variables=ALONE, timeout=60)
    assert done.returncode == 0, done.stdout
    assert len(list(tmp_path.glob("final_results_*.json"))) == 1


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
