"""Which of a run's processes this is, and how to start several."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from lab.base.errors import RequestError, one_line

# what torchrun sets
VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)


def launched() -> tuple[int, int, int]:
    """(rank, number of processes, rank on this machine) as torchrun sets them; (0, 1, 0) without
    it.

    Raises RequestError naming the variable where one of them has no meaning.
    """
    world = _number("WORLD_SIZE", 1, 1)
    if world == 1 or not {"RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys():
        return 0, 1, 0
    _number("MASTER_PORT", 0, 1, 2**16 - 1)
    rank = _number("RANK", 0, 0, world - 1)
    return rank, world, _number("LOCAL_RANK", rank, 0, world - 1)


def launched_here(default: int = 1) -> int:
    """How many of the run's processes are on this machine; `default` where torchrun does not
    say.
    """
    return _number("LOCAL_WORLD_SIZE", default, 1) if launched()[1] > 1 else 1


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
    for name in [*VARIABLES, *(name for name in os.environ if name.startswith("TORCHELASTIC_"))]:
        os.environ.pop(name, None)


def launch(script: Path, processes: int, max_restarts: int, arguments: Sequence[str]) -> int:
    """Run `script` in several processes of this machine by torchrun. Returns the exit code of the
    one that failed first; 1 if that one was killed.

    A run that loses a process is started again, up to `max_restarts` times.
    """
    from torch.distributed import run as torchrun
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # the processes report by themselves what went wrong
    for name in [*logging.root.manager.loggerDict]:
        if name.startswith("torch.distributed"):
            logging.getLogger(name).setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # one machine: its name need not resolve
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
        return 128 + int(error.sigval)
    return 0
