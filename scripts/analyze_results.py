"""Compare finished runs: a table with seeds as replicates, plots and a report; or follow a run while it goes on.

    python scripts/analyze_results.py --results-dir results
    python scripts/analyze_results.py --results-dir results --plot --save-dir results/plots
    python scripts/analyze_results.py --results-dir monday tuesday --baseline dense --report results/report.html
    python scripts/analyze_results.py --follow results/run.jsonl

Reads every final_results_*.json of the folders, also those that hold only the documented keys. Runs that differ in
nothing but their seed are one setting. Accuracies are in percent, activation a share of 0 to 1, time in seconds of
training, energy in kJ: measured by NVML, or estimated as time x TDP. Exit codes: 0 done; 2 the request was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import pandas as pd
from scipy.special import stdtrit

REQUIRED = ("best_accuracy", "total_time_hours", "epochs_completed", "training_history")
ACTIVATION_BAND = 0.02  # further than this from its target, an epoch's activation is worth a warning
CONFIDENCE = 0.95


class RequestError(Exception):
    """What was asked for cannot be done: shown as one line, exit code 2. (train_ast's own would import torch.)"""


# --------------------------------------------------------------------------------------------- Reading


@dataclass(frozen=True)
class Run:
    """One results file.

    `settings`: its config as dotted key to text, without seed and logging; empty where the file holds none.
    `history`: by key, a float array [epochs], NaN for null. `figures`: its row of the table of runs.
    """

    path: Path
    settings: dict[str, str]
    history: dict[str, np.ndarray]
    figures: dict[str, Any]
    environment: dict[str, str]

    @cached_property
    def key(self) -> tuple:
        """Equal for runs that differ in seed and logging alone; a run without config stands alone."""
        return tuple(sorted(self.settings.items())) or (str(self.path),)

    @property
    def name(self) -> str:
        return self.path.stem.removeprefix("final_results_")

    @property
    def dataset(self) -> str | None:
        """What the accuracies were measured on; None where the file does not say."""
        kind = self.settings.get("dataset.type")
        source = {"hf": ("dataset.name", "dataset.subset"), "folder": ("dataset.val_dir",)}.get(kind or "", ())
        parts = [self.settings.get(key, "null") for key in source]
        return kind and ":".join([kind, *(part for part in parts if part != "null")])


def one_line(text: object, limit: int = 300) -> str:
    """Text out of a file, safe to print: one line, no lone surrogates or control characters, not endless."""
    line = " ".join(str(text).split()).encode("utf-8", "replace").decode()
    line = "".join(character if character.isprintable() else "?" for character in line)
    return line if len(line) <= limit else line[: limit - 1] + "…"


def spell(value: Any) -> str:
    """A config value as text, 10 and 10.0 alike."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, str) else json.dumps(value)


def number(value: Any) -> float:
    """A figure of a results file, NaN for null."""
    return float("nan") if value is None else float(value)


def read_run(path: Path) -> Run:
    """Read one results file. Raises ValueError, saying why, for a file that is none."""
    non_finite: list[str] = []  # NaN and Infinity, which the lab never writes and others do
    try:
        result = json.loads(
            path.read_text(encoding="utf-8"), parse_constant=lambda name: non_finite.append(name) or float(name)
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {one_line(error)}") from None
    if not isinstance(result, dict):
        raise ValueError("not a JSON object")
    if missing := [key for key in REQUIRED if key not in result]:
        raise ValueError(f"no {', '.join(missing)}")
    try:
        history = {key: np.array(values, dtype=float) for key, values in result["training_history"].items()}
        parts = {name: part.items() for name, part in (result.get("config") or {}).items() if name != "logging"}
        settings = {f"{name}.{key}": spell(value) for name, items in parts.items() for key, value in items}
        settings.pop("training.seed", None)
        if "twin" in result and settings.get("ast.mode") == "dense":
            settings["ast.mode"] = "dense twin"  # every seed has its own budget: no difference between settings
            settings.pop("training.max_minutes", None)
        environment = {key: spell(value) for key, value in (result.get("environment") or {}).items()}
        if any(values.ndim != 1 for values in history.values()):
            raise TypeError("a list of numbers was expected")
        row = figures(result, history, settings) | {"non_finite": len(non_finite)}
        return Run(path, settings, history, row, environment)
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError) as error:
        raise ValueError(f"not a results file of the lab: {one_line(error)}") from None


def sparse_epochs(history: Mapping[str, np.ndarray], settings: Mapping[str, str]) -> np.ndarray:
    """Which epochs trained on a selection, bool [epochs]: by the config, else where not all samples were active."""
    active = history.get("activation_rate", np.array([]))
    if "ast.mode" not in settings:
        return active < 1
    index, epochs = np.arange(len(active)), int(settings.get("training.epochs", len(active)))
    dense_end = int(settings.get("ast.anneal_epochs", 0))
    if settings.get("ast.rule") == "infobatch":
        dense_end = math.ceil(epochs / 8)
    first, end = int(settings.get("ast.warmup_epochs", 0)), epochs - dense_end
    return (index >= first) & (index < end) & (not settings["ast.mode"].startswith("dense"))


def activation_errors(history: Mapping[str, np.ndarray], settings: Mapping[str, str]) -> np.ndarray:
    """|activation - target| of each epoch [epochs]; NaN but in the sparse epochs after the first of an `ast` run whose
    rule has a target."""
    active = history.get("activation_rate", np.array([]))
    if settings.get("ast.mode") != "ast" or settings.get("ast.rule") == "infobatch":
        return np.full(len(active), np.nan)
    sparse, target = sparse_epochs(history, settings), float(settings.get("ast.target_activation", "nan"))
    return np.where(sparse & (np.cumsum(sparse) > 1), np.abs(active - target), np.nan)


def largest(values: np.ndarray) -> float:
    """The largest number among them, NaN where there is none."""
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")


def figures(
    result: Mapping[str, Any], history: Mapping[str, np.ndarray], settings: Mapping[str, str]
) -> dict[str, Any]:
    """The row of a run in the table of runs; NaN for what its file does not say."""

    def last(key: str) -> float:
        return float(values[-1]) if len(values := history.get(key, [])) else float("nan")

    sparse = sparse_epochs(history, settings)
    active = history.get("activation_rate", np.array([]))[sparse]
    best_epoch = int(np.nanargmax(accuracies)) if np.isfinite(accuracies := history.get("val_acc", [])).any() else None
    return {
        "seed": seed if isinstance(seed := result.get("seed"), int | None) else one_line(seed),
        "status": one_line(result.get("status") or "completed"),
        "error": one_line(result.get("error") or ""),
        "twin": one_line(result.get("twin") or ""),
        "epochs": int(result["epochs_completed"]),
        "final_accuracy": number(result.get("final_accuracy", last("val_acc"))),
        "best_accuracy": number(result["best_accuracy"]),
        "best_epoch": None if best_epoch is None else best_epoch + 1,
        "best_in_dense_phase": best_epoch is not None and bool(sparse.any()) and not sparse[best_epoch],
        "activation": float(np.mean(active)) if len(active) else float("nan"),
        "activation_error": largest(activation_errors(history, settings)),
        "train_seconds": number(result.get("train_seconds")),
        "total_seconds": 3600 * number(result["total_time_hours"]),
        "energy_kj": number(result.get("energy_kj")),
        "est_energy_kj": last("est_energy_kj"),
        "tflop": last("total_flops_g" if "total_flops_g" in history else "est_flops_g") / 1000,
    }


def load_runs(folders: Sequence[Path], dataset: str | None = None) -> tuple[list[Run], dict[str, str]]:
    """The runs to compare, and the files left out with the reason.

    Left out are files that cannot be read, runs that did not end by themselves, runs on another dataset than the
    one asked for, and the older of two runs of one config and seed. Raises RequestError where a folder is missing,
    nothing is left, or the runs are on several datasets and none was asked for.
    """
    runs: list[Run] = []
    left_out: dict[str, str] = {}
    for folder in dict.fromkeys(folders):
        if not folder.is_dir():
            raise RequestError(f"--results-dir: {folder}: no such folder")
        for path in sorted(folder.glob("final_results_*.json")):
            try:
                runs.append(read_run(path))
            except (OSError, ValueError) as error:
                left_out[str(path)] = one_line(error)
    if not runs and not left_out:
        raise RequestError(f"--results-dir: {', '.join(map(str, folders))}: no final_results_*.json in it")
    candidates = []
    for run in runs:
        status = run.figures["status"]
        if status in ("failed", "interrupted"):
            left_out[str(run.path)] = ": ".join(filter(None, [status, run.figures["error"]]))
        elif dataset is not None and run.dataset != dataset:
            left_out[str(run.path)] = f"other dataset: {one_line(run.dataset or 'it does not say which')}"
        else:
            candidates.append(run)
    newest = {(run.key, str(run.figures["seed"])): run for run in sorted(candidates, key=lambda run: run.name)}
    kept = [run for run in candidates if newest[run.key, str(run.figures["seed"])] is run]
    for run in candidates:
        if (newer := newest[run.key, str(run.figures["seed"])]) is not run:
            left_out[str(run.path)] = f"config and seed of {newer.path}, which is newer"
    datasets = Counter(run.dataset for run in kept if run.dataset is not None)
    if len(datasets) > 1:
        found = ", ".join(f"{one_line(name)} ({count} runs)" for name, count in sorted(datasets.items()))
        raise RequestError(f"--results-dir: several datasets: {found}; choose one with --dataset")
    if not kept:
        (path, reason), more = next(iter(left_out.items())), len(left_out) - 1
        raise RequestError(f"nothing to compare: {path}: {reason}" + (f" (and {more} more files)" if more else ""))
    return kept, left_out


# -------------------------------------------------------------------------------------------- Settings


def label_settings(settings: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """A name for every setting: its mode, then as few of the differing keys as tell it from the others.

    `settings`: distinct configs as dotted key to text; the nameless, empty ones are called by their entry of `names`.
    """
    known = [each for each in settings if each]
    keys = list(dict.fromkeys(key for each in known for key in each))
    leaves = Counter(key.rpartition(".")[2] for key in keys)
    counted: dict[tuple[str, ...], Counter] = {}

    def alike(keys: Sequence[str]) -> Counter:
        if tuple(keys) not in counted:
            counted[tuple(keys)] = Counter(tuple(each.get(key) for key in keys) for each in known)
        return counted[tuple(keys)]

    def without(keys: list[str], key: str) -> list[str]:
        return [other for other in keys if other != key]

    telling = ["ast.mode", *(key for key in keys if key != "ast.mode" and len(alike([key])) > 1)]
    for key in telling[:0:-1]:  # the last in the config goes first, the mode stays
        if len(alike(without(telling, key))) == len(known):
            telling = without(telling, key)
    labels: list[str] = []
    for each, name in zip(settings, names, strict=True):
        own = list(telling)
        for key in own[:0:-1]:
            if each and alike(without(own, key))[tuple(each.get(k) for k in own if k != key)] == 1:
                own = without(own, key)
        words = [each.get("ast.mode", "?")] if each else [name]
        for key in own[1:] if each else []:
            leaf = key.rpartition(".")[2]
            words.append(f"{leaf if leaves[leaf] == 1 else key}={each.get(key, 'unset')}")
        label = one_line(" ".join(one_line(word, 60) for word in words), 160)
        labels.append(label if label not in labels else f"{label} ({name})")
    return labels


def dense_frontier(cost: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """What dense training reaches at a cost (seconds or joules): the points [k, 2] of (cost, accuracy), both rising,
    that no other point reaches at less cost. Between them the frontier is a straight line."""
    points = np.column_stack([cost, accuracy])[np.lexsort((-accuracy, cost))]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(points[:, 1])[:-1]])
    return points[points[:, 1] > before]


def dense_frontiers(table: pd.DataFrame, cost: str) -> dict[str, np.ndarray]:
    """The dense frontier of every arena against a column of the table, from the settings whose schedule ended."""
    rows = table[table["dense"] & table["decayed"] & table[cost].notna() & table["final_mean"].notna()]
    return {
        place: dense_frontier(own[cost].to_numpy(), own["final_mean"].to_numpy())
        for place, own in rows.groupby("arena")
    }


def time_to_match(accuracy: float, seconds: float, frontier: np.ndarray) -> tuple[float, str]:
    """`seconds` over what the dense frontier [k, 2] needs for the same accuracy, as (ratio, bound).

    Below 1 a setting saves time. The frontier is not extrapolated: bound is "<" where the accuracy is above all of
    it and the ratio less than the one given, ">" where it is below, else "".
    """
    if not len(frontier) or not np.isfinite([accuracy, seconds]).all():
        return float("nan"), ""
    bound = "<" if accuracy > frontier[-1, 1] else ">" if accuracy < frontier[0, 1] else ""
    return float(seconds / np.interp(accuracy, frontier[:, 1], frontier[:, 0])), bound


def half_width(sd: Any, n: Any) -> Any:
    """Half the 95 % confidence interval of a mean of `n` values with standard deviation `sd` (Student's t); NaN
    for n = 1."""
    return stdtrit(np.subtract(n, 1), (1 + CONFIDENCE) / 2) * sd / np.sqrt(n)


def difference_half_width(sd: Any, n: Any, base_sd: float, base_n: int) -> Any:
    """Half the 95 % confidence interval of the difference of two means, their variances not taken as equal (Welch
    1947); NaN where one of them has a single value."""
    own, base = np.square(sd) / n, base_sd**2 / base_n
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = (own + base) ** 2 / (own**2 / np.subtract(n, 1) + base**2 / np.subtract(base_n, 1))
        return np.where(own + base == 0, own + base, stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(own + base))


@dataclass
class Study:
    """Runs, compared.

    `runs`: a row a run, indexed by file, with its `setting`. `table`: a row a setting, the most accurate first.
    `frontiers`: by arena (what dense and sparse runs must share to be compared), points [k, 2] of (s, percent).
    """

    runs: pd.DataFrame
    table: pd.DataFrame
    settings: dict[str, dict[str, str]]  # by setting: its config
    histories: dict[str, list[dict[str, np.ndarray]]]  # by setting: those of its runs
    environments: Counter
    frontiers: dict[str, np.ndarray]
    baseline: str | None
    left_out: dict[str, str]
    warnings: list[str] = field(default_factory=list)


def arena(run: Run) -> str:
    """Model, dataset and processor: where training seconds and accuracies can be compared."""
    shared = [f"{key}={value}" for key, value in run.settings.items() if key.startswith(("model.", "dataset."))]
    shared = [pair for pair in shared if not pair.startswith("dataset.cache_dir=")]
    return "\n".join([*shared, f"gpu={run.environment.get('gpu', 'null')}"])


def compare(runs: Sequence[Run], left_out: Mapping[str, str], baseline: str | None = None) -> Study:
    """Group the runs by setting, and compare the settings with the baseline and the dense frontier.

    `baseline`: a setting's name; by default the most accurate dense one. Raises RequestError where it names none.
    """
    first = {run.key: run for run in reversed(runs)}
    names = label_settings([run.settings for run in first.values()], [run.name for run in first.values()])
    name_of = dict(zip(first, names, strict=True))
    frame = pd.DataFrame([{"setting": name_of[run.key], **run.figures, "file": str(run.path)} for run in runs])
    frame["seed"] = ["-" if run.figures["seed"] is None else str(run.figures["seed"]) for run in runs]
    frame["mode"] = [run.settings.get("ast.mode", "") for run in runs]
    frame["arena"] = [arena(run) for run in runs]
    table = tabulate(frame)
    frontiers = dense_frontiers(table, "train_seconds_mean")
    matches = [
        time_to_match(row.final_mean, row.train_seconds_mean, frontiers.get(row.arena, np.empty((0, 2))))
        for row in table.itertuples()
    ]
    table["time_to_match"], table["time_to_match_bound"] = zip(*matches, strict=True)
    if baseline is None:
        baseline = next(iter(table.index[table["dense"]]), None)
    elif baseline not in table.index:
        raise RequestError(f"--baseline: {one_line(baseline)}: none of the settings: {', '.join(table.index[:20])}")
    if baseline is not None:
        base = table.loc[baseline]
        table["difference"] = table["final_mean"] - base["final_mean"]
        half = difference_half_width(table["final_sd"], table["n"], base["final_sd"], base["n"])
        table["difference_ci95"] = np.where(table.index == baseline, np.nan, half)
        table.loc[baseline, "difference"] = np.nan
    histories: dict[str, list] = {name: [] for name in table.index}
    for run in runs:
        histories[name_of[run.key]].append(run.history)
    environments = Counter(tuple(run.environment.items()) for run in runs)
    settings = {name: first[key].settings for key, name in name_of.items()}
    study = Study(frame, table, settings, histories, environments, frontiers, baseline, dict(left_out))
    study.warnings.extend(find_warnings(study))
    return study


def tabulate(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a setting out of a row a run: means, standard deviations, 95 % intervals."""
    groups = frame.groupby("setting", sort=False)
    table = groups.agg(
        n=("final_accuracy", "count"),
        seeds=("seed", " ".join),
        final_mean=("final_accuracy", "mean"),
        final_sd=("final_accuracy", "std"),
        best_mean=("best_accuracy", "mean"),
        best_sd=("best_accuracy", "std"),
        epochs=("epochs", "mean"),
        activation=("activation", "mean"),
        activation_error=("activation_error", "max"),
        train_seconds_mean=("train_seconds", "mean"),
        train_seconds_sd=("train_seconds", "std"),
        energy_kj_mean=("energy_kj", "mean"),
        energy_kj_sd=("energy_kj", "std"),
        est_energy_kj_mean=("est_energy_kj", "mean"),
        est_energy_kj_sd=("est_energy_kj", "std"),
        tflop=("tflop", "mean"),
        arena=("arena", "first"),
        dense=("mode", lambda modes: modes.iloc[0].startswith("dense")),
        decayed=("status", lambda status: bool((status == "completed").all())),
    )
    table.insert(table.columns.get_loc("final_sd") + 1, "final_ci95", half_width(table["final_sd"], table["n"]))
    table[["dense", "decayed"]] = table[["dense", "decayed"]].astype(bool)
    return table.sort_values("final_mean", ascending=False, kind="stable")


def find_warnings(study: Study) -> list[str]:
    """What a reader should know before believing the table, one line each."""
    found = []
    of_setting = dict(list(study.runs.groupby("setting")))
    for setting in study.table.index:
        rows = of_setting[setting]
        error = rows["activation_error"].max()
        if error > ACTIVATION_BAND:
            found.append(f"{setting}: activation up to {error:.3f} off its target in a sparse epoch after the first")
        if dense_best := int(rows["best_in_dense_phase"].sum()):
            found.append(f"{setting}: best epoch inside a dense phase in {dense_best} of {len(rows)} runs")
        for status in ("time_capped", "early_stopped"):
            if count := int((rows["status"] == status).sum()):
                found.append(f"{setting}: {status} in {count} of {len(rows)} runs: its schedule did not end")
        if odd := int(rows["non_finite"].sum()):
            found.append(f"{setting}: {odd} NaN or infinite values in its files")
    for path, reason in study.left_out.items():
        if "non-finite" in reason:
            found.append(f"{path}: {reason}")
    machines = {(dict(each).get("gpu"), dict(each).get("platform")) for each in study.environments if each}
    if len(machines) > 1:
        found.append(f"the runs come from {len(machines)} machines: their seconds and joules are not comparable")
    return found


# --------------------------------------------------------------------------------------------- Showing


def shown(study: Study) -> pd.DataFrame:
    """The table as it is read, text throughout: the same figures in the terminal, in Markdown, LaTeX and the report."""
    table = study.table

    def show(column: str, spec: str) -> list[str]:
        return ["-" if pd.isna(value) else format(value, spec) for value in table[column]]

    columns = {
        "setting": list(table.index),
        "n": show("n", "d"),
        "final %": show("final_mean", ".2f"),
        "sd": show("final_sd", ".2f"),
        "± 95 %": show("final_ci95", ".2f"),
        "best %": show("best_mean", ".2f"),
    }
    if study.baseline is not None:
        columns |= {"difference": show("difference", "+.2f"), "± of it": show("difference_ci95", ".2f")}
    ratios = zip(show("time_to_match", ".2f"), table["time_to_match_bound"], strict=True)
    columns |= {
        "time to match": [f"{bound} {ratio}".strip() for ratio, bound in ratios],
        "train s": show("train_seconds_mean", ".1f"),
        "s sd": show("train_seconds_sd", ".1f"),
        "kJ": show("energy_kj_mean", ".4g"),
        "est kJ": show("est_energy_kj_mean", ".4g"),
        "TFLOP": show("tflop", ".4g"),
        "epochs": show("epochs", ".4g"),
        "activation": show("activation", ".3f"),
        "off target": show("activation_error", ".3f"),
    }
    return pd.DataFrame({name: texts for name, texts in columns.items() if set(texts) != {"-"}})


def verdict(study: Study) -> str:
    """Which setting wins, by how much, at what time to match, and whether the controller behaved."""
    figures = shown(study).set_index("setting").to_dict("index")
    table, best = study.table, study.table.index[0]
    spread = f", 95 % interval ± {figures[best]['± 95 %']}" if figures[best].get("± 95 %", "-") != "-" else ""
    text = f"{best} has the highest final accuracy: {figures[best]['final %']} % (n = {figures[best]['n']}{spread})."
    base = study.baseline
    others = sorted(table.index[1:], key=lambda name: table.loc[name, "dense"])  # the sparse ones first
    other = base if base != best else next(iter(others), None)
    if base is not None and other is not None:
        winner, loser = (best, base) if best != base else (other, base)
        row, half = figures[winner], table.loc[winner, "difference_ci95"]
        text += f" {winner} is {row['difference']} points from {loser}"
        if np.isnan(half):
            text += ", without an interval: that takes two seeds of each."
        elif abs(table.loc[winner, "difference"]) > half:
            text += f" ± {row['± of it']}: beyond chance."
        else:
            text += f" ± {row['± of it']}: not told apart by these seeds."
    sparse = table[~table["dense"] & table["time_to_match"].notna()].sort_values("time_to_match", kind="stable")
    reached = sparse.index[sparse["time_to_match_bound"] != ">"]
    if len(reached):
        text += f" Least time to match the dense frontier: {figures[reached[0]]['time to match']} ({reached[0]})."
    elif len(sparse):
        text += " No sparse setting is as accurate as the shortest dense one: its time to match is only bounded."
    elif not study.frontiers:
        text += " No finished dense run with its time is there: time to match is not known."
    errors = table["activation_error"].dropna()
    if len(errors):
        worst = errors.idxmax()
        text += f" Activation was at most {figures[worst]['off target']} off its target after the first sparse epoch"
        text += f" ({worst})." if errors.max() > ACTIVATION_BAND else "."
    return text


def frontier_lines(study: Study) -> list[str]:
    """The dense frontiers in words, one line each; where there are several, with what sets them apart."""
    lines = []
    for place, frontier in study.frontiers.items():
        others = [other.split("\n") for other in study.frontiers if other != place]
        own = [pair for pair in place.split("\n") if any(pair not in other for other in others)]
        points = ", ".join(f"{percent:.2f} % in {seconds:.1f} s" for seconds, percent in frontier)
        lines.append(one_line(f"dense frontier{f' ({chr(32).join(own)})' if own else ''}: {points}", 1000))
    return lines


def to_markdown(table: pd.DataFrame) -> str:
    rows = [list(table.columns), ["---", *["--:"] * (len(table.columns) - 1)], *table.to_numpy().tolist()]
    return "".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |\n" for row in rows)


def to_latex(table: pd.DataFrame) -> str:
    style = table.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis="columns")
    return style.to_latex(hrules=True, column_format="l" + "r" * (len(table.columns) - 1))


def write_files(files: Mapping[Path, bytes], flags: Mapping[Path, str]) -> None:
    """Write each file whole or not at all, and none where one of the folders cannot be written to.

    `flags`: by path, the option that asked for it. Raises RequestError naming both.
    """
    parts = {path: path.with_name(f".{path.name}.{os.getpid()}.part") for path in files}
    path = Path()
    try:
        for path, part in parts.items():
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir():
                raise IsADirectoryError(0, "it is a folder")
            part.write_bytes(files[path])
        for path, part in parts.items():
            os.replace(part, path)
    except OSError as error:
        for part in parts.values():
            part.unlink(missing_ok=True)
        raise RequestError(f"{flags[path]}: cannot write to {path}: {error.strerror}") from None


# ------------------------------------------------------------------------------------------- Following

FOLLOWED = {  # title: (history key, format); the width is the format's
    "epoch": ("epoch", "5.0f"),
    "loss": ("train_loss", "7.3f"),
    "train %": ("train_acc", "8.2f"),
    "val %": ("val_acc", "7.2f"),
    "active": ("activation_rate", "7.3f"),
    "threshold": ("threshold", "10.4f"),
    "loaded": ("samples_loaded", "10,.0f"),
    "trained": ("samples_trained", "10,.0f"),
    "train s": ("train_seconds", "10.1f"),
    "est kJ": ("est_energy_kj", "10.3f"),
    "kJ": ("energy_kj", "10.3f"),
    "ms/step": ("step_time_ms", "8.1f"),
}


def followed_line(row: Mapping[str, Any] | None = None) -> str:
    """A row of the live table, or its header."""
    cells = []
    for title, (key, spec) in FOLLOWED.items():
        value = title if row is None else "-" if row.get(key) is None else format(float(row[key]), spec)
        cells.append(value.rjust(len(format(0.0, spec))))
    return " ".join(cells)


def whole_lines(path: Path, poll_seconds: float) -> Iterator[tuple[int, str]]:
    """The lines of a growing file as they are finished, each with its number; from the start again when it shrinks.

    Waits for a file that is not there yet, as before a run's first epoch. Raises RequestError where it cannot be read.
    """
    position, count = 0, 0
    while True:
        try:
            if path.stat().st_size < position:
                position, count = 0, 0
            with path.open("rb") as file:
                file.seek(position)
                while (line := file.readline()).endswith(b"\n"):
                    position, count = file.tell(), count + 1
                    yield count, line.decode(errors="replace")
        except FileNotFoundError:
            if not path.parent.is_dir():
                raise RequestError(f"--follow: {path.parent}: no such folder") from None
        except OSError as error:
            raise RequestError(f"--follow: {path}: {error.strerror}") from None
        time.sleep(poll_seconds)


def follow(path: Path, poll_seconds: float = 0.5) -> NoReturn:
    """Print the epochs of `logging.jsonl_path` as they are logged, until interrupted.

    Raises RequestError for a line that is no epoch.
    """
    print(followed_line(), flush=True)
    before = 0.0
    for count, line in whole_lines(path, poll_seconds):
        try:
            row = json.loads(line)
            text, epoch = followed_line(row), float(row.get("epoch") or 0)
        except (ValueError, TypeError, AttributeError):
            raise RequestError(f"--follow: {path}: line {count}: not an epoch: {one_line(line, 60)}") from None
        if epoch <= before:
            print(f"\n{followed_line()}")  # another run goes on in the same file
        before = epoch
        print(text, flush=True)


# ------------------------------------------------------------------------------------------------ Main


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results-dir", default=[Path("results")], type=Path, nargs="+", metavar="DIR",
                        help="folders of final_results_*.json, default: results")  # fmt: skip
    parser.add_argument("--dataset", metavar="NAME", help="leave out runs on any other")
    parser.add_argument("--baseline", metavar="SETTING", help="compare with it; default: the most accurate dense one")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="write the table with all digits and columns")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table as Markdown")
    parser.add_argument("--latex", type=Path, metavar="FILE", help="write the table as LaTeX (booktabs)")
    parser.add_argument("--plot", action="store_true", help="write each figure as PNG and SVG")
    parser.add_argument("--save-dir", type=Path, metavar="DIR", help="for the figures (default: RESULTS_DIR/plots)")
    parser.add_argument("--report", type=Path, metavar="FILE", help="write one self-contained HTML page")
    parser.add_argument("--follow", type=Path, metavar="FILE", help="show a run's logging.jsonl_path as it grows")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.follow is not None:
        follow(args.follow)
    study = compare(*load_runs(args.results_dir, args.dataset), args.baseline)
    table = shown(study)
    baseline = [f"difference: in points, against {study.baseline}"] if study.baseline is not None else []
    print(table.to_string(index=False), *baseline, *frontier_lines(study), verdict(study), sep="\n")
    print("".join(f"warning: {text}\n" for text in study.warnings), end="")
    print("".join(f"left out: {path}: {reason}\n" for path, reason in study.left_out.items()), end="")

    files: dict[Path, bytes] = {}
    flags: dict[Path, str] = {}

    def add(flag: str, path: Path, content: str | bytes) -> None:
        files[path] = content if isinstance(content, bytes) else content.encode("utf-8", "replace")
        flags[path] = flag

    if args.csv is not None:
        add("--csv", args.csv, study.table.drop(columns="arena").to_csv())
    if args.markdown is not None:
        add("--markdown", args.markdown, to_markdown(table))
    if args.latex is not None:
        add("--latex", args.latex, to_latex(table))
    if args.plot:
        from report import draw_all

        for name, content in draw_all(study).items():
            add("--save-dir", (args.save_dir or args.results_dir[0] / "plots") / name, content)
    if args.report is not None:
        from report import render

        add("--report", args.report, render(study, table, verdict(study), frontier_lines(study)))
    write_files(files, flags)
    for path, flag in flags.items():
        print(f"{flag.removeprefix('--').replace('save-dir', 'plot')}: {path}")
    return 0


def cli(argv: Sequence[str] | None = None) -> int:
    """main(), with a wrong request as one line on stderr and exit code 2. A reader who has seen enough (`| head`) is
    no error."""
    try:
        code = main(argv)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter would complain at its exit
        return 0
    except RequestError as error:
        print(f"error: {one_line(error, 1000)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(cli())
