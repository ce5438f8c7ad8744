"""Runs with loader workers that fail: each ends, soon, with its code, one line and its results. `-m
long`: many.
"""

import ctypes
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils.data import Dataset

from conftest import REPO
from lab.data import datasets
from lab.machine import workers
from runs import PATIENCE, SOON, Ended, cases, forked_run, real_run, span, wait_until

SMOKE = REPO / "configs/digits_smoke.yaml"
KEYS = [
    "dataset.type=folder",
    "model.name=test_resnet",
    "dataset.image_size=32",
    "training.batch_size=8",
]
KEYS += [
    "training.device=cpu",
    "training.epochs=3",
    "ast.warmup_epochs=1",
    "metrics.base_flop_per_sample=1e6",
]


def arguments(images: Path, out: Path, *more: str) -> list[str]:
    folders = [
        f"dataset.train_dir={images}/train",
        f"dataset.val_dir={images}/val",
        f"logging.output_dir={out}/out",
    ]
    return ["--config", str(SMOKE), *KEYS, "training.num_workers=2", *folders, *more]


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
        return [
            int(child)
            for child in Path(f"/proc/{process}/task/{process}/children").read_text().split()
        ]
    except OSError:
        return []


def can_mount() -> bool:
    command = ["unshare", "--mount", "mount", "-t", "tmpfs", "none", "/dev/shm"]
    return (
        shutil.which("unshare") is not None
        and subprocess.run(command, capture_output=True).returncode == 0
    )


def small_disk_at(folder: str, size: str) -> None:
    """Mount a file system in memory of so many bytes at `folder`, for this process and its children
    alone.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    new_mounts = 0x20000
    recursive_private = 0x44000
    failed = libc.unshare(new_mounts) or libc.mount(None, b"/", None, recursive_private, None)
    if failed or libc.mount(b"none", folder.encode(), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "cannot mount")


def limit_memory() -> None:
    """Leave this process 300 MB more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 300 * 2**20,) * 2)


def set_tmpdir(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    os.environ["TMPDIR"] = str(folder)
    tempfile.tempdir = None


# ------------------------------------------------------------------------------------------ Failing


@pytest.mark.parametrize(("part", "workers"), [("train", 2), ("val", 4)])
def test_a_picture_that_cannot_be_read_ends_a_run_with_workers(
    part, workers, image_folder, tmp_path
):
    spoil(image_folder, part)
    ended = forked_run(
        arguments(image_folder, tmp_path / "1", f"training.num_workers={workers}"), tmp_path / "1"
    )
    assert_ended(ended, 2, f"{part}/green/1.jpg: not a readable image")


@pytest.mark.parametrize("processes", ["1", pytest.param("2", marks=pytest.mark.long)])
def test_the_command_itself_ends_and_so_do_two_processes(processes, image_folder, tmp_path):
    """A fork has the exit hooks of this process; a command has its own."""
    spoil(image_folder, "val")
    request = [*arguments(image_folder, tmp_path / "1"), "--nproc", processes]
    ended = real_run(request, tmp_path / "1")
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
        found = children(child)
        for worker in found:
            resource.prlimit(worker, resource.RLIMIT_NOFILE, (5, 5))
        return len(found) >= 2

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
    if not can_mount():
        pytest.skip("nothing can be mounted here")
    more = [
        f"dataset.cache={cache}",
        "dataset.image_size=224",
        "dataset.augment=pad_crop",
        "training.batch_size=24",
    ]
    args = arguments(image_folder, tmp_path / "1", *more)
    ended = forked_run(args, tmp_path / "1", lambda: small_disk_at("/dev/shm", "2m"))
    assert_ended(ended, 1, "/dev/shm is too small", "failed" if cache == "none" else None)
    assert "--shm-size" in ended.errors[0]


def test_a_cpu_without_memory_is_named(image_folder, tmp_path):
    args = arguments(
        image_folder, tmp_path / "1", "dataset.image_size=512", "training.batch_size=24"
    )
    ended = forked_run(args, tmp_path / "1", limit_memory)
    assert_ended(ended, 1, "out of memory")


class Numbers(Dataset):
    def __len__(self) -> int:
        return 10**5

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.full((40, 40), index)


def test_workers_that_are_ended_early_let_the_pinning_thread_end_in_silence(monkeypatch):
    """Pinned memory itself needs a GPU; here the thread receives each batch as there, and passes it
    on as it is.
    """
    says = {
        "is_available": True,
        "current_accelerator": torch.device("cuda"),
        "current_device_index": 0,
    }
    for name, answer in {**says, "set_device_index": None}.items():
        monkeypatch.setattr(torch.accelerator, name, lambda *_, answer=answer: answer)
    for name, answer in {
        "is_available": True,
        "current_device": 0,
        "set_device": None,
    }.items():  # torch 2.6 asks these
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    monkeypatch.setattr(
        torch.utils.data._utils.pin_memory, "pin_memory", lambda batch, device: batch
    )
    failed = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    for _ in range(12):
        batches = iter(workers.WorkerLoader(Numbers(), 16, num_workers=3, pin_memory=True))
        assert [int(next(batches)[0, 0, 0]) for _ in range(3)] == [0, 16, 32]
        assert [each for each in threading.enumerate() if "_pin_memory_loop" in each.name]
        workers.end_workers()
        assert not [each for each in threading.enumerate() if "_pin_memory_loop" in each.name]
        assert not multiprocessing.active_children()
    assert failed == []


def test_a_worker_killed_with_the_lock_of_its_event_keeps_nobody_waiting():
    """It may die between taking that lock and giving it back. Here this process takes it."""
    batches = iter(workers.WorkerLoader(Numbers(), 16, num_workers=2))
    assert int(next(batches)[0, 0, 0]) == 0
    (iterator,) = (each for each in workers._iterators if not each._shutdown)
    iterator._workers_done_event._cond.acquire()
    # in a thread, so that the test can fail; there torch's handler has to be put off by hand
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    ending = threading.Thread(target=workers.end_workers, daemon=True)
    ending.start()
    ending.join(20)
    signal.signal(signal.SIGCHLD, handler)
    assert not ending.is_alive()
    assert not multiprocessing.active_children()


def signal_a_worker(folder: Path, number: int, child: int) -> bool:
    """Once the run `child` has saved in the folder, send a signal to its first loader worker.
    Returns whether it did.
    """
    first = children(child)[:1] if list(folder.glob("out/checkpoints/*/last.pt")) else []
    for worker in first:
        os.kill(worker, number)
    return bool(first)


def test_a_worker_killed_from_outside_is_named_and_the_others_end(image_folder, tmp_path):
    args = arguments(image_folder, tmp_path / "1", "training.epochs=100000")
    kill = partial(signal_a_worker, tmp_path / "1", signal.SIGKILL)
    assert_ended(forked_run(args, tmp_path / "1", act=kill), 1, "a loader worker died")


def test_a_worker_that_is_stopped_is_told_of_with_its_file_and_the_run_can_go_on(
    image_folder, tmp_path
):
    """As a worker is that hangs on a dead network disk: it lives, and sends nothing."""
    args = arguments(image_folder, tmp_path / "1", "dataset.worker_timeout=1")
    stop = partial(signal_a_worker, tmp_path / "1", signal.SIGSTOP)
    ended = forked_run([*args, "training.epochs=100000"], tmp_path / "1", act=stop)
    assert_ended(ended, 1, "dataset.worker_timeout: no loader worker has sent a batch for 1 s; ")
    found = re.search(r"; (\S+\.jpg): process (\d+), stopped, has ", ended.errors[0])
    assert Path(found[1]).exists()
    assert not Path(f"/proc/{found[2]}").exists()
    (last,) = tmp_path.glob("1/out/checkpoints/*/last.pt")
    (path,) = tmp_path.glob("1/out/final_results_*.json")
    epochs = len(json.loads(path.read_text())["training_history"]["epoch"])
    more = [f"training.epochs={epochs + 1}", "--resume", str(last)]
    ended = forked_run([*args, *more], tmp_path / "1")
    assert (ended.code, ended.status) == (0, "completed"), ended.printed
    assert f"resumed from {last}: epoch {epochs + 1}, step 0" in ended.printed


def test_a_slow_file_ends_no_run_that_was_stopped_as_a_whole():
    """A terminal or a gang scheduler stops all of a run's processes: the time counts for nothing,
    whatever the clock says when it goes on.
    """

    class Slow(Numbers):
        def __getitem__(self, index: int) -> torch.Tensor:
            if index == 40:
                time.sleep(0.7)
            return super().__getitem__(index)

    loader = workers.WorkerLoader(Slow(), 8, num_workers=1, worker_timeout=1.0)
    with workers.ending_workers():
        batches = iter(loader)
        assert [int(next(batches)[0, 0, 0]) for _ in range(6)] == [0, 8, 16, 24, 32, 40]


def test_a_checkpoint_that_has_done_more_than_is_asked_for_is_complete(image_folder, tmp_path):
    args = arguments(image_folder, tmp_path)
    assert forked_run([*args, "training.epochs=4"], tmp_path).code == 0
    (last,) = tmp_path.glob("out/checkpoints/*/last.pt")
    ended = forked_run([*args, "training.epochs=2", "--resume", str(last)], tmp_path)
    assert (ended.code, ended.status) == (0, "completed"), ended.printed
    assert f"resumed from {last}: epoch 5, step 0" in ended.printed
    assert "epochs           4 of" in ended.printed


def test_a_reader_who_has_seen_enough_ends_no_run(image_folder, tmp_path):
    """Starting a worker flushes the standard output, with what could not be printed before."""
    ended = forked_run(arguments(image_folder, tmp_path / "1"), tmp_path / "1", without_output)
    assert (ended.code, ended.printed, ended.status) == (0, "", "completed")


# ------------------------------------------------------------------------------------------ Signals


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


def test_a_run_that_waits_for_a_worker_that_hangs_says_so(image_folder, tmp_path, monkeypatch):
    """As on a disk that does not answer: the worker lives. When the disk answers, the run goes
    on.
    """
    monkeypatch.setattr(workers, "WORTH_A_LINE", 1.0)
    (hangs := tmp_path / "hangs").touch()
    read = datasets.read_picture

    def slow_disk() -> None:
        datasets.read_picture = lambda path: wait_until(lambda: not hangs.exists()) and read(path)

    def look(child: int) -> bool:
        told = "waiting for data: " in (tmp_path / "1/output").read_text()
        hangs.unlink() if told else None
        return told

    ended = forked_run(arguments(image_folder, tmp_path / "1"), tmp_path / "1", slow_disk, look)
    assert (ended.code, ended.status) == (0, "completed"), ended.printed
    (line,) = [line for line in ended.printed.splitlines() if line.startswith("waiting for data: ")]
    assert line.endswith(" s: does the disk answer? a second Ctrl-C ends the run")


# --------------------------------------------------------------------------------------------- Long


class Fault(NamedTuple):
    """One way to fail: what is done to the run, its exit codes, and a word of its line."""

    codes: tuple[int, ...]
    says: str
    keys: tuple[str, ...] = ()
    prepare: Callable[[Path, Path], object] = lambda images, folder: None  # before the start
    before: Callable[[Path], object] = lambda folder: None  # in the process itself
    act: Callable[[int, Path], bool] | None = (
        None  # once it has a checkpoint; gets its id and folder
    )
    streamed_only: bool = False
    parallel: bool = True  # whether two processes can have it
    mounts: bool = False  # whether it needs a file system of its own


def set_limit(which: int, value: int) -> None:
    resource.setrlimit(which, (value, value))


def descendants(process: int) -> list[int]:
    found = children(process)
    return found + [each for child in found for each in descendants(child)]


def kill_worker(child: int, folder: Path) -> bool:
    """Kill a loader worker: a process without children that another one of the run has started."""
    last = [each for each in descendants(child) if not children(each)]
    for each in last[-1:]:
        os.kill(each, signal.SIGKILL)
    return bool(last)


def fill_disk(child: int, folder: Path) -> bool:
    with open(f"/proc/{child}/root{folder}/out/ballast", "wb", buffering=0) as file:
        try:
            while file.write(bytes(2**16)):
                pass
        except OSError:
            return True
    return True


def make_read_only(child: int, folder: Path) -> bool:
    # what is open for writing stays so
    mount = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0"'
    command = ["nsenter", f"--target={child}", "--mount", "sh", "-c", mount, str(folder / "out")]
    return subprocess.run(command, capture_output=True).returncode == 0


def mount_out(folder: Path) -> None:
    (folder / "out").mkdir(exist_ok=True)
    small_disk_at(str(folder / "out"), "16m")


def vanish(child: int, folder: Path) -> bool:
    shutil.rmtree(folder / "images")
    return True


def without_output() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    os.dup2(writer, 1)
    sys.stdout = os.fdopen(1, "w", closefd=False)


ENDLESS = ("training.epochs=100000",)
LARGE = ("dataset.augment=pad_crop", "dataset.image_size=224", "training.batch_size=24")
FAULTS = {
    "a bad picture in train": Fault(
        (2,), "not a readable image", prepare=lambda i, _: spoil(i, "train")
    ),
    "a bad picture in val": Fault(
        (2,), "not a readable image", prepare=lambda i, _: spoil(i, "val")
    ),
    "a loss that is not finite": Fault(
        (1,), "non-finite", ("training.lr=1e30", "training.optimizer=sgd")
    ),
    "a full disk": Fault(
        (1,), "No space left", ENDLESS, before=mount_out, act=fill_disk, mounts=True
    ),
    "an output that turns read-only": Fault(
        (1,), "Read-only", ENDLESS, before=mount_out, act=make_read_only, mounts=True
    ),
    "a small /dev/shm": Fault(
        (1,), "/dev/shm", LARGE, before=lambda _: small_disk_at("/dev/shm", "2m"), mounts=True
    ),
    "a full /dev/shm": Fault(
        (1,), "/dev/shm", LARGE, before=lambda _: small_disk_at("/dev/shm", "4k"), mounts=True
    ),
    "a worker killed": Fault(
        (1,), "a loader worker died", ENDLESS, act=kill_worker, streamed_only=True
    ),
    "no memory": Fault(
        (1,),
        "out of memory",
        ("dataset.image_size=512", "training.batch_size=24"),
        before=lambda _: limit_memory(),
        streamed_only=True,
        parallel=False,
    ),
    "few file handles": Fault(
        (0, 1, 2),
        "open files|^$",
        before=lambda _: set_limit(resource.RLIMIT_NOFILE, 38),
        parallel=False,
    ),
    "very few file handles": Fault(
        (1, 2), "open files", before=lambda _: set_limit(resource.RLIMIT_NOFILE, 24), parallel=False
    ),
    "a closed standard output": Fault((0,), "", before=lambda _: without_output()),
    "a folder that vanishes": Fault(
        (2,), "not a readable image|No such file", ENDLESS, act=vanish, streamed_only=True
    ),
    "a long TMPDIR": Fault((0,), "", before=lambda folder: set_tmpdir(folder / ("long" * 30))),
    "a TMPDIR that is not there": Fault(
        (0,), "", before=lambda folder: os.environ.update(TMPDIR=str(folder / "no"))
    ),
}


def fail_once(fault: Fault, images: Path, folder: Path, cache: str, processes: int) -> Ended:
    shutil.copytree(images, folder / "images")
    fault.prepare(folder / "images", folder)
    more = [*fault.keys, f"dataset.cache={cache}", *(["--nproc", "2"] if processes == 2 else [])]
    args = arguments(folder / "images", folder, *more)

    def act(child: int) -> bool:
        begun = list(Path(f"/proc/{child}/root{folder}").glob("out/checkpoints/*/last.pt"))
        return bool(begun) and (fault.act is None or fault.act(child, folder))

    if processes == 1:
        return forked_run(args, folder, lambda: fault.before(folder), act)
    return real_run(args, folder, act=act, preexec_fn=lambda: fault.before(folder))


@pytest.mark.long
def test_failing_runs_of_all_kinds_end(image_folder, tmp_path):
    """500 of them; what needs a mount is left out where nothing can be mounted."""
    possible = can_mount() and shutil.which("nsenter")
    names = [name for name, fault in FAULTS.items() if possible or not fault.mounts]
    slowest = 0.0
    wrong = []
    counts = dict.fromkeys(names, 0)
    done = []
    for run in cases(500):
        dice = random.Random(run)
        name = names[run % len(names)]
        fault = FAULTS[name]
        folder = tmp_path / str(run)
        cache = "none" if fault.streamed_only else dice.choice(["none", "device"])
        processes = dice.choice([1, 1, 2]) if fault.parallel else 1
        try:
            ended = fail_once(fault, image_folder, folder, cache, processes)
        except AssertionError as error:
            ended = Ended(-99, str(error), PATIENCE, None)
        fine = (
            ended.code in fault.codes and ended.seconds < SOON and "Traceback" not in ended.printed
        )
        fine = (
            fine
            and len(ended.errors) == int(ended.code > 0)
            and re.search(fault.says, "".join(ended.errors))
        )
        began = "train_acc" in ended.printed or "epoch " in ended.printed
        mounted = fault.before is mount_out  # its results file went with the process
        fine = fine and (
            mounted or not began or ended.status == ("failed" if ended.code else "completed")
        )
        counts[name] = counts[name] + 1
        slowest = max(slowest, ended.seconds)
        done.append(run)
        if not fine:
            wrong.append(f"run {run}, {name}, cache {cache}, {processes} processes: {ended}")
            print(wrong[-1], flush=True)
        shutil.rmtree(folder, ignore_errors=True)
    print(
        f"ENDS failing runs: cases {span(done)}, {len(wrong)} wrong, the slowest end "
        f"took {slowest:.1f} s; {counts}"
    )
    assert not wrong


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_every_process_of_several_reaches_one_end(number, image_folder, tmp_path):
    """As a scheduler sends it: to torchrun too, which passes it on."""

    def tell(child: int) -> bool:
        begun = bool(list(tmp_path.glob("1/out/checkpoints/*/last.pt")))
        for each in [child, *descendants(child)] if begun else ():
            os.kill(each, number)
        return begun

    args = arguments(image_folder, tmp_path / "1", "training.epochs=100000", "--nproc", "2")
    ended = real_run(args, tmp_path / "1", act=tell)
    assert (ended.code, ended.status) == (128 + number, "interrupted"), ended.printed
    assert "Traceback" not in ended.printed
