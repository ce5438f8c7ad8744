"""Runs, compared: settings with seeds as replicates, intervals, and the frontier of dense training.

A *setting* is a config without its seed, on one kind of machine. A *comparison group* is what runs
must share to be compared (`settings.comparison_group`); each group is a study of its own.
Accuracies are in percent, activation is a share of 0 to 1, time is seconds of training, energy is
in kJ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd

from lab.base.errors import RequestError, one_line
from lab.study.analysis.settings import comparison_group, group_titles, label_settings
from lab.study.analysis.statistics import (
    DenseTraining,
    Runs,
    at_equal_time,
    difference_half_width,
    half_width,
    time_to_match,
)
from lab.study.results import ACTIVATION_BAND, ResultsFile, is_whole, shown


@dataclass
class Study:
    """The runs of one comparison group, compared.

    `title`: its data and model. `runs`: a row a run, with its `setting` and `file`. `table`: a row
    a setting, the most accurate first. `frontiers`: by machine, the points [k, 2] of its dense
    frontier (seconds, percent).
    """

    title: str
    comparable: bool  # whether the files say that the runs share data and model
    runs: pd.DataFrame
    table: pd.DataFrame
    settings: dict[str, dict[str, str]]  # by setting: its config
    histories: dict[str, list[dict[str, np.ndarray]]]  # by setting: those of its runs
    environments: Counter  # how many runs each was found in
    frontiers: dict[str, np.ndarray]
    baseline: str | None
    left_out: dict[str, str]  # by path: why; of all groups together
    newest: dict[str, ResultsFile]  # by setting: its run that was finished last
    warnings: list[str] = field(default_factory=list)


def dense_frontier(cost: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """The points [k, 2] of (cost, accuracy), both rising, that no other point reaches at less cost.

    `cost`: seconds or joules of dense runs. Between the points the frontier is a straight line.
    """
    points = np.column_stack([cost, accuracy])[np.lexsort((-accuracy, cost))]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(points[:, 1])[:-1]])
    return points[points[:, 1] > before]


def dense_frontiers(table: pd.DataFrame, cost: str) -> dict[str, np.ndarray]:
    """By machine, the frontier against a column of the table of the dense settings whose schedule
    ended.

    Seconds and joules are comparable on the same GPU and with the same number of processes only.
    """
    rows = table[
        table["dense"] & table["decayed"] & table[cost].notna() & table["final_mean"].notna()
    ]
    return {
        machine: dense_frontier(own[cost].to_numpy(), own["final_mean"].to_numpy())
        for machine, own in rows.groupby("machine")
    }


def tabulate(frame: pd.DataFrame) -> pd.DataFrame:
    """A row a setting, from a row a run: means, standard deviations, 95 % intervals."""
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
        machine=("machine", "first"),
        dense=("mode", lambda modes: modes.iloc[0].startswith("dense")),
        decayed=("status", lambda status: bool((status == "completed").all())),
    )
    table.insert(
        table.columns.get_loc("final_sd") + 1,
        "final_ci95",
        half_width(table["final_sd"], table["n"]),
    )
    table[["dense", "decayed"]] = table[["dense", "decayed"]].astype(bool)
    return table.sort_values("final_mean", ascending=False, kind="stable")


def add_differences(table: pd.DataFrame, name: str, baseline: str | None) -> None:
    """Add each setting's difference to the baseline, in points, and its interval; NaN for the
    baseline itself.
    """
    table[[name, f"{name}_ci95"]] = np.nan
    if baseline is None:
        return
    base = table.loc[baseline]
    others = table.index != baseline
    half = difference_half_width(table["final_sd"], table["n"], base["final_sd"], base["n"])
    table[name] = np.where(others, table["final_mean"] - base["final_mean"], np.nan)
    table[f"{name}_ci95"] = np.where(others, half, np.nan)


def add_matches(table: pd.DataFrame, frame: pd.DataFrame) -> None:
    """Add what each setting is worth against dense training on the same machine: see
    `statistics`.
    """
    timed = frame[frame["final_accuracy"].notna() & frame["train_seconds"].notna()]
    runs = {
        name: Runs(name, rows["train_seconds"].to_numpy(), rows["final_accuracy"].to_numpy())
        for name, rows in timed.groupby("setting")
    }
    ended = table[table["dense"] & table["decayed"]]
    dense = {
        machine: DenseTraining([runs[name] for name in rows.index if name in runs])
        for machine, rows in ended.groupby("machine")
    }
    nothing = DenseTraining([])
    nobody = Runs("", np.array([]), np.array([]))
    pairs = [
        (runs.get(row.Index, nobody), dense.get(row.machine, nothing)) for row in table.itertuples()
    ]
    matches = [time_to_match(own, others) for own, others in pairs]
    table["time_to_match"] = [match.ratio for match in matches]
    for part in ("low", "high", "bound", "low_cut", "high_cut", "against"):
        table[f"time_to_match_{part}"] = [getattr(match, part) for match in matches]
    equal = [
        (np.nan, np.nan) if row.dense else at_equal_time(*pair)
        for row, pair in zip(table.itertuples(), pairs, strict=True)
    ]
    table["equal_time"], table["equal_time_ci95"] = zip(*equal, strict=True)


def best_dense(table: pd.DataFrame) -> str | None:
    """The most accurate dense setting whose schedule ended, of any length; without one, the most
    accurate dense one.
    """
    dense = table.index[table["dense"]]
    return next(iter([*table.index[table["dense"] & table["decayed"]], *dense]), None)


def compare(
    runs: Sequence[ResultsFile], left_out: Mapping[str, str], baseline: str | None = None
) -> list[Study]:
    """A study for each comparison group, in the order in which the groups are met; the one of runs
    whose files do not say what they share comes last.

    `baseline`: a setting's label; in a group without it, and by default, the most accurate dense
    one whose schedule ended. Raises RequestError where no group has such a setting.
    """
    groups: dict[tuple, list[ResultsFile]] = {}
    for run in runs:
        groups.setdefault(comparison_group(run.settings), []).append(run)
    groups = dict(sorted(groups.items(), key=lambda item: not item[0]))
    titles = group_titles({group: members[0] for group, members in groups.items()})
    studies = [
        compare_group(members, titles[group], left_out, baseline)
        for group, members in groups.items()
    ]
    labels = [label for study in studies for label in study.table.index]
    if baseline is not None and baseline not in labels:
        raise RequestError(
            f"--baseline: {one_line(baseline)}: none of the settings: {', '.join(labels[:20])}"
        )
    odd = [f"{path}: {reason}" for path, reason in left_out.items() if "non-finite" in reason]
    studies[0].warnings.extend(odd)
    return studies


def compare_group(
    runs: Sequence[ResultsFile], title: str, left_out: Mapping[str, str], baseline: str | None
) -> Study:
    """Group the runs by setting, and compare the settings with the baseline and the dense
    frontier.
    """
    first = {run.key: run for run in reversed(runs)}
    known = [
        run.settings | {"gpu": run.machine} if is_whole(run.settings) else {}
        for run in first.values()
    ]
    label_of = dict(
        zip(first, label_settings(known, [run.name for run in first.values()]), strict=True)
    )
    frame = pd.DataFrame(
        [{"setting": label_of[run.key], **run.figures, "file": shown(run.path)} for run in runs]
    )
    frame["seed"] = [
        "-" if run.figures["seed"] is None else str(run.figures["seed"]) for run in runs
    ]
    comparable = bool(comparison_group(runs[0].settings))
    frame["mode"] = [run.settings.get("ast.mode", "") if comparable else "" for run in runs]
    frame["machine"] = [run.machine for run in runs]
    table = tabulate(frame)
    add_matches(table, frame)
    dense = best_dense(table)
    baseline = baseline if baseline in table.index else dense
    add_differences(table, "difference", baseline)
    add_differences(table, "best_dense", dense)
    histories: dict[str, list] = {label: [] for label in table.index}
    for run in runs:
        histories[label_of[run.key]].append(run.history)
    environments = Counter(tuple(run.environment.items()) for run in runs)
    settings = {label: first[key].settings for key, label in label_of.items()}
    frontiers = dense_frontiers(table, "train_seconds_mean")
    newest = {label_of[run.key]: run for run in sorted(runs, key=lambda run: run.age)}
    study = Study(
        title,
        comparable,
        frame,
        table,
        settings,
        histories,
        environments,
        frontiers,
        baseline,
        dict(left_out),
        newest,
    )
    study.warnings.extend(find_warnings(study))
    return study


def find_warnings(study: Study) -> list[str]:
    """What a reader should know before believing the table, one line each."""
    found = []
    of_setting = dict(list(study.runs.groupby("setting")))
    for setting in study.table.index:
        rows = of_setting[setting]
        error = rows["activation_error"].max()
        if error > ACTIVATION_BAND:
            found.append(
                f"{setting}: activation up to {error:.3f} off its target in a sparse "
                f"epoch after the first"
            )
        if dense_best := int(rows["best_in_dense_phase"].sum()):
            found.append(
                f"{setting}: best epoch inside a dense phase in {dense_best} of {len(rows)} runs"
            )
        for status in ("time_capped", "early_stopped"):
            if count := int((rows["status"] == status).sum()):
                found.append(
                    f"{setting}: {status} in {count} of {len(rows)} runs: its schedule did not end"
                )
        if odd := int(rows["non_finite"].sum()):
            found.append(f"{setting}: {odd} NaN or infinite values in its files")
    machines = {
        (dict(each).get("gpu"), dict(each).get("platform")) for each in study.environments if each
    }
    if len(machines) > 1:
        found.append(
            f"the runs come from {len(machines)} machines: their seconds and joules are "
            f"not comparable"
        )
    return found
