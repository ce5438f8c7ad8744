"""Reading results files, of this lab or with the documented keys alone, and choosing those that can
be compared.
"""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lab.base.errors import RequestError, one_line
from lab.base.reading import spell
from lab.config.loading import config_keys
from lab.config.sections import auto_augment
from lab.config.together import sparse_span

RESULTS = "final_results_*.json"  # the files of a results folder
REQUIRED = ("best_accuracy", "total_time_hours", "epochs_completed", "training_history")
ACTIVATION_BAND = 0.02  # an epoch's activation further than this from its target is worth a warning
# a share: runs whose dense steps are further apart had machines of another speed
SAME_STEP = 0.1
STATUSES = ("completed", "early_stopped", "time_capped", "interrupted", "failed")
LARGEST = 1e18  # a figure beyond it is a damaged one
NAMED = (
    "model.name",
    "dataset.type",
    "ast.mode",
    "training.epochs",
)  # a config without one of them is not this lab's


class ClassRow(NamedTuple):
    """What a run says of one class."""

    name: str
    val_acc: float | None  # of the last epoch, percent
    val_samples: int
    times_trained: int


class Diet(NamedTuple):
    """What a run was trained on."""

    histogram: (
        np.ndarray
    )  # float [most + 1], how many pictures were trained on 0, 1, 2 times and so on
    classes: list[ClassRow]


# what an environment says of one run alone; the rest of it is the machine
OF_A_RUN = ("command", "started_utc", "finished_utc")


@dataclass(frozen=True)
class ResultsFile:
    """What one results file says about its run.

    `settings`: its config as dotted key to text, see `settings_of`; empty where the file holds
    none. `history`: by key, a float array [epochs], NaN for null. `figures`: its row of the table
    of runs.
    """

    path: Path
    settings: dict[str, str]
    history: dict[str, np.ndarray]
    figures: dict[str, Any]
    environment: dict[str, str]
    # how and when it was run, as text by its name; older files do not say
    told: dict[str, str] = field(default_factory=dict)
    diet: Diet | None = None  # likewise
    suspected: str = ""  # how many labels are suspected, in words

    @property
    def finished_utc(self) -> str | None:
        """ISO 8601."""
        return self.told.get("finished_utc")

    @property
    def age(self) -> tuple:
        """Greater for a result that was finished later; see `finished_at`."""
        return finished_at(self.finished_utc, self.name)

    @cached_property
    def key(self) -> tuple:
        """Equal for runs that differ in seed and logging alone.

        Runs on different machines differ too, for their seconds do. A run whose config is not whole
        stands alone.
        """
        if not is_whole(self.settings):
            return (str(self.path),)
        return *sorted(self.settings.items()), self.machine

    @property
    def replicate(self) -> tuple:
        """Equal for two runs of one config and seed. A run without a seed stands alone."""
        seed = self.figures["seed"]
        return self.key, str(self.path) if seed is None else str(seed)

    @property
    def machine(self) -> str:
        """The GPU, and the number of processes where there are several: what seconds and joules
        depend on.
        """
        gpu = self.environment.get("gpu", "null")
        processes = self.environment.get("processes", "1")
        return gpu if processes == "1" else f"{processes} x {gpu}"

    @property
    def name(self) -> str:
        return self.path.stem.removeprefix("final_results_")

    @property
    def dataset(self) -> str | None:
        """What the accuracies were measured on; None where the file does not say."""
        kind = self.settings.get("dataset.type")
        source = {
            "hf": ("name", "subset", "val_fraction"),
            "folder": ("val_dir",),
            "csv": ("name", "val_fraction"),
        }.get(kind or "", ())
        if kind == "folder" and self.settings.get("dataset.val_fraction", "null") != "null":
            source = ("train_dir", "val_fraction")
        parts = [self.settings.get(f"dataset.{key}", "null") for key in source]
        return kind and ":".join([kind, *(part for part in parts if part != "null")])


def finished_at(utc: str | None, name: str) -> tuple[float, int, str]:
    """What the age of a file is compared by: the UTC time in it, else its name, a local time and
    perhaps a number.

    A name that is no time is older than all that are.
    """
    stamp, number = re.fullmatch(
        r"([0-9]{8}_[0-9]{6})?(?:_([0-9]{1,9}))?.*", name, re.DOTALL
    ).groups()
    seconds = float("-inf")
    for text, form in ((utc, None), (stamp, "%Y%m%d_%H%M%S")):
        with contextlib.suppress(ValueError, OverflowError, OSError, TypeError):
            moment = (
                datetime.fromisoformat(text.replace("Z", "+00:00"))
                if form is None and text
                else None
            )
            moment = moment or datetime.strptime(text, form)
            seconds = moment.timestamp()
            break
    return seconds, int(number or 0), name


RENAMED = {"ast.leave_out": "ast.forget_rate"}  # keys of earlier days that only changed their name
# Keys of earlier days that are gone, as text: the values by which every run goes today.
FORMER = {
    "ast.explore_weight_cap": "1",
    "ast.proxy_every": "4",
    "ast.proxy_resolution": "null",
    "ast.score_ahead": "true",
    "dataset.cache_dir": "null",
    "training.amp_dtype": "auto",
    "training.compile_scoring": "null",
    "training.loss_weight": "3",
    "training.max_nonfinite_steps": "0",
}
DEFAULTS = FORMER | {
    key: spell(default)
    for key, (_, default) in config_keys().items()
    if not key.startswith("logging.")
}
DEFAULTS.pop("training.seed")


def shown(path: Path) -> str:
    """A path as one printable line: a name may hold line breaks, and bytes that are no text."""
    return one_line(path, 4096)


def number(value: Any, largest: float = LARGEST) -> float:
    """A figure of a results file, NaN for null, NaN and infinity.

    Raises TypeError where it is no number, ValueError where it is negative or beyond `largest`.
    """
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"a number was expected, not {one_line(repr(value), 40)}")
    if value < 0 or (value > largest and value != math.inf):
        raise ValueError(f"{value:.4g} is out of range")
    return float(value) if math.isfinite(value) else math.nan


def read_history(histories: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The training history, by key a float array [epochs], NaN for what is no finite number in the
    file.

    Raises TypeError for what is no list of numbers, ValueError for a number beyond LARGEST or a
    share or percentage beyond its range.
    """
    found = {}
    numbers = (int, float, type(None))
    for key, values in histories.items():
        wrong = (
            [each for each in values if type(each) not in numbers]
            if isinstance(values, list)
            else [values]
        )
        if wrong:
            raise TypeError(
                f"{one_line(key, 40)}: a list of numbers was expected, not "
                f"{one_line(repr(wrong[0]), 40)}"
            )
        array = np.array(values, dtype=float)
        array[~np.isfinite(array)] = math.nan
        low, high = {"val_acc": (0, 100), "train_acc": (0, 100), "activation_rate": (0, 1)}.get(
            key, (-LARGEST, LARGEST)
        )
        if (array < low).any() or (array > high).any():
            raise ValueError(
                f"{one_line(key, 40)}: a value is out of its range of {low:g} to {high:g}"
            )
        found[key] = array
    return found


def read_run(path: Path) -> ResultsFile:
    """Read one results file.

    Raises ValueError, with the reason, for a file that is none, and OSError where it cannot be
    read.
    """
    if path.exists() and not path.is_file():
        raise ValueError("not a regular file")  # reading a pipe would wait for ever
    non_finite: list[str] = []  # NaN and Infinity: this lab never writes them, but others do
    try:
        result = json.loads(
            path.read_text(encoding="utf-8"),
            parse_constant=lambda name: non_finite.append(name) or float(name),
        )
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not valid JSON: {one_line(error)}") from None
    if not isinstance(result, dict):
        raise ValueError("not a JSON object")
    if missing := [key for key in REQUIRED if key not in result]:
        raise ValueError(f"no {', '.join(missing)}")
    try:
        history = read_history(result["training_history"])
        settings = settings_of(result)
        environment = {
            spell(key): spell(value) for key, value in (result.get("environment") or {}).items()
        }
        told = {key: environment.pop(key) for key in OF_A_RUN if key in environment}
        if is_guessed(environment, settings):
            history.pop("est_energy_kj", None)
        figures = run_figures(result, history, settings) | {"non_finite": len(non_finite)}
        return ResultsFile(
            path,
            settings,
            history,
            figures,
            environment,
            told,
            read_diet(result),
            one_line(result.get("suspected_labels") or "", 200),
        )
    except (
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        OverflowError,
        RecursionError,
    ) as error:
        raise ValueError(f"not a results file of the lab: {one_line(error)}") from None


def is_guessed(environment: Mapping[str, str], settings: Mapping[str, str]) -> bool:
    """Whether the estimate of the energy is of a GPU that is not there: the machine has none, and
    nobody gave its watts.
    """
    watts = "metrics.gpu_tdp_watts"
    given = settings.get(watts, DEFAULTS[watts]) != DEFAULTS[watts]
    return environment.get("gpu") == "null" and not given


def read_diet(result: Mapping[str, Any]) -> Diet | None:
    """What a results file says of the classes and of how often pictures were trained on; None for
    one that does not.

    Raises TypeError or ValueError where that is no list of numbers.
    """
    if result.get("times_trained") is None or result.get("classes") is None:
        return None
    histogram = np.array(
        [number(value) for value in result["times_trained"]["histogram"]], dtype=float
    )
    if not len(histogram) or not np.isfinite(histogram).all():
        raise ValueError("times_trained: no histogram")
    columns = zip(
        *(result["classes"][name] for name in ("name", *ClassRow._fields[1:])), strict=True
    )
    rows = [
        ClassRow(
            one_line(name, 80),
            None if share is None else number(share, 100),
            int(number(n)),
            int(number(times)),
        )
        for name, share, n, times in columns
    ]
    return Diet(histogram, rows)


def is_whole(settings: Mapping[str, str]) -> bool:
    """Whether a config says what the run was trained on, and how: whether it is one of this
    lab's.
    """
    return all(key in settings for key in NAMED)


def settings_of(result: Mapping[str, Any]) -> dict[str, str]:
    """The config of a results file as dotted key to text, without what may differ between runs of
    one setting.

    The name of an imported part is followed by its code. Renamed keys have their new names. A key
    that a whole config lacks has its default, which keeps the meaning of older runs. A key that is
    gone (FORMER) has the value that today's runs have without it. A config that is not whole is
    some other lab's, and stays as it is.
    """
    settings = {}
    for name, part in (result.get("config") or {}).items():
        pairs = (
            {f"{name}.{key}": value for key, value in part.items()}
            if isinstance(part, dict)
            else {name: part}
        )
        settings |= {
            spell(RENAMED.get(key, key)): spell(value)
            for key, value in pairs.items()
            if name not in ("logging", "imports")
        }
    own = result.get("own_parts")
    for key, identity in own.items() if isinstance(own, dict) else ():
        if isinstance(identity, str):  # of another text it is another part
            settings[spell(key)] = f"{settings.get(key, '')} of {spell(identity)}"
    settings.pop("training.seed", None)
    if is_whole(settings):
        settings = DEFAULTS | settings
    if "twin" in result and settings.get("ast.mode") == "dense":
        settings["ast.mode"] = "dense twin"
        settings["training.max_minutes"] = "null"  # each seed's is the time its sparse run took
    return settings


def sparse_epochs(history: Mapping[str, np.ndarray], settings: Mapping[str, str]) -> np.ndarray:
    """Which epochs trained on a selection, bool [epochs].

    Without a whole config, an epoch counts as sparse where not all samples were active.
    """
    active = history.get("activation_rate", np.array([]))
    if not is_whole(settings):
        return active < 1
    span = sparse_span(
        mode="dense" if settings["ast.mode"].startswith("dense") else settings["ast.mode"],
        rule=settings.get("ast.rule", ""),
        epochs=int(settings.get("training.epochs", len(active))),
        warmup_epochs=int(settings.get("ast.warmup_epochs", 0)),
        anneal_epochs=int(settings.get("ast.anneal_epochs", 0)),
    )
    return np.array([epoch in span for epoch in range(len(active))], dtype=bool)


def activation_errors(history: Mapping[str, np.ndarray], settings: Mapping[str, str]) -> np.ndarray:
    """|activation - target| of each epoch [epochs].

    NaN in dense epochs, in the first sparse one, where the controller still settles, and in all
    epochs of a run without a target.
    """
    active = history.get("activation_rate", np.array([]))
    if settings.get("ast.mode") != "ast" or settings.get("ast.rule") == "infobatch":
        return np.full(len(active), np.nan)
    sparse = sparse_epochs(history, settings)
    target = history.get("target", np.full(len(active), np.nan))
    with contextlib.suppress(ValueError):  # else it moves, and the history has it
        target = float(settings.get("ast.target_activation", "nan"))
    return np.where(sparse & (np.cumsum(sparse) > 1), np.abs(active - target), np.nan)


def dense_step_ms(history: Mapping[str, np.ndarray], settings: Mapping[str, str]) -> float:
    """The mean wall time of a step in the middle half of a run's dense epochs, ms: how fast its
    machine was.

    Dense are the epochs outside the selection, and those in which everything was trained on and
    nothing scored. The first epoch warms up: it counts only where no other was dense. The fastest
    and the slowest quarter are left out, for one hiccup is not a slow machine. NaN for a run
    without a dense epoch.
    """
    steps = history.get("step_time_ms", np.array([]))
    nothing = np.full(len(steps), np.nan)
    active, scored, loaded, trained = (
        history.get(key, nothing)
        for key in "activation_rate samples_scored samples_loaded samples_trained".split()
    )
    sparse = sparse_epochs(history, settings)
    epochs = min(map(len, (steps, active, scored, loaded, trained, sparse)))
    idle = (active[:epochs] == 1) & (scored[:epochs] == 0) & (loaded[:epochs] == trained[:epochs])
    times = np.where(~sparse[:epochs] | idle, steps[:epochs], np.nan)
    for some in (times[1:], times[:1]):
        known = np.sort(some[np.isfinite(some)])
        if len(known):
            quarter = round(len(known) / 4)
            return float(known[quarter : len(known) - quarter].mean())
    return float("nan")


def apart(steps: Sequence[float]) -> tuple[float, float] | None:
    """The fastest and the slowest of the dense steps of runs that are compared by time, where they
    are further apart than SAME_STEP; NaN is left out.
    """
    known = [each for each in steps if math.isfinite(each) and each > 0]
    if not known or max(known) <= (1 + SAME_STEP) * min(known):
        return None
    return min(known), max(known)


def largest(values: np.ndarray) -> float:
    """The largest number among them, NaN where there is none."""
    return float(np.nanmax(values)) if np.isfinite(values).any() else float("nan")


def run_figures(
    result: Mapping[str, Any], history: Mapping[str, np.ndarray], settings: Mapping[str, str]
) -> dict[str, Any]:
    """The row of a run in the table of runs; NaN for what its file does not say."""

    def last(key: str) -> float:
        return float(values[-1]) if len(values := history.get(key, [])) else float("nan")

    sparse = sparse_epochs(history, settings)
    config = result.get("config") or {}
    seed = result.get(
        "seed", (config.get("training") or {}).get("seed") if is_whole(settings) else None
    )
    active = history.get("activation_rate", np.array([]))[sparse]
    if (status := result.get("status", "completed")) not in STATUSES:
        raise ValueError(f"status: {one_line(repr(status), 40)} is none of {', '.join(STATUSES)}")
    best_epoch = (
        int(np.nanargmax(accuracies))
        if np.isfinite(accuracies := history.get("val_acc", [])).any()
        else None
    )
    return {
        "seed": seed if isinstance(seed, int | None) else one_line(seed),
        "status": status,
        "error": one_line(result.get("error") or ""),
        "twin": one_line(result.get("twin") or ""),
        "epochs": int(number(result["epochs_completed"], 1e9)),
        "final_accuracy": number(result.get("final_accuracy", last("val_acc")), 100),
        "best_accuracy": number(result["best_accuracy"], 100),
        "best_epoch": None if best_epoch is None else best_epoch + 1,
        "best_in_dense_phase": best_epoch is not None
        and bool(sparse.any())
        and not sparse[best_epoch],
        "activation": float(np.mean(active)) if len(active) else float("nan"),
        "activation_error": largest(activation_errors(history, settings)),
        "train_seconds": number(result.get("train_seconds")),
        "total_seconds": 3600 * number(result["total_time_hours"]),
        "energy_kj": number(result.get("energy_kj")),
        "est_energy_kj": last("est_energy_kj"),
        "dense_step_ms": dense_step_ms(history, settings),
        "tflop": last("total_flops_g" if "total_flops_g" in history else "est_flops_g") / 1000,
    }


def read_folders(folders: Sequence[Path]) -> tuple[list[ResultsFile], dict[str, str]]:
    """The results files of the folders, and by path why one cannot be read.

    Raises RequestError where a folder is missing or there is no file in any of them.
    """
    runs: list[ResultsFile] = []
    unreadable: dict[str, str] = {}
    for folder in dict.fromkeys(folders):
        if not folder.is_dir():
            raise RequestError(f"--results-dir: {folder}: no such folder")
        for path in sorted(folder.glob(RESULTS)):
            try:
                runs.append(read_run(path))
            except (OSError, ValueError) as error:
                unreadable[shown(path)] = one_line(error)
    if not runs and not unreadable:
        raise RequestError(f"--results-dir: {', '.join(map(str, folders))}: no {RESULTS} in it")
    return runs, unreadable


PLACES = {  # what says where the pictures are
    f"dataset.{key}"
    for key in "type train_dir val_dir name subset revision split_train split_val image_key "
    "label_key num_classes".split()
}


def on_same_data(run: ResultsFile, names: Mapping[Path, str]) -> ResultsFile:
    """The run; where its folder has one of these names, its data is known by that name alone."""
    name = names.get(run.path.parent)
    if name is None or not is_whole(run.settings):
        return run
    settings = run.settings | dict.fromkeys(PLACES, "null") | {"dataset.type": name}
    size = settings.get("dataset.image_size", "")
    if settings.get("dataset.augment") == "auto" and size.isdecimal():
        settings["dataset.augment"] = auto_augment(run.settings["dataset.type"], int(size))
    return replace(run, settings=settings)


def load_runs(
    folders: Sequence[Path],
    dataset: str | None = None,
    same_data: Mapping[Path, str] | None = None,
) -> tuple[list[ResultsFile], dict[str, str]]:
    """The runs to compare, and by path why a file was left out.

    Left out are files that cannot be read, runs that failed or were interrupted, runs on another
    dataset than the one asked for, and the older of two runs of one config and seed. same_data: by
    folder, the name of the data that its runs are on, wherever these were. Raises RequestError
    where a folder is missing or nothing is left. Which of the runs are comparable is for
    `lab.study.analysis.study` to say.
    """
    runs, left_out = read_folders(folders)
    runs = [on_same_data(run, same_data or {}) for run in runs]
    candidates = []
    for run in runs:
        status = run.figures["status"]
        if status in ("failed", "interrupted"):
            left_out[shown(run.path)] = ": ".join(filter(None, [status, run.figures["error"]]))
        elif dataset is not None and run.dataset != dataset:
            left_out[shown(run.path)] = (
                f"other dataset: {one_line(run.dataset or 'it does not say which')}"
            )
        else:
            candidates.append(run)
    newest = {run.replicate: run for run in sorted(candidates, key=lambda run: run.age)}
    for run in candidates:
        if (newer := newest[run.replicate]) is not run:
            left_out[shown(run.path)] = f"config and seed of {shown(newer.path)}, which is newer"
    kept = [run for run in candidates if newest[run.replicate] is run]
    if not kept:
        (path, reason) = next(iter(left_out.items()))
        more = len(left_out) - 1
        raise RequestError(
            f"nothing to compare: {path}: {reason}" + (f" (and {more} more files)" if more else "")
        )
    return kept, left_out
