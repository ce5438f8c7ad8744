"""Sweeps: which runs are planned, their processes, and the summary of how each ended."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from itertools import chain, count, product
from pathlib import Path
from typing import Any

from lab.base.errors import RequestError, one_line
from lab.base.files import replace_text, sibling, utc_now
from lab.base.reading import read_config
from lab.base.streams import forget_unprinted, print_progress
from lab.config.grid import check_keys
from lab.config.loading import Config, load_config, run_id
from lab.study.cli import hand_on, option, run_cli
from lab.study.results import finished_at, read_run

RESULTS = "final_results_*.json"
FINISHED = ("completed", "early_stopped", "time_capped")  # a run with one of these is not repeated
POLL_SECONDS = 0.1
OUT_OF_MEMORY = ": by hand, or for want of memory"
ERROR_CHARACTERS = 300  # of a run's last line, in the summary
LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
PR_SET_PDEATHSIG = 1

Record = Callable[
    [dict[str, Any], Sequence["Planned"]], None
]  # gets a run's summary line and the plans still ahead


@dataclass(frozen=True)
class Planned:
    """One run of the sweep. Where the request for it is wrong, `config` is None and `error` says
    why.
    """

    id: str
    path: str  # of the config file
    overrides: tuple[str, ...]
    name: str  # the file and the overrides that tell this run from the others
    config: Config | None
    error: str | None = None
    twin: bool = False  # followed by a time-matched baseline
    resume: bool = False  # from its own checkpoint, if there is one
    text: str = ""  # of the config file, as it was read
    copy: Path | None = (
        None  # what the run reads instead of the file, see `hand_over`; None: the file
    )

    def complaint(self) -> str:
        """The `error`, with the run's name before it unless it names an override of all runs."""
        why = self.error.removeprefix(f"{self.path}: ")  # the name begins with it
        named = next(
            (text for text in self.overrides if why.startswith(f"override {text!r}: ")), None
        )
        if (
            named is not None
            and not f"{self.name} ".endswith(f" {named} ")
            and f" {named} " not in self.name
        ):
            return why
        return f"{self.name}: {why if named is None else why.removeprefix(f'override {named!r}: ')}"


def plan_runs(
    configs: Sequence[str],
    common: Sequence[str],
    points: Sequence[tuple[str, ...]],
    dense_twin: bool,
    resume: bool,
    check: Callable[[Config], None] | None = None,
    imports: Sequence[str] = (),
) -> list[Planned]:
    """Every config file with every point of the sweep; a run that is asked for twice is planned
    once.

    common: overrides of all runs; points: those of one run each (`cross`); check, imports: as for
    `load_config`. Raises RequestError for a wrong override in `common`, a request wrong for every
    run, `dense_twin` without a sparse run.
    """
    check_keys(common)
    texts = {path: read_once(path) for path in dict.fromkeys(configs)}
    plans: dict[str, Planned] = {}
    for path, own in product(configs, points):
        plan = plan_run(
            path,
            texts[path],
            (*common, *own),
            " ".join([path, *own]),
            dense_twin,
            resume,
            check,
            imports,
        )
        plans.setdefault(plan.id, plan)
    if all(plan.error for plan in plans.values()):
        first = next(iter(plans.values()))
        none = f"; none of {len(plans)} runs can start" if len(plans) > 1 else ""
        raise RequestError(first.complaint() + none)
    if dense_twin and not any(plan.twin for plan in plans.values()):
        raise RequestError("--dense-twin: none of the runs is sparse")
    return list(plans.values())


def read_once(path: str) -> str | RequestError:
    """The text of a config file, or what is wrong with it."""
    try:
        return read_config(path)
    except RequestError as error:
        return error


def plan_run(
    path: str,
    text: str | RequestError,
    overrides: tuple[str, ...],
    name: str,
    dense_twin: bool,
    resume: bool = False,
    check: Callable[[Config], None] | None = None,
    imports: Sequence[str] = (),
) -> Planned:
    """One run. `text`: what reading the config file gave. Nothing is raised: what is wrong is the
    plan's `error`.
    """
    try:
        if isinstance(text, RequestError):
            raise text
        config = load_config(path, overrides, text, check, imports)
    except RequestError as error:
        return Planned(digest(name), path, overrides, name, None, str(error))
    key = run_id(config)
    twin = dense_twin and config.ast.mode != "dense"
    if config.logging.jsonl_path is not None:  # each run gets a log of its own
        overrides += (f"logging.jsonl_path={sibling(config.logging.jsonl_path, key)}",)
    return Planned(key, path, overrides, name, config, None, twin, resume, text)


def digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()[:12]


def hand_over(plans: Sequence[Planned], folder: Path) -> list[Planned]:
    """`plans`, each with a copy in `folder` of its config file as it was read.

    The runs read the copy: a pipe cannot be read again, and a file may change before its last run
    starts.
    """
    handed = []
    for plan in plans:
        ending = ".json" if plan.path.lower().endswith(".json") else ".yaml"
        copy = folder / f"{Path(plan.path).stem}.{digest(plan.text)}{ending}"
        if not copy.exists():
            replace_text(copy, plan.text)
        handed.append(replace(plan, copy=copy))
    return handed


def slots_of(gpus: Sequence[str], runs_per_gpu: int) -> list[str | None]:
    """What each process slot sets CUDA_VISIBLE_DEVICES to; None leaves it as it is.

    Numbers in `gpus` count the GPUs that this process may see. Raises RequestError for a GPU that
    is not there.
    """
    if not gpus:
        return [None] * runs_per_gpu
    import torch  # only to count: it takes seconds to import

    visible = [name for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name]
    devices = []
    count = torch.cuda.device_count()
    for gpu in gpus:
        if gpu.isdecimal() and int(gpu) >= count:
            raise RequestError(f"--gpus {gpu}: torch sees {count} GPUs here, the first one is 0")
        devices.append(visible[int(gpu)] if visible and gpu.isdecimal() else gpu)
    return [device for device in devices for _ in range(runs_per_gpu)]


def result_row(path: Path) -> dict[str, Any]:
    """What a summary line says about a results file, with null for what was not measured.

    Raises ValueError where the file is not a results file, OSError where it cannot be read.
    """
    run = read_run(path)
    figures = run.figures
    keys = (
        "status",
        "seed",
        "epochs",
        "final_accuracy",
        "best_accuracy",
        "activation_error",
        "train_seconds",
    )
    row = {key: figures[key] for key in (*keys, "energy_kj")}
    row |= {
        "finished_utc": run.finished_utc,
        "results_file": str(path),
        "duration_seconds": round(figures["total_seconds"], 3),
    }
    row |= {key: figures[key] for key in ("error", "twin") if figures[key]}
    return {key: None if value != value else value for key, value in row.items()}


def plan_row(plan: Planned) -> dict[str, Any]:
    """What a summary line says about the request."""
    return {"id": plan.id, "config": plan.path, "overrides": list(plan.overrides)}


def finished_runs(plans: Iterable[Planned]) -> dict[str, dict[str, Any]]:
    """The summary lines, by run_id, of the finished runs in the folders that the plans write to.

    Runs with another model or dataset than the planned ones are left out. Of two results of one run
    the newer counts.
    """
    configs = [plan.config for plan in plans if plan.config is not None]
    folders = {Path(config.logging.output_dir) for config in configs}
    found = {}
    newest: dict[str, tuple] = {}  # by run_id, when its result was finished
    for path in (path for folder in folders for path in folder.glob(RESULTS)):
        try:
            config = Config.model_validate(json.loads(path.read_text(encoding="utf-8"))["config"])
            row = result_row(path)
            age = finished_at(row["finished_utc"], path.stem.removeprefix("final_results_"))
        except (OSError, ValueError, TypeError, KeyError):
            continue  # not a result of this version of the lab: it is run again
        alike = any(
            (config.model, config.dataset) == (other.model, other.dataset) for other in configs
        )
        if alike and row["status"] in FINISHED and age >= newest.get(run_id(config), age):
            newest[run_id(config)] = age
            found[run_id(config)] = {"id": run_id(config)} | row | {"exit_code": 0}
    return found


def is_done(plan: Planned, row: Mapping[str, Any] | None) -> bool:
    """Whether the `row` of a finished run has all that is asked for, the time-matched baseline
    included.
    """
    if row is None or not plan.twin:
        return row is not None
    return "twin" in row and Path(row["results_file"]).with_name(row["twin"]).exists()


def read_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The lines of a summary by run_id. A sweep that was killed may have left the last one torn: it
    is skipped.
    """
    rows = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        with contextlib.suppress(ValueError, TypeError, KeyError):
            row = json.loads(line)
            rows[row["id"]] = row
    return rows


def newest_summary(folder: Path) -> Path | None:
    """The summary that a sweep wrote to last, by the time of its lines; one without such a time
    goes by its name.
    """

    def age(path: Path) -> tuple:
        times = [
            row["finished_utc"]
            for row in read_rows(path).values()
            if isinstance(row.get("finished_utc"), str)
        ]
        return finished_at(max(times, default=None), path.stem.removeprefix("sweep_summary_"))

    return max(folder.glob("sweep_summary_*.jsonl"), default=None, key=age)


def as_written(folder: Path, finished: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The lines of `finished` as the newest summary has them, for those hold the time of the whole
    process.

    A line that a killed sweep could not write is taken as it is in `finished`, made from the
    results file.
    """
    summary = newest_summary(folder)
    old = read_rows(summary) if summary is not None else {}

    def same(row: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
        return all(row.get(key) == other[key] for key in ("exit_code", "results_file"))

    return {key: old[key] if same(old.get(key, {}), row) else row for key, row in finished.items()}


def open_summary(
    folder: Path, resume: bool, rows: Sequence[Mapping[str, Any]], planned: set[str]
) -> Path:
    """Start the summary with `rows`: a new one or, with `resume`, the folder's newest. Returns its
    path.

    What the newest held of runs that are not `planned` now stays in it.
    """
    path = newest_summary(folder) if resume else None
    others = (
        [row for key, row in read_rows(path).items() if key not in planned]
        if path is not None
        else []
    )
    # local time, which comes twice when the clock is set back
    stamp = f"{datetime.now():%Y%m%d_%H%M%S}"
    names = (
        f"sweep_summary_{stamp}{tail}.jsonl" for tail in chain([""], (f"_{n}" for n in count(1)))
    )
    path = path or next(folder / name for name in names if not (folder / name).exists())
    text = "".join(json.dumps(row) + "\n" for row in [*others, *rows])
    replace_text(path, text)
    return path


def time_left(
    rows: Iterable[Mapping[str, Any]], plans: Iterable[Planned], slots: int
) -> timedelta | None:
    """How long `plans` take in so many slots, at the seconds an epoch of the finished `rows`; None
    without such.
    """
    timed = [row for row in rows if row.get("status") in FINISHED and row.get("epochs")]
    if not timed:
        return None
    pace = sum(row["duration_seconds"] for row in timed) / sum(row["epochs"] for row in timed)
    return timedelta(
        seconds=round(
            pace * sum(plan.config.training.epochs for plan in plans if plan.config) / slots
        )
    )


def row_line(row: Mapping[str, Any], name: str) -> str:
    """A summary line for the terminal."""
    accuracy = row.get("final_accuracy")
    figures = row.get("error") or ("" if accuracy is None else f"final {accuracy:.2f} %")
    return f"{row['status']:<12} {row['duration_seconds']:8.1f} s  {name}  {figures}"


def show_plan(
    plans: Sequence[Planned], done: Sequence[str], rows: Sequence[Mapping[str, Any]], slots: int
) -> int:
    """Print what is to happen to each run, and a time for all of them from the finished `rows`.
    Returns exit code 0.
    """
    for plan in plans:
        state = "finished" if plan.id in done else "wrong" if plan.error else "to run"
        print(f"{plan.id}  {state:<8}  {plan.name}" + (f"  {plan.error}" if plan.error else ""))
    ahead = [plan for plan in plans if plan.id not in done and plan.error is None]
    left = time_left(rows, ahead, slots)
    estimate = (
        "no finished run to estimate their time from"
        if left is None
        else f"about {left}, as the finished ones"
    )
    print(f"{len(ahead)} runs, {slots} at a time: {estimate}")
    return 0


def arguments_for(plan: Planned) -> list[str]:
    """The command line of run_experiment.py for this run."""
    flags = ["--dense-twin"] * plan.twin + ["--resume", "auto"] * plan.resume
    code = hand_on(plan.config.imports if plan.config else ())
    return [*option("--config", str(plan.copy or plan.path)), *code, *flags, *plan.overrides]


def end_with_parent() -> None:
    """Called in a run's process. On Linux the run gets SIGTERM, and saves, where the sweep itself
    is killed.
    """
    if LIBC is not None:
        LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


class Running:
    """A run's process, in a session of its own: a Ctrl-C in the terminal reaches it once, from the
    sweep.
    """

    def __init__(self, plan: Planned, runner: Path, device: str | None, log: Path, beside: int = 0):
        """`runner`: the script. `device`: what CUDA_VISIBLE_DEVICES is set to; None leaves it as it
        is.

        `beside`: how many other runs share the machine. They then share its cores too, unless
        OMP_NUM_THREADS is set: several runs with a thread for every core each slow one another
        down.
        """
        self.plan = plan
        self.device = device
        self.log = log
        self.started = time.monotonic()
        threads = (
            {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // (1 + beside)))}
            if beside
            else {}
        )
        devices = {} if device is None else {"CUDA_VISIBLE_DEVICES": device}
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(runner), *arguments_for(plan)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=threads | os.environ | {"PYTHONIOENCODING": "utf-8"} | devices,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )

    def kill(self) -> None:
        """The run and its loader workers."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def row(self) -> dict[str, Any]:
        """The summary line, once the process has ended."""
        return ended_row(self.plan, self.process.returncode, self.log, self.started) | {
            "device": self.device
        }


def ended_row(plan: Planned, code: int, log: Path, started: float) -> dict[str, Any]:
    """The summary line of a run that ended with exit code `code`, from what it printed to `log`.

    `started`: time.monotonic() seconds. A negative `code` is the signal that ended the process.
    """
    lines = [
        line
        for line in log.read_text(encoding="utf-8", errors="replace").split("\n")
        if line.strip()
    ]
    files = [line.removeprefix("results: ") for line in lines if line.startswith("results: ")]
    row = plan_row(plan) | {"status": "failed", "results_file": None}
    if files:
        with contextlib.suppress(ValueError, OSError):
            row |= result_row(Path(files[0]))
    row |= {
        "finished_utc": utc_now(),
        "exit_code": code,
        "duration_seconds": round(time.monotonic() - started, 3),
        "log": str(log),
    }
    if code:
        row["status"] = "interrupted" if code in (130, 143) else "failed"
        row["error"] = one_line(lines[-1] if lines else "it printed nothing", ERROR_CHARACTERS)
    if code < 0:
        row["error"] = (
            f"ended by "
            f"{signal.Signals(-code).name}{OUT_OF_MEMORY if code == -signal.SIGKILL else ''}"
        )
    return row


class Halt:
    """What SIGINT or SIGTERM to the sweep does: no further run starts, and the running ones get the
    signal too.

    A second signal kills them.
    """

    def __init__(self) -> None:
        self.signals: list[int] = []
        self.passed_on = 0

    def watch_signals(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, _: self.signals.append(number))

    def pass_on(self, running: Iterable[Running]) -> None:
        """Pass on what came since the last call."""
        for number in self.signals[self.passed_on :]:
            for run in running:
                if self.passed_on == 0:
                    run.process.send_signal(number)
                else:
                    run.kill()
            self.passed_on += 1


def begin(plan: Planned, logs: Path) -> Path:
    """Announce a run. Returns the path of its log."""
    print_progress(f"{'':>9} start        {plan.name}")
    log = logs / f"{plan.id}.log"
    log.unlink(
        missing_ok=True
    )  # a run that has outlived a killed sweep may still write to the old one
    return log


def work_off(
    plans: Sequence[Planned],
    runner: Path,
    slots: Sequence[str | None],
    logs: Path,
    halt: Halt,
    record: Record,
) -> None:
    """Run `plans` in order, each in a process of `runner`, as many at a time as there are slots."""
    waiting = list(plans)
    free = list(slots)
    running = []
    while running or (waiting and not halt.signals):
        while waiting and free and not halt.signals:
            plan = waiting.pop(0)
            running.append(Running(plan, runner, free.pop(0), begin(plan, logs), len(slots) - 1))
        halt.pass_on(running)
        for run in [run for run in running if run.process.poll() is not None]:
            running.remove(run)
            free.append(run.device)
            record(run.row(), [*(other.plan for other in running), *waiting])
        time.sleep(POLL_SECONDS)


def work_off_here(
    plans: Sequence[Planned],
    run_main: Callable[[list[str]], int],
    logs: Path,
    halt: Halt,
    record: Record,
) -> None:
    """Run `plans` in order in this process, each by a call of `run_main`.

    Imported packages, decoded pictures on the device and compiled code stay from run to run.
    """
    import torch  # only here: a sweep of processes starts without it

    from lab.data.cache.loaders import shared_pictures

    with shared_pictures():
        for number, plan in enumerate(plans):
            if halt.signals:
                break
            log = begin(plan, logs)
            started = time.monotonic()
            code = run_here(plan, run_main, log)
            halt.watch_signals()  # the run has set handlers of its own
            if code in (130, 143):
                halt.signals.append(code - 128)
            record(ended_row(plan, code, log, started) | {"device": None}, plans[number + 1 :])
            gc.collect()  # reference cycles keep a run's tensors alive
            torch.cuda.empty_cache()


def run_here(plan: Planned, run_main: Callable[[list[str]], int], log: Path) -> int:
    """The exit code of a run in this process. What it prints goes to `log`, the traceback of a
    failure included.
    """
    with (
        log.open("w", encoding="utf-8", errors="replace") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        try:
            return run_cli(lambda: run_main(arguments_for(plan)))
        except Exception:
            traceback.print_exc()
            return 1
        finally:
            forget_unprinted(output)
