"""Seconds and joules of a run, and why it should end."""

from __future__ import annotations

import math
import os
import re
import signal
import sys
import time
from typing import Any

import torch

from lab.config import Config
from lab.errors import RequestError, TrainingFailed, one_line
from lab.runtime.launch import launched
from lab.runtime.workers import kill_workers, worker_error


class Stop:
    """Why the run should end before its last epoch: a signal, or the wall-clock cap."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.training = False  # before that there is nothing to save
        self.deadline = math.inf  # time.monotonic() seconds

    def watch_signals(self) -> None:
        """SIGINT and SIGTERM end the run after the current step, or at once where none was made; a second one does,
        but where torchrun watches over several processes."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        if not self.training:
            sys.stdout.flush()
            if launched()[0] == 0:
                os.write(2, b"ended before the first step\n")
            kill_workers()  # of a decoding that is under way
            os._exit(128 + number)  # an exception can get lost in an import that is under way
        self.signal = number
        # torchrun passes on to its processes what a scheduler has sent to them too, and kills them 30 s later
        signal.signal(number, signal.SIG_DFL if launched()[1] == 1 else signal.SIG_IGN)

    def status(self, reserve_seconds: float = 0.0) -> str | None:
        """`interrupted` or `time_capped` (with `reserve_seconds` still needed), else None."""
        if self.signal is not None:
            return "interrupted"
        return "time_capped" if time.monotonic() + reserve_seconds >= self.deadline else None


MEMORY = r"can't allocate memory|not enough memory|out of memory|Cannot allocate memory|MemoryError|std::bad_alloc"

# what an error's text tells of its cause, and what to do about it; the first that fits
KNOWN = (
    ("Too many open files|received 0 items of ancdata", "too many open files",
     "raise `ulimit -n`, or lower training.num_workers"),
    (r"shared memory|Bus error|/torch_\d", "/dev/shm is too small for the batches of the loader workers",
     "enlarge it (docker run --shm-size), or lower training.num_workers or training.batch_size"),
    (MEMORY, "out of memory", "lower training.batch_size"),
    ("DataLoader worker|Connection(Reset|Refused)Error|EOFError|/listener-", "a loader worker died",
     "out of memory? lower training.num_workers or training.batch_size"),
)  # fmt: skip


def explained(error: Exception, config: Config | None = None) -> Exception:
    """`error` as the one line a user can act on, where it is of a kind that is known to end runs."""
    met = worker_error(error)
    if isinstance(error, RequestError | TrainingFailed):
        return error if met is None else type(error)(met.partition(": ")[2])
    text, system = one_line(error), isinstance(error, OSError | EOFError | MemoryError | RuntimeError)
    clue = met or f"{type(error).__name__}: {text}"
    for pattern, why, hint in KNOWN if system else ():
        if re.search(pattern, clue):
            return TrainingFailed(f"{why}: {(met or text)[:200]}; {hint}")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return TrainingFailed(f"out of memory: {text[:200]}; lower training.batch_size")
    if isinstance(error, OSError):
        where = error.filename or ("standard output" if config is None else config.logging.output_dir)
        return TrainingFailed(f"{where}: {met or error.strerror or text}")
    return error
