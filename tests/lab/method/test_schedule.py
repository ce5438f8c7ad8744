"""The schedule of a run ends at its end, whatever the epochs load and train on."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import make_config
from lab.data.loading import EpochPlan
from lab.machine.clock import Clock, Stop
from lab.machine.distributed import Dist
from lab.method.schedule import Schedule
from train_ast import shares_of

HISTORY = ["ast.scoring=history"]
WAYS = [
    ["ast.mode=dense"],
    ["ast.mode=random"],
    ["ast.pack=true"],
    ["ast.pack=false", "ast.anneal_epochs=2"],
    ["ast.pack=true", "ast.forget_rate=0.2", "ast.target_activation=0.8"],
    [*HISTORY, "ast.anneal_epochs=1"],
    [*HISTORY, "ast.rule=infobatch", "ast.entropy_weight=0"],
    ["ast.target_activation=auto"],
    ["ast.target_activation=auto", "ast.pack=true", "ast.anneal_epochs=1"],
    [*HISTORY, "ast.target_activation=auto"],
]


def schedule_of(samples: int, *overrides: str) -> tuple[Schedule, EpochPlan]:
    config = make_config("training.epochs=8", "ast.warmup_epochs=1", *overrides)
    shares = shares_of(config)
    plan = EpochPlan(np.arange(samples), config.training.batch_size, 0, shares.loaded)
    clock = Clock(config.training, torch.device("cpu"), Dist(), Stop(), 0.0)
    is_auto = config.ast.target_activation == "auto"
    return Schedule(config.training, shares, shares.planned(plan), clock, is_auto), plan


@settings(max_examples=20)
@given(st.sampled_from(WAYS), st.integers(20, 700), st.integers(0, 1000))
def test_the_rate_is_at_its_end_at_the_end_of_the_run(way, samples, seed):
    """The epochs load another number than was planned, a target of auto moves from epoch to epoch,
    and windows close at any step.
    """
    schedule, plan = schedule_of(samples, *way, "training.min_lr=0.01")
    rng = np.random.default_rng(seed)
    rates = []
    for epoch in range(8):
        target = rng.choice([0.5, 0.7, 1.0]) if schedule.is_auto else schedule.shares.target
        chosen = schedule.shares.before_loading and epoch in schedule.shares.span
        share = np.clip(target + rng.uniform(-0.1, 0.1), 0, 1)
        mask = (rng.random(samples) < share).astype(np.uint8) if chosen else None
        plan.start_epoch(epoch, 0, mask)
        schedule.begin_epoch(epoch, plan, target)
        for _ in range(len(plan)):
            schedule.advance()
            if rng.random() < 0.4:
                rates.append(schedule.next_lr())
                schedule.close_window(applied=True)
    schedule.close_window(applied=True)
    assert schedule.applied == pytest.approx(schedule.planned_steps)
    assert schedule.next_lr() == pytest.approx(0.01)
    assert rates == sorted(rates, reverse=True)


def test_a_rate_over_time_follows_the_clock():
    schedule, _ = schedule_of(64, "training.lr_decay=time", "training.max_minutes=1")
    for seconds, share in ((0, 1.0), (15, (1 + math.cos(math.pi / 4)) / 2), (30, 0.5), (60, 0.0)):
        schedule.clock.train_seconds = seconds
        assert schedule.next_lr() == pytest.approx(0.1 * share)
