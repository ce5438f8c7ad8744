"""The figures of a study. A setting keeps its colour, line and marker in all of them."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from lab.base.errors import RequestError, one_line
from lab.base.plotting import plain_style
from lab.study.analysis.settings import distinct, short_labels
from lab.study.analysis.statistics import interval
from lab.study.analysis.study import Study, dense_frontiers
from lab.study.results import ACTIVATION_BAND

# OTHER: settings without a label
INK = "#1c2127"
GRID = "#e3e6ea"
OTHER = "#aab2bb"
PAPER = "#fefefe"
MODES = {
    "dense": INK,
    "dense twin": "#8a6d3b",
    "random": "#d55e00",
    "ast": "#0072b2",
}  # two of them from Wong 2011
COLOURS = {
    colour: f"--{name.replace(' ', '-')}"
    for name, colour in {  # on the page, which has a dark theme: its names
        "ink": INK,
        "grid": GRID,
        "other": OTHER,
        "paper": PAPER,
        **dict(list(MODES.items())[1:]),
    }.items()
}
LINES = {  # line: marker, and on the page the SVG dash array and the marker's character
    "-": ("o", "none", "●"),
    "--": ("s", "6 3", "■"),
    ":": ("^", "1.5 2", "▲"),
    "-.": ("D", "7 2 1.5 2", "◆"),
    (0, (6, 1, 1, 1, 1, 1)): ("v", "7 1.5 1.5 1.5 1.5 1.5", "▼"),
    (0, (3, 1)): ("X", "4 1.5", "✖"),
}
LABELLED = len(LINES)  # settings; the others are grey
RC = {
    "font.size": 10,
    "font.family": ["DejaVu Sans", "sans-serif"],
    "text.parse_math": False,  # a dollar sign in a config is a dollar sign
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
}


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a key of the history by epoch or by training time, or the final accuracies
    against a cost.

    `y`: key of the history, None for final accuracy. `x`: key of the history, or the cost's column
    of the table.
    """

    y: str | None
    ylabel: str
    x: str = "epoch"
    xlabel: str = "epoch"


VAL = "validation accuracy (%)"
FINAL = "final accuracy (%)"
TIME = "training time (s)"
MEASURED = "measured (kJ)"
ESTIMATED = "estimated, time x TDP (kJ)"
FIGURES = {  # file: (title, panels); a panel without data is not drawn
    "frontier_time": (
        "Final accuracy against training time",
        [Panel(None, FINAL, "train_seconds", TIME)],
    ),
    "frontier_energy": (
        "Final accuracy against GPU energy",
        [Panel(None, FINAL, "energy_kj", MEASURED), Panel(None, FINAL, "est_energy_kj", ESTIMATED)],
    ),
    "accuracy": ("Accuracy by epoch", [Panel("val_acc", VAL)]),
    "accuracy_by_time": (
        "Accuracy by training time",
        [Panel("val_acc", VAL, "train_seconds", TIME)],
    ),
    "activation": ("Activation, with its targets", [Panel("activation_rate", "activation rate")]),
    "threshold": ("Threshold", [Panel("threshold", "threshold (nats)")]),
    "energy": ("GPU energy", [Panel("energy_kj", MEASURED), Panel("est_energy_kj", ESTIMATED)]),
    "samples": (
        "Samples per epoch",
        [Panel(f"samples_{kind}", f"samples {kind}") for kind in ("loaded", "scored", "trained")],
    ),
}


def mode_of(study: Study, setting: str) -> str:
    """A setting's `ast.mode`; "" where its file holds none."""
    return study.settings[setting].get("ast.mode", "") if study.comparable else ""


def choose_styles(study: Study) -> dict[str, dict[str, Any]]:
    """The settings to be labelled, in the table's order, each with its colour, line and marker.

    These are the most accurate one of each mode and the baseline, then the most accurate sparse
    ones, LABELLED in all. The colour says the mode, line and marker the setting.
    """
    names = list(study.table.index)
    modes = {name: mode_of(study, name) for name in study.table.index}
    best = {mode: name for name, mode in reversed(modes.items())}
    rest = sorted(names, key=lambda name: modes[name].startswith("dense"))
    wanted = [
        *filter(
            None, [best.get("ast"), best.get("random"), study.baseline, best.get("dense twin")]
        ),
        *rest,
    ]
    chosen = list(dict.fromkeys(wanted))[:LABELLED]
    styles = {}
    used = dict.fromkeys(modes.values(), 0)
    for name in (name for name in names if name in chosen):
        mode = modes[name]
        line, (marker, *_) = list(LINES.items())[used[mode] % len(LINES)]
        styles[name] = {"color": MODES.get(mode, "#009e73"), "linestyle": line, "marker": marker}
        used[mode] += 1
    return styles


def mean_curve(
    histories: list[dict[str, np.ndarray]], x: str, y: str
) -> tuple[np.ndarray, np.ndarray] | None:
    """The mean of the histories' `x` [epochs] and all of their `y` [epochs, runs], over the epochs
    that all reached.

    None where a run does not hold both, or no epoch has a value.
    """
    pairs = [
        (each.get(x, np.arange(1, 1e5) if x == "epoch" else []), each.get(y, []))
        for each in histories
    ]
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


def is_empty(panel: Panel, study: Study) -> bool:
    """Whether a panel has nothing to say: nobody recorded it, or it is about a selection and nobody
    selected.
    """
    names = [name for name in study.table.index if recorded(panel, study, name)]
    idle = {"activation_rate": 1.0, "samples_scored": 0.0}.get(panel.y or "")
    curves = [
        mean_curve(study.histories[name], panel.x, panel.y)[1] for name in names if idle is not None
    ]
    return not names or (
        idle is not None and all((ys[np.isfinite(ys)] == idle).all() for ys in curves)
    )


def panels_of(study: Study, name: str) -> list[Panel]:
    """The panels of one of FIGURES that have something to show. An estimate is left out where
    everybody measured.
    """
    panels = [panel for panel in FIGURES[name][1] if not is_empty(panel, study)]
    measured = [p for p in panels if MEASURED in (p.ylabel, p.xlabel)]
    if measured and all(recorded(measured[0], study, name) for name in study.table.index):
        return measured
    return panels


def draw_panel(axes: Axes, panel: Panel, study: Study, styles: Mapping[str, dict]) -> None:
    """Draw the settings that recorded the panel's figures, the labelled ones over the others; say
    how many did not.
    """
    shown = [name for name in study.table.index if recorded(panel, study, name)]
    draw_one = draw_final_accuracy if panel.y is None else draw_curve
    if panel.y is None:
        draw_dense_frontiers(axes, panel.x, study)
    for name in shown:
        draw_one(axes, panel, study, name, styles.get(name))
    if panel.y == "activation_rate":
        draw_targets(axes, study, [name for name in shown if name in styles])
    cut = ""
    if panel.y == "val_acc":
        curves = [line.get_ydata() for line in axes.lines]
        lowest = lowest_of_interest(curves)
        axes.set_ylim(bottom=lowest)
        if lowest is not None and np.nanmin(np.concatenate(curves)) < lowest:
            cut = f"\nthe axis begins at {lowest:.0f} %: some epochs lie below it"
    count = len(study.table) - len(shown)
    missing = f"   ({count} setting{'s' * (count > 1)} without it)" if count else ""
    machines = set(study.table["machine"])
    timed = panel.x == "train_seconds" and len(machines) == 1 and "null" not in machines
    where = f", {one_line(machines.pop(), 60)}" if timed else ""
    axes.set(xlabel=panel.xlabel + where + missing + cut, ylabel=panel.ylabel)
    if (panel.y or "").startswith("samples"):
        most = max(1.0, axes.dataLim.y1)
        axes.set_ylim(-0.03 * most, 1.05 * most)  # a line at zero is seen whole
        axes.yaxis.set_major_formatter("{x:,.0f}")
    if panel.x == "epoch":
        axes.xaxis.get_major_locator().set_params(integer=True)


def draw_curve(
    axes: Axes, panel: Panel, study: Study, name: str, style: Mapping[str, Any] | None
) -> None:
    """A line, the mean over a setting's seeds, in a band from their minimum to their maximum;
    without a style, grey.
    """
    xs, ys = mean_curve(study.histories[name], panel.x, panel.y)
    if style is None:
        axes.plot(xs, ys.mean(axis=1), color=OTHER, linewidth=0.8, zorder=1.5)
        return
    every = max(1, round(len(xs) / 10))
    # dense training broad, below the others: where both have the same numbers, both are seen
    dense = style["color"] == MODES["dense"]
    width, order = (3.0, 2.9) if dense else (1.5, 3)
    axes.plot(
        xs, ys.mean(axis=1), markersize=4, markevery=every, linewidth=width, zorder=order, **style
    )
    if ys.shape[1] > 1:
        band = {"color": style["color"], "alpha": 0.15, "linewidth": 0, "zorder": 2}
        axes.fill_between(xs, ys.min(axis=1), ys.max(axis=1), **band)


def lowest_of_interest(curves: Iterable[np.ndarray]) -> float | None:
    """A lower limit that leaves out the first rise and single collapses: below it lie 2 % of the
    later values.
    """
    tails = [curve[len(curve) // 5 :] for curve in map(np.asarray, curves)]
    values = np.concatenate([tail[np.isfinite(tail)] for tail in tails])
    if not len(values):
        return None
    low, high = np.quantile(values, [0.02, 1.0])
    return max(0.0, float(low - 0.1 * (high - low) - 0.2))


def draw_targets(axes: Axes, study: Study, settings: Iterable[str]) -> None:
    """The targets of the controller, each a line in its band."""
    configs = [
        study.settings[name] for name in settings if study.settings[name].get("ast.mode") == "ast"
    ]
    texts = sorted({config.get("ast.target_activation", "nan") for config in configs})
    # a name is no number: that target moves
    for target in (t for t in pd.to_numeric(texts, errors="coerce") if 0 <= t <= 1):
        axes.axhspan(target - ACTIVATION_BAND, target + ACTIVATION_BAND, color=GRID, zorder=0)
        axes.axhline(target, color=OTHER, lw=0.8, zorder=0.5)
    axes.set_ylim(0, 1.05)


def has_line(study: Study, cost: str) -> bool:
    """Whether a machine has dense training of several lengths: a line to compare with."""
    frontiers = dense_frontiers(study.table, study.runs, cost).values()
    return any(len(frontier.points) > 1 for frontier in frontiers)


def draw_dense_frontiers(axes: Axes, cost: str, study: Study) -> None:
    """The dense frontiers as curves, their points labelled with the number of epochs."""
    for frontier in dense_frontiers(study.table, study.runs, cost).values():
        axes.plot(*frontier.curve().T, color=MODES["dense"], linewidth=1.2, zorder=2.5)
        for number, each in enumerate(frontier.points):
            epochs = study.table.loc[each.name, "epochs"]
            text = f"{epochs:g} epochs" if number == 0 else f"{epochs:g}"
            place = {"textcoords": "offset points", "xytext": (7, -3), "va": "top", "fontsize": 8.5}
            axes.annotate(text, each.means, color=MODES["dense"], zorder=4, **place)


def draw_final_accuracy(
    axes: Axes, panel: Panel, study: Study, name: str, style: Mapping[str, Any] | None
) -> None:
    """A setting's mean final accuracy against its mean cost, with their `interval`; hollow where it
    has one seed.
    """
    row = study.table.loc[name]
    runs = study.runs[study.runs["setting"] == name]
    x = row[f"{panel.x}_mean"]
    y = row["final_mean"]
    frontiers = dense_frontiers(study.table, study.runs, panel.x).values()
    points = {each.name for frontier in frontiers for each in frontier.points}
    if name in points and style is None:
        style = {"color": MODES["dense"], "marker": "o"}
    if style is None:
        axes.plot(x, y, "o", color=OTHER, markersize=4, zorder=2)
        return
    lows, highs = zip(
        *(interval(runs[key].to_numpy(float)) for key in (panel.x, "final_accuracy")), strict=True
    )
    errors = [
        [[at - max(0.0, low)], [min(most, high) - at]]
        for at, low, high, most in zip((x, y), lows, highs, (np.inf, 100.0), strict=True)
    ]
    face = style["color"] if row["n"] > 1 else PAPER
    look = {
        "color": style["color"],
        "marker": "o" if row["dense"] else style["marker"],
        "markersize": 6.5,
    }
    bars = {"xerr": errors[0], "yerr": errors[1], "elinewidth": 1.2} if row["n"] > 1 else {}
    axes.errorbar(
        x, y, **bars, **look, markerfacecolor=face, capsize=2.5 if row["n"] > 2 else 0, zorder=3
    )


def legend_entries(
    study: Study, styles: Mapping[str, dict], name: str
) -> list[tuple[str, dict[str, Any]]]:
    """(label, look) of what a figure shows: the labelled settings, the dense frontier, and the grey
    others.
    """
    finals = FIGURES[name][1][0].y is None
    short = dict(zip(study.table.index, short_labels(study.table.index), strict=True))
    entries = [(short[setting], style) for setting, style in styles.items()]
    if finals:
        entries = [
            (label, style | {"linestyle": ""})
            for label, style in entries
            if style["color"] != MODES["dense"]
        ]
        if study.table["dense"].any():
            line = "-" if has_line(study, FIGURES[name][1][0].x) else ""
            look = {"color": MODES["dense"], "marker": "o", "linestyle": line}
            entries.append(("dense training", look))
    if others := len(
        [
            n
            for n in study.table.index
            if n not in styles and not (finals and study.table.loc[n, "dense"])
        ]
    ):
        grey = {"marker": "o", "linestyle": ""} if finals else {"linestyle": "-"}
        entries.append((f"{others} other setting{'s' * (others > 1)}", {"color": OTHER, **grey}))
    return entries


def notes_on_bars(study: Study) -> list[str]:
    """What the error bars of the final accuracies are, by how many seeds there are."""
    seeds = study.table["n"]
    notes = ["bars: 95 % interval"] * bool((seeds > 2).any())
    notes += ["bars without caps: range of 2 seeds"] * bool((seeds == 2).any())
    notes += ["hollow: 1 seed"] * bool((seeds == 1).any())
    void = int((study.table["void"] != "").sum())
    return notes + [f"times of {void} setting{'s' * (void > 1)} void: see the table"] * bool(void)


def legend_handles(study: Study, name: str) -> list[Line2D]:
    """The legend of one of FIGURES."""
    entries = legend_entries(study, choose_styles(study), name)
    handles = [
        Line2D([], [], label=textwrap.fill(label, 30), markersize=5, **look)
        for label, look in entries
    ]
    notes = notes_on_bars(study) if panels_of(study, name)[0].y is None else []
    return handles + [Line2D([], [], label=note, linestyle="") for note in notes]


def draw(study: Study, name: str, legend: bool) -> Figure | None:
    """One of FIGURES, its panels stacked; None where it has none. `legend`: with title and legend,
    as a file.
    """
    panels = panels_of(study, name)
    styles = choose_styles(study)
    if not panels:
        return None
    with plain_style(RC):
        size = (8.4, 0.7 + 3.5 * len(panels)) if legend else (5.4, 0.2 + 3.2 * len(panels))
        figure = Figure(figsize=size, layout="constrained")
        for axes, panel in zip(
            figure.subplots(len(panels), squeeze=False)[:, 0], panels, strict=True
        ):
            draw_panel(axes, panel, study, styles)
        if legend:
            figure.suptitle(f"{FIGURES[name][0]}: {study.title}", fontsize=11, x=0.01, ha="left")
            handles = legend_handles(study, name)
            figure.legend(handles=handles, loc="outside right upper", fontsize=8.5, frameon=False)
    return figure


def saved(figure: Figure, name: str, kind: str) -> bytes:
    """A figure as a file, `png` or `svg`, the same bytes for the same study."""
    file = io.BytesIO()
    with plain_style(RC | {"svg.hashsalt": name}):
        figure.savefig(
            file, format=kind, dpi=150, metadata={"Date": None} if kind == "svg" else None
        )
    return file.getvalue()


def draw_file(study: Study, name: str, kind: str) -> bytes | None:
    """One of FIGURES as `saved`; None where it has no panel."""
    figure = draw(study, name, legend=True)
    return None if figure is None else saved(figure, name, kind)


def draw_frontier(path: Path, studies: Sequence[Study]) -> bytes:
    """The figure `frontier_time`, in the format that the path's ending names; of several groups one
    beside the other.

    Raises RequestError for another ending, and where there is nothing to draw.
    """
    if path.suffix not in (".png", ".svg"):
        raise RequestError(f"--frontier: expected a file that ends in .png or .svg, got {path}")
    name = "frontier_time"
    shown = [study for study in studies if panels_of(study, name)]
    if not shown:
        raise RequestError("--frontier: no run has a final accuracy and its training time")
    figure = draw(shown[0], name, legend=True) if len(shown) == 1 else draw_beside(shown, name)
    return saved(figure, name, path.suffix[1:])


def draw_beside(studies: Sequence[Study], name: str) -> Figure:
    """One of FIGURES of several groups, two in a row, each with its legend below it."""
    rows = -(-len(studies) // 2)
    with plain_style(RC):
        figure = Figure(figsize=(11, 0.4 + 5 * rows), layout="constrained")
        figure.suptitle(FIGURES[name][0], fontsize=11, x=0.01, ha="left")
        grid = figure.subplots(rows, 2, squeeze=False).ravel()
        for axes, study in zip(grid, studies, strict=False):
            draw_panel(axes, panels_of(study, name)[0], study, choose_styles(study))
            axes.set_title(study.title, fontsize=10, loc="left")
            place = {"loc": "upper left", "bbox_to_anchor": (-0.02, -0.14), "ncols": 2}
            axes.legend(handles=legend_handles(study, name), fontsize=8.5, frameon=False, **place)
        for axes in grid[len(studies) :]:
            axes.set_axis_off()
    return figure


def draw_groups(studies: Sequence[Study]) -> dict[str, bytes]:
    """Every figure of every group, by path; where there are several groups, each has a folder by
    its title.
    """
    if len(studies) == 1:
        return draw_all(studies[0])
    folders = distinct(
        re.sub(r"[^A-Za-z0-9_=-]+", "_", study.title)[:80].strip("_") for study in studies
    )
    groups = zip(folders, studies, strict=True)
    return {
        f"{folder}/{name}": file
        for folder, study in groups
        for name, file in draw_all(study).items()
    }


def draw_all(study: Study) -> dict[str, bytes]:
    """Every figure that has something to show, as PNG and as SVG, by file name."""
    drawn = {name: draw(study, name, legend=True) for name in FIGURES}
    shown = {name: figure for name, figure in drawn.items() if figure is not None}
    return {
        f"{name}.{kind}": saved(figure, name, kind)
        for name, figure in shown.items()
        for kind in ("png", "svg")
    }


def inline_svg(figure: Figure, name: str) -> Markup:
    """The figure as an SVG element for the page: its text is text, and `name` before its ids makes
    them unique.

    Its background is the page's, and its colours are the page's custom properties, for the page has
    a dark theme.
    """
    file = io.StringIO()
    with plain_style(RC | {"svg.fonttype": "none", "svg.hashsalt": name}):
        nothing = {"Date": None, "Creator": None, "Format": None, "Type": None}
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = file.getvalue()
    svg = re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :])
    return Markup(re.sub("|".join(COLOURS), lambda found: f"var({COLOURS[found[0]]})", svg))
