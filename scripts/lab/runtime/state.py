"""A run as a whole: warmed up, merged over its processes, saved, and loaded again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.console import print_rank0
from lab.data.loading import DeviceBatch, Scores
from lab.errors import RequestError, TrainingFailed, one_line
from lab.files import align_jsonl
from lab.runtime.checkpoint import CAPPED, FORMAT
from lab.runtime.devices import random_states, seed_rank, set_random_states
from lab.runtime.distributed import average_running_statistics

PARTS = ("selection", "trainer", "metrics", "clock")  # of a run, each with a state_dict of its own


def reduce_to_rank0(run: Any) -> None:
    """Move to rank 0 what the ranks have counted by themselves; average running statistics. Collective.

    Raises TrainingFailed where the ranks are not in the same state.
    """
    if run.dist.world == 1:
        return
    average_running_statistics(run.network.model, run.dist)
    run.trainer.reduce_to_rank0()
    states = run.dist.all_gather([*run.selection.alike(), *run.trainer.alike()])
    if not np.array_equal(states, states[:1].repeat(len(states), 0), equal_nan=True):
        where = f"epoch {run.metrics.epoch + 1}, step {run.metrics.step}"
        raise TrainingFailed(f"the processes have drifted apart in {where}")
    run.metrics.reduce_to_rank0()
    run.clock.reduce_to_rank0()


def run_state(run: Any) -> dict[str, Any]:
    """Everything that the steps to come depend on. Raises TrainingFailed rather than keep a non-finite loss.

    The running clock is paused, so that the time so far is counted. Of several processes all call it; rank 0 gets what
    all have.
    """
    clocked = run.clock.running_since is not None
    if clocked:
        run.clock.pause()
    reduce_to_rank0(run)
    run.metrics.meter.read()
    if clocked:
        run.clock.start()
    pending, random = run.ahead.pending, random_states(run.device)
    return {
        "format": FORMAT,
        "config": run.config.model_dump(),
        "model": run.network.model.state_dict(),
        **{name: getattr(run, name).state_dict() for name in PARTS},
        "queue": None if run.queue is None else run.queue.state_dict(),
        "scores": None if pending is None else pending.wait(),
        "random": random,
        **({"ranks": run.dist.all_gather_objects(random)} if run.dist.world > 1 else {}),
    }


def load_run_state(run: Any, state: dict[str, Any]) -> None:
    """Go on where `run_state` was taken, with as many processes as there are now. Raises KeyError, ValueError,
    RuntimeError and such for a wrong one."""
    run.network.model.load_state_dict(state["model"])
    for name in PARTS:
        getattr(run, name).load_state_dict(state[name])
    if run.queue is not None:
        run.queue.load_state_dict(state["queue"], run.device)
    if state["scores"] is not None:
        run.ahead.pending = Scores(state["scores"], None, run.scorer.is_model)
    ranks = state.get("ranks", ())
    same_world = len(ranks) == run.dist.world
    set_random_states(ranks[run.dist.rank] if same_world else state["random"], run.device)
    if run.dist.rank and not same_world:
        seed_rank(run.config.training.seed, run.dist.rank, run.metrics.epoch)


def resume_run(run: Any, path: Path | None, state: dict[str, Any] | None) -> None:
    """Load a checkpoint's `state` into a fresh run, and align its log. Raises RequestError where it does not fit."""
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
        raise RequestError(f"{path}: a checkpoint that does not fit this model and data ({why})") from None
    except OSError as error:
        raise RequestError(f"logging.jsonl_path: cannot put {log} in order: {error.strerror}") from None
    print_rank0(f"resumed from {path}: epoch {run.metrics.epoch + 1}, step {run.metrics.step}")


def warm_up(run: Any) -> None:
    """Compile and autotune every function of the run on blank images, before the clock starts.

    Leaves weights, buffers and random generators as they were. Raises RequestError where nothing can be compiled here.
    """
    training, side, network = run.config.training, run.config.dataset.image_size, run.network
    images = torch.zeros(network.local_batch, 3, side, side, dtype=torch.uint8, device=run.device)
    labels = torch.zeros(len(images), dtype=torch.int64, device=run.device)
    weights = run.selection.weights(DeviceBatch(images, labels, labels))
    inputs = (images, labels) if weights is None else (images, labels, weights)
    scoring = {network.evaluator, *([run.scorer.forward] if run.scorer else [])}  # one, but for score_resolution
    graphs = "reduce-overhead" in (training.compile, training.compile_scoring)
    buffers = [buffer.clone() for buffer in network.model.buffers()]

    def all_functions() -> None:
        with torch.no_grad():
            for forward in scoring:
                forward(images, labels)
        network.forward(*inputs)[0].backward()
        run.trainer.clear_gradients()

    try:
        with torch.random.fork_rng():
            for _ in range(3 if graphs else 1):  # a CUDA graph is recorded in the second pass, replayed from the third
                all_functions()
    except torch._dynamo.exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch 2.6 begins with "backend='inductor' raised:"
        why = next((line for line in lines if not line.endswith("raised:")), type(error).__name__)
        hint = "install a C++ compiler (and triton for a GPU), or set training.compile=off"
        raise RequestError(f"training.compile: nothing can be compiled here ({one_line(why)}); {hint}") from None
    for buffer, before in zip(network.model.buffers(), buffers, strict=True):
        buffer.copy_(before)
