"""Runs, compared: settings with seeds as replicates, intervals, and the frontier of dense training.

A *setting* is a config without its seed. A *comparison group* is what dense and sparse runs must share to be compared.
Accuracies are in percent, activation is a share of 0 to 1, time is seconds of training, energy is in kJ.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy.special import stdtrit

from lab.errors import RequestError, one_line
from lab.results import ACTIVATION_BAND, ResultsFile

CONFIDENCE = 0.95


@dataclass
class Study:
    """Runs, compared.

    `runs`: a row a run, with its `setting` and `file`. `table`: a row a setting, the most accurate first.
    `frontiers`: by comparison group, the points [k, 2] of its dense frontier (seconds, percent).
    """

    runs: pd.DataFrame
    table: pd.DataFrame
    settings: dict[str, dict[str, str]]  # by setting: its config
    histories: dict[str, list[dict[str, np.ndarray]]]  # by setting: those of its runs
    environments: Counter  # how many runs each was found in
    frontiers: dict[str, np.ndarray]
    baseline: str | None
    left_out: dict[str, str]  # by path: why
    warnings: list[str] = field(default_factory=list)


def label_settings(settings: Sequence[Mapping[str, str]], names: Sequence[str]) -> list[str]:
    """A label for every setting: its mode, then as few of the differing keys as tell it from the others.

    `settings`: distinct configs as dotted key to text. An empty one is labelled with its entry of `names`.
    """
    known = [each for each in settings if each]
    keys = list(dict.fromkeys(key for each in known for key in each))
    leaves = Counter(key.rpartition(".")[2] for key in keys)
    counted: dict[tuple[str, ...], Counter] = {}

    def alike(keys: Sequence[str]) -> Counter:
        """How many settings have each combination of values of the keys."""
        if tuple(keys) not in counted:
            counted[tuple(keys)] = Counter(tuple(each.get(key) for key in keys) for each in known)
        return counted[tuple(keys)]

    def without(keys: list[str], key: str) -> list[str]:
        return [other for other in keys if other != key]

    telling = ["ast.mode", *(key for key in keys if key != "ast.mode" and len(alike([key])) > 1)]
    for key in telling[:0:-1]:  # the config's last keys are the first to go; the mode stays
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


def comparison_group(run: ResultsFile) -> str:
    """Model, dataset and GPU, a line each: runs that share them have comparable accuracies and training seconds."""
    shared = [f"{key}={value}" for key, value in run.settings.items() if key.startswith(("model.", "dataset."))]
    shared = [pair for pair in shared if not pair.startswith("dataset.cache_dir=")]
    return "\n".join([*shared, f"gpu={run.environment.get('gpu', 'null')}"])


def dense_frontier(cost: np.ndarray, accuracy: np.ndarray) -> np.ndarray:
    """The points [k, 2] of (cost, accuracy), both rising, that no other point reaches at less cost.

    `cost`: seconds or joules of dense runs. Between the points the frontier is a straight line.
    """
    points = np.column_stack([cost, accuracy])[np.lexsort((-accuracy, cost))]
    before = np.concatenate([[-np.inf], np.maximum.accumulate(points[:, 1])[:-1]])
    return points[points[:, 1] > before]


def dense_frontiers(table: pd.DataFrame, cost: str) -> dict[str, np.ndarray]:
    """By comparison group, the frontier against a column of the table of the dense settings whose schedule ended."""
    rows = table[table["dense"] & table["decayed"] & table[cost].notna() & table["final_mean"].notna()]
    return {
        group: dense_frontier(own[cost].to_numpy(), own["final_mean"].to_numpy())
        for group, own in rows.groupby("group")
    }


def time_to_match(accuracy: float, seconds: float, frontier: np.ndarray) -> tuple[float, str]:
    """`seconds` over what the dense frontier [k, 2] needs for the same accuracy, as (ratio, bound).

    Below 1 a setting saves time. The frontier is not extrapolated. Beyond its ends the ratio is taken to the nearest
    end and is a bound: "<" for an accuracy above the frontier, ">" for one below it. Otherwise bound is "".
    """
    if not len(frontier) or not np.isfinite([accuracy, seconds]).all():
        return float("nan"), ""
    bound = "<" if accuracy > frontier[-1, 1] else ">" if accuracy < frontier[0, 1] else ""
    return float(seconds / np.interp(accuracy, frontier[:, 1], frontier[:, 0])), bound


def half_width(sd: Any, n: Any) -> Any:
    """Half the 95 % confidence interval of a mean (Student's t); NaN for n = 1.

    `sd`: standard deviation of the `n` values.
    """
    return stdtrit(np.subtract(n, 1), (1 + CONFIDENCE) / 2) * sd / np.sqrt(n)


def difference_half_width(sd: Any, n: Any, base_sd: float, base_n: int) -> Any:
    """Half the 95 % confidence interval of the difference of two means; NaN where one has a single value.

    The variances need not be equal (Welch 1947).
    """
    own, base = np.square(sd) / n, base_sd**2 / base_n
    with np.errstate(divide="ignore", invalid="ignore"):
        freedom = (own + base) ** 2 / (own**2 / np.subtract(n, 1) + base**2 / np.subtract(base_n, 1))
        return np.where(own + base == 0, own + base, stdtrit(freedom, (1 + CONFIDENCE) / 2) * np.sqrt(own + base))


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
        group=("group", "first"),
        dense=("mode", lambda modes: modes.iloc[0].startswith("dense")),
        decayed=("status", lambda status: bool((status == "completed").all())),
    )
    table.insert(table.columns.get_loc("final_sd") + 1, "final_ci95", half_width(table["final_sd"], table["n"]))
    table[["dense", "decayed"]] = table[["dense", "decayed"]].astype(bool)
    return table.sort_values("final_mean", ascending=False, kind="stable")


def add_differences(table: pd.DataFrame, baseline: str) -> None:
    """Add each setting's difference to the baseline, in points, and its interval; NaN for the baseline itself."""
    base = table.loc[baseline]
    table["difference"] = table["final_mean"] - base["final_mean"]
    half = difference_half_width(table["final_sd"], table["n"], base["final_sd"], base["n"])
    table["difference_ci95"] = np.where(table.index == baseline, np.nan, half)
    table.loc[baseline, "difference"] = np.nan


def compare(runs: Sequence[ResultsFile], left_out: Mapping[str, str], baseline: str | None = None) -> Study:
    """Group the runs by setting, and compare the settings with the baseline and the dense frontier.

    `baseline`: a setting's label; by default the most accurate dense one. Raises RequestError where there is no such
    setting.
    """
    first = {run.key: run for run in reversed(runs)}
    labels = label_settings([run.settings for run in first.values()], [run.name for run in first.values()])
    label_of = dict(zip(first, labels, strict=True))
    frame = pd.DataFrame([{"setting": label_of[run.key], **run.figures, "file": str(run.path)} for run in runs])
    frame["seed"] = ["-" if run.figures["seed"] is None else str(run.figures["seed"]) for run in runs]
    frame["mode"] = [run.settings.get("ast.mode", "") for run in runs]
    frame["group"] = [comparison_group(run) for run in runs]
    table = tabulate(frame)
    frontiers = dense_frontiers(table, "train_seconds_mean")
    matches = [
        time_to_match(row.final_mean, row.train_seconds_mean, frontiers.get(row.group, np.empty((0, 2))))
        for row in table.itertuples()
    ]
    table["time_to_match"], table["time_to_match_bound"] = zip(*matches, strict=True)
    if baseline is None:
        baseline = next(iter(table.index[table["dense"]]), None)
    elif baseline not in table.index:
        raise RequestError(f"--baseline: {one_line(baseline)}: none of the settings: {', '.join(table.index[:20])}")
    if baseline is not None:
        add_differences(table, baseline)
    histories: dict[str, list] = {label: [] for label in table.index}
    for run in runs:
        histories[label_of[run.key]].append(run.history)
    environments = Counter(tuple(run.environment.items()) for run in runs)
    settings = {label: first[key].settings for key, label in label_of.items()}
    study = Study(frame, table, settings, histories, environments, frontiers, baseline, dict(left_out))
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
