"""Which of a run's processes this is, and how to start several."""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.base.errors import RequestError, one_line

# on which a run saves and ends: a terminal's and a kill's, and those that schedulers send ahead of
# an end. Windows has no others
ENDS = (signal.SIGINT, signal.SIGTERM)
WARNINGS = tuple(getattr(signal, name) for name in ("SIGUSR1", "SIGUSR2") if hasattr(signal, name))
SIGNALS = (*ENDS, *WARNINGS)
INTERRUPTED = tuple(128 + number for number in SIGNALS)  # the exit codes of such an end

# what torchrun sets
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)

# what srun sets in each task of a step: how many there are, this one's number, that on its node,
# the node's number, and how many tasks each node has, as 2(x3),1
SRUN_VARIABLES = (
    "SLURM_STEP_NUM_TASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "SLURM_STEP_TASKS_PER_NODE",
)
MEETING = ("MASTER_ADDR", "MASTER_PORT")
# what a sweep sets for its runs: how many share this machine's cores; and that it passes signals
# on, also those that a scheduler has sent to all processes
RUNS_HERE = "AST_LAB_RUNS_HERE"
PASSES_ON = "AST_LAB_PASSES_SIGNALS_ON"


def launched() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun sets them, or else srun; (0, 1,
    0) without both.

    Raises RequestError naming the variable where one of them has no meaning, and where srun has
    started several tasks that do not know where to meet.
    """
    if of_srun():
        return _task_of_srun()
    world = _number("WORLD_SIZE", 1, 1)
    if world == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return 0, 1, 0
    _number("MASTER_PORT", 0, 1, 2**16 - 1)
    rank = _number("RANK", 0, 0, world - 1)
    return rank, world, _number("LOCAL_RANK", rank, 0, world - 1)


def launched_here(default: int = 1) -> int:
    """How many of the run's processes are on this machine; `default` where neither torchrun nor
    srun says.
    """
    if launched()[1] == 1:
        return 1
    if not of_srun():
        return _number("LOCAL_WORLD_SIZE", default, 1)
    counts = []
    for part in os.environ.get("SLURM_STEP_TASKS_PER_NODE", "").split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        counts += [int(found[1])] * int(found[2] or 1) if found else []
    node = _number("SLURM_NODEID", 0, 0)
    return counts[node] if node < len(counts) else default


def of_srun() -> bool:
    """Whether this process is one of several tasks of srun, and none of torchrun's."""
    return (
        not {"RANK", "WORLD_SIZE"} & os.environ.keys() and _number("SLURM_STEP_NUM_TASKS", 1, 1) > 1
    )


def hears_twice() -> bool:
    """Whether a signal may come to this process a second time, from who started it: torchrun or a
    sweep.
    """
    return launched()[1] > 1 or PASSES_ON in os.environ


def has_own_gpu() -> bool:
    """Whether srun lets this task see GPUs of its own alone."""
    return of_srun() and "SLURM_GPUS_PER_TASK" in os.environ


def available_cores() -> int:
    """The CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # fewer than the machine has, in a container
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def cores_here() -> int:
    """This process's share of them, beside the others of its run and the other runs of a sweep."""
    return max(1, available_cores() // (launched_here() * _number(RUNS_HERE, 1, 1)))


def _task_of_srun() -> tuple[int, int, int]:
    world = _number("SLURM_STEP_NUM_TASKS", 1, 1)
    if not os.environ.keys() >= set(MEETING):
        here = "$(scontrol show hostnames $SLURM_JOB_NODELIST | head -n 1)"
        raise RequestError(
            f"MASTER_ADDR, MASTER_PORT: srun started {world} tasks that do not know where to meet: "
            f"before srun, export MASTER_ADDR={here} MASTER_PORT=29500; or start one task a node: "
            f"srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_JOB_NUM_NODES "
            f"--nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint={here}:29500 "
            f"scripts/train_ast.py ..."
        )
    _number("MASTER_PORT", 0, 1, 2**16 - 1)
    rank = _number("SLURM_PROCID", 0, 0, world - 1)
    return rank, world, _number("SLURM_LOCALID", rank, 0, world - 1)


def _number(name: str, default: int, low: int, high: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None:
        return default
    if re.fullmatch("[0-9]{1,9}", text) and low <= int(text) <= (high or 10**9):
        return int(text)
    expected = f"at least {low}" if high is None else f"from {low} to {high}"
    hint = "to train in one process, unset RANK, WORLD_SIZE"
    raise RequestError(
        f"{name}: expected a whole number {expected}, got {one_line(text, 40)!r}; {hint}"
    )


def forget_launch() -> None:
    """Drop what torchrun or a scheduler has left in the environment: this command, and what it
    starts, is alone.
    """
    elastic = [name for name in os.environ if name.startswith("TORCHELASTIC_")]
    for name in [*VARIABLES, *SRUN_VARIABLES, *elastic]:
        os.environ.pop(name, None)


def launch(script: Path, processes: int, max_restarts: int, arguments: Sequence[str]) -> int:
    """Run `script` in several processes of this machine by torchrun. Returns the exit code of the
    one that failed first; 1 if that one was killed.

    A run that loses a process is started again, up to `max_restarts` times. torchrun handles no
    warning of a scheduler by default: here it takes one for a SIGTERM, which it passes on.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # the processes report by themselves what went wrong
    for name in [*logging.root.manager.loggerDict]:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // processes)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: its name need not resolve
    warned = []

    def as_term(number: int, _: object) -> None:
        warned.append(number)
        os.kill(os.getpid(), signal.SIGTERM)

    for number in WARNINGS:
        signal.signal(number, as_term)
    options = ["--standalone", f"--nproc-per-node={processes}", f"--max-restarts={max_restarts}"]
    options.append("--")  # or torchrun takes the script's options for its own
    try:
        # torchrun puts a process's rank in place of ${local_rank}, and one dollar sign in place of
        # two
        torchrun.main([*options, *(text.replace("$", "$$") for text in (str(script), *arguments))])
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        return code if code > 0 else 1
    except SignalException as error:
        return 128 + int(warned[0] if warned else error.sigval)
    return 0
