"""Run many configs, every run a process of its own, and list how each ended.

    python scripts/run_sweep.py --configs configs/imagenet_resnet50_ast.yaml configs/imagenet_vitb16_ast.yaml
    python scripts/run_sweep.py --configs configs/digits_smoke.yaml --grid ast.mode=ast,random \\
        ast.target_activation=0.1,0.25,0.5 --seeds 0 1 2 --output-dir results/sweep
    python scripts/run_sweep.py --configs configs/cifar10_resnet18_ast.yaml --gpus 0 1 --runs-per-gpu 2 --resume
    python scripts/run_sweep.py --configs configs/cifar10_resnet18_ast.yaml --one-process --seeds 0 1 2 \\
        --variants "ast.mode=dense training.epochs=15" "ast.mode=ast" "ast.mode=random"

A run that fails is listed with its reason and the others go on. One line a run goes to
<output_dir>/sweep_summary_<timestamp>.jsonl as it ends, what it printed to <output_dir>/logs/. Ctrl-C and SIGTERM are
passed on to the runs, which save what they have; a second one kills them.
Exit codes: 0 all done; 1 a run failed; 2 the request was wrong; 130 or 143 interrupted.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch

import run_experiment
from lab.cli import command_parser, run_cli
from lab.config import Config, LoggingConfig, config_keys, run_id
from lab.data import cache
from lab.errors import RequestError, one_line
from lab.files import append_jsonl, replace_text
from lab.results import read_run
from lab.runtime.outputs import prepare_outputs
from train_ast import load_config

RUNNER = Path(__file__).with_name("run_experiment.py")
RESULTS = "final_results_*.json"
FINISHED = ("completed", "early_stopped", "time_capped")
POLL_SECONDS = 0.1
OUT_OF_MEMORY = ": by hand, or for want of memory"
LIBC, PR_SET_PDEATHSIG = ctypes.CDLL(None) if sys.platform == "linux" else None, 1


# ------------------------------------------------------------------------------------------------ Plan


@dataclass(frozen=True)
class Planned:
    """A run to be: `config` is None and `error` says why where the request for it is wrong."""

    id: str
    path: str
    overrides: tuple[str, ...]
    name: str
    config: Config | None
    error: str | None = None
    twin: bool = False
    resume: bool = False


def parse_grid(texts: Sequence[str]) -> list[list[str]]:
    """["a.b=1,2", "c.d=x"] to [["a.b=1", "a.b=2"], ["c.d=x"]].

    Raises RequestError for an unknown key, one given twice, one of logging (it does not make a run another), or no
    values.
    """
    axes = [(key, values.split(",")) for key, _, values in (text.partition("=") for text in texts)]
    for key, values in axes:
        if not all(values):
            raise RequestError(f"--grid {key}: expected key=value,value...")
        check_keys([f"{key}={values[0]}"])
        if key.startswith("logging."):
            raise RequestError(f"--grid {key}: does not make a run another; every run is logged under its own name")
        if [other for other, _ in axes].count(key) > 1:
            raise RequestError(f"--grid {key}: given twice")
    return [[f"{key}={value}" for value in values] for key, values in axes]


def check_keys(overrides: Iterable[str]) -> None:
    """Raises RequestError, with the nearest known key, for an override that is none or of an unknown key."""
    for override in overrides:
        if override.partition("=")[0] not in config_keys():
            load_config(None, [override])


def plan_runs(args: argparse.Namespace) -> list[Planned]:
    """Every config crossed with the variants, the grid and the seeds; a run that is asked for twice is planned once."""
    check_keys(args.overrides)
    axes = parse_grid(args.grid)
    if args.seeds:
        if any(axis[0].startswith("training.seed=") for axis in axes):
            raise RequestError("--seeds: training.seed is in --grid too")
        axes.append([f"training.seed={seed}" for seed in args.seeds])
    variants = [shlex.split(text) for text in args.variants] or [[]]
    check_keys(override for variant in variants for override in variant)
    plans: dict[str, Planned] = {}
    for path, variant, point in product(args.configs, variants, product(*axes)):
        own = (*variant, *point)
        plan = plan_run(path, (*args.overrides, *own), " ".join([path, *own]), args.dense_twin, args.resume)
        plans.setdefault(plan.id, plan)
    if args.dense_twin and not any(plan.twin for plan in plans.values()):
        raise RequestError("--dense-twin: none of the runs is sparse")
    return list(plans.values())


def plan_run(path: str, overrides: tuple[str, ...], name: str, dense_twin: bool, resume: bool = False) -> Planned:
    try:
        config = load_config(path, overrides)
    except RequestError as error:
        return Planned(hashlib.sha256(name.encode()).hexdigest()[:12], path, overrides, name, None, str(error))
    key = run_id(config)
    if config.logging.jsonl_path is not None:  # a log of its own for each
        log = Path(config.logging.jsonl_path)
        overrides += (f"logging.jsonl_path={log.with_name(f'{log.stem}.{key}{log.suffix}')}",)
    return Planned(key, path, overrides, name, config, None, dense_twin and config.ast.mode != "dense", resume)


def slots_of(gpus: Sequence[str], runs_per_gpu: int) -> list[str | None]:
    """What each process slot sets CUDA_VISIBLE_DEVICES to, None for leaving it alone.

    Raises RequestError for a GPU that is not there. Numbers count the GPUs that this process may see.
    """
    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    count = torch.cuda.device_count() if gpus else 0
    devices: list[str | None] = []
    for gpu in gpus:
        if gpu.isdecimal() and int(gpu) >= count:
            raise RequestError(f"--gpus {gpu}: torch sees {count} GPUs here, the first one is 0")
        devices.append(visible[int(gpu)] if visible and gpu.isdecimal() else gpu)
    return [device for device in devices or [None] for _ in range(runs_per_gpu)]


# --------------------------------------------------------------------------------------------- Summary


def result_row(path: Path) -> dict[str, Any]:
    """What a summary line says about a results file; null for what was not measured.

    Raises ValueError where the file cannot be read.
    """
    figures = read_run(path).figures
    keys = ("status", "seed", "epochs", "final_accuracy", "best_accuracy", "activation_error", "train_seconds")
    row = {key: figures[key] for key in (*keys, "energy_kj")}
    row |= {"results_file": str(path), "duration_seconds": round(figures["total_seconds"], 3)}
    row |= {key: figures[key] for key in ("error", "twin") if figures[key]}
    return {key: None if value != value else value for key, value in row.items()}


def plan_row(plan: Planned) -> dict[str, Any]:
    """What a summary line says about the request."""
    return {"id": plan.id, "config": plan.path, "overrides": list(plan.overrides)}


def finished_runs(plans: Iterable[Planned]) -> dict[str, dict[str, Any]]:
    """By run_id, the summary lines of the runs that ended by themselves, in the folders the plans write to: of those
    with a model and a dataset that is planned; of two the newer."""
    configs = [plan.config for plan in plans if plan.config is not None]
    folders = {Path(config.logging.output_dir) for config in configs}
    found = {}
    for path in sorted((path for folder in folders for path in folder.glob(RESULTS)), key=attrgetter("name")):
        try:
            config = Config.model_validate(json.loads(path.read_text(encoding="utf-8"))["config"])
            row = result_row(path)
        except (OSError, ValueError, TypeError, KeyError):
            continue  # not a run of this lab, or one of another version of it: it is run again
        alike = any((config.model, config.dataset) == (other.model, other.dataset) for other in configs)
        if alike and row["status"] in FINISHED:
            found[run_id(config)] = {"id": run_id(config)} | row | {"exit_code": 0}
    return found


def is_done(plan: Planned, row: Mapping[str, Any] | None) -> bool:
    """Whether a finished run's `row` has all that is asked for: where a twin is, that too."""
    if row is None or not plan.twin:
        return row is not None
    return "twin" in row and Path(row["results_file"]).with_name(row["twin"]).exists()


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a summary by run_id, but for a last one cut short by whatever ended the sweep."""
    rows = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            rows[row["id"]] = row
    return rows


def newest_summary(folder: Path) -> Path | None:
    return max(folder.glob("sweep_summary_*.jsonl"), default=None)


def as_written(folder: Path, finished: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The lines of `finished` as the newest summary has them, with the whole time of the process; where the sweep was
    killed before it could write one, as made from the results."""
    summary = newest_summary(folder)
    old = read_rows(summary) if summary is not None else {}

    def same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        return all(row.get(key) == other[key] for key in ("exit_code", "results_file"))

    return {key: old[key] if same(old.get(key, {}), row) else row for key, row in finished.items()}


def open_summary(folder: Path, resume: bool, rows: Sequence[Mapping[str, Any]], planned: set[str]) -> Path:
    """The summary to write to, a new one or with `resume` the folder's newest: it holds `rows` from the start, and
    what it held of runs that are not planned now."""
    path = newest_summary(folder) if resume else None
    others = [row for key, row in read_rows(path).items() if key not in planned] if path is not None else []
    path = path or folder / f"sweep_summary_{datetime.now():%Y%m%d_%H%M%S}.jsonl"
    text = "".join(json.dumps(row) + "\n" for row in [*others, *rows])
    replace_text(path, text)
    return path


def time_left(rows: Iterable[Mapping[str, Any]], plans: Iterable[Planned], slots: int) -> timedelta | None:
    """The time `plans` will take on so many slots at the pace of the finished `rows`; None before there is one."""
    timed = [row for row in rows if row.get("status") in FINISHED and row.get("epochs")]
    if not timed:
        return None
    pace = sum(row["duration_seconds"] for row in timed) / sum(row["epochs"] for row in timed)
    return timedelta(seconds=round(pace * sum(plan.config.training.epochs for plan in plans if plan.config) / slots))


# ------------------------------------------------------------------------------------------- Processes


def command_for(plan: Planned) -> list[str]:
    flags = ["--dense-twin"] * plan.twin + ["--resume", "auto"] * plan.resume
    return [sys.executable, str(RUNNER), "--config", plan.path, *flags, *plan.overrides]


def end_with_parent() -> None:
    """In a child, on Linux: a sweep that is killed outright takes its runs with it, and SIGTERM lets them save."""
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Running:
    """A run's process, in a session of its own, so that a Ctrl-C reaches it once: from the sweep."""

    def __init__(self, plan: Planned, device: str | None, log: Path, beside: int = 0):
        """`device`: what CUDA_VISIBLE_DEVICES is set to, None for leaving it alone. `beside`: how many runs share the
        machine with it; unless OMP_NUM_THREADS is set they share its cores, for on the same ones they crawl."""
        self.plan, self.device, self.log, self.started = plan, device, log, time.monotonic()
        threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (1 + beside)))} if beside else {}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                command_for(plan),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=threads | os.environ | ({} if device is None else {"CUDA_VISIBLE_DEVICES": device}),
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def row(self) -> dict[str, Any]:
        """The summary line, once the process has ended."""
        return ended_row(self.plan, self.process.returncode, self.log, self.started) | {"device": self.device}


def ended_row(plan: Planned, code: int, log: Path, started: float) -> dict[str, Any]:
    """The summary line of a run that ended with exit code `code`, from what it printed to `log`."""
    lines = [line for line in log.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    files = [line.removeprefix("results: ") for line in lines if line.startswith("results: ")]
    row = plan_row(plan) | {"status": "failed", "results_file": None}
    if files:
        with contextlib.suppress(ValueError, OSError):
            row |= result_row(Path(files[0]))
    row |= {"exit_code": code, "duration_seconds": round(time.monotonic() - started, 3), "log": str(log)}
    if code:
        row["status"] = "interrupted" if code in (130, 143) else "failed"
        row["error"] = one_line(lines[-1] if lines else "it printed nothing")
    if code < 0:
        row["error"] = f"ended by {signal.Signals(-code).name}{OUT_OF_MEMORY if code == -signal.SIGKILL else ''}"
    return row


class Halt:
    """SIGINT or SIGTERM to the sweep: no run starts any more; the running ones get it too; a second one kills them."""

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.passed_on = 0

    def watch_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self.signals.append(number))

    def pass_on(self, running: Iterable[Running]) -> None:
        """Send on what came since the last call."""
        for number in self.signals[self.passed_on :]:
            for run in running:
                if self.passed_on == 0:
                    run.process.send_signal(number)
                else:
                    with contextlib.suppress(ProcessLookupError):
                        os.killpg(run.process.pid, signal.SIGKILL)
            self.passed_on += 1


def work_off(
    plans: Sequence[Planned],
    slots: Sequence[str | None],
    logs: Path,
    halt: Halt,
    record: Callable[[dict[str, Any], Sequence[Planned]], None],
) -> None:
    """Run `plans` in order, as many at a time as there are slots. `record` gets each row and the plans still ahead."""
    waiting, free, running = list(plans), list(slots), []
    while running or (waiting and not halt.signals):
        while waiting and free and not halt.signals:
            plan = waiting.pop(0)
            print(f"{'':>9} start        {plan.name}", flush=True)
            running.append(Running(plan, free.pop(0), logs / f"{plan.id}.log", len(slots) - 1))
        halt.pass_on(running)
        for run in [run for run in running if run.process.poll() is not None]:
            running.remove(run)
            free.append(run.device)
            record(run.row(), [*(other.plan for other in running), *waiting])
        time.sleep(POLL_SECONDS)


def work_off_here(
    plans: Sequence[Planned], logs: Path, halt: Halt, record: Callable[[dict[str, Any], Sequence[Planned]], None]
) -> None:
    """Run `plans` in order in this process. Decoded pictures stay on the device, compiled code in the process."""
    cache.SHARED_PICTURES = {}
    for number, plan in enumerate(plans):
        if halt.signals:
            break
        print(f"{'':>9} start        {plan.name}", flush=True)
        log, started = logs / f"{plan.id}.log", time.monotonic()
        with (
            log.open("w", encoding="utf-8") as output,
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            code = run_here(plan)
        halt.watch_signals()  # the run has watched them itself
        if code in (130, 143):
            halt.signals.append(code - 128)
        record(ended_row(plan, code, log, started) | {"device": None}, plans[number + 1 :])
        gc.collect()  # a run's tensors hang in cycles
        torch.cuda.empty_cache()
    cache.SHARED_PICTURES = None


def run_here(plan: Planned) -> int:
    """The exit code of a run in this process; what would be a traceback is printed as one."""
    try:
        return run_cli(lambda: run_experiment.main(command_for(plan)[2:]))
    except Exception:
        traceback.print_exc()
        return 1


# ------------------------------------------------------------------------------------------------ Main


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = command_parser(__doc__)
    parser.add_argument("--configs", required=True, nargs="+", metavar="FILE", help="configs, run in this order")
    parser.add_argument("--grid", default=[], nargs="+", metavar="KEY=V1,V2", help="run every combination of these")
    parser.add_argument(
        "--variants", default=[], nargs="+", metavar='"KEY=V ..."', help="run each with each of these sets of overrides"
    )
    parser.add_argument("--seeds", default=[], nargs="+", metavar="N", help="repeat each with these seeds")
    parser.add_argument("--gpus", default=[], nargs="+", metavar="N", help="GPUs to use; default: as torch chooses")
    parser.add_argument("--runs-per-gpu", default=1, type=int, metavar="N", help="runs at a time on each (default 1)")
    parser.add_argument(
        "--one-process",
        action="store_true",
        help="one run after the other in this process, which keeps packages, pictures and compiled code; if one takes "
        "the process down, the others wait for --resume",
    )
    parser.add_argument("--dense-twin", action="store_true", help="after each sparse run, a dense one of its length")
    parser.add_argument("--resume", action="store_true", help="leave out finished runs, go on with begun ones")
    parser.add_argument("--dry-run", action="store_true", help="print the plan and an estimate of its time, and stop")
    parser.add_argument("--output-dir", metavar="DIR", help="short for logging.output_dir=DIR in every run")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="laid over every config")
    args = parser.parse_intermixed_args(argv)
    for name in ("configs", "seeds", "gpus"):  # `--configs a.yaml training.lr=1` takes the override too
        values = getattr(args, name)
        args.overrides += [value for value in values if "=" in value]
        setattr(args, name, [value for value in values if "=" not in value])
    args.overrides += [f"logging.output_dir={args.output_dir}"] if args.output_dir else []
    if args.one_process and (args.gpus or args.runs_per_gpu != 1):
        raise RequestError("--one-process: one run at a time; leave out --gpus and --runs-per-gpu")
    if args.runs_per_gpu < 1:
        raise RequestError(f"--runs-per-gpu: expected at least 1, got {args.runs_per_gpu}")
    if bad := next((seed for seed in args.seeds if not seed.isdecimal()), None):
        raise RequestError(f"--seeds: expected whole numbers, got {bad!r}")
    return args


def row_line(row: Mapping[str, Any], name: str) -> str:
    accuracy = row.get("final_accuracy")
    figures = row.get("error") or ("" if accuracy is None else f"final {accuracy:.2f} %")
    return f"{row['status']:<12} {row['duration_seconds']:8.1f} s  {name}  {figures}"


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    plans, slots = plan_runs(args), slots_of(args.gpus, args.runs_per_gpu)
    output_dir = Path(next((plan.config for plan in plans if plan.config), Config()).logging.output_dir)
    finished = as_written(output_dir, finished_runs(plans))
    done = [plan.id for plan in plans if args.resume and is_done(plan, finished.get(plan.id))]
    if args.dry_run:
        return show_plan(plans, done, list(finished.values()), len(slots))
    prepare_outputs(LoggingConfig(output_dir=str(output_dir / "logs")))
    rows = {plan.id: plan_row(plan) | finished[plan.id] for plan in plans if plan.id in done}
    summary = open_summary(output_dir, args.resume, list(rows.values()), {plan.id for plan in plans})
    ahead = [plan for plan in plans if plan.id not in done]
    print(f"{len(plans)} runs, {len(done)} of them finished before; their output: {output_dir / 'logs'}", flush=True)
    names = {plan.id: plan.name for plan in plans}

    def record(row: dict[str, Any], still: Sequence[Planned]) -> None:
        rows[row["id"]] = row
        append_jsonl(summary, row)
        left = time_left(rows.values(), still, len(slots)) if still else None
        ended = f"[{len(plans) - len(still):>3}/{len(plans):<3}]"
        print(f"{ended} {row_line(row, names[row['id']])}{f'  ({left} left)' if left else ''}", flush=True)

    halt = Halt()
    halt.watch_signals()
    for plan in ahead:
        if plan.error is not None:
            wrong = {"status": "failed", "exit_code": 2, "duration_seconds": 0.0, "error": plan.error}
            record(plan_row(plan) | wrong, [other for other in ahead if other.id not in rows and other != plan])
    sound = [plan for plan in ahead if plan.error is None]
    if args.one_process:
        work_off_here(sound, output_dir / "logs", halt, record)
    else:
        work_off(sound, slots, output_dir / "logs", halt, record)
    own = [rows[plan.id] for plan in plans if plan.id in rows]
    bad = [row for row in own if row["exit_code"]]
    print(f"\n{len(own) - len(bad)} of {len(plans)} runs done, {len(plans) - len(own)} not started")
    print("".join(f"{row_line(row, names[row['id']])}\n" for row in bad) + f"summary: {summary}")
    return 128 + halt.signals[0] if halt.signals else int(bool(bad))


def show_plan(plans: Sequence[Planned], done: Sequence[str], rows: Sequence[Mapping[str, Any]], slots: int) -> int:
    """Print every run with what is to happen to it, and how long all will take at the pace of the folder's `rows`."""
    for plan in plans:
        state = "finished" if plan.id in done else "wrong" if plan.error else "to run"
        print(f"{plan.id}  {state:<8}  {plan.name}" + (f"  {plan.error}" if plan.error else ""))
    ahead = [plan for plan in plans if plan.id not in done and plan.error is None]
    left = time_left(rows, ahead, slots)
    estimate = "no finished run to estimate their time from" if left is None else f"about {left}, as the finished ones"
    print(f"{len(ahead)} runs, {slots} at a time: {estimate}")
    return 0


if __name__ == "__main__":
    sys.exit(run_cli(main))
