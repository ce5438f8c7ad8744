"""What a step would take on more GPUs with as many samples each: a table on paper.

A GPU's own work and the price of each collective come from the JSON of `steps --nproc`. The host's
choosing is measured while the table is made. The rest is assumed, and stands above the table.
`parts_at` and `step_ms` hold the formulas.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
from pydantic import BaseModel, Field, ValidationError

from lab.base.console import Columns, table_line
from lab.base.errors import RequestError
from lab.machine.devices import environment
from lab.machine.distributed import vote_interval

Measured = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Printable = Annotated[
    str, Field(pattern=r"^[ -~]{1,80}$")
]  # anybody may have written the file that it is shown from


class Collective(BaseModel):
    """A kind of collective, as `time_collectives` has it."""

    calls: Measured
    bytes: Measured
    transfer_ms: Measured

    def per_batch(self) -> float:
        """Milliseconds a considered batch, without waiting for others."""
        return self.calls * self.transfer_ms


class StepsRow(BaseModel):
    ms: Measured
    images_per_second: Measured
    activation: float | None = Field(None, ge=0, le=1)
    collectives: dict[str, Collective] | None = None

    def computing_ms(self) -> float:
        """Milliseconds a considered batch, without the collectives that the step waits for."""
        waits = [
            each.per_batch()
            for kind, each in (self.collectives or {}).items()
            if kind != "agreement"
        ]
        return self.ms - sum(waits)


class StepsFile(BaseModel):
    """What `steps` has written, as far as it is read again."""

    processes: int = Field(1, ge=1)
    batch_size: int | None = Field(None, ge=1)
    model: Printable | None = None
    image_size: int | None = None
    gpu: Printable | None = None
    rows: dict[Printable, StepsRow]


class Assumed(NamedTuple):
    """What the table takes for granted."""

    gpus_per_node: int  # of one machine
    network_gb: float  # GB/s a GPU, between machines
    latency_us: float  # microseconds a hop between machines


def read_steps(option: str, path: Path) -> StepsFile:
    """The JSON of a `steps` run. Raises RequestError naming `option` and the file for anything
    else.
    """
    try:
        return StepsFile.model_validate_json(path.read_bytes())
    except OSError as error:
        raise RequestError(f"{option}: cannot read {path}: {error.strerror}") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ascii(".".join(map(str, first["loc"])) or "file")[:120]
        raise RequestError(
            f"{option}: {path} is no JSON of benchmark.py steps: {where}: {first['msg']}"
        ) from None


def read_single(path: Path, model: str, image_size: int) -> dict[str, float]:
    """Images per second by row of a `steps` run of one process. Raises RequestError where it is of
    several processes, or of another model or image size.
    """
    single = read_steps("--single", path)
    if single.processes > 1:
        raise RequestError(f"--single: {path} is of {single.processes} processes")
    for key, asked in (("model", model), ("image_size", image_size)):
        theirs = getattr(single, key)
        if theirs not in (None, asked):
            raise RequestError(f"--single: {path} is of {key} {theirs}, not {asked}")
    return {name: row.images_per_second for name, row in single.rows.items()}


def compile_tail(name: str) -> str:
    """What the name of a row says of torch.compile: ", compiled", ", reduce-overhead" or
    nothing.
    """
    found = re.search(", (compiled|reduce-overhead)$", name)
    return found[0] if found else ""


def break_even(rows: Mapping[str, Mapping[str, float]], activation: float) -> dict[str, float]:
    """The activation below which each scored loop is faster than dense, by the cost model: a scored
    loop takes the time of scoring plus activation times the dense step. Both are in `rows`, alike
    compiled.
    """
    found = {}
    for name, row in rows.items():
        dense = rows.get(f"dense loop{compile_tail(name)}")
        if (
            dense
            and name.strip().startswith(("batch-scored", "scored at"))
            and "not packed" not in name
        ):
            scoring = row["ms"] - row.get("activation", activation) * dense["ms"]
            found[name.strip()] = min(1.0, max(0.0, 1 - scoring / dense["ms"]))
    return found


Choose = Callable[[torch.Tensor, float], None]  # scores [n], nats, and a share to be active


@cache
def choosing_ms(choose: Choose, samples: int, activation: float) -> float:
    """Milliseconds the host takes to choose among so many scores, float32: the median of three,
    measured here.
    """
    scores = torch.randn(samples, generator=torch.Generator().manual_seed(0))
    times = []
    for _ in range(4):
        started = time.perf_counter()
        choose(scores, activation)
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times[1:])  # the first one warms up


def parts_at(
    gpus: int,
    row: StepsRow,
    found: StepsFile,
    assumed: Assumed,
    choose_ms: Callable[[int, float], float],
) -> dict[str, float]:
    """What a considered batch costs on so many GPUs, each with as many samples as measured:
    milliseconds by part.

    With N GPUs on M machines, n processes measured, and of each collective its bytes B and its
    transfer's time t:
      device        the measured step less the collectives it waits for (calls x t): what a GPU
                    computes, whatever N is
      gradients     ring all-reduce, 2 (N - 1) / N x B / pace, and 2 ceil(log2 M) hops between
                    machines. The pace is the measured one, 2 (n - 1) / n x B / t, and with M > 1
                    at most --network-gb
      scores        t as a fixed price, (N - 1) x B / pace, and ceil(log2 M) hops
      evening out   t, with M > 1 at least B / --network-gb and a hop: a GPU's surplus does not
                    grow with N
      agreement     gloo's all_gather is a ring of N - 1 hops: t / (n - 1) each, with M > 1 at
                    least --latency-us. It comes once in `vote_interval` batches, while all else
                    goes on
      choosing      `choose_ms` over the scores of all GPUs
    All but the device's are of one call, and are multiplied by the calls a considered batch.
    Assumed: no GPU is slower than those measured, nobody else uses the network, and memory for N
    processes' results costs no time.
    """
    nodes = math.ceil(gpus / assumed.gpus_per_node)
    n = found.processes
    hops = math.ceil(math.log2(nodes))
    hop = assumed.latency_us / 1000 if nodes > 1 else 0.0
    network = assumed.network_gb * 1e6 if nodes > 1 else math.inf  # bytes a millisecond
    gradients = row.collectives["gradients"]
    pace = min(network, 2 * (n - 1) / n * gradients.bytes / gradients.transfer_ms)
    a_call = {
        "gradients": lambda c: 2 * (gpus - 1) / gpus * c.bytes / pace + 2 * hops * hop,
        "scores": lambda c: c.transfer_ms + (gpus - 1) * c.bytes / pace + hops * hop,
        "evening out": lambda c: max(c.transfer_ms, c.bytes / network + hop),
        "agreement": lambda c: (gpus - 1) * max(c.transfer_ms / (n - 1), hop) / vote_interval(gpus),
    }
    parts = {"device": row.computing_ms(), "choosing": 0.0}
    for kind, price in a_call.items():
        collective = row.collectives.get(kind)
        parts[kind] = 0.0 if collective is None else collective.calls * price(collective)
    if scores := row.collectives.get("scores"):
        samples = gpus * found.batch_size // n
        parts["choosing"] = scores.calls * choose_ms(samples, row.activation or 0.0)
    return parts


def step_ms(parts: Mapping[str, float], ahead: bool) -> float:
    """Milliseconds a considered batch. The host chooses while the GPU works: the longer of the two
    counts. Not scored ahead, the GPU waits for the host's choice, and they add up. Gradients
    overlap with neither. Agreement overlaps with all: it counts where it takes longer than the
    rest.
    """
    device = parts["device"] + parts["scores"] + parts["evening out"]
    host = parts["choosing"]
    return max(
        (max(device, host) if ahead else device + host) + parts["gradients"], parts["agreement"]
    )


LEAST_EFFICIENCY = 0.9
MOST_GPUS = 4096


def breaks_first(at: Callable[[int], dict[str, float]], ahead: bool) -> dict[str, Any] | None:
    """The first power of two of `gpus` at which the efficiency is below LEAST_EFFICIENCY, and the
    `part` to blame: the one without which that step would be the shortest. None where there is none
    up to MOST_GPUS.
    """
    for gpus in (2**power for power in range(1, MOST_GPUS.bit_length())):
        parts = at(gpus)
        if parts["device"] < LEAST_EFFICIENCY * step_ms(parts, ahead):
            others = [part for part in parts if part != "device"]
            return {
                "part": min(others, key=lambda part: step_ms({**parts, part: 0.0}, ahead)),
                "gpus": gpus,
            }
    return None


def scalable(path: Path) -> tuple[StepsFile, dict[str, StepsRow]]:
    """A `steps --nproc` file and its rows with collectives: the compiled ones, if there are any.
    Raises RequestError where the file does not hold what the table needs.
    """
    found = read_steps("--steps", path)
    rows = {name: row for name, row in found.rows.items() if row.collectives}
    if found.processes < 2 or found.batch_size is None or not rows:
        raise RequestError(
            f"--steps: {path} has no rows with collectives; make it by `steps --nproc N --json`"
        )
    rows = {name: row for name, row in rows.items() if compile_tail(name)} or rows
    for name, row in rows.items():
        if "gradients" not in row.collectives:
            raise RequestError(
                f"--steps: {path}: {name.strip()}: no optimizer step was timed, take more --steps"
            )
        if row.computing_ms() <= 0:
            raise RequestError(
                f"--steps: {path}: {name.strip()}: its collectives take longer than its step"
            )
    return found, rows


def scaling(path: Path, sizes: Sequence[int], assumed: Assumed, choose: Choose) -> dict[str, Any]:
    """For each loop in a `steps --nproc` file, what a considered batch takes on each number of GPUs
    in `sizes`, its bytes, and what breaks first.
    """
    found, measured_rows = scalable(path)
    rows = {}
    verdicts = {}
    for name, row in measured_rows.items():
        at = partial(
            parts_at,
            row=row,
            found=found,
            assumed=assumed,
            choose_ms=partial(choosing_ms, choose),
        )
        ahead = "not scored ahead" not in name
        gradients, scores = (row.collectives.get(kind) for kind in ("gradients", "scores"))
        rows[name] = []
        for gpus in sizes:
            parts = at(gpus)
            step = step_ms(parts, ahead)
            size = {"gpus": gpus, "batch_size": gpus * found.batch_size // found.processes}
            size["gradient_bytes"] = (
                gradients.calls * 2 * (gpus - 1) / gpus * gradients.bytes
            )  # sent by a GPU
            size["score_bytes"] = (
                scores.calls * gpus * scores.bytes if scores else 0.0
            )  # gathered on a GPU
            rows[name].append(
                {**size, "ms": parts, "step_ms": step, "efficiency": parts["device"] / step}
            )
        verdicts[name] = breaks_first(at, ahead)
    measured = {
        "file": str(path),
        "processes": found.processes,
        "batch_size": found.batch_size,
        "gpu": found.gpu,
    }
    measured["threads_choosing"] = torch.get_num_threads()
    result = {
        "measured": measured,
        "assumed": assumed._asdict(),
        "rows": rows,
        "breaks_first": verdicts,
    }
    return {**result, **environment(torch.device("cpu"))}


SCALING_COLUMNS: Columns = {
    "GPUs": ("gpus", "5"),
    "batch": ("batch_size", "9,"),
    "grad. MB": ("gradient_mb", "9.2f"),
    "score KB": ("score_kb", "9.1f"),
    **{
        part: (part, "11.3f")
        for part in ("device", "gradients", "scores", "evening out", "agreement", "choosing")
    },
    "step": ("step_ms", "11.3f"),
    "efficiency": ("efficiency", "11.3f"),
}


def benchmark_scaling(args: argparse.Namespace, choose: Callable[..., Any]) -> dict[str, Any]:
    """`scaling` by the options of the command."""
    return scaling(
        args.steps, args.gpus, Assumed(args.gpus_per_node, args.network_gb, args.latency_us), choose
    )


def show_scaling(result: Mapping[str, Any]) -> str:
    """What is measured and what assumed, the table on paper, and a line a loop on what breaks
    first.
    """
    measured = result["measured"]
    assumed = result["assumed"]
    each = f"{measured['batch_size'] // measured['processes']} samples"
    network = f"{assumed['network_gb']:g} GB/s a GPU and {assumed['latency_us']:g} us a hop"
    lines = [
        (
            f"on paper, from {measured['file']}: {measured['processes']} x "
            f"{measured['gpu'] or 'CPU'}, {each} each"
        ),
        (
            "measured there: the step and its collectives, and so the pace of gradients "
            "inside a machine"
        ),
        f"measured here: choosing, on {measured['threads_choosing']} threads",
        (
            f"assumed: {assumed['gpus_per_node']} GPUs a machine, {network} between "
            f"machines, {each} a GPU,"
        ),
        (
            "  gradients by a ring, overlapping with nothing; the host at work while the GPU "
            "is; efficiency: device / step"
        ),
        "",
        f"{'ms per considered batch':<44} {table_line(SCALING_COLUMNS)}",
    ]
    for name, row in result["rows"].items():
        for at in row:
            volumes = {
                "gradient_mb": at["gradient_bytes"] / 1e6,
                "score_kb": at["score_bytes"] / 1e3,
            }
            lines.append(f"{name:<44} {table_line(SCALING_COLUMNS, {**at, **at['ms'], **volumes})}")
    for name, first in result["breaks_first"].items():
        verdict = f"nothing brings the efficiency below {LEAST_EFFICIENCY} up to {MOST_GPUS} GPUs"
        if first is not None:
            verdict = (
                f"first to break: {first['part']}, efficiency below {LEAST_EFFICIENCY} at "
                f"{first['gpus']} GPUs"
            )
        lines.append(f"{name.strip()}: {verdict}")
    return "\n".join(lines)
