"""What a sparse run was trained on: how often each picture and each class, as the page shows it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from lab.base.plotting import plain_style
from lab.study.analysis.figures import MODES, PAPER, RC
from lab.study.analysis.sheets import MOST_SETTINGS, sheet
from lab.study.analysis.study import Study
from lab.study.results import ResultsFile

MOST_CLASSES = 20  # of a table, those with the lowest accuracy
SHEETS = {
    "most_trained": "The 24 most often trained on",
    "least_trained": "The 24 least often trained on",
}


def draw_histogram(histogram: np.ndarray, mode: str) -> Figure:
    """How many pictures were trained on 0, 1, 2 times and so on."""
    with plain_style(RC | {"axes.grid.axis": "y"}):
        figure = Figure(figsize=(5, 2.6), layout="constrained")
        axes = figure.subplots()
        axes.bar(
            np.arange(len(histogram)),
            histogram,
            width=1.0,
            color=MODES.get(mode, MODES["ast"]),
            edgecolor=PAPER,
            linewidth=0.3,
        )
        axes.set(xlabel="times trained on", ylabel="pictures")
        axes.xaxis.get_major_locator().set_params(integer=True)
    return figure


def class_table(run: ResultsFile) -> pd.DataFrame:
    """A row a class, text throughout, the lowest accuracies first."""
    rows = sorted(run.diet.classes, key=lambda row: -1.0 if row.val_acc is None else row.val_acc)[
        :MOST_CLASSES
    ]
    return pd.DataFrame(
        {
            "class": [row.name for row in rows],
            "accuracy %": ["-" if row.val_acc is None else f"{row.val_acc:.2f}" for row in rows],
            "validated": [f"{row.val_samples:,}" for row in rows],
            "times trained on": [f"{row.times_trained:,}" for row in rows],
        }
    )


def summary(histogram: np.ndarray) -> str:
    """The histogram in a line: how many pictures, the mean, and how many were never or most often
    trained on.
    """
    pictures = int(histogram.sum())
    times = np.arange(len(histogram))
    mean = float((histogram * times).sum() / max(1, pictures))
    never = 100 * float(histogram[0]) / max(1, pictures)
    return (
        f"{pictures:,} pictures, trained on {mean:.1f} times on average; {never:.1f} % "
        f"never; at most {times[-1]}"
    )


def diets(study: Study) -> list[tuple[str, dict[str, Any]]]:
    """(setting, what the page shows of its newest run), of the most accurate settings that chose
    their samples.
    """
    rows = [
        (name, study.newest[name])
        for name in study.table.index
        if not study.table.loc[name, "dense"]
    ]
    return [(name, shown(run)) for name, run in rows if run.diet is not None][:MOST_SETTINGS]


def shown(run: ResultsFile) -> dict[str, Any]:
    return {
        "file": run.path.name,
        "summary": summary(run.diet.histogram),
        "figure": draw_histogram(run.diet.histogram, run.settings.get("ast.mode", "")),
        "classes": class_table(run),
        "count": len(run.diet.classes),
        "sheets": [(title, sheet(run, name)) for name, title in SHEETS.items()],
    }
