"""Runs that are interrupted, killed or spread over processes, and what must repeat of them."""

import atexit
import contextlib
import faulthandler
import functools
import importlib
import itertools
import json
import multiprocessing
import os
import re
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import run_experiment
from conftest import REPO
from lab.config.loading import Config, checkpoint_folder
from lab.data.datasets import digits_dataset
from lab.engine.checkpoint import load_checkpoint
from lab.machine.clock import Stop
from lab.study.cli import run_cli


def own_code() -> str:
    """The file of somebody's own that the README shows."""
    text = (REPO / "README.md").read_text(encoding="utf-8")
    return re.search(r"```python\n(.*?)```", text, re.DOTALL)[1]


TIMED = {"step_time_ms", "est_energy_kj", "energy_kj", "train_seconds"}


def cases(count: int, first: int = 0) -> Iterator[int]:
    """The numbers of the cases of a long test: `count` from `first` on. A case depends on its
    number alone.

    AST_LAB_CASES and AST_LAB_FIRST replace them, so that several processes can share a test and one
    case can be run again. AST_LAB_MINUTES ends the test after that time; it says which cases it has
    run.
    """
    count = int(os.environ.get("AST_LAB_CASES", count))
    first = int(os.environ.get("AST_LAB_FIRST", first))
    deadline = time.monotonic() + 60 * float(os.environ.get("AST_LAB_MINUTES", "inf"))
    for number in range(first, first + count):
        if time.monotonic() > deadline:
            return
        yield number
        print(f"done {number}", flush=True)  # for whoever has to end the test before its end


def span(numbers: Sequence[int]) -> str:
    """Cases without a gap, as text."""
    return f"{numbers[0]}-{numbers[-1]}" if numbers else "none"


class StopAfter(Stop):
    """A signal that comes while step number `steps` of the session is under way; `steps` counts
    from 1.
    """

    def __init__(self, steps: int):
        super().__init__()
        self.left = steps

    def status(self, reserve_seconds: float = 0.0) -> str | None:
        self.left -= 1
        if self.left == 0:
            self.signal = 15
        return super().status(reserve_seconds)


class CapAfter(StopAfter):
    """A wall-clock cap that is reached in step number `steps`."""

    def status(self, reserve_seconds: float = 0.0) -> str | None:
        self.left -= 1
        self.deadline = 0.0 if self.left <= 0 else self.deadline
        return Stop.status(self)


def untimed(result: dict) -> dict:
    """What must repeat of a result: all but times."""
    history = {
        key: values for key, values in result["training_history"].items() if key not in TIMED
    }
    timed = {"total_time_hours", "training_history", "config", "environment", *TIMED}
    return {key: value for key, value in result.items() if key not in timed} | history


def same(left, right) -> bool:
    """Whether two nested states are equal bit for bit."""
    if isinstance(left, torch.Tensor):
        return left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple):
        return len(left) == len(right) and all(map(same, left, right))
    return left == right


def final_state(config: Config) -> dict:
    """The last checkpoint of a finished run, without times and the keys that say where it was
    written.
    """
    state = load_checkpoint(checkpoint_folder(config) / "last.pt", config)
    history = state["metrics"]["history"]
    state["metrics"]["history"] = {
        key: values for key, values in history.items() if key not in TIMED
    }
    return {key: state[key] for key in state if key not in ("clock", "config")}


WAYS = {
    "dense": ["ast.mode=dense"],
    "random": ["ast.mode=random"],
    "ast": [],
    "packed": ["ast.pack=true"],
    "packed, accumulated": [
        "ast.pack=true",
        "training.grad_accum_steps=2",
        "training.optimizer=adamw",
    ],
    "accumulated": [
        "training.grad_accum_steps=4",
        "training.grad_clip_norm=1.0",
        "dataset.image_size=16",
        "ast.score_resolution=8",
    ],
    "forward once": [
        "ast.reuse_forward=true",
        "ast.target_activation=0.5",
        "ast.candidates=0.75",
        "training.grad_accum_steps=2",
    ],
    "annealed, dropout": ["ast.anneal_epochs=1", "model.name=test_vit", "dataset.image_size=32"],
    "resident": ["dataset.cache=device", "dataset.augment=pad_crop"],
    "resident crops": [
        "dataset.cache=device",
        "dataset.augment=random_resized_crop",
        "ast.pack=true",
    ],
    "two workers": [
        "training.num_workers=2",
        "dataset.augment=random_resized_crop",
        "ast.pack=true",
    ],
    "history": ["ast.scoring=history", "ast.target_activation=0.5"],
    "doubted by prediction": [
        "ast.forget_rate=auto",
        "dataset.label_noise=0.2",
        "ast.pack=true",
    ],
    "history, doubted": [
        "ast.scoring=history",
        "ast.rule=topk",
        "ast.target_activation=0.5",
        "ast.forget_rate=0.2",
    ],
    "history, two workers": [
        "ast.scoring=history",
        "ast.target_activation=0.5",
        "training.num_workers=2",
    ],
    "history, resident, accumulated": [
        *(
            "ast.scoring=history",
            "ast.target_activation=0.5",
            "ast.forget_rate=0.1",
            "ast.anneal_epochs=1",
        ),
        *(
            "dataset.cache=device",
            "dataset.repeat=2",
            "dataset.label_noise=0.2",
            "training.grad_accum_steps=2",
        ),
    ],
    "infobatch": ["ast.scoring=history", "ast.rule=infobatch", "ast.entropy_weight=0"],
    "top-k": ["ast.rule=topk", "ast.pack=true"],
    "target auto, batch statistics": [
        *(
            "ast.target_activation=auto",
            "ast.score_statistics=batch",
            "ast.rule=topk",
            "ast.pack=true",
        ),
        *("model.name=small_conv", "training.optimizer=adamw", "training.lr=0.01"),
        # 6 steps an epoch; after 12 it is decided: two pictures come in, and a selection begins
        *("dataset.repeat=2", "training.batch_size=32", "training.epochs=5"),
    ],
    "target auto, mixed": [
        "ast.target_activation=auto",
        "ast.anneal_epochs=1",
        "ast.rule=topk",
        "training.mixup=0.2",
    ],
    "proxy": [
        "model.name=test_resnet",
        "ast.scoring=proxy",
        "ast.pack=true",
        "dataset.image_size=16",
        "ast.score_resolution=12",
    ],
    "mixed, averaged, LAMB": [
        *(
            "training.mixup=0.2",
            "training.cutmix=1.0",
            "training.weight_average=0.9",
            "training.optimizer=lamb",
        ),
        *("dataset.augment_policy=trivial_augment", "dataset.random_erasing=0.5", "ast.pack=true"),
    ],
    "resident, erased, Muon": [
        *(
            "dataset.cache=device",
            "dataset.augment=pad_crop",
            "dataset.random_erasing=0.5",
            "training.cutmix=1.0",
        ),
        *("training.weight_average=0.9", "training.optimizer=muon", "training.lr_schedule=step"),
        *("training.grad_accum_steps=2", "ast.mode=dense"),
    ],
    "labels may be wrong": [
        *("training.noisy_labels=true", "dataset.label_noise=0.2", "training.epochs=4"),
        *("training.cutmix=1.0", "training.class_weights=balanced", "training.grad_accum_steps=2"),
    ],
    "layers, Adam": [
        *(
            "model.name=test_resnet",
            "training.layer_decay=0.8",
            "training.optimizer=adam",
            "training.lr_schedule=linear",
            "ast.mode=random",
        ),
        *("dataset.augment_policy=rand_augment", "ast.target_activation=0.9"),
    ],
}


@functools.cache
def prepare() -> None:
    """Read the digits and import what a run imports late, or each process forked here would do it
    again: two seconds.
    """
    digits_dataset("train")
    importlib.import_module("sklearn.metrics")
    importlib.import_module("timm")


def forked(
    work: Callable[[], int], output: Path, errors: Path | None = None, text: str | None = None
) -> int:
    """Start `work` in a process of its own that exits with what it returns. Returns its id.

    It prints to the file `output`, and to `errors` if there is one; it reads `text`.
    """
    prepare()
    output.touch()
    child = os.fork()
    if child:
        return child
    code = 99
    with output.open("a", 1) as file, (errors or output).open("a", 1) as error_file:
        try:
            os.dup2(file.fileno(), 1), os.dup2(error_file.fileno(), 2)
            # pytest's are not those
            sys.stdout = file
            sys.stderr = error_file
            if text is not None:
                reader, writer = os.pipe()
                os.write(writer, text.encode()), os.close(writer), os.dup2(reader, 0)
            torch.set_num_threads(1)  # the parent's threads have not come along
            # the parent's clean up what is the parent's; a command has its own, which may wait
            atexit._clear()
            atexit.register(multiprocessing.util._exit_function)
            code = work()
        except BaseException:
            traceback.print_exc()
        finally:
            file.flush(), error_file.flush()
            atexit._run_exitfuncs()
            os._exit(code)


def program(
    arguments: Sequence[object], cwd: Path = REPO, variables: Mapping[str, str] | None = None
) -> Callable[[], int]:
    """`python <arguments>`, a script's path the first of them, for a fork of this process: it need
    not import torch.

    variables: added to the environment. What a library reads from there while it is imported needs
    a real start.
    """
    name, *rest = map(str, arguments)

    def work() -> int:
        os.chdir(cwd)
        os.environ.update(variables or {})
        sys.argv = [name, *rest]
        try:
            runpy.run_path(name, run_name="__main__")
        except SystemExit as left:
            return left.code or 0
        return 0

    return work


def command(
    arguments: Sequence[object], text: str | None = None, timeout: float = 120, **options: Any
) -> subprocess.CompletedProcess:
    """What comes of a `program`. text: what it reads from its standard input. options: of
    `program`.
    """
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "out")
        err = Path(folder, "err")
        with running(program(arguments, **options), out, err, text) as child:
            wait_until(
                lambda: os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT), timeout
            )
            code = exit_code(child)
        return subprocess.CompletedProcess(arguments, code, out.read_text(), err.read_text())


def exit_code(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@contextlib.contextmanager
def running(work: Callable[[], int], output: Path, *streams: Any) -> Iterator[int]:
    """`work` in a process of its own, by its id; killed at the end if it still runs. streams: as of
    `forked`.
    """
    child = forked(work, output, *streams)
    try:
        yield child
    finally:
        with contextlib.suppress(ChildProcessError):  # it has ended and was waited for
            if os.waitpid(child, os.WNOHANG) == (0, 0):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def wait_until(happened: Callable[[], Any], seconds: float = 60) -> Any:
    """What `happened` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (outcome := happened()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.002)
    return outcome


SOON = 10.0  # seconds from its error to the end of a run
PATIENCE = 120.0  # seconds for a whole run, on a busy machine


class Ended(NamedTuple):
    code: int
    printed: str
    seconds: float  # from the error line to the end
    status: str | None  # of the results file

    @property
    def errors(self) -> list[str]:
        lines = [
            line.lstrip("\0") for line in self.printed.splitlines()
        ]  # torch's handler of SIGBUS ends with a \0
        return [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]


def watched(
    poll: Callable[[], int | None], output: Path, act: Callable[[], bool] = lambda: True
) -> Ended:
    """Wait for the end of a run that prints to `output`; `act` is called until it has done
    something.
    """
    deadline = time.monotonic() + PATIENCE
    erred = None
    acted = False
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
    args: list[str],
    folder: Path,
    before: Callable[[], object] = int,
    act: Callable[[int], bool] = bool,
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


def real_run(
    args: list[str], folder: Path, *prefix: str, act: Callable[[int], bool] = bool, **options: Any
) -> Ended:
    """The command as a user runs it, in a session of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "output").open("w") as output:
        command = [*prefix, sys.executable, str(REPO / "scripts/run_experiment.py"), *args]
        options = {
            "stdout": output,
            "stderr": subprocess.STDOUT,
            "start_new_session": True,
        } | options
        process = subprocess.Popen(command, cwd=REPO, **options)
        try:
            return watched(process.poll, folder / "output", lambda: act(process.pid))
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@functools.cache
def meeting_point() -> int:
    """The port of a store in a process of its own, as torchrun has it: to fork beside the store's
    thread can hang.
    """
    code = (
        "import sys; from torch.distributed import TCPStore as S; s = S('127.0.0.1', 0, "
        "is_master=True, "
    )
    # until the tests end
    code += "wait_for_workers=False); print(s.port, flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    return int(subprocess.Popen([sys.executable, "-c", code], **pipes, text=True).stdout.readline())


ATTEMPTS = itertools.count()


def as_rank(rank: int, world: int, attempt: int, work: Callable[[int], Any], folder: Path) -> None:
    """What a process of `ranks` does: `work`, as torchrun would have started it; its output goes to
    a file.
    """
    code = 99
    with (folder / f"{rank}.out").open("w", 1) as file:
        os.dup2(file.fileno(), 1), os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        faulthandler.dump_traceback_later(50, file=file)  # where it hangs, if it does
        facts = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        facts |= {
            "MASTER_PORT": meeting_point(),
            "TORCHELASTIC_RESTART_COUNT": attempt,
        }  # a place of its own to meet
        os.environ.update({key: str(value) for key, value in facts.items()})
        os.environ.update(
            MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo", TORCHELASTIC_USE_AGENT_STORE="True"
        )
        torch.set_num_threads(1)
        try:
            torch.save(work(rank), folder / f"{rank}.pt")
            code = 0
        except SystemExit as error:
            code = error.code
        except BaseException:
            traceback.print_exc()
        finally:
            file.flush()
            os._exit(code)


class EndedRanks:
    """How the processes of `ranks` ended: exit codes, what they printed, what their work
    returned.
    """

    def __init__(self, codes: list[int], folder: Path):
        self.codes = codes
        self.folder = folder
        self.texts = [path.read_text() for path in sorted(folder.glob("*.out"))]

    def errors(self) -> list[str]:
        """What all of them together said on how they failed; a traceback counts."""
        lines = [line for text in self.texts for line in text.splitlines()]
        return [line for line in lines if line.startswith(("error:", "Traceback"))]

    def results(self) -> list[Any]:
        assert self.codes == [0] * len(self.codes), "\n".join(self.texts)
        return [
            torch.load(self.folder / f"{rank}.pt", weights_only=False)
            for rank in range(len(self.codes))
        ]


def ranks(
    world: int,
    work: Callable[[int], Any],
    folder: Path,
    seconds: float = 60,
    missing: Sequence[int] = (),
    disturb: Callable[[list[int]], object] = bool,
) -> EndedRanks:
    """`work(rank)` in `world` processes that torchrun might have started, those `missing` left out.

    disturb: called with the ids of the processes once they are started.
    """
    folder.mkdir(parents=True, exist_ok=True)
    prepare()
    meeting_point()
    attempt = next(ATTEMPTS)
    context = multiprocessing.get_context("fork")
    started = [rank for rank in range(world) if rank not in missing]
    processes = [
        context.Process(target=as_rank, args=(rank, world, attempt, work, folder), daemon=False)
        for rank in started
    ]
    deadline = time.monotonic() + seconds
    for process in processes:
        process.start()
    disturb([process.pid for process in processes])
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
    hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
    for process in processes:
        with contextlib.suppress(AttributeError):
            process.kill()
        process.join()
    texts = "\n".join(path.read_text() for path in sorted(folder.glob("*.out")))
    assert not hanging, f"ranks {hanging} did not end\n{texts}"
    return EndedRanks([process.exitcode for process in processes], folder)
