"""SIGUSR1, SIGUSR2, SIGTERM and SIGINT: each is saved on by a run, a sweep, a twin and two
processes, and what was saved goes on bit for bit.
"""

import json
import os
import signal
from pathlib import Path

import pytest

import run_sweep
from conftest import REPO
from lab.base.launch import SIGNALS
from lab.config.loading import load_config
from lab.study.cli import run_cli
from run_experiment import main
from runs import exit_code, final_state, forked, ranks, running, same, untimed, wait_until

DIGITS = str(REPO / "configs/digits_smoke.yaml")
SMALL = ["training.epochs=5", "ast.warmup_epochs=1", "dataset.max_train_samples=128"]
SMALL += ["dataset.max_val_samples=64", "training.device=cpu", "ast.target_activation=0.5"]
LONG = [pytest.param(each, marks=pytest.mark.long, id=each.name) for each in SIGNALS]


def arguments(folder: Path) -> list[str]:
    return ["--config", DIGITS, *SMALL, f"logging.output_dir={folder}"]


def experiment(folder: Path, *more: str) -> int:
    return run_cli(lambda: main([*arguments(folder), *more]))


def interrupted(work, folder: Path, number: int, times: int = 1) -> int:
    """The exit code of `work` in a process of its own that gets a signal once a checkpoint of the
    run is there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with running(work, folder / "output") as child:
        wait_until(lambda: list(folder.glob("out/checkpoints/*/last.pt")))
        for _ in range(times):
            os.kill(child, number)
        return exit_code(child)


def newest(folder: Path) -> dict:
    path = max(folder.glob("final_results_*.json"), key=os.path.getmtime)
    return json.loads(path.read_text())


def assert_as_undisturbed(folder: Path, whole: Path) -> None:
    """Checkpoint and results of a run that went on are those of one that was left alone."""
    first, second = (
        load_config(DIGITS, [*SMALL, f"logging.output_dir={each}"]) for each in (folder, whole)
    )
    assert same(final_state(first), final_state(second))
    assert untimed(newest(folder)) == untimed(newest(whole))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run that nothing happens to."""
    folder = tmp_path_factory.mktemp("whole")
    assert exit_code(forked(lambda: experiment(folder), folder / "output")) == 0
    return folder


@pytest.mark.parametrize("number", [signal.SIGUSR1, *LONG])
def test_a_run_saves_and_goes_on(number, whole, tmp_path):
    """A warning may come twice while the run saves."""
    folder = tmp_path / "out"
    times = 2 if number in (signal.SIGUSR1, signal.SIGUSR2) else 1
    code = interrupted(lambda: experiment(folder), tmp_path, number, times)
    assert code == 128 + number
    assert newest(folder)["status"] == "interrupted"
    again = forked(lambda: experiment(folder, "--resume", "auto"), tmp_path / "output")
    assert exit_code(again) == 0
    assert_as_undisturbed(folder, whole)


def sweep(folder: Path, *more: str) -> int:
    args = ["--configs", DIGITS, *SMALL, "--output-dir", str(folder), *more]
    return run_cli(lambda: run_sweep.main(args))


@pytest.mark.parametrize(
    ("number", "flags"),
    [
        (signal.SIGUSR2, ["--one-process"]),
        *(
            pytest.param(number, flags, marks=pytest.mark.long)
            for number in SIGNALS
            for flags in (["--jobs", "2"], ["--one-process"])
        ),
    ],
)
def test_a_sweep_passes_it_on_and_goes_on(number, flags, whole, tmp_path):
    folder = tmp_path / "out"
    code = interrupted(lambda: sweep(folder, *flags), tmp_path, number)
    assert code == 128 + number
    (summary,) = folder.glob("sweep_summary_*.jsonl")
    (row,) = map(json.loads, summary.read_text().splitlines())
    assert (row["status"], row["exit_code"]) == ("interrupted", 128 + number)
    again = forked(lambda: sweep(folder, "--one-process", "--resume"), tmp_path / "output")
    assert exit_code(again) == 0
    assert_as_undisturbed(folder, whole)


@pytest.mark.parametrize("number", LONG)
def test_a_twin_saves_and_goes_on(number, tmp_path):
    """The sparse run is undisturbed; its dense twin, whose schedule is by time, is interrupted."""
    folder = tmp_path / "out"

    def twin(*more: str) -> int:
        return experiment(folder, "--dense-twin", *more)

    with running(twin, tmp_path / "output") as child:
        wait_until(lambda: len(list(folder.glob("checkpoints/*"))) == 2)
        os.kill(child, number)
        assert exit_code(child) == 128 + number
    statuses = [json.loads(path.read_text())["status"] for path in folder.glob("final_*.json")]
    assert sorted(statuses) == ["completed", "interrupted"]
    again = forked(lambda: twin("--resume", "auto"), tmp_path / "output")
    assert exit_code(again) == 0
    assert newest(folder)["status"] == "completed"
    assert "verdict: " in (tmp_path / "output").read_text()


def as_processes(folder: Path, log: Path, disturb=bool) -> list[int]:
    """The exit codes of two processes as torchrun starts them."""
    return ranks(
        2, lambda _: sys_exit(experiment(folder, "--resume", "auto")), log, disturb=disturb
    ).codes


def sys_exit(code: int) -> None:
    raise SystemExit(code)


@pytest.mark.parametrize("number", LONG)
def test_two_processes_save_and_go_on(number, tmp_path):
    """One of them gets the signal, both end."""
    folder = tmp_path / "out"

    def disturb(children: list[int]) -> None:
        wait_until(lambda: list(folder.glob("checkpoints/*/last.pt")))
        os.kill(children[1], number)

    assert as_processes(folder, tmp_path / "first", disturb) == [128 + number] * 2
    assert as_processes(folder, tmp_path / "second") == [0, 0]
    assert as_processes(tmp_path / "whole", tmp_path / "third") == [0, 0]
    assert_as_undisturbed(folder, tmp_path / "whole")


@pytest.mark.parametrize("number", LONG)
def test_the_command_for_several_processes_saves(number, tmp_path):
    """torchrun itself takes no warning of a scheduler: `launch` does."""
    folder = tmp_path / "out"
    code = interrupted(
        lambda: experiment(folder, "--nproc", "2", "training.epochs=1000"), tmp_path, number
    )
    assert code == 128 + number
    assert newest(folder)["status"] == "interrupted"
