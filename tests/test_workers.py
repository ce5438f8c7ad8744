"""Runs with loader workers that fail: each ends, soon, with its code, one line and its results. `-m long`: many."""

import json
import multiprocessing
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

import run_experiment
from conftest import REPO
from lab.cli import run_cli
from test_kill import running

SMOKE = REPO / "configs/digits_smoke.yaml"
KEYS = ["dataset.type=folder", "model.name=test_resnet", "dataset.image_size=32", "training.batch_size=8"]
KEYS += ["training.device=cpu", "training.epochs=3", "ast.warmup_epochs=1", "metrics.base_flop_per_sample=1e6"]
SOON = 10.0  # seconds from its error to the end of a run
PATIENCE = 120.0  # for a whole run, on a busy machine


class Ended(NamedTuple):
    code: int
    printed: str
    seconds: float  # from the error line to the end
    status: str | None  # of the results file

    @property
    def errors(self) -> list[str]:
        return [line.removeprefix("error: ") for line in self.printed.splitlines() if line.startswith("error: ")]


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    folders = [f"dataset.train_dir={images}/train", f"dataset.val_dir={images}/val", f"logging.output_dir={out}/out"]
    return ["--config", str(SMOKE), *KEYS, "training.num_workers=2", *folders, *more]


def watched(poll: Callable[[], int | None], output: Path, act: Callable[[], bool] = lambda: True) -> Ended:
    """Wait for the end of a run that prints to `output`; `act` is called until it has done something."""
    deadline, erred, acted = time.monotonic() + PATIENCE, None, False
    while (code := poll()) is None:
        assert time.monotonic() < deadline, f"no end: {output.read_text()}"
        acted = acted or act()
        if erred is None and "error: " in output.read_text():
            erred = time.monotonic()
        time.sleep(0.02)
    results = sorted(output.parent.glob("out/final_results_*.json"))
    status = json.loads(results[-1].read_text())["status"] if results else None
    return Ended(code, output.read_text(), time.monotonic() - (erred or time.monotonic()), status)


def forked_run(
    args: list[str], folder: Path, before: Callable[[], object] = int, act: Callable[[int], bool] = bool
) -> Ended:
    """The command in a fork of this process, after `before`; `act` gets its id."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "output").unlink(missing_ok=True)

    def work() -> int:
        os.setsid()
        multiprocessing.current_process()._config.pop("tempdir", None)
        before()
        return run_cli(lambda: run_experiment.main(args))

    with running(work, folder / "output") as child:

        def poll() -> int | None:
            done, status = os.waitpid(child, os.WNOHANG)
            return os.waitstatus_to_exitcode(status) if done else None

        return watched(poll, folder / "output", lambda: act(child))


def real_run(args: list[str], folder: Path, *prefix: str, act: Callable[[int], bool] = bool) -> Ended:
    """The command as a user runs it, in a session of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output").open("w") as output:
        command = [*prefix, sys.executable, str(REPO / "scripts/run_experiment.py"), *args]
        options = {"stdout": output, "stderr": subprocess.STDOUT, "start_new_session": True}
        process = subprocess.Popen(command, cwd=REPO, **options)
        try:
            return watched(process.poll, folder / "output", lambda: act(process.pid))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def assert_ended(ended: Ended, code: int, says: str, status: str | None = "failed") -> None:
    assert ended.code == code, ended.printed
    assert len(ended.errors) == 1, ended.printed
    assert says in ended.errors[0]
    assert "Traceback" not in ended.printed
    assert ended.seconds < SOON
    assert ended.status == status, ended.printed


def spoil(images: Path, part: str) -> None:
    """Leave nothing of a picture but its name."""
    os.truncate(images / part / "green/1.jpg", 0)


def children(process: int) -> list[int]:
    try:
        return [int(child) for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def small_shm(size: str) -> list[str]:
    """What starts a command with a /dev/shm of so many bytes, alone with it."""
    prefix = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs -o size={size} none /dev/shm && exec "$@"', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        pytest.skip("nothing can be mounted here")
    return prefix


def limit_memory() -> None:
    """Leave this process 300 MB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300 * 2**20,) * 2)


def set_tmpdir(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"], tempfile.tempdir = str(folder), None


# ------------------------------------------------------------------------------------------------ Failing


@pytest.mark.parametrize(("part", "workers"), [("train", 2), ("val", 8)])
def test_a_picture_that_cannot_be_read_ends_a_run_with_workers(part, workers, image_folder, tmp_path):
    spoil(image_folder, part)
    ended = forked_run(arguments(image_folder, tmp_path / "1", f"training.num_workers={workers}"), tmp_path / "1")
    assert_ended(ended, 2, f"{part}/green/1.jpg: not a readable image")


def test_the_command_itself_ends_and_so_do_two_processes(image_folder, tmp_path):
    """A fork has the exit hooks of this process; a command has its own."""
    spoil(image_folder, "val")
    ended = real_run([*arguments(image_folder, tmp_path / "1"), "--nproc", "2"], tmp_path / "1")
    assert_ended(ended, 2, "val/green/1.jpg: not a readable image")


def test_a_loss_that_is_not_finite_ends_a_run_with_workers(image_folder, tmp_path):
    more = ["training.lr=1e30", "training.optimizer=sgd"]
    ended = forked_run(arguments(image_folder, tmp_path / "1", *more), tmp_path / "1")
    assert_ended(ended, 1, "non-finite loss")


def test_few_file_handles_are_named(image_folder, tmp_path):
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))

    args = arguments(image_folder, tmp_path / "1", "training.num_workers=8")
    ended = forked_run(args, tmp_path / "1", few)
    assert_ended(ended, 2, "training.num_workers: 8 loader workers need about")
    assert "`ulimit -n` allows 40" in ended.errors[0]


def test_few_file_handles_later_are_named_too(image_folder, tmp_path):
    def fewer(child: int) -> bool:
        workers = children(child)
        for worker in workers:
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (5, 5))
        return len(workers) >= 2

    args = arguments(image_folder, tmp_path / "1", "training.epochs=100000")
    ended = forked_run(args, tmp_path / "1", act=fewer)
    assert_ended(ended, 1, "too many open files")
    assert "ulimit -n" in ended.errors[0]


def test_a_long_temporary_folder_is_no_obstacle(image_folder, tmp_path):
    args = arguments(image_folder, tmp_path / "1")
    ended = forked_run(args, tmp_path / "1", lambda: set_tmpdir(tmp_path / ("long" * 30)))
    assert (ended.code, ended.status) == (0, "completed"), ended.printed


@pytest.mark.parametrize("cache", ["none", "device"])
def test_a_small_dev_shm_is_named(cache, image_folder, tmp_path):
    more = [f"dataset.cache={cache}", "dataset.image_size=224", "training.batch_size=24"]
    ended = real_run(arguments(image_folder, tmp_path / "1", *more), tmp_path / "1", *small_shm("2m"))
    assert_ended(ended, 1, "/dev/shm is too small", "failed" if cache == "none" else None)
    assert "--shm-size" in ended.errors[0]


def test_a_cpu_without_memory_is_named(image_folder, tmp_path):
    args = arguments(image_folder, tmp_path / "1", "dataset.image_size=512", "training.batch_size=24")
    ended = forked_run(args, tmp_path / "1", limit_memory)
    assert_ended(ended, 1, "out of memory")


def test_a_worker_killed_from_outside_is_named_and_the_others_end(image_folder, tmp_path):
    def kill(child: int) -> bool:
        workers = children(child)[:1] if list(tmp_path.glob("1/out/checkpoints/*/last.pt")) else []
        for worker in workers:
            os.kill(worker, signal.SIGKILL)
        return bool(workers)

    args = arguments(image_folder, tmp_path / "1", "training.epochs=100000")
    assert_ended(forked_run(args, tmp_path / "1", act=kill), 1, "a loader worker died")


def test_a_checkpoint_that_has_done_more_than_is_asked_for_is_complete(image_folder, tmp_path):
    args = [*arguments(image_folder, tmp_path), "--resume", "auto"]
    assert forked_run([*args, "training.epochs=4"], tmp_path).code == 0
    ended = forked_run([*args, "training.epochs=2"], tmp_path)
    assert (ended.code, ended.status) == (0, "completed"), ended.printed


# ------------------------------------------------------------------------------------------------ Signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_whole_group_reaches_one_end(number, image_folder, tmp_path):
    """As a terminal and a scheduler send it: to the run and to its workers."""

    def tell(child: int) -> bool:
        begun = bool(list(tmp_path.glob("1/out/checkpoints/*/last.pt")))
        if begun:
            os.killpg(child, number)
        return begun

    args = arguments(image_folder, tmp_path / "1", "training.epochs=100000")
    ended = forked_run(args, tmp_path / "1", act=tell)
    assert (ended.code, ended.status) == (128 + number, "interrupted"), ended.printed
    assert "Traceback" not in ended.printed
    assert "error: " not in ended.printed
