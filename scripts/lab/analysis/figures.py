"""The figures of a study. A setting keeps its colour, line and marker in all of them."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lab.analysis.settings import distinct
from lab.analysis.study import Study, dense_frontiers
from lab.plotting import plain_style
from lab.results import ACTIVATION_BAND

WONG = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Wong 2011, safe for the colour-blind
LINES = {  # line: marker, and on the page the SVG dash array and the marker's character
    "-": ("o", "none", "●"),
    "--": ("s", "6 3", "■"),
    ":": ("^", "1.5 2", "▲"),
    "-.": ("D", "7 2 1.5 2", "◆"),
    (0, (6, 1, 1, 1, 1, 1)): ("v", "7 1.5 1.5 1.5 1.5 1.5", "▼"),
}
STYLES = [{"color": c, "linestyle": line, "marker": marker} for (line, (marker, *_)), c in product(LINES.items(), WONG)]
FRONTIER = {"color": "black", "linewidth": 1.0, "zorder": 1.0}
RC = {
    "font.size": 9,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "text.parse_math": False,  # a dollar sign in a config is a dollar sign
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a key of the history by epoch or by training time, or the final accuracies against a cost.

    `y`: key of the history, None for final accuracy. `x`: key of the history, or the cost's column of the table.
    """

    y: str | None
    ylabel: str
    x: str = "epoch"
    xlabel: str = "epoch"


VAL, FINAL, TIME = "validation accuracy (%)", "final accuracy (%)", "training time (s)"
MEASURED, ESTIMATED = "measured (kJ)", "estimated, time x TDP (kJ)"
FIGURES = {  # file: (title, panels); a panel without data is not drawn
    "accuracy": ("Accuracy by epoch", [Panel("val_acc", VAL)]),
    "accuracy_by_time": ("Accuracy by training time", [Panel("val_acc", VAL, "train_seconds", TIME)]),
    "activation": ("Activation, with its targets", [Panel("activation_rate", "activation rate")]),
    "threshold": ("Threshold", [Panel("threshold", "threshold (nats)")]),
    "energy": ("GPU energy", [Panel("energy_kj", MEASURED), Panel("est_energy_kj", ESTIMATED)]),
    "frontier_time": ("Final accuracy against training time", [Panel(None, FINAL, "train_seconds", TIME)]),
    "frontier_energy": (
        "Final accuracy against GPU energy",
        [Panel(None, FINAL, "energy_kj", MEASURED), Panel(None, FINAL, "est_energy_kj", ESTIMATED)],
    ),
    "samples": (
        "Samples an epoch",
        [Panel(f"samples_{kind}", f"samples {kind}") for kind in ("loaded", "scored", "trained")],
    ),
}


def choose_styles(study: Study) -> dict[str, dict[str, Any]]:
    """Colour, line and marker by setting, for the most accurate ones, as many as can be told apart."""
    return dict(zip(study.table.index, STYLES, strict=False))


def mean_curve(histories: list[dict[str, np.ndarray]], x: str, y: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The mean of the histories' `x` [epochs] and all of their `y` [epochs, runs], over the epochs that all reached.

    None where a run does not hold both, or no epoch has a value.
    """
    pairs = [(each.get(x, np.arange(1, 1e5) if x == "epoch" else []), each.get(y, [])) for each in histories]
    length = min(min(len(xs), len(ys)) for xs, ys in pairs)
    values = np.array([ys[:length] for _, ys in pairs], dtype=float).T
    if not np.isfinite(values).any():
        return None
    return np.mean([xs[:length] for xs, _ in pairs], axis=0), values


def recorded(panel: Panel, study: Study, setting: str) -> bool:
    """Whether a setting has anything to show in a panel."""
    if panel.y is None:
        row = study.table.loc[setting]
        return bool(np.isfinite(row[f"{panel.x}_mean"]) and np.isfinite(row["final_mean"]))
    return mean_curve(study.histories[setting], panel.x, panel.y) is not None


def draw_panel(axes: Axes, panel: Panel, study: Study, styles: Mapping[str, dict]) -> None:
    """Draw the settings that recorded the panel's figures; its label says how many did not."""
    shown = {name: style for name, style in styles.items() if recorded(panel, study, name)}
    if panel.y is None:
        draw_final_accuracies(axes, panel.x, study, shown)
    else:
        draw_curves(axes, panel.x, panel.y, study, shown)
    if panel.y == "activation_rate":
        draw_targets(axes, study, shown)
    missing = f"   ({len(styles) - len(shown)} settings without it)" if len(shown) < len(styles) else ""
    axes.set(xlabel=panel.xlabel + missing, ylabel=panel.ylabel)
    if panel.x == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)
    if not shown:
        axes.text(0.5, 0.5, "no run recorded it", transform=axes.transAxes, ha="center")


def draw_curves(axes: Axes, x: str, y: str, study: Study, styles: Mapping[str, dict]) -> None:
    """For each setting a line, the mean over its seeds, in a band from their minimum to their maximum."""
    for name, style in styles.items():
        xs, ys = mean_curve(study.histories[name], x, y)
        marker = style["marker"] if np.isfinite(ys[:, 0]).sum() < 15 else ""
        axes.plot(xs, ys.mean(axis=1), markersize=3.5, linewidth=1.4, **style | {"marker": marker})
        if ys.shape[1] > 1 and len(styles) <= len(WONG):
            axes.fill_between(xs, ys.min(axis=1), ys.max(axis=1), color=style["color"], alpha=0.15, linewidth=0)


def draw_targets(axes: Axes, study: Study, styles: Mapping[str, dict]) -> None:
    """The targets of the controller, each a line in its band."""
    configs = [study.settings[name] for name in styles if study.settings[name].get("ast.mode") == "ast"]
    texts = {config.get("ast.target_activation", "nan") for config in configs} - {"auto"}
    for target in sorted(target for target in map(float, texts) if 0 <= target <= 1):
        axes.axhspan(target - ACTIVATION_BAND, target + ACTIVATION_BAND, color="0.85", zorder=0)
        axes.axhline(target, color="0.5", lw=0.8, zorder=0.5)
    axes.set_ylim(0, 1.05)


def draw_final_accuracies(axes: Axes, cost: str, study: Study, styles: Mapping[str, dict]) -> None:
    """Final accuracy against a cost, means with standard deviations; the dense frontiers as lines."""
    for frontier in dense_frontiers(study.table, f"{cost}_mean").values():
        axes.plot(*frontier.T, **FRONTIER)
    for name, style in styles.items():
        row = study.table.loc[name]
        spread = {"xerr": row[f"{cost}_sd"], "yerr": row["final_sd"]} if row["n"] > 1 else {}
        look = {"color": style["color"], "marker": style["marker"], "markersize": 6, "elinewidth": 1, "capsize": 2}
        axes.errorbar(row[f"{cost}_mean"], row["final_mean"], **spread, **look)


def draw(study: Study, name: str, legend: bool) -> Figure:
    """One of FIGURES, its panels stacked. `legend`: with a title and a legend; the page has its own."""
    title, panels = FIGURES[name]
    styles = choose_styles(study)
    if len(styles) < len(study.table):
        title += f" (the {len(styles)} most accurate of {len(study.table)} settings)"
    labels = [textwrap.fill(setting, 40) for setting in styles]
    held = [panel for panel in panels if any(recorded(panel, study, name) for name in styles)] or panels[:1]
    with plain_style(RC):
        tall = 0.6 + sum(0.17 + 0.12 * label.count("\n") for label in labels)  # the legend, inches
        size = (8.5, max(1 + 3.4 * len(held), tall)) if legend else (5, 0.3 + 2.9 * len(held))
        figure = Figure(figsize=size, layout="constrained")
        for axes, panel in zip(figure.subplots(len(held), squeeze=False)[:, 0], held, strict=True):
            draw_panel(axes, panel, study, styles)
        if legend:
            figure.suptitle(title)
            handles = [Line2D([], [], markersize=4, label=label, **style)
                       for label, style in zip(labels, styles.values(), strict=True)]  # fmt: skip
            handles += [Line2D([], [], label="dense frontier", **FRONTIER)] if panels[0].y is None else []
            figure.legend(handles=handles, loc="outside right upper", fontsize=7, frameon=False)
    return figure


def draw_groups(studies: Sequence[Study]) -> dict[str, bytes]:
    """Every figure of every group, by path; where there are several groups, each has a folder by its title."""
    if len(studies) == 1:
        return draw_all(studies[0])
    folders = distinct(re.sub(r"[^A-Za-z0-9_=-]+", "_", study.title)[:80].strip("_") for study in studies)
    groups = zip(folders, studies, strict=True)
    return {f"{folder}/{name}": file for folder, study in groups for name, file in draw_all(study).items()}


def draw_all(study: Study) -> dict[str, bytes]:
    """Every figure as PNG and as SVG, by file name."""
    files = {}
    for name in FIGURES:
        figure = draw(study, name, legend=True)
        for kind in ("png", "svg"):
            file = io.BytesIO()
            with plain_style(RC | {"svg.hashsalt": name}):
                figure.savefig(file, format=kind, dpi=150)
            files[f"{name}.{kind}"] = file.getvalue()
    return files


def inline_svg(figure: Figure, name: str) -> Markup:
    """The figure as an SVG element for the page: its text is text, and `name` before its ids makes them unique."""
    file = io.StringIO()
    with plain_style(RC | {"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    return Markup(re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :]))
