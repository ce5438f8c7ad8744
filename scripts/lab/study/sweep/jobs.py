"""A sweep as jobs, a job a run, by submitit: of SLURM, or on this machine by the same path.

A job is a command of its own on the sweep's folder (`sharing`), with one run to do. SLURM and
submitit tell a job of its end in two ways. SIGUSR2 comes ahead of a time-out: the run saves, and
submitit's own hook requeues the job, as the same one. SIGTERM comes with a pre-emption or an
scancel: the run saves too, and whether the job comes back is for SLURM to say. A job that comes
back goes on from the checkpoint.
"""

from __future__ import annotations

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from lab.base.errors import RequestError, one_line
from lab.base.launch import WARNINGS
from lab.base.streams import print_progress
from lab.study.sweep.plans import Planned
from lab.study.sweep.processes import Halt, Record, end, work_off, wrong_row
from lab.study.sweep.sharing import LOOK_SECONDS, Board, Round, member
from lab.study.sweep.standing import Standings
from lab.study.sweep.summary import row_line

WARN_SECONDS = 90  # before a job's time-out: to end a step and to write a checkpoint
TIMEOUT_MINUTES = 60  # of a job, where nothing else is asked for
# a job may time out so often: each time it has come further
MOST_TIMEOUTS = 1000
QUEUE_SECONDS = 15.0  # between two looks into SLURM's queue
SCRIPTS = Path(__file__).resolve().parents[3]


def library() -> Any:
    """submitit. Raises RequestError where it is not there."""
    try:
        import submitit
    except ImportError:
        raise RequestError(
            "--launcher: needs a package that is not there: pip install submitit"
        ) from None
    return submitit


class JobOptions(NamedTuple):
    """What a job is to get; None: what the cluster gives."""

    partition: str | None = None
    gpus: int | None = None
    cpus: int | None = None
    timeout_min: int | None = None

    def check(self, launcher: str) -> None:
        """Raises RequestError where no such job can be submitted here."""
        library()
        if launcher == "slurm" and shutil.which("sbatch") is None:
            raise RequestError("--launcher slurm: there is no sbatch here")

    def warn_seconds(self) -> int:
        """How long before its time-out a job is warned."""
        return min(WARN_SECONDS, 30 * (self.timeout_min or TIMEOUT_MINUTES))


@dataclass
class Job:
    """One run of a sweep, as submitit pickles it and calls it where the job runs."""

    plan: Planned
    round: Round
    logs: Path
    runner: Path
    cpus: int | None  # threads of the run; None: as torch chooses
    device: str | None = None  # what CUDA_VISIBLE_DEVICES is set to; None: SLURM has set it

    def __call__(self) -> int:
        """Do the run, unless it is done or another command does it. Returns its exit code."""
        if self.cpus is not None:
            os.environ["OMP_NUM_THREADS"] = str(self.cpus)
        hooks = {number: signal.getsignal(number) for number in WARNINGS}
        halt = Halt()
        halt.watch_signals()
        board = Board(self.logs, self.round, [self.plan])

        def record(row: dict[str, Any]) -> None:
            print_progress(row_line(row, self.plan.name))

        with member(self.logs):
            work_off(board, self.runner, [self.device], halt, record, wait=False)
        row = board.rows.get(self.plan.id)
        if halt.signals and (row is None or row["status"] == "interrupted"):
            warned = [number for number in halt.signals if callable(hooks.get(number))]
            if warned:
                hooks[warned[0]](warned[0], None)  # submitit requeues the job, and leaves
            await_end()
            sys.exit(128 + halt.signals[0])
        if row is None:
            print_progress(f"{self.plan.name}: another command does it")
        return 0 if row is None else row["exit_code"]

    def checkpoint(self) -> Any:
        """What submitit is to call when the job comes back."""
        return library().helpers.DelayedSubmission(self)


def await_end() -> None:
    """Stay as long as SLURM lets the job run after it has told it to end. A job that leaves within
    the grace time of a pre-emption counts as ended, and would not come back.
    """
    job = os.environ.get("SLURM_JOB_ID")
    while job is not None and queue_state(job) == ["RUNNING"]:
        time.sleep(1)


def queue_state(job: str) -> list[str] | None:
    """The states of a job, or of the elements of an array, that SLURM has in its queue; None where
    it does not answer.
    """
    asked = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
    done = subprocess.run(asked, capture_output=True, text=True)
    if done.returncode and "Invalid job id" not in done.stderr:
        return None
    return done.stdout.split()


class Jobs:
    """The jobs of a sweep that were submitted."""

    def __init__(self, launcher: str, folder: Path, jobs: int, options: JobOptions):
        """folder: of submitit's files. jobs: how many run at a time."""
        submitit = library()
        self.of_slurm = launcher == "slurm"
        self.submitted: list[Any] = []
        self.told = False  # to end
        self.left = True  # whether any was there at the last look into the queue
        self.looked = time.monotonic()
        kind = submitit.SlurmExecutor if self.of_slurm else submitit.LocalExecutor
        self.executor = kind(folder, max_num_timeout=MOST_TIMEOUTS)
        minutes = options.timeout_min or TIMEOUT_MINUTES
        if not self.of_slurm:
            self.executor.update_parameters(
                timeout_min=minutes, signal_delay_s=options.warn_seconds()
            )
            return
        asked = {
            "partition": options.partition,
            "gpus_per_node": options.gpus,
            "cpus_per_task": options.cpus,
        }
        self.executor.update_parameters(
            job_name="ast-lab",
            time=minutes,
            signal_delay_s=options.warn_seconds(),
            array_parallelism=jobs,
            additional_parameters={"requeue": True},
            setup=[f"export PYTHONPATH={shlex.quote(str(SCRIPTS))}:$PYTHONPATH"],
            **{key: value for key, value in asked.items() if value is not None},
        )

    def submit(self, jobs: Sequence[Job]) -> list[Any]:
        """Submit them, to SLURM as one array. Raises RequestError where it refuses."""
        try:
            with self.executor.batch():
                new = [self.executor.submit(job) for job in jobs]
        except Exception as error:  # of submitit's own kinds, and of sbatch
            raise RequestError(f"--launcher: {one_line(error, 300)}") from None
        self.submitted += new
        return new

    def alive(self) -> bool:
        """Whether any of them waits or runs."""
        if not self.submitted:
            return False
        if not self.of_slurm:
            return any(not job.done() for job in self.submitted)
        if time.monotonic() - self.looked >= QUEUE_SECONDS:
            self.looked = time.monotonic()
            states = queue_state(self.array())
            self.left = states is None or bool(states)
        return self.left

    def array(self) -> str:
        """The id of the array."""
        return self.submitted[0].job_id.partition("_")[0]

    def tell_to_end(self) -> None:
        """Let the jobs of this machine save and end. Those of SLURM go on without the sweep."""
        for job in self.submitted if not self.told else ():
            if not job.done():
                job._process.send_signal(signal.SIGTERM)  # what submitit's controller passes on
        self.told = True


def launch_jobs(
    launcher: str,
    board: Board,
    runner: Path,
    slots: Sequence[str | None],
    options: JobOptions,
    halt: Halt,
    record: Record,
) -> None:
    """Do the runs of the `board` that are not done as jobs, as many at a time as there are slots,
    and wait for them.
    """
    os.environ["PYTHONPATH"] = os.pathsep.join(
        [str(SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    )
    jobs = Jobs(launcher, board.logs / "jobs", len(slots), options)
    waiting = []
    for plan in board.ahead():
        if plan.error is None:
            waiting.append(Job(plan, board.round, board.logs, runner, options.cpus))
        elif board.claim(plan):
            end(board, wrong_row(plan), record)
    if jobs.of_slurm and waiting:
        jobs.submit(waiting)
        waiting = []
        print_progress(f"SLURM has them as job {jobs.array()}; scancel {jobs.array()} ends them")
    standings = Standings(board)
    places: list[Any] = [None] * len(slots)  # the job of this machine in each slot
    while board.ahead() and (waiting or jobs.alive()) and not (jobs.of_slurm and halt.signals):
        for place, slot in enumerate(slots):
            free = places[place] is None or places[place].done()
            if waiting and free and not halt.signals:
                (places[place],) = jobs.submit([replace(waiting.pop(0), device=slot)])
        if halt.signals:
            waiting = []
            jobs.tell_to_end()
        for row in board.look():
            record(row)
        standings.show({})
        time.sleep(LOOK_SECONDS)
    if jobs.of_slurm and halt.signals:
        print_progress(f"left to SLURM: job {jobs.array()}")
    for row in board.look(or_stopped=True):
        record(row)
