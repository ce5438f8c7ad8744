"""The page: a study as one self-contained HTML file.

It loads nothing from the network, and can be read without its script. jinja2 escapes whatever comes out of a config
or an error message.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from lab.analysis.diet import diets
from lab.analysis.figures import FIGURES, LINES, choose_styles, draw, inline_svg
from lab.analysis.study import Study
from lab.analysis.suspects import suspects
from lab.analysis.tables import frontier_lines, several, text_table, verdict
from lab.results import ACTIVATION_BAND


def differences(study: Study, setting: str) -> list[str]:
    """Where a setting's config differs from the baseline's, a line a key."""
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


def legend_keys(study: Study) -> dict[str, dict[str, str]]:
    """By setting, how the page draws the key of its colour, line and marker."""
    keys = {}
    for setting, style in choose_styles(study).items():
        _, dash, glyph = LINES[style["linestyle"]]
        keys[setting] = {"color": style["color"], "dash": dash, "glyph": glyph}
    return keys


def section(study: Study, number: int) -> dict[str, Any]:
    """What the page shows of a group. `number`: from 1; it keeps the ids of several groups apart."""
    tail = "" if number == 1 else f"-{number}"
    return {
        "study": study,
        "tail": tail,
        "table": text_table(study),
        "runs": runs_table(study),
        "verdict": verdict(study),
        "frontiers": frontier_lines(study),
        "styles": legend_keys(study),
        "figures": [
            (title, inline_svg(draw(study, name, legend=False), name + tail)) for name, (title, _) in FIGURES.items()
        ],
        "diets": [
            (setting, shown | {"figure": inline_svg(shown["figure"], f"diet-{i}{tail}")})
            for i, (setting, shown) in enumerate(diets(study))
        ],
        "suspects": suspects(study),
        "differences": {setting: differences(study, setting) for setting in study.table.index},
        "environments": [(count, dict(each)) for each, count in study.environments.items() if each],
    }


def render(studies: Sequence[Study]) -> str:
    """The page, a section a group, with the tables and the verdicts as the terminal shows them."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(
        groups=[section(study, number) for number, study in enumerate(studies, 1)],
        settings=sum(len(study.table) for study in studies),
        count=sum(len(study.runs) for study in studies),
        several=several(studies),
        left_out=studies[0].left_out,
        band=ACTIVATION_BAND,
    )
