"""A run as a whole: warmed up, merged over its processes, saved, and loaded again."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.base.console import print_rank0
from lab.base.errors import RequestError, TrainingFailed, one_line
from lab.base.files import align_jsonl
from lab.data.loading import DeviceBatch, Scores
from lab.engine.checkpoint import CAPPED, FORMAT, host_copy
from lab.machine.devices import random_states, seed_rank, set_random_states
from lab.machine.meters import merged_sums

PARTS = ("selection", "trainer", "metrics", "clock")  # of a run, each `Stateful`


def require_alike(run: Any) -> None:
    """Raises TrainingFailed where the processes are not in the same state. Collective."""
    states = (
        run.dist.all_gather([*run.selection.alike(), *run.trainer.alike()])
        if run.dist.world > 1
        else None
    )
    if states is not None and not np.array_equal(
        states, states[:1].repeat(len(states), 0), equal_nan=True
    ):
        where = f"epoch {run.metrics.epoch + 1}, step {run.metrics.step}"
        raise TrainingFailed(f"the processes have drifted apart in {where}")


def reduce_to_rank0(run: Any) -> None:
    """At the end of an epoch, move to rank 0 what the ranks have counted by themselves.
    Collective.
    """
    require_alike(run)
    _reduce_metrics(run.metrics)
    run.clock.reduce_to_rank0()


def _reduce_metrics(metrics: Any) -> None:
    """Move to rank 0 what the ranks have counted by themselves since the last time. Collective."""
    if metrics.dist.world == 1:
        return
    metrics.times_trained.merge()
    first = metrics.dist.rank == 0
    ledger = metrics.ledger
    meter = metrics.meter
    counted = [
        ledger.loaded,
        ledger.scored,
        ledger.trained,
        meter.correct,
        meter.trained,
        meter.predicted,
    ]
    rows = metrics.dist.all_gather([*counted, *meter.sums.tolist()])
    numbers = [int(total) * first for total in rows[:, : len(counted)].sum(0)]
    ledger.loaded, ledger.scored, ledger.trained, meter.correct, meter.trained, meter.predicted = (
        numbers
    )
    meter.sums.copy_(torch.from_numpy(merged_sums(rows[:, len(counted) :]) * first))
    for found in (
        metrics.dist.all_gather_objects(metrics.read_errors.found)
        if metrics.read_errors.limit
        else ()
    ):
        if first:
            metrics.read_errors.add(found)


def run_state(run: Any) -> dict[str, Any]:
    """Everything that the steps to come depend on; on rank 0 of several processes it is whole.
    Collective.

    The run itself is not changed by it. The running clock is paused, so that the time so far is
    counted. Raises TrainingFailed rather than keep a non-finite loss.
    """
    clocked = run.clock.running_since is not None
    if clocked:
        run.clock.pause()
    require_alike(run)
    run.metrics.meter.read()
    if clocked:
        run.clock.start()
    pending = run.ahead.pending
    own = own_state(run)
    return {
        "format": FORMAT,
        "config": run.config.model_dump(),
        "model": run.network.model.state_dict(),
        "averaged": None if run.network.average is None else run.network.exported.state_dict(),
        **{name: getattr(run, name).state_dict() for name in PARTS},
        "queue": None if run.queue is None else run.queue.state_dict(),
        "scores": None if pending is None else pending.wait(),
        "ranks": run.dist.gather_objects(own if run.dist.world == 1 else host_copy(own)),
    }


def own_state(run: Any) -> dict[str, Any]:
    """What this process has for itself: its counts, its open window, its BatchNorm statistics, its
    random numbers.
    """
    parts = {name: getattr(run, name).own_state() for name in PARTS}
    return {**parts, "buffers": run.network.statistics(), "random": random_states(run.device)}


def merged_own(states: list[dict[str, Any]]) -> dict[str, Any]:
    """The `own_state` of a single process that has done what several did: counts added up,
    statistics averaged, the window's gradient that of all.
    """
    merged = copy.deepcopy(states[0])
    trainers = [each["trainer"] for each in states]
    metrics = [each["metrics"] for each in states]
    merged["buffers"] = [
        torch.stack(each).mean(0) for each in zip(*(s["buffers"] for s in states), strict=True)
    ]
    samples = sum(each["window_samples"] for each in trainers)
    merged["trainer"]["gradients"] = _window_gradients(trainers, samples) if samples else None
    merged["trainer"]["window_samples"] = merged["trainer"]["window_divisor"] = samples
    bad = [each["window_bad"] for each in trainers if each["window_bad"] is not None]
    merged["trainer"]["window_bad"] = torch.stack(bad).any() if bad else None
    for ledger in ("ledger", "ledger_before"):
        for name in ("loaded", "scored", "trained"):
            merged["metrics"][ledger][name] = sum(each[ledger][name] for each in metrics)
    for name in ("correct", "trained", "predicted"):
        merged["metrics"]["meter"][name] = sum(each["meter"][name] for each in metrics)
    meters = np.stack([each["meter"]["sums"].cpu().numpy() for each in metrics])
    merged["metrics"]["meter"]["sums"] = torch.from_numpy(merged_sums(meters))
    merged["metrics"]["read_errors"] = [text for each in metrics for text in each["read_errors"]]
    energies = [each["clock"]["energy_kj"] for each in states]
    merged["clock"]["energy_kj"] = None if None in energies else sum(energies)
    return merged


def _window_gradients(trainers: list[dict[str, Any]], samples: int) -> list[torch.Tensor | None]:
    """The mean over the window's samples of all processes, a tensor a parameter; None where it has
    no gradient.
    """
    windows = [
        (each["window_divisor"], each["gradients"])
        for each in trainers
        if each["gradients"] is not None
    ]
    merged = []
    for each in zip(*(gradients for _, gradients in windows), strict=True):
        sums = [divisor * g for (divisor, _), g in zip(windows, each, strict=True) if g is not None]
        merged.append(sum(sums) / samples if sums else None)
    return merged


def load_run_state(run: Any, state: dict[str, Any]) -> None:
    """Go on where `run_state` was taken. As many processes as then go on bit for bit; another
    number of them go on with what all had together. Raises KeyError, ValueError, RuntimeError and
    such for a wrong one.
    """
    network = run.network
    ranks = state["ranks"]
    rank = run.dist.rank
    same_world = len(ranks) == run.dist.world
    own = ranks[rank] if same_world else merged_own(ranks)
    network.model.load_state_dict(state["model"])
    if network.average is not None:
        network.exported.load_state_dict(state["averaged"])
    for buffer, value in zip(network.statistics(), own["buffers"], strict=True):
        buffer.copy_(value)
    for name in PARTS:
        getattr(run, name).load_state_dict(state[name])
    if run.queue is not None:
        run.queue.load_state_dict(state["queue"], run.device)
    if state["scores"] is not None:
        run.ahead.pending = Scores(state["scores"], None, run.scorer.is_model)
    if same_world or rank == 0:
        for name in PARTS:
            getattr(run, name).load_own_state(own[name])
        set_random_states(own["random"], run.device)
    else:  # rank 0 has what all had
        steps = own["metrics"]["ledger"]["steps"], own["metrics"]["ledger_before"]["steps"]
        run.metrics.ledger.steps, run.metrics.ledger_before.steps = steps
        run.metrics.meter = run.metrics.new_meter()
        seed_rank(run.config.training.seed, rank, run.metrics.epoch)


def resume_run(run: Any, path: Path | None, state: dict[str, Any] | None) -> None:
    """Load a checkpoint's `state` into a fresh run, and align its log. Raises RequestError where it
    does not fit.
    """
    log = run.config.logging.jsonl_path
    if state is None:
        print_rank0("--resume auto: there is no checkpoint of this config, the run starts afresh")
        return
    try:
        load_run_state(run, state)
        if log is not None and run.dist.rank == 0:
            align_jsonl(Path(log), run.metrics.history, path.with_name(CAPPED))
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        why = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise RequestError(
            f"{path}: a checkpoint that does not fit this model and data ({why})"
        ) from None
    except OSError as error:
        raise RequestError(
            f"logging.jsonl_path: cannot put {log} in order: {error.strerror}"
        ) from None
    print_rank0(f"resumed from {path}: epoch {run.metrics.epoch + 1}, step {run.metrics.step}")


def warm_up(run: Any) -> None:
    """Compile and autotune every function of the run on blank images, before the clock starts.

    Leaves weights, buffers and random generators as they were. Raises RequestError where nothing
    can be compiled here.
    """
    training = run.config.training
    side = run.config.dataset.image_size
    network = run.network
    images = torch.zeros(network.local_batch, 3, side, side, dtype=torch.uint8, device=run.device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=run.device)
    weights = run.selection.weights(DeviceBatch(images, labels, labels))
    extra = {"weights": weights, "rows": network.loss.recall(labels)}
    extra = {name: each for name, each in extra.items() if each is not None}
    inputs = network.mixed(images, labels, 0, 0) if weights is None else (images, labels)
    scoring = {
        network.evaluator,
        *([run.scorer.forward] if run.scorer else []),
    }  # one, but for score_resolution
    graphs = "reduce-overhead" in (training.compile, training.compile_scoring)
    buffers = [buffer.clone() for buffer in network.model.buffers()]

    def all_functions() -> None:
        with torch.no_grad():
            for forward in scoring:
                forward(images, labels)
        network.forward(*inputs, **extra)[0].backward()
        run.trainer.clear_gradients()
        run.selection.warm_up(images, labels)

    try:
        with torch.random.fork_rng():
            for _ in range(
                3 if graphs else 1
            ):  # a CUDA graph is recorded in the second pass, replayed from the third
                all_functions()
    except torch._dynamo.exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch 2.6 begins with "backend='inductor' raised:"
        why = next((line for line in lines if not line.endswith("raised:")), type(error).__name__)
        hint = "install a C++ compiler (and triton for a GPU), or set training.compile=off"
        raise RequestError(
            f"training.compile: nothing can be compiled here ({one_line(why)}); {hint}"
        ) from None
    for buffer, before in zip(network.model.buffers(), buffers, strict=True):
        buffer.copy_(before)
