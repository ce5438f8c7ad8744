"""Disks that fill up and folders that turn read-only: real file systems, the real commands, each in
a process.
"""

import contextlib
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import run_experiment
import run_sweep
from conftest import REPO
from lab.config.loading import Config, checkpoint_folder
from lab.engine.checkpoint import load_checkpoint
from lab.study.cli import run_cli
from runs import exit_code, final_state, forked, running, same, wait_until
from train_ast import load_config, train

SMOKE = REPO / "configs/digits_smoke.yaml"
KEYS = [
    "model.name=test_resnet",
    "dataset.image_size=8",
    "training.batch_size=32",
    "training.device=cpu",
]
KEYS += [
    "dataset.max_train_samples=128",
    "dataset.max_val_samples=32",
    "training.num_workers=0",
    "ast.warmup_epochs=1",
]
EPOCHS = 16  # so many that the run is under way when its disk fails
KEYS += ["metrics.base_flop_per_sample=1e6", f"training.epochs={EPOCHS}"]
FULL = "No space left on device"
READ_ONLY = "Read-only file system"


@pytest.fixture
def mount() -> Iterator[Callable[..., Path]]:
    """Mount something at a folder, options before it; every mount is taken away at the end."""
    mounted = []

    def mount(at: Path, *options: str) -> Path:
        at.mkdir(parents=True, exist_ok=True)
        if shutil.which("mount") is None:
            pytest.skip("there is no mount command here")
        done = subprocess.run(["mount", *options, str(at)], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"nothing can be mounted here: {done.stderr.strip()}")
        mounted.append(at)
        return at

    try:
        yield mount
    finally:
        for at in reversed(mounted):
            subprocess.run(["umount", "--lazy", str(at)], capture_output=True)
        left = [
            line
            for line in Path("/proc/mounts").read_text().splitlines()
            if line.split()[1] in map(str, mounted)
        ]
        assert not left


@pytest.fixture
def small_disk(mount, tmp_path) -> Callable[..., Path]:
    """A file system in memory, in the folder of that name: it takes three checkpoints of 4.4
    MiB.
    """
    return lambda name="disk", size="16m": mount(
        tmp_path / name, "-t", "tmpfs", "-o", f"size={size}", "none"
    )


def make_read_only(folder: Path, mount: Callable[..., Path]) -> None:
    """What stands there can be read, and nothing written any more, by nobody."""
    mount(folder, "--bind", str(folder))
    remount = ["mount", "-o", "remount,ro,bind", str(folder)]
    wait_until(
        lambda: subprocess.run(remount, capture_output=True).returncode == 0
    )  # not while a file is written


def fill(disk: Path, leave: int = 0) -> Path:
    """Fill the file system of the folder `disk` but for so many bytes. Returns the file that does
    it.
    """
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(2**16)):
            pass
    os.truncate(ballast, ballast.stat().st_size - leave)
    return ballast


def command(config: Config) -> Callable[[], int]:
    """The command that runs a config of `configured`, going on from its checkpoint where there is
    one.
    """
    more = [
        f"logging.{key}={value}"
        for key, value in config.logging.model_dump(exclude_none=True).items()
    ]
    more.append(f"training.num_workers={config.training.num_workers}")
    args = ["--config", str(SMOKE), "--resume", "auto", *KEYS, *more]
    return lambda: run_cli(lambda: run_experiment.main(args))


def configured(output_dir: Path, *more: str) -> Config:
    return load_config(SMOKE, [*KEYS, f"logging.output_dir={output_dir}", *more])


def last(config: Config) -> Path:
    return checkpoint_folder(config) / "last.pt"


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict:
    """The final state of the run that nothing happens to."""
    config = configured(tmp_path_factory.mktemp("whole"))
    train(config)
    return final_state(config)


def only_line(output: Path) -> str:
    """The error that a command ended with: one line, the last one, and no other sign of trouble."""
    *before, line = output.read_text().splitlines()
    assert line.startswith("error: "), output.read_text()
    assert not any(
        "Traceback" in each or "rror: " in each.replace("failed: ", "") for each in before
    ), before
    return line.removeprefix("error: ")


def ends(config: Config, output: Path) -> tuple[int, str]:
    """The exit code of `config`'s command and the one line it ends with."""
    output.unlink(missing_ok=True)
    return exit_code(forked(command(config), output)), only_line(output)


def resumes(config: Config, output: Path, whole: dict) -> None:
    """Once there is room again, the run goes on from the checkpoint it has, to the end it would
    have had anyway.
    """
    there = load_checkpoint(last(config), config)["metrics"]["history"]["epoch"]
    output.unlink(missing_ok=True)
    assert exit_code(forked(command(config), output)) == 0, output.read_text()
    assert f"resumed from {last(config)}: epoch {len(there) + 1}, step 0" in output.read_text()
    assert same(final_state(config), whole)
    for path in Path(config.logging.output_dir).glob("final_results*.json"):
        assert json.loads(path.read_text())["status"] in ("completed", "failed")
    newest = max(Path(config.logging.output_dir).glob("final_results_*.json"), key=os.path.getmtime)
    assert json.loads(newest.read_text())["epochs_completed"] == config.training.epochs
    assert not list(Path(config.logging.output_dir).rglob("*.part"))


def disturbed(config: Config, output: Path, disturb: Callable[[], object]) -> tuple[int, str]:
    """Start `config`, `disturb` it once it has a checkpoint; how it then ends, as `ends`."""
    with running(command(config), output) as child:
        wait_until(lambda: last(config).exists() or "error: " in output.read_text())
        disturb()
        code = exit_code(child)
    return code, only_line(output)


# --------------------------------------------------------------------------------------------- Full


def test_a_disk_full_from_the_start_is_refused_in_one_line(small_disk, tmp_path, whole):
    """Of a new run, of one to resume, and where the disk has room for a probe but for no
    checkpoint.
    """
    disk = small_disk()
    config = configured(disk / "out")
    code, line = disturbed(config, tmp_path / "first", lambda: fill(disk, leave=8192))
    assert code == 1
    before = last(config).read_bytes()
    (disk / "ballast").unlink()
    fill(disk)
    for asked in (config, configured(disk / "new")):
        code, line = ends(asked, tmp_path / "again")
        assert (code, line.partition(":")[0]) == (2, "logging.output_dir")
        assert line.endswith(FULL)
        assert asked.logging.output_dir in line
    code, line = ends(
        configured(tmp_path / "out", f"logging.jsonl_path={disk}/log.jsonl"), tmp_path / "again"
    )
    assert (code, line) == (2, f"logging.jsonl_path: cannot write to {disk}/log.jsonl: {FULL}")
    os.truncate(disk / "ballast", (disk / "ballast").stat().st_size - 2**18)
    code, line = ends(configured(disk / "new"), tmp_path / "again")
    assert (code, line.partition(" need ")[0]) == (
        2,
        f"logging.output_dir: the checkpoints in {disk}/new/checkpoints/"
        + checkpoint_folder(config).name,
    )
    assert last(config).read_bytes() == before
    (disk / "ballast").unlink()
    resumes(config, tmp_path / "resumed", whole)


@pytest.mark.parametrize(
    ("leave", "workers"),
    [pytest.param(4096, 0, marks=pytest.mark.long), (0, 2), (2_000_000, 4)],
)
def test_a_disk_that_fills_up_under_a_checkpoint_leaves_the_one_before(
    leave, workers, small_disk, tmp_path, whole
):
    disk = small_disk()
    config = configured(disk / "out", f"training.num_workers={workers}")
    code, line = disturbed(config, tmp_path / "output", lambda: fill(disk, leave))
    assert code == 1
    assert str(checkpoint_folder(config)) in line  # a checkpoint, or the weights
    assert "cannot write, the checkpoint before is whole" in line
    (disk / "ballast").unlink()
    resumes(config, tmp_path / "resumed", whole)


def test_a_disk_that_fills_up_under_the_log_leaves_no_torn_line(small_disk, tmp_path, whole):
    disk = small_disk("log")
    log = disk / "log.jsonl"
    config = configured(tmp_path / "out", f"logging.jsonl_path={log}")
    log.write_text('{"epoch": 1, "of": "an earlier run"}\n' * 3000)
    code, line = disturbed(config, tmp_path / "output", lambda: fill(disk))
    assert (code, line) == (1, f"{log}: cannot write, the checkpoint before is whole: {FULL}")
    before = log.read_text()
    epochs = [json.loads(text)["epoch"] for text in before.splitlines()[3000:]]
    assert epochs == list(range(1, len(epochs) + 1))
    assert epochs
    assert log.stat().st_size % 4096  # the line that did not fit would have begun on the last page
    fill(disk, leave=2**16)  # the probe at the start fits in, a second log does not
    code, line = ends(config, tmp_path / "output")
    assert (code, line) == (2, f"logging.jsonl_path: cannot put {log} in order: {FULL}")
    assert log.read_text() == before
    (disk / "ballast").unlink()
    resumes(config, tmp_path / "resumed", whole)
    epochs = [json.loads(text)["epoch"] for text in log.read_text().splitlines()[3000:]]
    assert epochs == list(range(1, EPOCHS + 1))


@pytest.mark.parametrize("leave", [0, pytest.param(4096, marks=pytest.mark.long)])
def test_a_disk_that_fills_up_under_the_results_leaves_them_to_be_written(
    leave, small_disk, tmp_path, whole
):
    """The checkpoints, on another disk, hold all of the run: resumed, it has nothing more to do
    than that.
    """
    disk = small_disk()
    (tmp_path / "roomy").mkdir()
    (disk / "out").mkdir()
    (disk / "out/checkpoints").symlink_to(tmp_path / "roomy")
    config = configured(disk / "out")
    code, line = disturbed(config, tmp_path / "output", lambda: fill(disk, leave))
    assert code == 1
    assert line.startswith(f"{disk}/out/final_results")
    assert line.endswith(f"cannot write the results: {FULL}")
    assert [path.name for path in (disk / "out").iterdir()] == ["checkpoints"]
    (disk / "ballast").unlink()
    resumes(config, tmp_path / "resumed", whole)


def test_a_full_disk_under_the_printed_lines_ends_no_run(small_disk, tmp_path, whole):
    """As with `run_experiment.py ... > disk/output`: what it computes is kept all the same."""
    disk = small_disk("printed")
    config = configured(tmp_path / "out", "training.num_workers=2")
    errors = tmp_path / "errors"
    with running(command(config), disk / "output", errors) as child:
        wait_until(last(config).exists)
        fill(disk)
        with (disk / "output").open("ab", buffering=0) as output, contextlib.suppress(OSError):
            # the next line needs another page
            output.write(b" " * (-os.fstat(output.fileno()).st_size % 4096))
        code = exit_code(child)
    assert (code, errors.read_text()) == (0, "")
    assert (disk / "output").stat().st_size % 4096 == 0  # nothing came through
    assert same(final_state(config), whole)
    (path,) = (tmp_path / "out").glob("final_results_*.json")
    assert json.loads(path.read_text())["status"] == "completed"


@pytest.mark.long
def test_a_sweep_on_a_full_disk_lists_what_failed(small_disk, tmp_path):
    disk = small_disk()
    args = [
        "--configs",
        str(SMOKE),
        "--output-dir",
        str(disk / "out"),
        *KEYS,
        "training.epochs=100000",
    ]
    args.append("training.num_workers=2")

    def sweep() -> int:
        return run_cli(lambda: run_sweep.main(args))

    with running(sweep, tmp_path / "first") as child:
        (path,) = wait_until(lambda: list(disk.glob("out/checkpoints/*/last.pt")))
        fill(disk)
        assert exit_code(child) == 1
    printed = (tmp_path / "first").read_text()
    summary = f"error: {disk}/out/sweep_summary"  # where that cannot be added to, nothing is listed
    assert (
        f"{path}: cannot write, the checkpoint before is whole: {FULL}" in printed
        or summary in printed
    )
    assert "Traceback" not in printed
    fill(disk)
    assert exit_code(forked(sweep, tmp_path / "second")) == 2
    assert only_line(tmp_path / "second").endswith(FULL)


# ---------------------------------------------------------------------------------------- Read-only


@pytest.mark.parametrize("part", ["checkpoints", "everything"])
def test_a_read_only_folder_is_found_at_the_start(part, mount, tmp_path):
    config = configured(tmp_path / "out")
    checkpoint_folder(config).mkdir(parents=True)
    folder = checkpoint_folder(config) if part == "checkpoints" else tmp_path / "out"
    make_read_only(folder, mount)
    code, line = ends(config, tmp_path / "output")
    assert (code, line) == (2, f"logging.output_dir: cannot write to {folder}: {READ_ONLY}")


@pytest.mark.parametrize("part", ["checkpoints", "everything"])
def test_a_folder_that_turns_read_only_leaves_the_last_checkpoint(part, mount, tmp_path, whole):
    config = configured(tmp_path / "out")
    folder = checkpoint_folder(config) if part == "checkpoints" else tmp_path / "out"
    code, line = disturbed(config, tmp_path / "output", lambda: make_read_only(folder, mount))
    assert code == 1
    assert (
        f"{checkpoint_folder(config)}/" in line
    )  # the last one, the best one or what goes with them
    assert "cannot write, the checkpoint before is whole" in line
    assert READ_ONLY in line
    load_checkpoint(last(config), config)
    subprocess.run(["umount", str(folder)], check=True)
    resumes(config, tmp_path / "resumed", whole)


def test_a_folder_without_the_right_to_write_is_found_at_the_start(tmp_path):
    """By its mode, as a user without root's powers; root gives them up for it."""
    with tempfile.TemporaryDirectory() as folder:  # unlike tmp_path a place where others may enter
        os.chmod(folder, 0o755)
        (Path(folder) / "out").mkdir(mode=0o555)
        config = configured(Path("out"))

        def powerless() -> int:
            os.chdir(folder)
            if os.geteuid() == 0:
                os.setuid(65534)
            return run_cli(lambda: train(config) and 0)

        assert exit_code(forked(powerless, tmp_path / "output")) == 2
    assert (
        only_line(tmp_path / "output")
        == "logging.output_dir: cannot write to out: Permission denied"
    )
