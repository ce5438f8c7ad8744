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
from lab.study.analysis.settings import (
    comparison_group,
    dense_step,
    group_titles,
    label_settings,
)
from lab.study.analysis.statistics import (
    DenseTraining,
    Match,
    Measure,
    Runs,
    at_equal_time,
    difference_half_width,
    half_width,
    time_to_match,
    wide_gap,
)
from lab.study.results import ACTIVATION_BAND, ResultsFile, apart, is_whole, shown

# columns with this before their names hold intervals that allow for picking the best setting
OF_BEST = "best_of_"


@dataclass
class Study:
    """The runs of one comparison group, compared.

    `title`: its data and model. `runs`: a row a run, with its `setting` and `file`. `table`: a row
    a setting, the most accurate first. `frontiers`: by machine, its dense frontier over seconds.
    `rivals`: how many sparse settings have an accuracy, so that the best is picked of so many.
    """

    title: str
    comparable: bool  # whether the files say that the runs share data and model
    runs: pd.DataFrame
    table: pd.DataFrame
    settings: dict[str, dict[str, str]]  # by setting: its config
    histories: dict[str, list[dict[str, np.ndarray]]]  # by setting: those of its runs
    environments: Counter  # how many runs each was found in
    frontiers: dict[str, Measure]
    rivals: int
    baseline: str | None
    left_out: dict[str, str]  # by path: why; of all groups together
    newest: dict[str, ResultsFile]  # by setting: its run that was finished last
    warnings: list[str] = field(default_factory=list)


def runs_by_setting(frame: pd.DataFrame, cost: str) -> dict[str, Runs]:
    """By setting, its runs that have a final accuracy and a `cost`: seconds or joules."""
    known = frame[frame["final_accuracy"].notna() & (frame[cost] > 0)]
    return {
        name: Runs(name, rows[cost].to_numpy(), rows["final_accuracy"].to_numpy())
        for name, rows in known.groupby("setting")
    }


def dense_trainings(table: pd.DataFrame, runs: Mapping[str, Runs]) -> dict[str, DenseTraining]:
    """By machine, its dense settings whose schedule ended, as far as they have runs.

    Seconds and joules are comparable on the same GPU and with the same number of processes only.
    """
    ended = table[table["dense"] & table["decayed"] & table.index.isin(list(runs))]
    return {
        machine: DenseTraining([runs[name] for name in rows.index])
        for machine, rows in ended.groupby("machine")
    }


def dense_frontiers(table: pd.DataFrame, frame: pd.DataFrame, cost: str) -> dict[str, Measure]:
    """By machine, the frontier of its dense settings, those of one seed too, over a column of the
    frame of runs.
    """
    trainings = dense_trainings(table, runs_by_setting(frame, cost))
    return {machine: dense.every for machine, dense in trainings.items()}


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


def add_differences(table: pd.DataFrame, name: str, baseline: str | None, rivals: int) -> None:
    """Add each setting's difference to the baseline, in points, and its interval; NaN for the
    baseline itself. `rivals`: see `Study`; the columns of OF_BEST allow for it.
    """
    table[[name, f"{name}_ci95", f"{OF_BEST}{name}_ci95"]] = np.nan
    if baseline is None:
        return
    base = table.loc[baseline]
    others = table.index != baseline
    table[name] = np.where(others, table["final_mean"] - base["final_mean"], np.nan)
    for prefix, count in (("", 1), (OF_BEST, rivals)):
        half = difference_half_width(
            table["final_sd"], table["n"], base["final_sd"], base["n"], count
        )
        table[f"{prefix}{name}_ci95"] = np.where(others, half, np.nan)


def unlike_steps(
    name: str,
    dense: DenseTraining,
    settings: Mapping[str, Mapping[str, str]],
    steps: Mapping[str, Sequence[float]],
) -> str:
    """The fastest and the slowest dense step, in ms, of a setting's runs and of the dense runs that
    it is compared with, where they are too far apart; otherwise "".

    Only dense runs whose steps ought to cost the same are looked at.
    """
    own = dense_step(settings[name])
    alike = [each.name for each in dense.settings if dense_step(settings[each.name]) == own]
    found = apart([step for each in {name, *alike} for step in steps[each]])
    return "" if found is None else f"{found[0]:.4g} and {found[1]:.4g} ms"


def add_matches(
    table: pd.DataFrame,
    frame: pd.DataFrame,
    settings: Mapping[str, Mapping[str, str]],
    rivals: int,
) -> None:
    """Add what each sparse setting is worth against dense training on the same machine: see
    `statistics`. `rivals`: see `Study`; the columns of OF_BEST allow for it.

    `void`: the two figures of `unlike_steps`; then nothing is compared by time.
    """
    runs = runs_by_setting(frame, "train_seconds")
    trainings = dense_trainings(table, runs)
    steps = {name: list(rows) for name, rows in frame.groupby("setting")["dense_step_ms"]}
    rows = table[~table["dense"] & table.index.isin(list(runs))]
    pairs = {
        row.Index: (runs[row.Index], trainings[row.machine])
        for row in rows.itertuples()
        if row.machine in trainings
    }
    void = {name: unlike_steps(name, dense, settings, steps) for name, (_, dense) in pairs.items()}
    table["void"] = [void.get(name, "") for name in table.index]
    for prefix, count in (("", 1), (OF_BEST, rivals)):
        matches = []
        equal = []
        for name in table.index:
            known = name in pairs and not void[name]
            matches.append(time_to_match(*pairs[name], count) if known else Match())
            equal.append(at_equal_time(*pairs[name], count) if known else (np.nan, np.nan))
        for part in ("low", "high", "bound", "low_cut", "high_cut", "dense_seconds"):
            table[f"{prefix}time_to_match_{part}"] = [getattr(each, part) for each in matches]
        table[f"{prefix}time_to_match"] = [each.ratio for each in matches]
        table[f"{prefix}equal_time"], table[f"{prefix}equal_time_ci95"] = zip(*equal, strict=True)


def advice(study: Study) -> list[str]:
    """Which dense lengths to add: where a setting's time, or the dense time that it matches, lies
    in a `wide_gap`. One line a gap.
    """
    runs = runs_by_setting(study.runs, "train_seconds")
    trainings = dense_trainings(study.table, runs)
    found: dict[tuple[str, str], str] = {}
    for row in study.table.itertuples():
        if row.dense or row.machine not in trainings or row.void:
            continue
        for seconds in (row.train_seconds_mean, row.time_to_match_dense_seconds):
            gap = wide_gap(seconds, trainings[row.machine])
            if gap is not None:
                found.setdefault((gap[0].name, gap[1].name), gap_line(study, row.Index, *gap))
    return list(found.values())


def gap_line(study: Study, name: str, left: Runs, right: Runs) -> str:
    seconds = np.sqrt(left.means[0] * right.means[0])
    epochs = np.sqrt(np.prod(study.table.loc[[left.name, right.name], "epochs"]))
    return (
        f"{name} lies between {left.name} and {right.name}, which are a factor "
        f"{right.means[0] / left.means[0]:.1f} apart: too few dense lengths to know the frontier "
        f"there; add dense runs of about {epochs:.0f} epochs ({seconds:.3g} s)"
    )


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
    frame["finished"] = [(run.finished_utc or "")[:16].replace("T", " ") or None for run in runs]
    comparable = bool(comparison_group(runs[0].settings))
    frame["mode"] = [run.settings.get("ast.mode", "") if comparable else "" for run in runs]
    frame["machine"] = [run.machine for run in runs]
    table = tabulate(frame)
    settings = {label: first[key].settings for key, label in label_of.items()}
    rivals = int((~table["dense"] & (table["n"] > 0)).sum())
    add_matches(table, frame, settings, rivals)
    dense = best_dense(table)
    baseline = baseline if baseline in table.index else dense
    add_differences(table, "difference", baseline, rivals)
    add_differences(table, "best_dense", dense, rivals)
    histories: dict[str, list] = {label: [] for label in table.index}
    for run in runs:
        histories[label_of[run.key]].append(run.history)
    environments = Counter(tuple(run.environment.items()) for run in runs)
    frontiers = dense_frontiers(table, frame, "train_seconds")
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
        rivals,
        baseline,
        dict(left_out),
        newest,
    )
    study.warnings.extend(find_warnings(study))
    return study


def find_warnings(study: Study) -> list[str]:
    """What a reader should know before believing the table, one line each."""
    found = advice(study)
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
                f"{setting}: the best epoch lies in a dense phase in {dense_best} of {len(rows)} "
                f"runs"
            )
        for status in ("time_capped", "early_stopped"):
            if count := int((rows["status"] == status).sum()):
                found.append(
                    f"{setting}: {status} in {count} of {len(rows)} runs: its schedule did not end"
                )
        if scatter := apart(rows["train_seconds"] / rows["epochs"]):
            found.append(
                f"{setting}: an epoch took {scatter[0]:.3g} s in one run and {scatter[1]:.3g} s in "
                "another: the machine did other work, so its times say little"
            )
        if void := study.table.loc[setting, "void"]:
            found.append(
                f"{setting}: its comparison by time is void: dense steps of the compared runs took "
                f"{void}"
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
