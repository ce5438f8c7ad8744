"""The page: a study as one self-contained HTML file.

It loads nothing from the network, and can be read without its script. jinja2 escapes whatever comes
out of a config or an error message.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from lab.study.analysis.diet import diets
from lab.study.analysis.figures import (
    COLOURS,
    FIGURES,
    LINES,
    choose_styles,
    draw,
    has_line,
    inline_svg,
    legend_entries,
    mode_of,
    notes_on_bars,
)
from lab.study.analysis.study import Study
from lab.study.analysis.suspects import suspects
from lab.study.analysis.tables import frontier_lines, several, text_table, verdict_sentences
from lab.study.results import ACTIVATION_BAND


def differences(study: Study, setting: str) -> list[str]:
    """Where a setting's config differs from the baseline's, a line a key."""
    own = study.settings[setting]
    base = study.settings.get(study.baseline or "", {})
    if not own or not base:
        return ["it holds no config" if not own else "no baseline"]
    keys = dict.fromkeys([*base, *own])
    return [
        f"{key}: {base.get(key, 'unset')} → {own.get(key, 'unset')}"
        for key in keys
        if own.get(key) != base.get(key)
    ]


def runs_table(study: Study) -> pd.DataFrame:
    """A row a run, text throughout."""
    specs = {
        "final_accuracy": ".2f",
        "best_accuracy": ".2f",
        "train_seconds": ".1f",
        "activation_error": ".3f",
    }
    texts = {
        key: ["-" if pd.isna(v) else format(v, spec) for v in study.runs[key]]
        for key, spec in specs.items()
    }
    return pd.DataFrame(
        {
            "setting": study.runs["setting"],
            "seed": study.runs["seed"],
            "status": study.runs["status"],
            "final %": texts["final_accuracy"],
            "best %": texts["best_accuracy"],
            "in epoch": [
                "-" if pd.isna(epoch) else f"{epoch:.0f}" for epoch in study.runs["best_epoch"]
            ],
            "train s": texts["train_seconds"],
            "off target": texts["activation_error"],
            "finished, UTC": ["-" if pd.isna(time) else time for time in study.runs["finished"]],
            "file": study.runs["file"],
        }
    )


def environments(study: Study) -> list[tuple[int, dict[str, str]]]:
    """(how many runs, what their machine and packages were)."""
    found = []
    for each, count in study.environments.items():
        known = {key: value for key, value in each if value != "null"}
        commit, *changed = known.get("git_commit", "").rsplit("-dirty", 1)
        if changed:
            known["git_commit"] = f"{commit}, with changes that were not committed"
        if known:
            found.append((count, known))
    return found


MAIN = "setting|n|final %|± 95 %|difference|at equal time|time to match|train s|kJ".split(
    "|"
)  # of a first table
WORDS = {
    "ast": "adaptive selection",
    "random": "random selection",
    "dense": "dense training",
    "dense twin": "dense twins",
}


def heading(study: Study) -> str:
    """What was compared, on which data with which model."""
    modes = {mode_of(study, setting) for setting in study.table.index}
    words = [word for mode, word in WORDS.items() if mode in modes]
    if not words or len(study.table) == 1:
        return study.title
    sparse = [word for word in words if word.endswith("selection")]
    dense = " and ".join(word for word in words if word not in sparse)
    text = " against ".join(filter(None, [" and ".join(sparse), dense]))
    return f"{text[0].upper()}{text[1:]}: {study.title}"


def split_table(table: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The columns that a first look needs, and the others, both with the settings."""
    main = [name for name in table.columns if name in MAIN]
    if "kJ" not in main and "kJ (estimate)" in table.columns:
        main.append("kJ (estimate)")
    return table[main], table[["setting", *(name for name in table.columns if name not in main)]]


def key_of(look: dict[str, Any]) -> dict[str, str]:
    """How the page draws the key of a colour, line and marker."""
    colour = COLOURS.get(look["color"])
    glyphs = {marker: glyph for marker, _, glyph in LINES.values()}
    line = look.get("linestyle", "")
    return {
        "color": look["color"] if colour is None else f"var({colour})",
        "dash": LINES[line][1] if line else "0 99",
        "glyph": glyphs.get(look.get("marker", ""), ""),
    }


def figures_of(study: Study, tail: str) -> list[dict[str, Any]]:
    """The figures that have something to show, each with its title, its SVG and its legend."""
    styles = choose_styles(study)
    found = []
    for name, (title, panels) in FIGURES.items():
        # a point alone has nothing to stand against
        alone = panels[0].y is None and len(study.table) == 1
        figure = None if alone else draw(study, name, legend=False)
        if figure is not None:
            entries = [(label, key_of(look)) for label, look in legend_entries(study, styles, name)]
            legend = entries if name in ("frontier_time", "accuracy") else []
            found.append(
                {
                    "name": name,
                    "title": title,
                    "svg": inline_svg(figure, name + tail),
                    "legend": legend,
                }
            )
    return found


def section(study: Study, number: int) -> dict[str, Any]:
    """What the page shows of a group. `number`: from 1; it keeps the ids of several groups
    apart.
    """
    tail = "" if number == 1 else f"-{number}"
    table, details = split_table(text_table(study))
    figures = figures_of(study, tail)
    return {
        "study": study,
        "heading": heading(study),
        "tail": tail,
        "table": table,
        "details": details,
        "runs": runs_table(study),
        "verdict": verdict_sentences(study),
        "frontiers": frontier_lines(study),
        "styles": {setting: key_of(style) for setting, style in choose_styles(study).items()},
        "frontier": next((each for each in figures if each["name"] == "frontier_time"), None),
        "figures": [each for each in figures if each["name"] != "frontier_time"],
        "bars": "; ".join(notes_on_bars(study)),
        "has_line": has_line(study, "train_seconds"),
        "diets": [
            (setting, shown | {"figure": inline_svg(shown["figure"], f"diet-{i}{tail}")})
            for i, (setting, shown) in enumerate(diets(study))
        ],
        "suspects": suspects(study),
        "differences": {setting: differences(study, setting) for setting in study.table.index},
        "base": study.settings.get(study.baseline or next(iter(study.table.index)), {}),
        "commands": {
            setting: run.told["command"]
            for setting, run in study.newest.items()
            if "command" in run.told
        },
        "environments": environments(study),
    }


def render(studies: Sequence[Study]) -> str:
    """The page, a section a group, with the tables and the verdicts as the terminal shows them."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html").render(
        groups=[section(study, number) for number, study in enumerate(studies, 1)],
        several=several(studies),
        left_out=studies[0].left_out,
        band=ACTIVATION_BAND,
    )
