"""The processes of a sweep: how they start, end, and are told to end."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from lab.base.errors import RequestError, one_line
from lab.base.files import utc_now
from lab.base.launch import ENDS, INTERRUPTED, PASSES_ON, RUNS_HERE, SIGNALS, cores_here
from lab.base.streams import forget_unprinted, print_progress
from lab.study.cli import run_cli
from lab.study.sweep.halving import Halving
from lab.study.sweep.plans import Planned, arguments_for
from lab.study.sweep.sharing import LOOK_SECONDS, Board
from lab.study.sweep.standing import Standings
from lab.study.sweep.summary import plan_row, result_row

POLL_SECONDS = 0.1
OUT_OF_MEMORY = ": by hand, or for want of memory"
ERROR_CHARACTERS = 300  # of a run's last line, in the summary
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1

Record = Callable[[dict[str, Any]], None]  # gets the summary line of a run that has ended


def slots_of(jobs: int, gpus: int | None) -> list[str | None]:
    """What each of `jobs` runs at a time sets CUDA_VISIBLE_DEVICES to; None leaves it as it is.

    gpus: how many each run gets, by default one; a single run gets what torch chooses. The runs
    share the GPUs that this process may see where there are too few. Raises RequestError where
    there are fewer than one run is to get.
    """
    if jobs == 1 and gpus is None:
        return [None]
    import torch  # only to count: it takes seconds to import

    count = torch.cuda.device_count()
    if gpus is not None and gpus > count:
        raise RequestError(f"--gpus {gpus}: torch sees {count} GPUs here")
    if not count:
        return [None] * jobs
    named = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    names = (named or [str(number) for number in range(count)])[:count]
    each = gpus or 1
    groups = [",".join(names[start : start + each]) for start in range(0, count - each + 1, each)]
    return [groups[number % len(groups)] for number in range(jobs)]


def end_with_parent() -> None:
    """Called in a run's process. On Linux the run gets SIGTERM, and saves, where the sweep itself
    is killed.
    """
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Running:
    """A run's process, in a session of its own: a Ctrl-C in the terminal reaches it once, from the
    sweep.
    """

    def __init__(self, plan: Planned, runner: Path, device: str | None, log: Path, beside: int = 0):
        """`runner`: the script. `device`: what CUDA_VISIBLE_DEVICES is set to; None leaves it as it
        is.

        `beside`: how many other runs share the machine. They then share its cores too, unless
        OMP_NUM_THREADS is set: several runs with a thread for every core each slow one another
        down. So would their loader workers.
        """
        self.plan = plan
        self.device = device
        self.log = log
        self.started = time.monotonic()
        threads = {}
        if beside:
            share = max(1, cores_here() // (1 + beside))
            threads = {"OMP_NUM_THREADS": str(share), RUNS_HERE: str(1 + beside)}
        devices = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(runner), *arguments_for(plan)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=threads | os.environ | {"PYTHONIOENCODING": "utf-8", PASSES_ON: "1"} | devices,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def kill(self) -> None:
        """The run and its loader workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def row(self) -> dict[str, Any]:
        """The summary line, once the process has ended."""
        return ended_row(self.plan, self.process.returncode, self.log, self.started) | {
            "device": self.device
        }


def ended_row(plan: Planned, code: int, log: Path, started: float) -> dict[str, Any]:
    """The summary line of a run that ended with exit code `code`, from what it printed to `log`.

    `started`: time.monotonic() seconds. A negative `code` is the signal that ended the process.
    """
    lines = [
        line
        for line in log.read_text(encoding="utf-8", errors="replace").split("\n")
        if line.strip()
    ]
    files = [line.removeprefix("results: ") for line in lines if line.startswith("results: ")]
    row = plan_row(plan) | {"status": "failed", "results_file": None}
    if files:
        with contextlib.suppress(ValueError, OSError):
            row |= result_row(Path(files[0]))
    row |= {
        "finished_utc": utc_now(),
        "exit_code": code,
        "duration_seconds": round(time.monotonic() - started, 3),
        "log": str(log),
    }
    if code:
        ended = code in INTERRUPTED or -code in SIGNALS
        row["status"] = "interrupted" if ended else "failed"
        row["error"] = one_line(lines[-1] if lines else "it printed nothing", ERROR_CHARACTERS)
    if code < 0:
        row["error"] = (
            f"ended by "
            f"{signal.Signals(-code).name}{OUT_OF_MEMORY if code == -signal.SIGKILL else ''}"
        )
    return row


class Halt:
    """What SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 to the sweep do: no further run starts, and the
    running ones get the signal too.

    A SIGINT after a SIGINT or SIGTERM kills them. SIGTERM and the warnings of a scheduler kill
    nothing, for they come several times: SLURM sends its own to all processes, and srun once more.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.passed_on = 0

    def watch_signals(self) -> None:
        for number in SIGNALS:
            signal.signal(number, lambda number, _: self.signals.append(number))

    def pass_on(self, running: Iterable[Running]) -> None:
        """Pass on what came since the last call."""
        for number in self.signals[self.passed_on :]:
            ends = [other for other in self.signals[: self.passed_on] if other in ENDS]
            for run in running:
                if ends and number == signal.SIGINT:
                    run.kill()
                elif run.process.poll() is None:
                    run.process.send_signal(number)
            self.passed_on += 1


def begin(plan: Planned, logs: Path) -> Path:
    """Announce a run. Returns the path of its log."""
    print_progress(f"{'':>9} start        {plan.name}")
    log = logs / f"{plan.id}.log"
    log.unlink(
        missing_ok=True
    )  # a run that has outlived a killed sweep may still write to the old one
    return log


def wrong_row(plan: Planned) -> dict[str, Any]:
    """The summary line of a run whose request is wrong."""
    wrong = {"status": "failed", "exit_code": 2, "duration_seconds": 0.0, "error": plan.error}
    return plan_row(plan) | wrong | {"finished_utc": utc_now()}


class Crew:
    """The processes that do the runs of a `board`, as many at a time as there are slots."""

    def __init__(
        self,
        board: Board,
        runner: Path,
        slots: Sequence[str | None],
        halt: Halt,
        record: Record,
        halving: Halving | None = None,
    ):
        """runner: the script that each is a process of. slots: see `slots_of`. halving: stops those
        that are behind.
        """
        self.halving = halving
        self.board = board
        self.runner = runner
        self.free = list(slots)
        self.beside = len(slots) - 1
        self.halt = halt
        self.record = record
        self.running: list[Running] = []
        self.hungry = True  # whether a run may be free that was not at the last look

    def goes_on(self, wait: bool) -> bool:
        """Whether there is something to do. wait: also while other commands do all that is
        left: they may die.
        """
        if self.running:
            return True
        return not self.halt.signals and (self.hungry or (wait and any(self.board.ahead())))

    def start(self) -> None:
        """Start what is free in the slots that are."""
        while self.free and not self.halt.signals and (self.hungry or self.board.is_due()):
            plan = next_free(self.board, self.record)
            self.hungry = plan is not None
            if plan is None:
                return
            log = begin(plan, self.board.logs)
            slot = self.free.pop(0)
            self.running.append(Running(plan, self.runner, slot, log, self.beside))

    def collect(self) -> None:
        """Take in the runs that have ended."""
        for run in [run for run in self.running if run.process.poll() is not None]:
            self.running.remove(run)
            self.free.append(run.device)
            row = run.row() if self.halving is None else self.halving.ended(run.row())
            end(self.board, row, self.record)
            self.hungry = True


def next_free(board: Board, record: Record) -> Planned | None:
    """The next free run whose request is right; None where none is. What others have done since is
    recorded, and so are wrong requests.
    """
    while True:
        plan = board.take()
        for row in board.look():
            record(row)
        if plan is None or plan.error is None:
            return plan
        end(board, wrong_row(plan), record)


def end(board: Board, row: dict[str, Any], record: Record) -> None:
    board.finish(row)
    record(row)


def work_off(
    board: Board,
    runner: Path,
    slots: Sequence[str | None],
    halt: Halt,
    record: Record,
    wait: bool = True,
    halving: Halving | None = None,
) -> None:
    """Do the runs of the `board` that are free, each in a process of `runner`.

    wait: until the runs of other commands are done too. halving: see `Crew`.
    """
    crew = Crew(board, runner, slots, halt, record, halving)
    standings = Standings(board)
    while crew.goes_on(wait):
        crew.start()
        halt.pass_on(crew.running)
        if halving is not None:
            halving.look(crew.running)
        crew.collect()
        standings.show({run.plan.id: run.started for run in crew.running})
        time.sleep(POLL_SECONDS)


def work_off_here(
    board: Board, run_main: Callable[[list[str]], int], halt: Halt, record: Record
) -> None:
    """Do the runs of the `board` that are free in this process, one after the other, each by a call
    of `run_main`.

    Imported packages, decoded pictures on the device and compiled code stay from run to run.
    """
    import torch  # only here: a sweep of processes starts without it

    from lab.data.cache.loaders import shared_pictures

    with shared_pictures():
        while not halt.signals and any(board.ahead()):
            plan = next_free(board, record)
            if plan is None:  # others are at what is left
                time.sleep(LOOK_SECONDS)
                continue
            log = begin(plan, board.logs)
            started = time.monotonic()
            code = run_here(plan, run_main, log)
            halt.watch_signals()  # the run has set handlers of its own
            if code in INTERRUPTED:
                halt.signals.append(code - 128)
            end(board, ended_row(plan, code, log, started) | {"device": None}, record)
            gc.collect()  # reference cycles keep a run's tensors alive
            torch.cuda.empty_cache()


def run_here(plan: Planned, run_main: Callable[[list[str]], int], log: Path) -> int:
    """The exit code of a run in this process. What it prints goes to `log`, the traceback of a
    failure included.
    """
    with (
        log.open("w", encoding="utf-8", errors="replace") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            return run_cli(lambda: run_main(arguments_for(plan)))
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            forget_unprinted(output)
