"""The schedule of a run: which epochs are sparse, how far it is, what the learning rate is."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lab.config.sections import TrainingConfig
from lab.config.tables import Table
from lab.data.loading import EpochPlan
from lab.machine.clock import Clock
from lab.machine.stateful import Stateful


@dataclass(frozen=True)
class Shares:
    """What the epochs of a run are expected to load and to train on, as shares of the samples."""

    epochs: int
    span: range  # the sparse epochs, from 0
    before_loading: bool  # whether a sparse epoch loads only who was chosen
    packs: bool  # whether the active samples of several batches make one step
    target: float  # share of the samples to be active when the run begins
    candidates: float = 1.0  # share that a sparse epoch loads where it scores what it loads
    widened: float = 1.0  # samples of a batch of a sparse epoch over those of a training step

    def loaded(self, epoch: int, target: float | None = None) -> float:
        """Which share of the samples `epoch` loads. target: by default that of the run's start."""
        target = self.target if target is None else target
        if epoch not in self.span or target == 1:
            return 1.0
        return target if self.before_loading else max(target, self.candidates)

    def steps(self, epoch: int, target: float) -> float:
        """How many training steps `epoch` takes for so many loaded samples as a step has: packing
        makes them fewer, and so do wider batches.
        """
        if epoch not in self.span or target == 1:
            return 1.0
        return target / self.loaded(epoch, target) if self.packs else 1 / self.widened

    def planned(self, plan: EpochPlan) -> float:
        """The training steps of the whole run, as far as its start can tell."""
        return sum(
            plan.planned_steps(epoch) * self.steps(epoch, self.target)
            for epoch in range(self.epochs)
        )

    def until(self, epochs: float, of_loaded: bool = False) -> float:
        """Which share of the run's training steps its first `epochs` take; or of the batches that
        it loads.
        """
        shares = [self.loaded(epoch) for epoch in range(self.epochs)]
        if not of_loaded:
            shares = [share * self.steps(e, self.target) for e, share in enumerate(shares)]
        before = np.cumsum([0.0, *shares])
        return float(np.interp(epochs, np.arange(len(before)), before / before[-1]))


def cosine(done: float, lr: float, min_lr: float) -> float:
    """The learning rate once a share `done` (0 to 1) of what follows its warm-up is over: half a
    cosine from lr to min_lr (Loshchilov & Hutter 2017, SGDR, equation 5, one cycle).
    """
    return min_lr + (lr - min_lr) * ((1 + math.cos(math.pi * done)) / 2)


def linear(done: float, lr: float, min_lr: float) -> float:
    """A line from lr to min_lr."""
    return min_lr + (lr - min_lr) * (1 - done)


def constant(done: float, lr: float, min_lr: float) -> float:
    return min_lr + (lr - min_lr) * 1.0


def step(done: float, lr: float, min_lr: float) -> float:
    """A tenth after each third, but not below min_lr."""
    return max(min_lr, lr / 10 ** min(2, int(3 * done)))


def tried_schedule(rate: Callable[[float, float, float], float]) -> str | None:
    """What is wrong with the rates of a schedule; None where nothing is."""
    rates = [rate(done, 0.1, 0.0) for done in (0.0, 0.5, 1.0)]
    sound = all(isinstance(each, int | float) and 0 <= each < math.inf for each in rates)
    return None if sound else f"at lr=0.1 it gives {rates}, expected numbers of at least 0"


SCHEDULES = Table(
    "training.lr_schedule",
    cosine,
    {"cosine": cosine, "linear": linear, "constant": constant, "step": step},
    tried=tried_schedule,
)


def lr_at(progress: float, training: TrainingConfig, warmup: float) -> float:
    """Learning rate at `progress` (0 to 1) of the run: linear over its first part `warmup`, then by
    the schedule.
    """
    if progress < warmup:
        return training.lr * progress / warmup
    decayed = min(1.0, (progress - warmup) / max(1e-12, 1 - warmup))
    return SCHEDULES[training.lr_schedule](decayed, training.lr, training.min_lr)


class Schedule(Stateful):
    """How far the run is, and the learning rate there.

    It counts planned steps: the training steps that the run was expected to take when it began.
    What an epoch takes may differ. `planned_per_step` makes up for it, so that every epoch moves
    the rate as far as planned.
    """

    STATE = ("lr", "applied", "pending", "planned_per_step")

    def __init__(
        self,
        training: TrainingConfig,
        shares: Shares,
        planned_steps: float,
        clock: Clock,
        is_auto: bool = False,
    ):
        """planned_steps: of the whole run, see `Shares.planned`. clock: tells the time, for
        training.lr_decay=time. is_auto: whether the target moves, ast.target_activation=auto.
        """
        self.training = training
        self.shares = shares
        self.planned_steps = planned_steps
        self.clock = clock
        self.warmup = shares.until(training.lr_warmup_epochs)
        self.is_auto = is_auto
        self.lr = lr_at(0.0, training, self.warmup)
        self.applied = 0  # planned steps whose gradient has reached the weights
        self.pending = 0  # those since
        self.planned_per_step = 1.0  # of this epoch

    def progress(self) -> float:
        """How far the run is, 0 to 1: by the planned steps, or by training time."""
        if self.training.lr_decay == "time":
            return self.clock.schedule()
        return (self.applied + self.pending / 2) / self.planned_steps

    def is_sparse(self, epoch: int, target: float) -> bool:
        """Whether `epoch` trains on a selection: an automatic target may be all samples."""
        return epoch in self.shares.span and not (self.is_auto and target == 1)

    def sparse_epochs(self, epoch: int, done: float = 0.0) -> float:
        """How many sparse epochs lie before this point of `epoch`. done: share of it, 0 to 1."""
        return epoch - self.shares.span.start + done

    def begin_epoch(self, epoch: int, plan: EpochPlan, target: float) -> None:
        """Set how far a step moves the schedule, once the plan knows what the epoch loads."""
        loaded = plan.steps_of(self.shares.loaded(epoch, target))
        self.planned_per_step = loaded / max(1, len(plan)) * self.shares.steps(epoch, target)
        if self.is_auto:  # what is left is planned anew by the target of today
            left = sum(
                plan.steps_of(self.shares.loaded(later, target)) * self.shares.steps(later, target)
                for later in range(epoch, self.shares.epochs)
            )
            self.planned_per_step *= (self.planned_steps - self.applied - self.pending) / left
        if not len(plan):  # nobody was chosen: the schedule goes on all the same
            self.pending += loaded

    def advance(self) -> None:
        """A loop step was taken."""
        self.pending += self.planned_per_step

    def next_lr(self) -> float:
        """The rate of the optimizer step that is due."""
        self.lr = lr_at(self.progress(), self.training, self.warmup)
        return self.lr

    def close_window(self, applied: bool) -> None:
        """The gradient of the pending steps was applied, or dropped."""
        self.applied += self.pending if applied else 0
        self.pending = 0

    def alike(self) -> list[float]:
        """Numbers that every process must have alike."""
        return [self.lr, self.applied]
