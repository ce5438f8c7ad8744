"""A run as a whole: its parts are saved, loaded and warmed up together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lab.base.errors import RequestError, TrainingFailed, one_line
from lab.base.files import align_jsonl
from lab.engine.checkpoint import CAPPED, host_copy
from lab.machine.distributed import Dist
from lab.machine.stateful import Stateful

Parts = Mapping[str, Stateful]  # of a run, by name


def require_alike(numbers: list[float], where: str, dist: Dist) -> None:
    """Raises TrainingFailed where the processes do not have the same numbers. Collective.

    where: in the run, in words.
    """
    if dist.world == 1:
        return
    rows = dist.all_gather(numbers)
    if not np.array_equal(rows, rows[:1].repeat(len(rows), 0), equal_nan=True):
        raise TrainingFailed(f"the processes have drifted apart in {where}")


def state_of(parts: Parts, dist: Dist) -> dict[str, Any]:
    """Everything that the steps to come depend on; on rank 0 of several processes it is whole.
    Collective. The parts are not changed by it.
    """
    local = {name: part.local_state() for name, part in parts.items()}
    return {
        **{name: part.state_dict() for name, part in parts.items()},
        "ranks": dist.gather_objects(local if dist.world == 1 else host_copy(local)),
    }


def load_state(parts: Parts, state: Mapping[str, Any], dist: Dist) -> None:
    """Go on where `state_of` was taken. As many processes as then go on bit for bit; another number
    of them go on with what all had together. Raises KeyError, ValueError, RuntimeError and such for
    a wrong one.
    """
    ranks = state["ranks"]
    for name, part in parts.items():
        part.load_state_dict(state.get(name, state))  # the weights lie at the top
    for name, part in parts.items():
        states = [each[name] for each in ranks]
        same = len(ranks) == dist.world
        part.load_local_state(states[dist.rank] if same else part.merged(states, dist.rank))


def resume_parts(
    parts: Parts,
    path: Path,
    state: dict[str, Any],
    log: str | None,
    history: Callable[[], Mapping[str, list]],
    dist: Dist,
) -> None:
    """Load a checkpoint's `state` into fresh parts, and align the log to its history.

    log: `logging.jsonl_path`. history: once it is loaded. Raises RequestError where it does not
    fit.
    """
    try:
        load_state(parts, state, dist)
        if log is not None and dist.rank == 0:
            align_jsonl(Path(log), history(), path.with_name(CAPPED))
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, RuntimeError) as error:
        why = f"{type(error).__name__}: {one_line(error)[:200]}"
        raise RequestError(
            f"{path}: a checkpoint that does not fit this model and data ({why})"
        ) from None
    except OSError as error:
        raise RequestError(
            f"logging.jsonl_path: cannot put {log} in order: {error.strerror}"
        ) from None


def compile_all(once: Callable[[], None], buffers: list[torch.Tensor], passes: int) -> None:
    """Call `once`, which calls every function of a run, before the clock starts: so all are
    compiled and autotuned.

    passes: 3 with CUDA graphs, recorded in the second and replayed from the third, else 1. Leaves
    `buffers` and random generators as they were. Raises RequestError where nothing can be compiled
    here.
    """
    before = [buffer.clone() for buffer in buffers]
    try:
        with torch.random.fork_rng():
            for _ in range(passes):
                once()
    except torch._dynamo.exc.TorchDynamoException as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch 2.6 begins with "backend='inductor' raised:"
        reasons = (line for line in lines if not line.endswith("raised:"))
        why = next(reasons, type(error).__name__)
        hint = "install a C++ compiler (and triton for a GPU), or set training.compile=off"
        raise RequestError(
            f"training.compile: nothing can be compiled here ({one_line(why)}); {hint}"
        ) from None
    for buffer, value in zip(buffers, before, strict=True):
        buffer.copy_(value)
