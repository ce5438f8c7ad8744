"""The figures and the HTML page of analyze_results.py, drawn from its Study.

Every setting keeps its colour, line and marker in all figures. The page needs no network, and no script to be read;
jinja2 escapes whatever comes out of a config or an error message.
"""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product
from typing import Any

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from analyze_results import ACTIVATION_BAND, Study, dense_frontiers

WONG = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Wong 2011, safe for the colour-blind
DASHES = {  # line: its SVG dash array and its marker
    "-": ("none", "o"),
    "--": ("6 3", "s"),
    ":": ("1.5 2", "^"),
    "-.": ("7 2 1.5 2", "D"),
    (0, (6, 1, 1, 1, 1, 1)): ("7 1.5 1.5 1.5 1.5 1.5", "v"),
}
STYLES = [{"color": c, "linestyle": line, "marker": marker} for (line, (_, marker)), c in product(DASHES.items(), WONG)]
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

# ---------------------------------------------------------------------------------------------- Figures


@dataclass(frozen=True)
class Panel:
    """One pair of axes: a key of the history by epoch or by training time, or the end of each setting against a cost.

    `y`: key of the history, None for final accuracy. `x`: key of the history, or the cost's column of the table.
    """

    y: str | None
    ylabel: str
    x: str = "epoch"
    xlabel: str = "epoch"


VAL = "validation accuracy (%)"
MEASURED, ESTIMATED = "measured (kJ)", "estimated, time x TDP (kJ)"
FIGURES = {  # file: (title, panels); a panel without data is not drawn
    "accuracy": ("Accuracy by epoch", [Panel("val_acc", VAL)]),
    "accuracy_by_time": ("Accuracy by training time", [Panel("val_acc", VAL, "train_seconds", "training time (s)")]),
    "activation": ("Activation, with its targets", [Panel("activation_rate", "activation rate")]),
    "threshold": ("Threshold", [Panel("threshold", "threshold (nats)")]),
    "energy": ("GPU energy", [Panel("energy_kj", MEASURED), Panel("est_energy_kj", ESTIMATED)]),
    "frontier_time": (
        "Final accuracy against training time",
        [Panel(None, "final accuracy (%)", "train_seconds", "training time (s)")],
    ),
    "frontier_energy": (
        "Final accuracy against GPU energy",
        [
            Panel(None, "final accuracy (%)", "energy_kj", MEASURED),
            Panel(None, "final accuracy (%)", "est_energy_kj", ESTIMATED),
        ],
    ),
    "samples": (
        "Samples an epoch",
        [Panel(f"samples_{kind}", f"samples {kind}") for kind in ("loaded", "scored", "trained")],
    ),
}


def choose_styles(study: Study) -> dict[str, dict[str, Any]]:
    """Colour, line and marker of the settings, the most accurate first; of those no figure can tell apart, none."""
    return dict(zip(study.table.index, STYLES, strict=False))


def mean_curve(histories: list[dict[str, np.ndarray]], x: str, y: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The histories' `y` against the mean of their `x`: ([epochs], [epochs, runs]), as far as all runs reach.

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
    """Draw the settings into a panel, which says how many of them did not record it."""
    shown = {name: style for name, style in styles.items() if recorded(panel, study, name)}
    if panel.y is None:
        draw_ends(axes, panel.x, study, shown)
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
    """A line a setting, the mean over its seeds, in a band from the least to the greatest of them."""
    for name, style in styles.items():
        xs, ys = mean_curve(study.histories[name], x, y)
        marker = style["marker"] if np.isfinite(ys[:, 0]).sum() < 15 else ""
        axes.plot(xs, ys.mean(axis=1), markersize=3.5, linewidth=1.4, **style | {"marker": marker})
        if ys.shape[1] > 1 and len(styles) <= len(WONG):
            axes.fill_between(xs, ys.min(axis=1), ys.max(axis=1), color=style["color"], alpha=0.15, linewidth=0)


def draw_targets(axes: Axes, study: Study, styles: Mapping[str, dict]) -> None:
    """The targets of the controller, each a line in its band."""
    configs = [study.settings[name] for name in styles if study.settings[name].get("ast.mode") == "ast"]
    for target in sorted({float(config["ast.target_activation"]) for config in configs}):
        axes.axhspan(target - ACTIVATION_BAND, target + ACTIVATION_BAND, color="0.85", zorder=0)
        axes.axhline(target, color="0.5", lw=0.8, zorder=0.5)
    axes.set_ylim(0, 1.05)


def draw_ends(axes: Axes, cost: str, study: Study, styles: Mapping[str, dict]) -> None:
    """Final accuracy against a cost, means with standard deviations; the dense frontiers as lines."""
    for frontier in dense_frontiers(study.table, f"{cost}_mean").values():
        axes.plot(*frontier.T, **FRONTIER)
    for name, style in styles.items():
        row = study.table.loc[name]
        spread = {"xerr": row[f"{cost}_sd"], "yerr": row["final_sd"]} if row["n"] > 1 else {}
        look = {"color": style["color"], "marker": style["marker"], "markersize": 6, "elinewidth": 1, "capsize": 2}
        axes.errorbar(row[f"{cost}_mean"], row["final_mean"], **spread, **look)


def draw(study: Study, name: str, legend: bool) -> Figure:
    """One figure of FIGURES, its panels stacked; with a legend beside them, or without one for the page."""
    title, panels = FIGURES[name]
    styles = choose_styles(study)
    if len(styles) < len(study.table):
        title += f" (the {len(styles)} most accurate of {len(study.table)} settings)"
    labels = [textwrap.fill(setting, 40) for setting in styles]
    held = [panel for panel in panels if any(recorded(panel, study, name) for name in styles)] or panels[:1]
    with matplotlib.rc_context(RC):
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


def draw_all(study: Study) -> dict[str, bytes]:
    """Every figure as PNG and as SVG, by file name."""
    files = {}
    for name in FIGURES:
        figure = draw(study, name, legend=True)
        for kind in ("png", "svg"):
            file = io.BytesIO()
            with matplotlib.rc_context(RC | {"svg.hashsalt": name}):
                figure.savefig(file, format=kind, dpi=150)
            files[f"{name}.{kind}"] = file.getvalue()
    return files


# ------------------------------------------------------------------------------------------------- Page


def inline_svg(figure: Figure, name: str) -> Markup:
    """The figure as an SVG element with text as text, its ids made unique on the page."""
    file = io.StringIO()
    with matplotlib.rc_context(RC | {"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = file.getvalue()
    return Markup(re.sub(r'( id="|url\(#|href="#)', rf"\g<1>{name}-", svg[svg.index("<svg") :]))


def differences(study: Study, setting: str) -> list[str]:
    """What a setting's config has otherwise than the baseline's."""
    own, base = study.settings[setting], study.settings.get(study.baseline or "", {})
    if not own or not base:
        return ["it holds no config" if not own else "no baseline"]
    keys = dict.fromkeys([*base, *own])
    return [
        f"{key}: {base.get(key, 'unset')} → {own.get(key, 'unset')}" for key in keys if own.get(key) != base.get(key)
    ]


def runs_table(study: Study) -> pd.DataFrame:
    """A row a run, text throughout."""
    specs = {"final_accuracy": ".2f", "best_accuracy": ".2f", "train_seconds": ".1f", "activation_error": ".3f"}
    texts = {key: ["-" if pd.isna(v) else format(v, spec) for v in study.runs[key]] for key, spec in specs.items()}
    return pd.DataFrame({
        "setting": study.runs["setting"],
        "seed": study.runs["seed"],
        "status": study.runs["status"],
        "final %": texts["final_accuracy"],
        "best %": texts["best_accuracy"],
        "in epoch": ["-" if pd.isna(epoch) else f"{epoch:.0f}" for epoch in study.runs["best_epoch"]],
        "train s": texts["train_seconds"],
        "off target": texts["activation_error"],
        "file": study.runs["file"],
    })  # fmt: skip


def render(study: Study, table: pd.DataFrame, verdict: str, frontiers: list[str]) -> str:
    """The page. `table`: the settings as analyze_results shows them, text throughout, taken over as they are."""
    dashes = {line: dash for line, (dash, _) in DASHES.items()}
    glyphs = dict(zip("os^Dv", "●■▲◆▼", strict=True))
    styles = {
        setting: {"color": each["color"], "dash": dashes[each["linestyle"]], "glyph": glyphs[each["marker"]]}
        for setting, each in choose_styles(study).items()
    }
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(PAGE).render(
        study=study,
        table=table,
        runs=runs_table(study),
        verdict=verdict,
        frontiers=frontiers,
        styles=styles,
        figures=[(title, inline_svg(draw(study, name, legend=False), name)) for name, (title, _) in FIGURES.items()],
        differences={setting: differences(study, setting) for setting in study.table.index},
        band=ACTIVATION_BAND,
        environments=[(count, dict(each)) for each, count in study.environments.items() if each],
    )


PAGE = """\
<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>AST-LAB: {{ study.table | length }} settings, {{ study.runs | length }} runs</title>
<style>
:root { color-scheme: light; --line: #d5d9de; --soft: #f5f6f8; --ink: #1c2127; --dim: #5b6570; --link: #0072b2 }
* { box-sizing: border-box }
body { margin: 0; color: var(--ink); background: #fff; font: 16px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
main { max-width: 92rem; margin: 0 auto; padding: 1rem; overflow-wrap: anywhere }
h1 { font-size: 1.35rem; margin: .5rem 0 } h2 { font-size: 1.1rem; margin: 2.25rem 0 .5rem }
p, li { max-width: 52rem } ul { padding-left: 1.2rem; margin: .5rem 0 }
.verdict { font-size: 1.1rem; background: var(--soft); border-left: 4px solid var(--link); padding: .75rem 1rem }
.dim { color: var(--dim); font-size: .875rem }
.wide { overflow-x: auto; border: 1px solid var(--line); border-radius: 6px }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; width: 100% }
th, td { padding: .35rem .5rem; text-align: right; white-space: nowrap; overflow-wrap: normal }
thead th { background: var(--soft); border-bottom: 1px solid var(--line) }
tbody tr + tr > * { border-top: 1px solid var(--line) }
th:first-child, .text { text-align: left } tbody th { font-weight: 500 }
tr.baseline { background: #fff8e6 }
td.text, tbody th { white-space: normal; overflow-wrap: break-word; min-width: 12.5rem; max-width: 26rem }
th button { all: unset; cursor: pointer } th button:hover, th button:focus-visible { text-decoration: underline }
th[aria-sort=ascending] button::after { content: " ▲" } th[aria-sort=descending] button::after { content: " ▼" }
.figures { columns: 26rem; column-gap: 2rem }
figure { margin: 0 0 1rem; break-inside: avoid } figcaption { font-weight: 600; font-size: .95rem }
figure svg { width: 100%; height: auto; display: block }
.legend { list-style: none; padding: 0; display: flex; flex-wrap: wrap; gap: .15rem 1.25rem; font-size: .875rem }
.key { width: 34px; height: 12px; vertical-align: -1px; margin-right: .35rem }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 0 1rem; margin: .5rem 0; font-size: .875rem }
dt { color: var(--dim) } dd { margin: 0; min-width: 0 }
</style>
</head>
<body>
<main>
{% macro key(setting) %}
{% if setting in styles %}
<svg class="key" viewBox="0 0 34 12" aria-hidden="true"><line x1="0" x2="34" y1="6" y2="6" stroke-width="2" \
stroke="{{ styles[setting].color }}" stroke-dasharray="{{ styles[setting].dash }}"/><text x="17" y="10" font-size="11" \
text-anchor="middle" fill="{{ styles[setting].color }}">{{ styles[setting].glyph }}</text></svg>
{% endif %}
{% endmacro %}
{% macro grid(frame, id, texts) %}
<div class="wide"><table id="{{ id }}" class="sortable">
<thead><tr>{% for name in frame.columns %}<th scope="col"\
{% if name in texts %} class="text"{% endif %}>{{ name }}</th>{% endfor %}</tr></thead>
<tbody>
{% for row in frame.to_numpy().tolist() %}
<tr{% if row[0] == study.baseline %} class="baseline"{% endif %}>
<th scope="row">{{ key(row[0]) }}{{ row[0] }}</th>
{% for cell in row[1:] %}<td{% if frame.columns[loop.index] in texts %} class="text"{% endif %}>{{ cell }}</td>\
{% endfor %}
</tr>
{% endfor %}
</tbody></table></div>
{% endmacro %}
<h1>{{ study.table | length }} settings, {{ study.runs | length }} runs</h1>
<p class="verdict">{{ verdict }}</p>
<h2>Settings</h2>
{{ grid(table, "settings", []) }}
<p class="dim">Runs that differ in seed alone are one setting. Accuracies in percent: the last epoch's, and the best.
sd: over seeds. ± 95 %: half the confidence interval of the mean, Student's t.
{% if study.baseline %}difference: final accuracy in points, against <b>{{ study.baseline }}</b> (marked). {% endif %}
time to match: training seconds over what the dense frontier needs for the same accuracy, below 1 saves time; &lt; and
&gt; are bounds, where the accuracy lies beyond the frontier. est kJ: time x TDP; kJ: measured. off target: the largest
distance of an epoch's activation from its target, after the first sparse epoch.</p>
{% for line in frontiers %}<p class="dim">{{ line }}</p>{% endfor %}
{% if study.warnings %}
<h2>Warnings</h2>
<ul id="warnings">{% for text in study.warnings %}<li>{{ text }}</li>{% endfor %}</ul>
{% endif %}
<h2>Figures</h2>
<ul class="legend">{% for setting in styles %}<li>{{ key(setting) }}{{ setting }}</li>{% endfor %}
<li><svg class="key" viewBox="0 0 34 12" aria-hidden="true"><line x1="0" x2="34" y1="6" y2="6" stroke="#000"/></svg>\
dense frontier</li></ul>
{% if styles | length < study.table | length %}
<p class="dim">Drawn are the {{ styles | length }} most accurate of {{ study.table | length }} settings.</p>
{% endif %}
<p class="dim">Lines are means over seeds, bands reach from the least to the greatest, bars are standard deviations; the
grey bands of the activation are its targets ± {{ band }}.</p>
<div class="figures">
{% for title, svg in figures %}
<figure><figcaption>{{ title }}</figcaption>{{ svg }}</figure>
{% endfor %}
</div>
<h2>What each setting changes</h2>
<div class="wide"><table id="differences">
<thead><tr><th scope="col">setting</th><th scope="col" class="text">against \
{{ study.baseline or "no baseline" }}</th></tr></thead>
<tbody>
{% for setting, lines in differences.items() %}
<tr><th scope="row">{{ key(setting) }}{{ setting }}</th><td class="text">\
{% for line in lines %}{{ line }}{% if not loop.last %}<br>{% endif %}{% else %}the baseline{% endfor %}</td></tr>
{% endfor %}
</tbody></table></div>
<h2>Runs</h2>
{{ grid(runs, "runs", ["status", "file"]) }}
{% if study.left_out %}
<h2>Left out</h2>
<ul id="left-out">{% for path, reason in study.left_out.items() %}<li>{{ path }}: {{ reason }}</li>{% endfor %}</ul>
{% endif %}
<h2>Environment</h2>
{% for count, each in environments %}
<p class="dim">{{ count }} runs</p>
<dl>{% for name, value in each.items() %}<dt>{{ name }}</dt><dd>{{ value }}</dd>{% endfor %}</dl>
{% else %}
<p class="dim">The files do not say.</p>
{% endfor %}
</main>
<script>
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  const value = (row, column) => row.cells[column].textContent.trim();
  const number = text => parseFloat(text.replace(/[<>+\\s]/g, ""));
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const down = head.getAttribute("aria-sort") !== "descending";
      const rows = [...body.rows], numeric = column && rows.some(row => !isNaN(number(value(row, column))));
      rows.sort((a, b) => {
        const [left, right] = [a, b].map(row => value(row, column));
        if (!numeric) return left.localeCompare(right);
        return (isNaN(number(left)) ? -Infinity : number(left)) - (isNaN(number(right)) ? -Infinity : number(right));
      });
      heads.forEach(other => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      body.append(...(down ? rows.reverse() : rows));
    };
  });
}
</script>
</body>
</html>
"""
