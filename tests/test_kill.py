"""Processes that die: killed, told to end, or left without a worker. Short by default; `-m long`
for the long form.
"""

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
from safetensors.torch import load_file

import lab.machine.distributed
import run_experiment
from conftest import REPO, make_config
from lab.base.errors import TrainingFailed
from lab.config.loading import Config
from lab.engine.checkpoint import load_checkpoint
from lab.machine.clock import Stop
from lab.study.cli import run_cli
from runs import (
    WAYS,
    cases,
    exit_code,
    final_state,
    forked,
    ranks,
    running,
    same,
    span,
    untimed,
    wait_until,
)
from train_ast import execute, train

TINY = [
    "model.name=test_resnet",
    "dataset.image_size=8",
    "training.batch_size=32",
    "training.lr=0.05",
]
TINY += [
    "dataset.max_train_samples=128",
    "dataset.max_val_samples=32",
    "training.epochs=4",
    "ast.warmup_epochs=1",
]


PAIRED = [
    "ast",
    "packed, accumulated",
    "two workers",
    "history, two workers",
    "resident crops",
]  # two processes


@pytest.fixture(autouse=True)
def _short_contact(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that is killed while they meet leaves the other waiting, where torchrun would end
    it.
    """
    monkeypatch.setattr(lab.machine.distributed, "CONTACT_SECONDS", 10.0)


def check_readable(folder: Path, config: Config) -> None:
    """Nothing that a killed process left is torn: results, log, checkpoints, weights."""
    for path in folder.glob("final_results_*.json"):
        assert json.loads(path.read_text())["status"] in (
            "completed",
            "interrupted",
            "failed",
        )  # where a peer was lost
    for path in folder.glob("*.jsonl"):
        assert all(
            json.loads(line)["epoch"] for line in path.read_text().splitlines()
        )  # none yet is no tear
    for path in folder.glob("checkpoints/*/*.pt"):
        load_checkpoint(path, config)
    for path in folder.glob("checkpoints/*/weights/*.safetensors"):
        weights = load_file(path)
        facts = json.loads(path.with_name("config.json").read_text())
        assert facts["num_classes"] == 10
        assert all(tensor.isfinite().all() for tensor in weights.values())


def go_on(
    config: Config, processes: int, disturb: Callable[[list[int]], object] = bool
) -> list[int]:
    """Start a run, or go on from its checkpoint, in so many processes. Returns their exit codes.

    disturb: called with the ids of the processes once they are started.
    """
    folder = Path(config.logging.output_dir)
    if processes == 1:
        child = forked(lambda: execute(config, "auto"), folder / "output")
        disturb([child])
        return [exit_code(child)]
    return ranks(
        processes, lambda _: sys.exit(execute(config, "auto")), folder / "ranks", disturb=disturb
    ).codes


def kill_and_resume(
    config: Config, dice: random.Random, seconds: float, kills: int, processes: int
) -> int:
    """Kill a process of `config`'s run at random moments (SIGKILL, SIGTERM), then let it end.
    Returns how many hit.
    """
    folder = Path(config.logging.output_dir)
    hits = 0
    folder.mkdir(parents=True)

    def kill(children: list[int]) -> None:
        time.sleep(dice.uniform(0, 0.9 * seconds))
        os.kill(dice.choice(children), dice.choice([signal.SIGKILL, signal.SIGTERM]))

    for _ in range(kills):
        hits += any(go_on(config, processes, kill))
        check_readable(folder, config)
    assert not any(go_on(config, processes)), "".join(
        path.read_text() for path in folder.rglob("*out*")
    )
    check_readable(folder, config)
    return hits


def kill_test(
    tmp_path: Path, ways: list[str], numbers: Iterable[int], kills: int, processes: int = 1
) -> None:
    """Each run is killed `kills` times, and must end bit for bit as one that nothing happens to."""
    hits = 0
    whole = {}
    done = []
    for run in numbers:
        dice = random.Random(run)
        way = ways[run % len(ways)]

        def config(folder, *more, way=way):
            log = [
                f"logging.output_dir={tmp_path / folder}",
                f"logging.jsonl_path={tmp_path / folder}/log.jsonl",
            ]
            size = [
                key for key in WAYS[way] if key.startswith(("model.name", "dataset.image_size"))
            ]
            return make_config(
                *[key for key in TINY if not size or "image_size" not in key],
                *WAYS[way],
                *log,
                *more,
            )

        if way not in whole:
            started = time.monotonic()
            name = f"whole{run}"
            kill_and_resume(config(name), dice, 0.0, 0, processes)
            whole[way] = name, time.monotonic() - started
        name, seconds = whole[way]
        often = (
            [] if run % 3 else ["logging.checkpoint_minutes=1e-9"]
        )  # a write is nearly always under way
        hits += kill_and_resume(config(f"run{run}", *often), dice, seconds, kills, processes)
        assert same(final_state(config(f"run{run}")), final_state(config(name)))
        results = [
            max((tmp_path / each).glob("final_results_*.json"), key=os.path.getmtime)
            for each in (name, f"run{run}")
        ]
        first, second = (untimed(json.loads(path.read_text())) for path in results)
        assert first == second
        logs = [
            (tmp_path / each / "log.jsonl").read_text().splitlines() for each in (name, f"run{run}")
        ]
        assert [json.loads(line)["epoch"] for line in logs[1]] == [1, 2, 3, 4]
        assert [json.loads(line)["val_acc"] for line in logs[1]] == [
            json.loads(line)["val_acc"] for line in logs[0]
        ]
        done.append(run)
    wanted = len(done) * kills
    print(
        f"ENDS kills: {processes} processes, cases {span(done)}, {hits} of {wanted} "
        f"kills hit a running process"
    )
    assert hits >= wanted / 3 or wanted < 12  # by chance


@pytest.mark.parametrize(
    ("processes", "ways", "runs"),
    [(1, ["packed, accumulated", "two workers", "resident crops"], 3), (2, PAIRED[1:2], 1)],
)
def test_killed_runs_end_as_the_uninterrupted_one(processes, ways, runs, tmp_path):
    kill_test(tmp_path, ways, range(runs), kills=2, processes=processes)


@pytest.mark.long
@pytest.mark.parametrize(("processes", "ways"), [(1, list(WAYS)), (2, PAIRED)])
def test_hundreds_of_killed_runs_end_as_the_uninterrupted_one(processes, ways, tmp_path):
    """500 kills: two thirds of them hit runs of one process, a third runs of two."""
    kill_test(tmp_path, ways, cases(112 // processes), kills=3, processes=processes)


def terminate_test(tmp_path: Path, times: int) -> None:
    dice = random.Random(1)
    slowest = 0.0
    for n in range(times):
        folder = tmp_path / str(n)
        args = [
            "--config",
            str(REPO / "configs/digits_smoke.yaml"),
            "training.epochs=100000",
            "training.num_workers=1",
        ]
        args += ["dataset.max_train_samples=256", "--output-dir", str(folder / "out")]
        folder.mkdir()
        child = forked(
            lambda args=args: run_cli(lambda: run_experiment.main(args)), folder / "output"
        )
        wait_until((folder / "out").exists)  # from here on signals are watched
        time.sleep(dice.uniform(0, 3))
        os.kill(child, signal.SIGTERM)
        started = time.monotonic()
        code = exit_code(child)
        slowest = max(slowest, time.monotonic() - started)
        printed = (folder / "output").read_text()
        assert code == 143, printed
        assert "Traceback" not in printed
        for path in (folder / "out").glob("final_results_*.json"):
            assert json.loads(path.read_text())["status"] == "interrupted"
        if "results: " in printed:
            (last,) = (folder / "out").glob("checkpoints/*/last.pt")
            config = Config.model_validate(json.loads(path.read_text())["config"])
            assert load_checkpoint(last, config)["metrics"]["step"] >= 0
    print(f"{times} times told to end, the slowest took {slowest:.2f} s")
    assert slowest < 5.0


def test_told_to_end_at_any_moment_a_run_does(tmp_path):
    terminate_test(tmp_path, 3)


@pytest.mark.long
def test_told_to_end_at_twenty_moments_a_run_does(tmp_path):
    terminate_test(tmp_path, 20)


def test_a_second_process_with_the_same_config_is_refused_until_the_first_has_died(tmp_path):
    """Killed outright, the first one leaves loader workers behind for seconds: they do not keep the
    folder.
    """
    endless = [
        "--config",
        str(REPO / "configs/digits_smoke.yaml"),
        "training.epochs=100000",
        "training.num_workers=2",
    ]
    args = [
        *endless,
        "dataset.max_train_samples=256",
        "--resume",
        "auto",
        "--output-dir",
        str(tmp_path / "out"),
    ]

    def command() -> int:
        return run_cli(lambda: run_experiment.main(args))

    with running(command, tmp_path / "first") as first:
        last = wait_until(lambda: list(tmp_path.glob("out/checkpoints/*/last.pt")))[0]
        workers = Path(f"/proc/{first}/task/{first}/children").read_text().split()
        assert exit_code(forked(command, tmp_path / "second")) == 2
        todo = "wait for it to end, or set another logging.output_dir"
        refusal = f"error: {last.parent}: another process is running this config into it; {todo}\n"
        assert (tmp_path / "second").read_text() == refusal
        assert os.waitpid(first, os.WNOHANG) == (0, 0)  # it runs on, undisturbed
        os.kill(first, signal.SIGKILL)
        assert exit_code(first) == -signal.SIGKILL
    assert workers
    assert all(Path(f"/proc/{worker}").exists() for worker in workers)
    with running(command, tmp_path / "third") as third:
        wait_until(lambda: "resumed from" in (tmp_path / "third").read_text())
        os.kill(third, signal.SIGTERM)
        assert exit_code(third) == 143


def test_a_worker_that_is_killed_is_named(tmp_path, image_folder):
    """As the kernel does it where memory runs out."""

    class Killer(Stop):
        def status(self, reserve_seconds: float = 0.0) -> str | None:
            children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
            for child in children:
                os.kill(int(child), signal.SIGKILL)
                time.sleep(0.2)
            return None

    folders = [f"dataset.train_dir={image_folder}/train", f"dataset.val_dir={image_folder}/val"]
    more = [
        "training.num_workers=1",
        "training.batch_size=4",
        "ast.mode=dense",
        f"logging.output_dir={tmp_path}/o",
    ]
    died = (
        r"a loader worker died: DataLoader worker .* (killed by signal: Killed|exited "
        r"unexpectedly).*out of memory"
    )
    with pytest.raises(TrainingFailed, match=died):
        train(make_config(*TINY, "dataset.type=folder", *folders, *more), Killer())
    (path,) = (tmp_path / "o").glob("final_results_*.json")
    assert json.loads(path.read_text())["error"].startswith("a loader worker died")
