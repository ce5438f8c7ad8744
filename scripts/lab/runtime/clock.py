"""Seconds and joules of a run, and why it should end."""

from __future__ import annotations

import math
import os
import signal
import sys
import time
from typing import Any

import torch

from lab.config import Config
from lab.errors import TrainingFailed, one_line
from lab.runtime.launch import launched


class Stop:
    """Why the run should end before its last epoch: a signal, or the wall-clock cap."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.training = False  # before that there is nothing to save
        self.deadline = math.inf  # time.monotonic() seconds

    def watch_signals(self) -> None:
        """SIGINT and SIGTERM end the run after the current step, or at once where none was made; a second one does."""
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        if not self.training:
            sys.stdout.flush()
            if launched()[0] == 0:
                os.write(2, b"ended before the first step\n")
            os._exit(128 + number)  # an exception can get lost in an import that is under way
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def status(self, reserve_seconds: float = 0.0) -> str | None:
        """`interrupted` or `time_capped` (with `reserve_seconds` still needed), else None."""
        if self.signal is not None:
            return "interrupted"
        return "time_capped" if time.monotonic() + reserve_seconds >= self.deadline else None


def explained(error: Exception, config: Config) -> Exception:
    """`error` as the one line a user can act on, where it is of a kind that is known to end runs."""
    text, folder = one_line(error), config.logging.output_dir
    if "DataLoader worker" in text:
        hint = "out of memory? lower training.num_workers or training.batch_size"
        return TrainingFailed(f"a loader worker died: {text}; {hint}")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return TrainingFailed(f"out of memory: {text[:200]}; lower training.batch_size")
    if isinstance(error, OSError):
        return TrainingFailed(f"{error.filename or folder}: {error.strerror or text}")
    return error
