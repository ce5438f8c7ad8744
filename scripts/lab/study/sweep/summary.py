"""The lines of a sweep: one for each run that ended, and which results count as finished."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from itertools import chain, count
from pathlib import Path
from typing import Any

from lab.base.console import Columns, table_line
from lab.base.files import replace_text
from lab.config.loading import Config, run_id
from lab.study.results import RESULTS, finished_at, read_run
from lab.study.sweep.plans import Planned

FINISHED = ("completed", "early_stopped", "time_capped")  # a run with one of these is not repeated


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

    Lines of the newest on runs that are not `planned` now stay in it.
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


RESULT_COLUMNS: Columns = {
    "final %": ("final_accuracy", "8.2f"),
    "best %": ("best_accuracy", "8.2f"),
    "train s": ("train_seconds", "9.1f"),
    "kJ": ("energy_kj", "8.2f"),
}


def results_table(rows: Sequence[Mapping[str, Any]], names: Mapping[str, str]) -> str:
    """A line for each run that ended, in the order of the `rows`. names: by id."""
    lines = [f"{table_line(RESULT_COLUMNS)}  {'status':<12} run"]
    for row in rows:
        name = names[row["id"]]
        lines.append(f"{table_line(RESULT_COLUMNS, row)}  {row['status']:<12} {name}")
    return "\n".join(lines)


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
