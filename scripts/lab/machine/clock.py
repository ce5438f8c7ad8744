"""Seconds and joules of a run, and whether it is time to end."""

from __future__ import annotations

import contextlib
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from lab.base.errors import RequestError, TrainingFailed, one_line
from lab.base.launch import ENDS, SIGNALS, hears_twice, launched
from lab.base.streams import forget_unprinted
from lab.config.sections import TrainingConfig
from lab.machine.devices import synchronize
from lab.machine.distributed import Dist, vote_interval
from lab.machine.meters import EnergyMeter
from lab.machine.stateful import Stateful
from lab.machine.workers import kill_workers, worker_error


class Stop:
    """Why a run should end before its last epoch: a signal, or the wall-clock cap."""

    def __init__(self) -> None:
        self.signal: int | None = None
        self.training = False  # before that there is nothing to save
        self.deadline = math.inf  # time.monotonic() seconds

    def watch_signals(self) -> None:
        """Let SIGINT, SIGTERM, SIGUSR1 and SIGUSR2 end the run after the current step, or at once
        before the first one.

        A second SIGINT or SIGTERM ends it at once, except under torchrun or a sweep, which may pass
        on a signal that was sent to all. The other two are a scheduler's warnings, and come as
        often as it likes.
        """
        for number in SIGNALS:
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        if not self.training:
            forget_unprinted(sys.stdout)
            if launched()[0] == 0:
                with contextlib.suppress(OSError):
                    os.write(2, b"ended before the first step\n")
            kill_workers()  # of a decoding that is under way
            os._exit(128 + number)  # an exception can get lost in an import that is under way
        self.signal = number
        # torchrun passes on to its processes what a scheduler has sent to them too, and kills them
        # 30 s later; a sweep kills its runs at a second signal
        at_once = number in ENDS and not hears_twice()
        signal.signal(number, signal.SIG_DFL if at_once else signal.SIG_IGN)

    def status(self, reserve_seconds: float = 0.0) -> str | None:
        """`interrupted`, `time_capped` (where `reserve_seconds` more would pass the deadline) or
        None.
        """
        if self.signal is not None:
            return "interrupted"
        return "time_capped" if time.monotonic() + reserve_seconds >= self.deadline else None


class Clock(Stateful):
    """Training time and energy, without validation, compilation and start-up; and the vote on
    stopping.

    Of several processes each measures its own time; rank 0's is reported. Decisions are made alike
    on all ranks.
    """

    STATE = ("train_seconds", "epoch_seconds", "eval_seconds")
    LOCAL = ("energy_kj",)

    def __init__(
        self, training: TrainingConfig, device: torch.device, dist: Dist, stop: Stop, started: float
    ):
        """started: time.monotonic() seconds at the start of this session."""
        self.training = training
        self.device = device
        self.dist = dist
        self.stop = stop
        self.started = started  # of this session
        self.earlier_seconds = 0.0  # all sessions before it
        self.train_seconds = self.epoch_seconds = 0.0  # of the finished epochs; of this one
        self.eval_seconds = 0.0  # of the last validation
        self.eval_steps = 0  # its batches
        self.running_since: float | None = None  # time.monotonic() seconds, while an epoch trains
        self.energy = EnergyMeter(device)
        self.energy_kj = None if self.energy.read_kj() is None else 0.0
        self.energy_read = None
        self.agreed_seconds = 0.0  # of training, the longest of all ranks at the last vote
        self.ballot: Callable[[], np.ndarray] | None = None  # votes under way

    def start(self) -> None:
        synchronize(self.device)
        self.running_since = time.monotonic()
        self.energy_read = self.energy.read_kj()

    def pause(self) -> None:
        """Count the time and the energy since `start`."""
        synchronize(self.device)
        self.epoch_seconds = self.epoch_seconds + time.monotonic() - self.running_since
        self.running_since = None
        if self.energy_read is not None:
            self.energy_kj = self.energy_kj + self.energy.read_kj() - self.energy_read
            self.energy_read = None

    def close_epoch(self) -> float:
        """Add the epoch's training time to the run's. Returns it, seconds."""
        seconds = self.epoch_seconds
        self.epoch_seconds = 0.0
        self.train_seconds += seconds
        return seconds

    def training_seconds(self) -> float:
        """Training time so far, that of the running epoch included."""
        running = 0.0 if self.running_since is None else time.monotonic() - self.running_since
        return self.train_seconds + self.epoch_seconds + running

    def elapsed(self) -> float:
        """Seconds since the start, earlier sessions of a resumed run included."""
        return self.earlier_seconds + time.monotonic() - self.started

    def schedule(self) -> float:
        """How much of the training time of `lr_decay: time` has passed, 0 to 1 and beyond; alike on
        all ranks.
        """
        seconds = self.agreed_seconds if self.dist.world > 1 else self.training_seconds()
        return seconds / (60 * self.training.max_minutes)

    def out_of_time(self) -> bool:
        """Whether a schedule over time has come to its end."""
        return self.training.lr_decay == "time" and self.schedule() >= 1

    def reserve(self, step: int) -> float:
        """Seconds to keep for the last validation and the files: as long as the validation before
        took.

        Before the first validation: as long as that many training steps, at most half of
        max_minutes.
        """
        if self.eval_seconds or self.training.max_minutes is None or self.running_since is None:
            return self.eval_seconds
        elapsed = time.monotonic() - self.running_since
        return min(self.eval_steps * elapsed / max(1, step), 30 * self.training.max_minutes)

    def vote(self, step: int, last: bool, checkpoint_due: bool) -> tuple[bool, bool, bool]:
        """(end for a signal, end for the time, checkpoint now), alike on all ranks: yes where one
        rank says so.

        Several processes vote after a step and go on; the result counts at their next vote, one
        step later. After the epoch's `last` step they wait for it. An all-gather takes longer the
        more processes there are, so many of them vote less often (`vote_interval`).
        """
        capped = self.out_of_time() or self.stop.status(self.reserve(step)) == "time_capped"
        due = capped or checkpoint_due
        if self.dist.world == 1:
            return self.stop.signal is not None, capped, due
        if not last and step % vote_interval(self.dist.world):
            return False, False, False
        votes = [np.array([[0, 0, 0, self.agreed_seconds]])]
        if self.ballot is not None:
            votes.append(self.ballot())
        due = due and not votes[-1][:, 2].any()  # that checkpoint comes now
        own_vote = [self.stop.signal or 0, capped, due, self.training_seconds()]
        if last:
            votes.append(self.dist.all_gather(own_vote))
        number, capped, due, self.agreed_seconds = np.concatenate(votes).max(0).tolist()
        capped = capped > 0 or self.out_of_time()
        if number:
            self.stop.signal = int(number)
        ends = number or capped or last
        self.ballot = None if ends else self.dist.all_gather_async(own_vote)
        return number > 0, capped, capped or due > 0

    def signalled(self) -> bool:
        """Whether a signal is to end the run. Collective: all ranks then know."""
        self.stop.signal = (
            int(self.dist.all_gather([self.stop.signal or 0]).max()) or self.stop.signal
        )
        return self.stop.signal is not None

    def validation_deadline(self) -> float:
        """time.monotonic() seconds at which a validation is given up: a tenth of max_minutes after
        the cap.
        """
        return self.stop.deadline + 6 * (self.training.max_minutes or math.inf)

    def ending(self, epoch: int, step: int, accuracies: Sequence[float]) -> str | None:
        """Why no further epoch is to begin, None where one is: rank 0's answer on every rank.

        epoch: finished ones; accuracies: theirs, percent.
        """
        status, number = self.dist.broadcast(
            (self._ending(epoch, step, accuracies), self.stop.signal)
        )
        self.stop.signal = self.stop.signal or number
        return status

    def _ending(self, epoch: int, step: int, accuracies: Sequence[float]) -> str | None:
        if epoch >= self.training.epochs or (self.out_of_time() and step == 0):
            return "completed"
        if status := self.stop.status(self.eval_seconds):
            return status
        patience = self.training.early_stop_patience
        since_best = len(accuracies) - 1 - accuracies.index(max(accuracies)) if accuracies else 0
        return "early_stopped" if patience is not None and since_best >= patience else None

    def merged(self, states: Sequence[dict[str, Any]], rank: int) -> dict[str, Any]:
        """The joules of all on rank 0."""
        energies = [each["energy_kj"] for each in states]
        total = None if None in energies else sum(energies)
        return {"energy_kj": total if rank == 0 or total is None else 0.0}

    def reduce_to_rank0(self) -> None:
        """Move the energy counted on all ranks to rank 0. Collective."""
        if self.dist.world > 1:
            total = float(self.dist.all_gather([self.energy_kj or 0.0]).sum())
            if self.energy_kj is not None:
                self.energy_kj = total if self.dist.rank == 0 else 0.0

    def state_dict(self) -> dict[str, Any]:
        return super().state_dict() | {"elapsed": self.elapsed()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        self.earlier_seconds = state["elapsed"]
        self.agreed_seconds = self.train_seconds + self.epoch_seconds


MEMORY = (
    r"can't allocate memory|Cannot allocate memory|not enough memory|out of memory|"
    r"MemoryError|std::bad_alloc"
)

LESS_MEMORY = (
    "lower training.batch_size (ast.reuse_forward=false needs less than true: it keeps the "
    "activations of the active samples alone)"
)
# what an error's text tells of its cause, and what to do about it; the first that fits
KNOWN = (
    (
        "Too many open files|received 0 items of ancdata",
        "too many open files",
        "raise `ulimit -n`, or lower training.num_workers",
    ),
    (
        r"shared memory|Bus error|/torch_\d",
        "/dev/shm is too small for the batches of the loader workers",
        "enlarge it (docker run --shm-size), or lower training.num_workers or training.batch_size",
    ),
    (MEMORY, "out of memory", LESS_MEMORY),
    (
        "DataLoader worker|Connection(Reset|Refused)Error|EOFError|/listener-",
        "a loader worker died",
        "out of memory? lower training.num_workers or training.batch_size",
    ),
)


def explained(error: Exception, output_dir: str = "standard output") -> Exception:
    """`error` as the one line a user can act on, where it is of a kind that is known to end
    runs.
    """
    in_worker = worker_error(error)
    if isinstance(error, RequestError | TrainingFailed):
        return error if in_worker is None else type(error)(in_worker.partition(": ")[2])
    text = one_line(error)
    of_system = isinstance(error, OSError | EOFError | MemoryError | RuntimeError)
    clue = in_worker or f"{type(error).__name__}: {text}"
    for pattern, why, hint in KNOWN if of_system else ():
        if re.search(pattern, clue):
            return TrainingFailed(f"{why}: {(in_worker or text)[:200]}; {hint}")
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return TrainingFailed(f"out of memory: {text[:200]}; {LESS_MEMORY}")
    if isinstance(error, ValueError) and "more than 1 value per channel" in text:
        return TrainingFailed(
            "BatchNorm cannot normalise a single sample; raise ast.min_active or "
            "training.batch_size"
        )
    if isinstance(error, OSError):
        return TrainingFailed(
            f"{error.filename or output_dir}: {in_worker or error.strerror or text}"
        )
    return error
