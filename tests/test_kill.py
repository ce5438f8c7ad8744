"""Processes that die: killed, told to end, or left without a worker. Short by default; `-m long` for the long form."""

import json
import os
import random
import signal
import time
from pathlib import Path

import pytest

import run_experiment
from conftest import REPO, make_config
from lab.cli import run_cli
from lab.config import Config
from lab.errors import TrainingFailed
from lab.runtime.checkpoint import load_checkpoint
from lab.runtime.clock import Stop
from runs import WAYS, exit_code, final_state, forked, running, same, untimed, wait_until
from train_ast import train

TINY = ["model.name=test_resnet", "dataset.image_size=8", "training.batch_size=32", "training.lr=0.05"]
TINY += ["dataset.max_train_samples=256", "dataset.max_val_samples=64", "training.epochs=4", "ast.warmup_epochs=1"]


def check_readable(folder: Path, config: Config) -> None:
    """Nothing that a killed process left is torn: results, log, checkpoints."""
    for path in folder.glob("final_results_*.json"):
        assert json.loads(path.read_text())["status"] in ("completed", "interrupted")
    for path in folder.glob("*.jsonl"):
        assert all(json.loads(line)["epoch"] for line in path.read_text().splitlines())  # none yet is no tear
    for path in folder.glob("checkpoints/*/*.pt"):
        load_checkpoint(path, config)


def kill_and_resume(config: Config, dice: random.Random, seconds: float, kills: int) -> int:
    """Kill `config`'s run at random moments, then let it end. Returns how many kills hit."""
    folder, hits = Path(config.logging.output_dir), 0
    folder.mkdir(parents=True)
    for _ in range(kills):
        child = forked(lambda: train(config, resume="auto") and 0, folder / "output")
        time.sleep(dice.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        hits += exit_code(child) == -signal.SIGKILL
        check_readable(folder, config)
    assert exit_code(forked(lambda: train(config, resume="auto") and 0, folder / "output")) == 0, (
        folder / "output"
    ).read_text()
    check_readable(folder, config)
    return hits


def kill_test(tmp_path: Path, runs: int, ways: list[str], kills: int) -> None:
    dice, hits, whole = random.Random(0), 0, {}
    for run in range(runs):
        way = ways[run % len(ways)]

        def config(folder, *more, way=way):
            log = [f"logging.output_dir={tmp_path / folder}", f"logging.jsonl_path={tmp_path / folder}/log.jsonl"]
            size = [key for key in WAYS[way] if key.startswith(("model.name", "dataset.image_size"))]
            return make_config(*[key for key in TINY if not size or "image_size" not in key], *WAYS[way], *log, *more)

        if way not in whole:
            started, name = time.monotonic(), f"whole{run}"
            kill_and_resume(config(name), dice, 0.0, 0)
            whole[way] = name, time.monotonic() - started
        name, seconds = whole[way]
        often = [] if run % 3 else ["logging.checkpoint_minutes=1e-9"]  # a write is nearly always under way
        hits += kill_and_resume(config(f"run{run}", *often), dice, seconds, kills)
        assert same(final_state(config(f"run{run}")), final_state(config(name)))
        results = [max((tmp_path / each).glob("final_results_*"), key=os.path.getmtime) for each in (name, f"run{run}")]
        first, second = (untimed(json.loads(path.read_text())) for path in results)
        assert first == second
        logs = [(tmp_path / each / "log.jsonl").read_text().splitlines() for each in (name, f"run{run}")]
        assert [json.loads(line)["epoch"] for line in logs[1]] == [1, 2, 3, 4]
        assert [json.loads(line)["val_acc"] for line in logs[1]] == [json.loads(line)["val_acc"] for line in logs[0]]
    print(f"{runs} runs, {hits} of {runs * kills} kills hit a running process")
    assert hits >= runs * kills / 3


def test_killed_runs_end_as_the_uninterrupted_one(tmp_path):
    kill_test(tmp_path, runs=3, ways=["ast", "packed, accumulated", "two workers"], kills=2)


@pytest.mark.long
def test_fifty_killed_runs_end_as_the_uninterrupted_one(tmp_path):
    kill_test(tmp_path, runs=50, ways=list(WAYS), kills=3)


def terminate_test(tmp_path: Path, times: int) -> None:
    dice, slowest = random.Random(1), 0.0
    for n in range(times):
        folder = tmp_path / str(n)
        args = ["--config", str(REPO / "configs/digits_smoke.yaml"), "training.epochs=100000", "training.num_workers=1"]
        args += ["dataset.max_train_samples=256", "--output-dir", str(folder / "out")]
        folder.mkdir()
        child = forked(lambda args=args: run_cli(lambda: run_experiment.main(args)), folder / "output")
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
    """Killed outright, the first one leaves loader workers behind for seconds: they do not keep the folder."""
    endless = ["--config", str(REPO / "configs/digits_smoke.yaml"), "training.epochs=100000", "training.num_workers=2"]
    args = [*endless, "dataset.max_train_samples=256", "--resume", "auto", "--output-dir", str(tmp_path / "out")]

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
    more = ["training.num_workers=1", "training.batch_size=4", "ast.mode=dense", f"logging.output_dir={tmp_path}/o"]
    died = r"a loader worker died: DataLoader worker .* killed by signal: Killed.*out of memory"
    with pytest.raises(TrainingFailed, match=died):
        train(make_config(*TINY, "dataset.type=folder", *folders, *more), Killer())
    (path,) = (tmp_path / "o").glob("final_results_*.json")
    assert json.loads(path.read_text())["error"].startswith("a loader worker died")
